"""
What reproduce.py trains: the rows of every table, and the runs that its pictures show.

The first row of a table is what the others are compared with. `published` is the paper's figure,
at the paper's scale; 3.50 of SM+ScFFN is of the authors' longer paper (AERO). Every configuration
is trained at the learning rate that the table "tuning" chose for it, unless a row says otherwise.
"""
SEEDS = (1337, 1338, 1339)
TUNING_SEED = 1  # no table but "tuning" and "quick" reports it
PAPER_RATE = 1e-3  # the paper's learning rate
PAPER_SHAPE = dict(n_layer=12, n_head=12, n_embd=768)
SHORT = {"max_iters": 700, "eval_interval": 175}  # of the runs that choose a learning rate
NO_LN_F = {"final_layernorm": False}

LN_G, LN_R, LN, SM, SM_G, SM_R = "sm_ln_g", "sm_ln_r", "sm_ln", "sm", "sm_g", "sm_r"
SCF, SC, T, TH = "sm_scffn", "sm_scfuffn", "sm_t_scfuffn", "sm_th_scfuffn"
EREG = "ereg_sm_t_scfuffn"
NAMES = {LN_G: "SM+LN+G", LN_R: "SM+LN+R", LN: "SM+LN", SM_G: "SM+G", SM_R: "SM+R", SM: "SM",
         SCF: "SM+ScFFN", SC: "SM+ScFuFFN", T: "SM(t)+ScFuFFN", TH: "SM(th)+ScFuFFN",
         EREG: "EReg(SM(t)+ScFuFFN)"}
PUBLISHED = {LN_G: "2.69", LN_R: "2.76", LN: "3.38", SM_G: "3.20", SM_R: "2.94", SM: "NaN",
             SCF: "3.50 (AERO)", SC: "3.48", EREG: "3.21"}
TOP_QUARTER = {LN_G: "about 10%", SM_G: "58%", SM_R: "23%", SM: "45%"}  # of its heads, Figure 2a

TUNED = {LN_G: 3e-3, LN_R: 3e-3, LN: 3e-3, SM_G: 1e-3, SM_R: 2e-3, SM: 1e-3, SCF: 2e-3, SC: 2e-3,
         T: 1e-3, TH: 1e-3, EREG: 4e-3}
TUNED_NO_LN_F = {LN_G: 6e-3, LN_R: 9e-3, LN: 6e-3, SM_G: 6e-3, SM_R: 9e-3, SM: 9e-3, SCF: 6e-3,
                 SC: 9e-3, T: 6e-3, EREG: 9e-3}
TUNED_DEEP = {LN_G: 3e-3, SM_G: 1e-3, SM_R: 2e-3, SC: 1e-3, EREG: 2e-3}  # at 12 layers
TRIED = {LN_G: (1e-3, 3e-3, 6e-3), LN_R: (1e-3, 3e-3, 6e-3), LN: (1e-3, 3e-3, 6e-3),
         SM_G: (5e-4, 1e-3, 2e-3, 3e-3), SM_R: (1e-3, 2e-3, 3e-3), SM: (5e-4, 1e-3, 2e-3, 3e-3),
         SCF: (1e-3, 2e-3), SC: (1e-3, 2e-3, 3e-3), T: (5e-4, 1e-3, 2e-3, 3e-3),
         EREG: (1e-3, 2e-3, 3e-3, 4e-3, 6e-3, 9e-3)}
# What whole runs, whose warmup is longer than the short ones', may bear as well:
HIGHER = {LN_G: 6e-3, LN_R: 6e-3, SM_G: 2e-3, SM_R: 4e-3, SM: 2e-3, SCF: 4e-3, SC: 4e-3, T: 4e-3}
SIGMA = {"sigma_reparam": "qkvo+ffn"}
TUNED_SIGMA = 9e-3
TRIED_SIGMA = (2e-3, 3e-3, 6e-3, 9e-3, 12e-3)
TRIED_VARIANCE = ((4e-3, 1e-3), (4e-3, 1e-2), (4e-3, 0.1), (4e-3, 1.0),
                  (2e-3, 1e-2), (2e-3, 0.1), (2e-3, 1.0))
TUNED_VARIANCE = (2e-3, 0.1)  # learning rate and lambda
TRIED_NO_LN_F = {LN_G: (3e-3, 6e-3, 9e-3), LN_R: (3e-3, 6e-3, 9e-3, 12e-3),
                 LN: (3e-3, 6e-3, 9e-3), SM_G: (1e-3, 3e-3, 6e-3, 9e-3),
                 SM_R: (1e-3, 3e-3, 6e-3, 9e-3, 12e-3, 2e-2), SM: (3e-3, 6e-3, 9e-3),
                 SCF: (3e-3, 6e-3, 9e-3), SC: (1e-3, 3e-3, 6e-3, 9e-3, 12e-3),
                 T: (1e-3, 3e-3, 6e-3), EREG: (1e-3, 3e-3, 6e-3, 9e-3, 12e-3)}
