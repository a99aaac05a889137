"""What the logs of reproduce.py's runs say, as Markdown tables with paired differences."""
import math
import statistics

from entropy import max_causal_entropy
from tables import TABLES

T_QUANTILE = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # Student's, two-sided 95%, by number of seeds


def mean(values):
    return sum(values) / len(values)


def paired(runs, first):
    """
    How far the perplexity of runs is from that of first, by the seeds that both have finished:
    "+8.1% (5.0 to 11.3)", the mean of the log ratios and its 95% interval by Student's t; without
    the interval for one seed, "" for none.
    """
    base = {x["seed"]: x["val_ppl"] for x in first if x["event"] == "done"}
    ratios = [math.log(x["val_ppl"] / base[x["seed"]]) for x in runs
              if x["event"] == "done" and x["seed"] in base]

    def percent(ratio):
        return f"{100 * math.expm1(ratio):+.1f}"

    if not ratios or runs is first:
        return ""
    middle = mean(ratios)
    if len(ratios) == 1:
        return f"{percent(middle)}%"
    half = T_QUANTILE[len(ratios)] * statistics.stdev(ratios) / math.sqrt(len(ratios))
    return f"{percent(middle)}% ({percent(middle - half)} to {percent(middle + half)})"


def lost(runs):
    """How many of a row's runs its means leave out, as words to end its line with."""
    count = sum(x["event"] == "diverged" for x in runs)
    return f"; {count} of {len(runs)} diverged" if count else ""


HEADINGS = ["", "learning rate", "seeds", "tokens", "a parameter", "val. perplexity",
            "spread over seeds", "over the first, by pairs of a seed (95%)",
            "heads by quarter of the largest, %", "of log(T!)/T, %", "entropy by layer, nats"]


def markdown_row(cells):
    return f"| {' | '.join(cells)} |"


def shares(runs, key):
    """Shares of heads by quarter, in percent, the mean of the runs."""
    return " ".join(f"{100 * mean([x[key][i] for x in runs]):.0f}" for i in range(4))


def cells_of(r, first):
    """A row's cells, HEADINGS' and the published one. first: the first row's runs."""
    runs = r["runs"]
    if not runs:
        rate = f"{r['flags']['learning_rate']:g}"
        return [r["label"], rate, "not run", *[""] * (len(HEADINGS) - 3), r["published"]]
    done = [x["val_ppl"] for x in runs if x["event"] == "done"]
    broken = [str(x["step"]) for x in runs if x["event"] == "diverged"]
    perplexity, spread = f"{mean(done):.1f}" if done else "", ""
    if broken:
        perplexity += f" diverged at step {', '.join(broken)}"
    if len(done) > 1:
        spread = f"{min(done):.1f} to {max(done):.1f}"
    layers = []
    for entropies in zip(*(x["entropy_by_layer"] for x in runs)):
        layers.append("nan" if None in entropies else f"{mean(entropies):.2f}")
    seeds = " ".join(str(x["seed"]) for x in runs)
    per_parameter = f"{runs[0]['tokens'] / runs[0]['parameters']:.1f}"
    return [r["label"], f"{runs[0]['learning_rate']:g}", seeds, f"{runs[0]['tokens']:,}",
            per_parameter, perplexity.strip(), spread, paired(runs, first),
            shares(runs, "quartiles"), shares(runs, "quartiles_of_causal_maximum"),
            " ".join(layers), r["published"]]


def markdown(name, rows):
    title, column, _ = TABLES[name]
    headings = [*HEADINGS, f"published {column}, the paper's scale"]
    lines = [f"### {title} (`{name}`)", "", markdown_row(headings), "|" + "---|" * len(headings)]
    lines += [markdown_row(cells_of(r, rows[0]["runs"])) for r in rows]
    if name == "divergence":
        lines += ["", "Step at which a layer's entropy first is below a quarter of its maximum, "
                  "and step at which the loss first is a tenth above its lowest, seed by seed:"]
        for r in rows:
            pairs = [x["collapse_and_jump"] for x in r["runs"]]
            told = ", ".join(f"{collapse} and {jump}" for collapse, jump in pairs)
            lines.append(f"- {r['label']}: {told.replace('None', 'never')}")
    return "\n".join(lines) + "\n"


def breaks(log, T):
    """
    (collapse, jump) of a run that was evaluated at every step: the first step at which a layer's
    mean entropy is below a quarter of log(T!)/T, and the first at which the validation loss is a
    tenth above its lowest so far, by evaluations of the same weights. None for what never happens.
    """
    collapse, jump, lowest = None, None, math.inf
    for r in log:
        if r["event"] != "eval":
            continue
        if collapse is None and min(map(mean, r["head_entropy"])) < max_causal_entropy(T) / 4:
            collapse = r["step"]
        if jump is None and not r["val_ce"] <= 1.1 * lowest:  # so that a loss of NaN is one
            jump = r["step"]
        lowest = min(lowest, r["val_ce"])
    return collapse, jump


def heading(runs, command):
    """The paragraph above the tables: what was trained, where, and by which command."""
    one, s = runs[0], runs[0]["size"]
    makers = sorted({f"{x['machine']}, torch {x['torch']}, {x['processor']}, commit "
                     f"{x['commit'][:7]}" for x in runs})
    return (f"{s['n_layer']} layers, width {s['n_embd']}, {s['n_head']} heads, "
            f"T = {s['block_size']}, vocabulary {s['vocab_size']}, pycode (sha256 "
            f"{one['data_sha256'][:16]}), where the paper has 12 layers, width 768, 12 heads and "
            f"2.1B tokens of CodeParrot (17 a parameter). {'; '.join(makers)}. "
            f"Made by `{command}`.\n\n")
