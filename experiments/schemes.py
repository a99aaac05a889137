"""
Which of the paper's Table 2 architectures is cheap under which scheme? bench_spu.py runs each of
them under semi2k, aby3 and Cheetah at one size; this puts them side by side, with the ratios to
SM+LN+G and what a slow link would make of them at most.

    python experiments/schemes.py      # the paper's shape, minutes; beside Table 2's runs
    python experiments/schemes.py --schemes=semi2k,aby3,cheetah --also="" --n_layer=2 --n_head=4 \\
        --n_embd=256 --vocab_size=2048 --measure_layers=0 --into=/tmp     # the smallest, minutes

The link is an estimate, an upper bound: every message waits for a round trip, and all bytes go one
after the other. Writes schemes.json, a list that bench_spu.py --from_json takes, and schemes.png.
"""
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from configurator import configure, die, end_on_signals  # noqa: E402

end_on_signals()
from json import dumps, loads  # noqa: E402

from draw import COLOURS, write_figure, write_whole  # noqa: E402
from private.relay import NETWORKS  # noqa: E402

into = str(ROOT / "results")  # folder for schemes.json and schemes.png
schemes = "semi2k,aby3"  # and cheetah
also = str(ROOT / "results/private_table2.json")  # bench_spu.py's results of that size, Cheetah's
archs = "sm_ln_g,sm_ln_r,sm_scfuffn"  # the ratios are to the first
n_layer = 12
n_head = 12
n_embd = 768
block_size = 128
vocab_size = 50257
measure_layers = 2  # under Cheetah run so many layers of a kind and the last, and multiply; 0: all

TRUST = {
    "semi2k": "the client deals the triples: the weights are not secret from it",
    "aby3": "three parties, no two of which may collude",
    "cheetah": "nobody",
}
SIZE = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")


def results_of(scheme):
    """bench_spu.py's results of every architecture under a scheme, each with its command."""
    flags = [f"--archs={archs}", f"--protocol={scheme}", "--timeout=3600"]
    flags += [f"--{key}={globals()[key]}" for key in SIZE]
    if scheme == "cheetah":  # the others are quick; and aby3's parties send ahead of their time, so
        flags.append(f"--measure_layers={measure_layers}")  # that a layer's bytes are no other's
    with TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        run = subprocess.run([sys.executable, "bench_spu.py", *flags, f"--json={file}"], cwd=ROOT)
        if run.returncode:
            die(f"bench_spu.py --protocol={scheme} ended with status {run.returncode}")
        command = " ".join(["python bench_spu.py", *flags])
        return [r | {"command": command} for r in loads(file.read_text())]


def at_most(r, network):
    """Seconds that a link adds at most: each message a round trip, the bytes one by one."""
    bandwidth, delay = NETWORKS[network]
    return r["rounds"] * 2 * delay, 8 * r["bytes_total"] / bandwidth


def table(results):
    """A Markdown table: a row for each scheme and architecture."""
    print("| | MB | fewer bytes | messages | fewer messages | seconds, link none "
          "| minutes by wan, at most | trusted |\n|---|---|---|---|---|---|---|---|")
    for r in results:
        first = next(one for one in results if one["protocol"] == r["protocol"])
        minutes = (r["seconds"] + sum(at_most(r, "wan"))) / 60
        print(f"| {r['protocol']} {r['arch']} | {r['bytes_total'] / 1e6:,.0f} "
              f"| {first['bytes_total'] / r['bytes_total']:.2f}x | {r['rounds']:,} "
              f"| {first['rounds'] / r['rounds']:.2f}x | {r['seconds']:.0f} | {minutes:.1f} "
              f"| {TRUST[r['protocol']]} |")


def draw(results, path):
    """Gigabytes, and minutes on the slow link at most, of each scheme and architecture."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 0.9 + 0.4 * len(results)), sharey=True,
                                      layout="constrained")
    colours = dict(zip(TRUST, COLOURS[1:]))
    for place, r in enumerate(results):
        gigabytes = r["bytes_total"] / 1e9
        left.barh(place, gigabytes, color=colours[r["protocol"]])
        left.text(gigabytes, place, f" {gigabytes:.2f}", va="center")
        parts = [part / 60 for part in (r["seconds"], *at_most(r, "wan"))]
        starts = [sum(parts[:i]) for i in range(3)]
        right.barh([place] * 3, parts, left=starts, color=("#444444", "#e69f00", "#56b4e9"))
        right.text(sum(parts), place, f" {sum(parts):.1f}", va="center")
    for colour, what in (("#444444", "computing, measured"), ("#e69f00", "messages x 80 ms"),
                         ("#56b4e9", "bytes at 100 Mbps")):
        right.bar(0, 0, color=colour, label=what)
    names = [f"{r['protocol']}  {r['arch']}" for r in results]
    left.set(xlabel="GB of one private token, measured", yticks=range(len(names)))
    left.set_yticklabels(names)
    left.invert_yaxis()
    right.set(xlabel="minutes on a slow link, an estimate: at most")
    fig.legend(*right.get_legend_handles_labels(), fontsize=8, loc="outside lower right", ncols=3)
    for panel in (left, right):
        panel.margins(x=0.2)
        panel.set_xlim(left=0)
        panel.spines[["top", "right"]].set_visible(False)
    first = results[0]
    fig.suptitle(f"{first['n_layer']} layers, {first['n_head']} heads, width {first['n_embd']}, "
                 f"T = {first['block_size']}, vocabulary {first['vocab_size']:,}")
    write_figure(fig, str(path))


def main():
    configure(globals())
    for scheme in schemes.split(","):
        if scheme not in TRUST:
            die(f"schemes are of {', '.join(TRUST)}, and one is {scheme!r}", 2)
    if not Path(into).is_dir():
        die(f"no folder {into} to write into", 2)
    file, results = Path(into) / "schemes.json", []
    try:
        for scheme in schemes.split(","):
            results += results_of(scheme)
            write_whole(file, (dumps(results, indent=1) + "\n").encode())
        if also:
            results += loads(Path(also).read_text())
            write_whole(file, (dumps(results, indent=1) + "\n").encode())
        table(results)
        draw(results, Path(into) / "schemes.png")
    except OSError as e:
        die(e)


if __name__ == "__main__":
    main()
