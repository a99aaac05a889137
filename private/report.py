"""
What private runs cost, as the paper's tables and as a picture. A result r is an object of the list
that bench_spu.py writes to --json.
"""
from plot import aligned

PUBLISHED = {  # the paper's Tables 2, 6, 7, 3: (n_layer, block_size): {arch: (GB, minutes)}
    (12, 128): {"SM+LN+G": (25.32, 8.21), "SM+LN+R": (9.44, 6.06),
                "SM+ScFuFFN": (6.43, 4.76)},
    (12, 256): {"SM+LN+G": (58.51, 16.57), "SM+LN+R": (26.73, 12.59),
                "SM+ScFuFFN": (20.72, 10.45)},
    (18, 128): {"SM+LN+G": (37.17, 10.77), "SM+LN+R": (13.34, 8.04),
                "SM+ScFuFFN": (8.83, 6.07)},
    (12, 512): {"SM+LN+G": (145.24, 30.74), "SM+LN+R": (81.71, 23.54),
                "SM+ScFuFFN": (69.68, 19.44)},
}
COLORS = {  # of the kinds of operation, in the order of a bar: what is not linear, then the rest
    "GELU": "#d55e00", "ReLU": "#e69f00", "softmax": "#0072b2", "LayerNorm": "#cc79a7",
    "argmax": "#6a3d9a", "temperature": "#56b4e9", "average": "#b2df8a", "pattern": "#b15928",
    "matmul": "#009e73", "ahead": "#17becf", "embedding": "#f0e442", "set-up": "#999999",
    "head": "#000000", "watch": "#8dd3c7",
}
OTHER = "#8c564b"  # of a kind that is not among these
SMALL = 0.02  # of the longest bar: a kind that takes less has its figure in the legend
OPERATIONS = {"SM": "softmaxes", "LN": "LayerNorms", "G": "GELUs", "R": "ReLUs"}


def published(r):
    """(GB, minutes) that the paper prints for one token of a run's architecture, or None."""
    size = r["n_embd"], r["n_head"], r["vocab_size"], r["protocol"]
    if size != (768, 12, 50257, "cheetah") or tokens_of(r) > 1:
        return None
    return PUBLISHED.get((r["n_layer"], r["block_size"]), {}).get(r["arch"].removesuffix(" plain"))


def kinds_of(results):
    """The kinds of operation that any of the results has, in the order they ran."""
    return list(dict.fromkeys(kind for r in results for kind in r["bytes_by_kind"]))


def flops(n):
    return f"{n / 1e9:.1f}B" if n > 1e8 else f"{n / 1e6:.2f}M"


def layers_run(r):
    if r["measured_layers"] == r["n_layer"]:
        return f"all {r['n_layer']}"
    last = "" if r["settings"]["plain"] else " + last"
    return f"{r['measured_layers']}{last}, {r['n_layer']} (multiplied)"


def tokens_of(r):
    """How many tokens a run made."""
    return sum(p.get("tokens", 1) for reply in r.get("replies", [{"passes": [{}]}])
               for p in reply["passes"])


def further_tokens(r):
    """How many of them came behind the first of a reply."""
    return tokens_of(r) - len(r["replies"])


def further(r):
    """The passes of a run that made further tokens."""
    return [p for reply in r["replies"] for p in reply["passes"][1:]]


def same_as_plain(r):
    """Whether the reply's tokens are the likeliest in the clear, if the client chose these."""
    if r["settings"].get("temperature"):
        return ""
    if "replies" not in r:
        return "yes" if r["token"] == r["plain_token"] else "NO"
    tokens = [token for reply in r["replies"] for token in reply["tokens"]]
    same = [a == b for a, b in zip(tokens, r["plain_tokens"])]
    return "yes" if all(same) else f"NO, {sum(same)} of {len(same)}"


def ahead_of(r, key):
    """What was made ahead in a run, as passes; key: "ahead" or "prompt_ahead"."""
    return [made for reply in r["replies"] for made in reply[key]]


def on_average(passes, n):
    """MB, messages and seconds of one of n things that these passes made."""
    def mean(key):
        return sum(p[key] for p in passes) / n

    return f"{mean('bytes') / 1e6:,.1f} / {mean('rounds'):,.0f} / {mean('seconds'):,.1f}"


