"""
What reproduce.py trains: the rows of every table, and the runs that its pictures show.

The first row of a table is what the others are compared with. `published` is the paper's figure,
at the paper's scale; 3.50 of SM+ScFFN is of the authors' longer paper (AERO).
"""
SEEDS = (1337, 1338, 1339)
TUNING_SEED = 1  # no table but "tuning" reports it
LN_G, SM, T, SC, EREG = "sm_ln_g", "sm", "sm_t_scfuffn", "sm_scfuffn", "ereg_sm_t_scfuffn"
TUNED_EREG = {"learning_rate": 4e-3, "temperature_init": 0.1}  # what the tuning seed chose for EReg
TUNED_LN = {"learning_rate": 2e-3, "warmup": 0.2}  # and for SM+LN+G


def row(label, config, published="", seeds=SEEDS[:1], **flags):
    """A configuration of config/ with settings of its own, trained with each seed."""
    return {"label": label, "config": config, "flags": flags, "seeds": list(seeds),
            "published": published}


ARCHITECTURES = {  # those without a regularizer: name: (configuration, the paper's perplexity)
    "SM+LN+G": (LN_G, "2.69"),
    "SM+LN+R": ("sm_ln_r", "2.76"),
    "SM+LN": ("sm_ln", "3.38"),
    "SM+G": ("sm_g", "3.20"),
    "SM+R": ("sm_r", "2.94"),
    "SM": (SM, "NaN"),
    "SM+ScFFN": ("sm_scffn", "3.50 (AERO)"),
    "SM+ScFuFFN": (SC, "3.48"),
}
FIVE = {"SM+ScFuFFN": (SC, "3.48"), "EReg": (EREG, "3.21"), "SM+LN+G": (LN_G, "2.69"),
        "SM+G": ("sm_g", "3.20"), "SM+R": ("sm_r", "2.94")}


def architectures(seeds=SEEDS[:1], **flags):
    """A row of each, with the same settings."""
    return [row(name, config, published, seeds, **flags)
            for name, (config, published) in ARCHITECTURES.items()]


def five(suffix, names=FIVE, **flags):
    """A row of each of FIVE, labelled with what is special about it."""
    return [row(f"{name}, {suffix}", *FIVE[name], **flags) for name in names]


def tuning():
    """The grid on the tuning seed."""
    def tried(label, config, **flags):
        return row(label, config, "", [TUNING_SEED], **flags)

    rows = []
    for name, config in (("SM+ScFuFFN", SC), ("EReg", EREG), ("SM+LN+G", LN_G)):
        for rate in (1e-3, 2e-3, 4e-3):
            rows.append(tried(f"{name}, lr {rate:g}", config, learning_rate=rate))
    rows.append(tried("SM+ScFuFFN, lr 0.008", SC, learning_rate=8e-3))
    rows.append(tried("SM+LN+G, lr 0.0005", LN_G, learning_rate=5e-4))
    warm = "warmup 20%"
    rows.append(tried(f"SM+LN+G, lr 0.002, {warm}", LN_G, **TUNED_LN))
    rows.append(tried(f"SM+LN+G, lr 0.004, {warm}", LN_G, learning_rate=4e-3, warmup=0.2))
    rows.append(tried(f"SM+ScFuFFN, lr 0.004, {warm}", SC, learning_rate=4e-3, warmup=0.2))
    rows.append(tried(f"EReg, t from 0.1, lr 0.004, {warm}", EREG, **TUNED_EREG, warmup=0.2))
    rows.append(tried("SM(t)+ScFuFFN, lr 0.004, t from 0.1", T, **TUNED_EREG))
    label = "EReg, lr 0.004, t from 0.1, lambda "
    rows.append(tried(label + "0.164", EREG, **TUNED_EREG))
    for weight in (0.05, 0.5):
        rows.append(tried(f"{label}{weight:g}", EREG, **TUNED_EREG, lambda_entropy=weight))
    return rows


def ablation(*more, learning_rate=None, **temperature):
    """Temperature and regularizer, each alone and together. more: rows for temperature alone."""
    rate = {} if learning_rate is None else {"learning_rate": learning_rate}
    return [
        row("neither: SM+ScFuFFN", SC, "3.48", **rate),
        row("temperature alone: SM(t)+ScFuFFN", T, **rate, **temperature),
        *more,
        row("regularizer alone: EReg(SM+ScFuFFN)", SC, **rate, entropy_reg=True),
        row("both: EReg(SM(t)+ScFuFFN)", EREG, "3.21", **rate, **temperature),
        row("per head alone: SM(th)+ScFuFFN", "sm_th_scfuffn", **rate, **temperature),
        row("per head, with the regularizer: EReg(SM(th)+ScFuFFN)", EREG, **rate, **temperature,
            temperature_per_head=True),
    ]


def gammas():
    published = {0.0: "at most 0.7%", 0.05: "at most 0.7%", 0.1: "at most 0.7%", 0.15: "0.7%",
                 0.25: "3.47%", 0.3: "6.25%"}
    others = [row(f"EReg, gamma {g:g}", EREG, p, gamma=g) for g, p in published.items()]
    return [row("EReg, gamma 0.2", EREG, "2.08%"), *others]