TUNED_SIGMA_NO_LN_F = 3e-2
TRIED_SIGMA_NO_LN_F = (6e-3, 9e-3, 2e-2, 3e-2, 4.5e-2)
TUNED_VARIANCE_NO_LN_F = (6e-3, 1e-2)
TRIED_VARIANCE_NO_LN_F = ((6e-3, 1e-2), (6e-3, 0.1), (6e-3, 1.0))
TRIED_DEEP = {LN_G: (1e-3, 3e-3), SM_G: (5e-4, 1e-3), SM_R: (5e-4, 1e-3, 2e-3),
              SC: (5e-4, 1e-3, 2e-3), EREG: (1e-3, 2e-3, 4e-3)}
TUNED_SIGMA_DEEP = 9e-3
TRIED_SIGMA_DEEP = (3e-3, 6e-3, 9e-3)


def row(label, config, rate, published="", seeds=SEEDS, **flags):
    """A configuration of config/ with settings of its own, trained with each seed."""
    if config in (T, TH, EREG):  # whose last layers collapse from 0.01 at such rates
        flags = {"temperature_init": 0.1} | flags
    return {"label": label, "config": config, "flags": {"learning_rate": rate, **flags},
            "seeds": list(seeds), "published": published}


def each(rates, seeds=SEEDS, **flags):
    """A row of every configuration in `rates`, at its rate there."""
    rows = []
    for config, rate in rates.items():
        published = [told[config] for told in (PUBLISHED, TOP_QUARTER) if config in told]
        rows.append(row(NAMES[config], config, rate, "; ".join(published), seeds, **flags))
    return rows


def tuning(tried, note="", **flags):
    """Every rate of every configuration, short runs on the tuning seed."""
    return [row(NAMES[config] + note, config, rate, "", [TUNING_SEED], **SHORT, **flags)
            for config, rates in tried.items() for rate in rates]


def some(suffix, tuned, **flags):
    """A few configurations at their rates, with settings that the row's name tells."""
    return [row(f"{NAMES[config]}, {suffix}", config, tuned[config], PUBLISHED[config], **flags)
            for config in TUNED_DEEP]


def ablation():
    """Temperature and regularizer, each alone and together, at SC's learning rate and EReg's."""
    rows = []
    for rate in (TUNED[SC], TUNED[EREG]):
        rows += [
            row("neither: SM+ScFuFFN", SC, rate, "3.48"),
            row("temperature alone: SM(t)+ScFuFFN", T, rate),
            row("regularizer alone: EReg(SM+ScFuFFN)", SC, rate, entropy_reg=True),
            row("both: EReg(SM(t)+ScFuFFN)", EREG, rate, "3.21"),
            row("both, one temperature a head", EREG, rate, temperature_per_head=True)]
    return rows


def gammas():
    published = {0.0: "at most 0.7%", 0.05: "at most 0.7%", 0.1: "at most 0.7%", 0.15: "0.7%",
                 0.25: "3.47%", 0.3: "6.25%"}
    others = [row(f"EReg, gamma {g:g}", EREG, TUNED[EREG], p, gamma=g)
              for g, p in published.items()]
    return [row("EReg, gamma 0.2", EREG, TUNED[EREG], "2.08%"), *others]


def norms():
    """Weight and spectral norm by place, Table 4, below the learnable scales."""
    published = {"ffn": ("3.64", "3.63"), "qk": ("3.89", "4.25"), "qk+ffn": ("3.88", "4.23"),
                 "qkv+ffn": ("3.93", "4.26"), "qkvo+ffn": ("3.98", "4.34")}
    rows = [row("SM+ScFuFFN", SC, 1e-3, "3.48"), row("SM+ScFFN", SCF, 1e-3, "3.50 (AERO)")]
    for where, (weight, spectral) in published.items():
        rows.append(row(f"SM+WNorm({where.upper()})", SM, 1e-3, weight, weight_norm=where))
        rows.append(row(f"SM+SNorm({where.upper()})", SM, 1e-3, spectral, spectral_norm=where))
    return rows


def variance(rate, weight, note="", **settings):
    """SM+ScFuFFN with a penalty on the variance of its logits."""
    return row(f"SM+ScFuFFN, logit variance, lambda {weight:g}{note}", SC, rate, entropy_reg=True,
               regularizer="logit_variance", lambda_entropy=weight, **settings)