def table(results):
    """
    The results side by side, a column for each, as the paper's tables have them. A figure that a
    run lacks is an empty cell, and a row of empty cells is left out.
    """
    first = results[0]
    links = " of the client's links" if first["protocol"] == "aby3" else ""
    rows = []
    for op in dict.fromkeys(op for r in results for op in r["nonlinear_ops"]):
        rows.append((OPERATIONS.get(op, op), lambda r, op=op: r["nonlinear_ops"][op]))
    rows += [
        ("FLOPs, FFN / attention",
         lambda r: f"{flops(r['flops']['ffn'])} / {flops(r['flops']['attn'])}"),
        ("MB, both directions" + links, lambda r: f"{r['bytes_total'] / 1e6:,.1f}"),
    ]
    for kind in kinds_of(results):
        rows.append((f"  {kind}", lambda r, k=kind: f"{r['bytes_by_kind'][k] / 1e6:,.1f}"))
    rows += [
        ("  (truncations, of all)", lambda r: f"{r['bytes_of_truncations'] / 1e6:,.1f}"),
        ("messages (round trips at most)", lambda r: f"{r['rounds']:,}"),
        (f"seconds, link {first['network']}", lambda r: f"{r['seconds']:.1f}"),
        ("layers run, of", layers_run),
        ("tokens", lambda r: f"{tokens_of(r)}" if "replies" in r else ""),
        ("  the first: MB / messages / s",
         lambda r: on_average([reply["passes"][0] for reply in r["replies"]], len(r["replies"]))),
        ("  made ahead of it",
         lambda r: on_average(ahead_of(r, "prompt_ahead"), len(r["replies"]))),
        ("  tokens to a further pass",
         lambda r: f"{further_tokens(r) / len(further(r)):.2f}"
         if r["settings"]["guesses"] else ""),
        ("  a further one",
         lambda r: on_average(further(r), further_tokens(r))),
        ("  made ahead of it",
         lambda r: on_average(ahead_of(r, "ahead"), further_tokens(r))),
    ]
    if len(results) > 1:
        rows += [
            (f"fewer bytes than {first['arch']}",
             lambda r: f"{first['bytes_total'] / r['bytes_total']:.2f}x"),
            (f"faster than {first['arch']}", lambda r: f"{first['seconds'] / r['seconds']:.2f}x"),
        ]
    rows += [
        ("published by the paper: GB", lambda r: f"{published(r)[0]:.2f}"),
        ("  minutes, its machines", lambda r: f"{published(r)[1]:.2f}"),
        ("peak memory of a party, GB",
         lambda r: f"{max(r['peak_memory_bytes'].values()) / 1e9:.1f}"),
        ("max |secure - plain| logit", lambda r: f"{r['max_abs_err']:.1e}"),
        ("same token as in plain", same_as_plain),
        ("top-1 agreement",
         lambda r: f"{r['top1_agreement']:.1%} of {r['windows'] * r['block_size']}"),
        ("perplexity, secure / plain",
         lambda r: f"{r['secure_perplexity']:.3f} / {r['plain_perplexity']:.3f}"),
    ]

    def cell(figure, r):
        try:
            return figure(r)
        except (KeyError, TypeError, ZeroDivisionError):  # missing, None, or none of them
            return ""

    cells = [[name, *(cell(figure, r) for r in results)] for name, figure in rows]
    header = ["", *(r["arch"] for r in results)]
    return aligned([header] + [row for row in cells if any(row[1:])])


def counted(results):
    """What the bars are of."""
    most = max(map(tokens_of, results))
    return "one private next token" if most == 1 else f"{most} private tokens"


def draw_kinds(axes, results, unit, name):
    """A bar of bytes for each result, split by kind of operation."""
    longest = max(r["bytes_total"] for r in results)
    ends = [0.0 for r in results]
    kinds = kinds_of(results)
    for kind in [k for k in COLORS if k in kinds] + [k for k in kinds if k not in COLORS]:
        sizes = [r["bytes_by_kind"].get(kind, 0) for r in results]
        small = max(sizes) < SMALL * longest
        label = f"{kind}, {max(sizes) / 1e6:.2g} MB" if small else kind
        widths = [size / unit for size in sizes]
        color = COLORS.get(kind, OTHER)
        axes.barh(range(len(results)), widths, 0.6, ends, label=label, color=color)
        ends = [end + width for end, width in zip(ends, widths)]
    for place, end in enumerate(ends):
        axes.text(end, place, f" {end:.2f} {name}", va="center")
    axes.set(yticks=range(len(results)), yticklabels=[r["arch"] for r in results],
             xlabel=f"{name} of {counted(results)}, both directions")


def draw_published(axes, results):
    """A bar of each result's bytes over the outlined one that the paper published."""
    for place, r in enumerate(results):
        gigabytes = r["bytes_total"] / 1e9
        axes.barh(place - 0.17, gigabytes, 0.26, color="#444444")
        axes.text(gigabytes, place - 0.17, f" {gigabytes:.2f} here", va="center")
        if published(r):
            gigabytes = published(r)[0]
            axes.barh(place + 0.17, gigabytes, 0.26, color="none", edgecolor="black")
            axes.text(gigabytes, place + 0.17, f" {gigabytes:.2f} published", va="center")
    axes.set(xlabel="GB here, and published by the paper")


def draw(results, file):
    """A PNG into a binary file: the bytes of each result by kind, and beside them the paper's."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    first = results[0]
    large = max(r["bytes_total"] for r in results) > 1e9
    panels = 2 if any(map(published, results)) else 1
    figure, axes = plt.subplots(1, panels, figsize=(11, 1.9 + 0.55 * len(results)), sharey=True,
                                squeeze=False, width_ratios=(5, 3)[:panels], layout="constrained")
    draw_kinds(axes[0, 0], results, *((1e9, "GB") if large else (1e6, "MB")))
    if panels == 2:
        draw_published(axes[0, 1], results)
    axes[0, 0].invert_yaxis()
    for panel in axes.flat:
        panel.margins(x=0.25)  # room for the text behind the longest bar
        panel.spines[["top", "right"]].set_visible(False)
    layers = f"{first['n_layer']} layers"
    measured = sorted({r["measured_layers"] for r in results})
    if measured[0] < first["n_layer"]:
        layers += f", {' or '.join(map(str, measured))} measured"
    figure.suptitle(f"{layers}, width {first['n_embd']}, T = {first['block_size']}, "
                    f"vocabulary {first['vocab_size']:,}, {first['protocol']}")
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(file, dpi=150, format="png")
    plt.close(figure)