def norms():
    """Weight and spectral norm by place, Table 4, below the learnable scales."""
    published = {"ffn": ("3.64", "3.63"), "qk": ("3.89", "4.25"), "qk+ffn": ("3.88", "4.23"),
                 "qkv+ffn": ("3.93", "4.26"), "qkvo+ffn": ("3.98", "4.34")}
    rows = [row("SM+ScFuFFN", SC, "3.48"), row("SM+ScFFN", "sm_scffn", "3.50 (AERO)")]
    for where, (weight, spectral) in published.items():
        rows.append(row(f"SM+WNorm({where.upper()})", SM, weight, weight_norm=where))
        rows.append(row(f"SM+SNorm({where.upper()})", SM, spectral, spectral_norm=where))
    return rows


def readings():
    """The regularizer's weight and reading, and where the temperatures start."""
    rows = [row("EReg: lambda 0.164, per position, t from 0.01", EREG, "3.21")]
    for weight in (0.0164, 0.05, 0.5):
        rows.append(row(f"lambda {weight:g}", EREG, lambda_entropy=weight))
    for weight in (0.164, 0.05):
        rows.append(row(f"per head (Algorithm 1 as printed), lambda {weight:g}", EREG,
                        reduction="head", lambda_entropy=weight))
    for t in (0.003, 0.1, 1.0):
        rows.append(row(f"t from {t:g}", EREG, temperature_init=t))
    return rows


def wide():
    rows = five("width 384", ("SM+ScFuFFN", "EReg", "SM+LN+G", "SM+G"), n_embd=384, **TUNED_LN)
    rows[1]["flags"]["temperature_init"] = 0.1
    return rows


TABLES = {  # name: (what it is, what the published column shows, rows)
    "architectures": ("The configurations of the perplexity tables", "PPL", [
        *architectures(SEEDS),
        row("SM(t)+ScFuFFN", T, "", SEEDS),
        row("SM(t)+ScFuFFN, t from 0.1", T, "", SEEDS, temperature_init=0.1),
        row("EReg(SM(t)+ScFuFFN)", EREG, "3.21", SEEDS)]),
    "tuning": ("The learning rate and EReg's own settings, on a seed that no other table reports",
               "PPL", tuning()),
    "tuned": ("At the settings which the tuning seed chose, for each its own", "PPL", [
        row("SM+ScFuFFN, lr 0.004", SC, "3.48", SEEDS, learning_rate=4e-3),
        row("SM(t)+ScFuFFN, lr 0.004, t from 0.1", T, "", SEEDS, **TUNED_EREG),
        row("EReg(SM(t)+ScFuFFN), lr 0.004, t from 0.1", EREG, "3.21", SEEDS, **TUNED_EREG),
        row("SM+LN+G, lr 0.002, warmup 20%", LN_G, "2.69", SEEDS, **TUNED_LN)]),
    "gamma": ("Tolerance margin (Figures 6 and 7)", "heads in the top quarter", gammas()),
    "ablation": ("Temperature and regularizer, each alone and together; one temperature per head "
                 "for one per head and position", "PPL",
                 ablation(row("temperature alone, from 0.1", T, temperature_init=0.1))),
    "ablation_tuned": ("The same at the tuned settings, learning rate 0.004 and temperatures from "
                       "0.1", "PPL", ablation(**TUNED_EREG)),
    "norms": ("Weight and spectral norm by place, against the learnable scales (Tables 4 and 5)",
              "PPL", norms()),
    "lambda": ("Weight of the regularizer, its penalty by position or by head, and where the "
               "temperature starts", "PPL", readings()),
    "warmed": ("The architectures at a learning rate of 0.002 and a warmup of 20% of the steps for "
               "5%", "PPL", [
                   *architectures(**TUNED_LN),
                   row("EReg, t from 0.1", EREG, "3.21", **TUNED_LN, temperature_init=0.1)]),
    "depth": ("Does the order hold at 12 layers?", "PPL", five("12 layers", n_layer=12)),
    "tokens": ("Does it hold with three times the tokens?", "PPL",
               five("3 x the tokens", max_iters=3000)),
    "width": ("And at twice the width? Learning rate 0.002 and a warmup of 20%, to be compared "
              "with those above", "PPL", wide()),
    "divergence": ("Softmax alone at the paper's width and depth, 3 sequences a step: 12 layers, "
                   "width 768", "PPL", [
                       row("SM, 12 x 768", SM, "NaN", n_layer=12, n_head=12, n_embd=768,
                           batch_size=3, max_iters=80, eval_interval=1, eval_windows=3,
                           log_interval=1)]),
}
SMALL_ONLY = ("warmed", "depth", "tokens", "width", "divergence")  # not for the scale of GPT-2

PICTURES = {  # file: runs side by side, of the first seed
    "entropy_architectures.png": [(LN_G, {}), ("sm_g", {}), ("sm_r", {}), (SM, {})],  # Figure 2
    "entropy_stabilised.png": [  # Figures 4 and 5
        (SM, {"weight_norm": "ffn"}), (SM, {"spectral_norm": "ffn"}), (SC, {}), (EREG, {})],
    "entropy_temperature.png": [
        (T, {}), (T, {"temperature_init": 0.1}), (SC, {"entropy_reg": True}), (EREG, {})],
    "entropy_tuned.png": [(SC, {"learning_rate": 4e-3}), (EREG, TUNED_EREG)],
    "entropy_gamma.png": [  # Figures 6 and 7
        (EREG, {"gamma": 0.0}), (EREG, {"gamma": 0.1}), (EREG, {}), (EREG, {"gamma": 0.3})],
}