def one_layer():
    """Algorithm 1 on one layer's heads alone."""
    return [row("EReg on all layers", EREG, TUNED[EREG]),
            *(row(f"EReg on layer {layer} alone", EREG, TUNED[EREG], regularizer=f"layer={layer}")
              for layer in range(4))]


def weights():
    """The regularizer's weight, down to none, at EReg's learning rate."""
    return [row("EReg, lambda 0.164", EREG, TUNED[EREG]),
            *(row(f"EReg, lambda {x:g}", EREG, TUNED[EREG], lambda_entropy=x)
              for x in (0.041, 0.01, 0.0025)),
            row("no regularizer: SM(t)+ScFuFFN", T, TUNED[EREG])]


def rivals(tuned, sigma_rate, rate_and_weight, **flags):
    """What else holds the logits and costs inference nothing, at the rate that suits it best."""
    return [row("EReg(SM(t)+ScFuFFN)", EREG, tuned[EREG], **flags),
            row("SM+ScFuFFN", SC, tuned[SC], **flags),
            row("SM+ScFuFFN, sigmaReparam", SC, sigma_rate, **SIGMA, **flags),
            variance(*rate_and_weight, **flags)]


def deep():
    """12 layers, each configuration at the rate that its own short runs chose."""
    return some("12 layers", TUNED_DEEP, n_layer=12) + [
        row("SM+ScFuFFN, 12 layers, sigmaReparam", SC, TUNED_SIGMA_DEEP, n_layer=12, **SIGMA),
        row("SM+ScFuFFN, 12 layers, 6 positional", SC, TUNED_DEEP[SC], n_layer=12,
            positional_layers=6)]


KINDS = {"softmax": {SC: (0,), EREG: (0,), LN_G: (0,)},  # of the first k of the four layers
         "uniform": {SC: (1, 2, 3, 4), EREG: (2,), LN_G: (2,)},
         "positional": {SC: (1, 2, 3, 4), EREG: (2,), LN_G: (2, 4)}}


def frontier():
    """None, some and all of the layers without softmax."""
    rows = []
    for kind, configs in KINDS.items():
        for config, counts in configs.items():
            for k in counts:
                label = f"{NAMES[config]}, {k} {kind}" if k else NAMES[config]
                flags = {f"{kind}_layers": k} if k else {}
                rows.append(row(label, config, TUNED[config], **flags))
    rows.append(row("SM+ScFuFFN, 2 positional, no ln_f", SC, TUNED_NO_LN_F[SC],
                    positional_layers=2, **NO_LN_F))
    return rows


LARGE = dict(**PAPER_SHAPE, batch_size=3, max_iters=80, eval_interval=1,
             eval_windows=3, log_interval=1, warmup=0.05)


def large(label, config, **flags):
    """The paper's width and depth for 80 steps, with a warmup of 4."""
    published = PUBLISHED.get(config, "")
    return row(f"{label}, 12 x 768", config, PAPER_RATE, published, **LARGE, **flags)


WHOLE = dict(**PAPER_SHAPE, batch_size=64, max_iters=1500, eval_interval=500,
             eval_windows=512, warmup=0.05)


def paper_size():
    """The paper's width and depth on a GPU, at the paper's learning rate and at lower ones."""
    rows = [row(NAMES[config], config, PAPER_RATE, PUBLISHED.get(config, ""), **WHOLE)
            for config in NAMES if config != TH]
    rows += [row(f"{NAMES[config]}, 6 positional", config, PAPER_RATE, **WHOLE, positional_layers=6)
             for config in (SC, EREG)]
    rows += [row("SM+ScFuFFN, sigmaReparam", SC, rate, **WHOLE, **SIGMA) for rate in (1e-3, 3e-3)]
    rows += [row(NAMES[config], config, 3e-4, **WHOLE)
             for config in (LN_G, LN_R, SM_G, SM_R, SM, SCF, SC, T)]
    return rows


WITH_SHARES = "PPL; share of heads in the top quarter"
TABLES = {  # name: (what it is, what the published column shows, rows)
    "quick": ("Ten minutes: does ReLU or GELU suit a model without LayerNorm?", "PPL",
              tuning({SM_G: (1e-3,), SM_R: (1e-3,)})),
    "architectures": ("The configurations of the perplexity tables, each at its own rate",
                      WITH_SHARES,
                      each({key: TUNED[key] for key in NAMES if key != TH})),
    "no_final_layernorm": ("The same without the final LayerNorm", WITH_SHARES,
                           each(TUNED_NO_LN_F, **NO_LN_F)),
    "higher_rates": ("Whole runs at higher rates than the short ones chose", WITH_SHARES,
                     each(HIGHER) + [
                         row(f"SM+ScFuFFN, 2 {kind}", SC, HIGHER[SC], **{f"{kind}_layers": 2})
                         for kind in ("positional", "uniform")]
                     + [row("SM(t)+ScFuFFN, at 0.006", T, 6e-3)]),
    "one_rate": ("Those that bear a higher rate, at 0.001 like the paper's", WITH_SHARES,
                 each(dict.fromkeys((LN_G, LN_R, LN, SC, T, EREG), 1e-3))),
    "tuning": ("The learning rate of each, on a seed that no other table reports, in runs of 2.9M "
               "tokens", "PPL",
               tuning(TRIED) + tuning({SC: TRIED_SIGMA}, ", sigmaReparam", **SIGMA)
               + [variance(*pair, seeds=[TUNING_SEED], **SHORT) for pair in TRIED_VARIANCE]
               + tuning(TRIED_NO_LN_F, ", no ln_f", **NO_LN_F)
               + tuning({SC: TRIED_SIGMA_NO_LN_F}, ", sigmaReparam, no ln_f", **SIGMA, **NO_LN_F)
               + [variance(*pair, ", no ln_f", seeds=[TUNING_SEED], **SHORT, **NO_LN_F)
                  for pair in TRIED_VARIANCE_NO_LN_F]
               + tuning(TRIED_DEEP, ", 12 layers", n_layer=12)
               + tuning({SC: TRIED_SIGMA_DEEP}, ", 12 layers, sigmaReparam", n_layer=12, **SIGMA)),
    "frontier": ("The first layers without softmax: uniform, the average, or positional, a learned "
                 "pattern of distances", "", frontier()),
    "rivals": ("EReg against sigmaReparam (arXiv 2303.06296) and a penalty on the logits' variance",
               "PPL", rivals(TUNED, TUNED_SIGMA, TUNED_VARIANCE) + [
                   row("SM+ScFuFFN, sigmaReparam, 2 positional", SC, TUNED_SIGMA, **SIGMA,
                       positional_layers=2)]),
    "rivals_no_final_layernorm": ("The same without the final LayerNorm", "PPL", rivals(
        TUNED_NO_LN_F, TUNED_SIGMA_NO_LN_F, TUNED_VARIANCE_NO_LN_F, **NO_LN_F)),
    "one_layer": ("Algorithm 1 on a single layer", "PPL", one_layer()),
    "lambda": ("The weight of the regularizer", "PPL", weights()),
    "norms": ("Weight and spectral norm by place, against the learnable scales (Tables 4 and 5)",
              "PPL", norms()),
    "ablation": ("Temperature and regularizer, each alone and together", "PPL", ablation()),
    "gamma": ("Tolerance margin (Figures 6 and 7)", "heads in the top quarter", gammas()),
    "context": ("At T = 256 (Table 6)", "PPL, T = 128", some("T = 256", TUNED, block_size=256,
                                                             batch_size=16)),
    "depth": ("At 12 layers", "PPL", deep()),
    "paper_size": ("The paper's width and depth, 12.3M tokens by 8,192 a step, on an H200", "PPL",
                   paper_size()),
    "divergence": ("The paper's width and depth, 3 sequences a step", "PPL", [
        large("SM", SM), large("SM+ScFFN", SCF), large("SM+ScFuFFN", SC),
        large("SM+WNorm(FFN)", SM, weight_norm="ffn"),
        large("SM+SNorm(FFN)", SM, spectral_norm="ffn"), large("SM+G", SM_G)]),
}
SMALL_ONLY = ("quick", "depth", "paper_size", "divergence")  # not for the scale of GPT-2
NAMED_ONLY = ("paper_size",)  # trained where --only names it: on a CPU it would take weeks


def at(config, **flags):
    """(configuration, flags) of a run in "architectures" or another table."""
    return config, row("", config, TUNED[config], **flags)["flags"]


PICTURES = {  # file: runs side by side, of the first seed
    "entropy_architectures.png": [at(LN_G), at(SM_G), at(SM_R), at(SM)],  # Figure 2
    "entropy_stabilised.png": [at(SC), at(T), at(EREG)],  # Figures 4 and 5
    "entropy_no_final_layernorm.png": [
        (config, row("", config, TUNED_NO_LN_F[config], **NO_LN_F)["flags"])
        for config in (SM_G, SM_R, SC, EREG)],
    "entropy_gamma.png": [at(EREG, gamma=0.0), at(EREG, gamma=0.1), at(EREG),
                          at(EREG, gamma=0.3)],  # Figures 6 and 7
}
