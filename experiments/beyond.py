"""
What a private token costs beyond 1B parameters: the parts of SM+ScFuFFN at the shapes of GPT-2
small, GPT-3 XL and LLaMA-7B, each measured on the real engine (Cheetah) and multiplied by how often
a pass has it. Two processes; writes beyond.json, and beyond.png with what links would make of it.

    python experiments/beyond.py                           # all three shapes, 20 minutes on 2 cores
    python experiments/beyond.py --shapes=125M --into=/tmp  # the smallest cell
    python experiments/beyond.py --shapes=""               # table and picture of what is there

A product with T rows takes 4 KB of memory for every number of the matrix, so that of a large matrix
only some columns are run, and half as many: bytes and messages grow by the same for each column,
seconds in proportion. So does the embedding. All else is run whole: every head's softmax, every
number of a row.

A layer is attention alone, Q, K, V and the projection, as pi_export.py folds it; the last layer and
the head make one row. The link is an estimate: CPU seconds of both parties on CORES cores, as other
work on the machine hardly changes these; dependent round trips, of a toy that ran with and without
a slow link (ROUNDS); and bytes that flow both ways at once.
"""
import json
import math
import os
import resource
import signal
import sys
import time
from pathlib import Path
from threading import Thread

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from configurator import configure, die, end_on_signals  # noqa: E402

end_on_signals()
import numpy as np  # noqa: E402

from draw import COLOURS, write_figure, write_whole  # noqa: E402
from machine import machine_and_commit  # noqa: E402
from private.meet import free_addresses  # noqa: E402
from private.relay import NETWORKS  # noqa: E402

SHAPES = {  # L, d, H, V: of GPT-2 small, GPT-3 XL with heads of 128, LLaMA-7B
    "125M": (12, 768, 12, 50257),
    "1.3B": (24, 2048, 16, 50257),
    "7B": (32, 4096, 32, 32000),
    "toy": (3, 32, 2, 600),
}
shapes = "125M,1.3B,7B"
block_size = 128     # T
rows_ahead = 16      # further tokens whose products are made ahead at once
weights = 2**20      # of a matrix that T rows are multiplied by at a time; a row by 4 times as many
table_columns = 256  # of the embedding that are run
into = str(HERE.parent / "results")  # the folder of beyond.json, beyond.png and ROUNDS

# bench_spu.py's results of a toy with and without a slow link, all of its layers equal
ROUNDS = ("beyond_rounds_none.json", "beyond_rounds_wan.json")
BANDWIDTHS = {"100 Mbps": 1e8, "1 Gbps": 1e9, "10 Gbps": 1e10}  # bits a second each way
ROUND_TRIPS = {"0.5 ms": 0.5e-3, "20 ms": 20e-3, "80 ms": 80e-3}
BYTES, MESSAGES, SECONDS, CPU = range(4)  # of a cost; CPU: seconds of both parties' processes
CORES = 2  # that both parties share where computing is told by their CPU seconds
CIPHERTEXT = 8192  # numbers, as in private/nonlinear.py, which a reader of beyond.json needn't load


# ------------------------------------------------------------------------------------ measured
def measure(engine, name, keys):
    """
    keys: what the set-up has cost, which makes keys once, or None before it has been run. Returns
    the costs, arrays of bytes, messages, seconds and this party's CPU seconds, of each part of a
    shape's passes: at once and in blocks of columns, each of which is a product of its own.
    """
    from functools import partial

    import jax.numpy as jnp

    from model import GPTConfig
    from private.ahead import Matrix
    from private.block import causal_means, divide, linear, mix, scores
    from private.embed import NO_TOKEN, embed, embed_next, silent
    from private.engine import CLIENT, SERVER
    from private.further import Seats, next_block
    from private.infer import Cache, put_place, set_up
    from private.nonlinear import LOGIT_UNIT, SECURE

    L, d, H, V = SHAPES[name]
    T, client, server = block_size, engine.rank == CLIENT, engine.rank == SERVER
    rng = np.random.default_rng(0)

    def own(owner, shape, size):
        value = None
        if engine.rank == owner:
            value = size * rng.standard_normal(shape, dtype=np.float32)
        return engine.put(shape, owner, value)

    def shared(shape, size=1.0):
        """A secret that neither party knows."""
        return engine.op("share", jnp.add, own(CLIENT, shape, size), own(SERVER, shape, size))

    def cost_of(run, times=1):
        """
        The least of so many runs: the first touches memory, and whichever comes to the end of what
        the engine has at hand for comparisons and truncations makes it anew, 2.5 MB.
        """
        least = np.full(4, np.inf)
        for _ in range(times):
            engine.costs, began = [], time.process_time()
            run()
            cost = sum(count * cost for _, count, cost in engine.costs)
            cost[CPU] = time.process_time() - began
            least = np.minimum(least, cost)
        return least

    def by_columns(most, run, wholes):
        """
        The costs of a run of each of `wholes` columns, at once and in blocks, of which at most so
        many columns are run.
        """
        n = min(most, min(wholes))
        large, small = cost_of(partial(run, n), 2), cost_of(partial(run, n // 2), 2)
        slope = (large - small) / (n - n // 2)
        slope[SECONDS:] = large[SECONDS:] / n
        return [(large + slope * (whole - n), large * whole / n) for whole in wholes]

    def product(x, columns):
        engine.op("matmul", linear, x, own(SERVER, (d, columns), d**-0.5))

    def products(rows, most):
        """Of so many secret rows: Q, K and V, and the projection."""
        return by_columns(most // d, partial(product, shared((rows, d))), (3 * d, d))

    def looked_up(columns):
        c = GPTConfig(block_size=T, vocab_size=V, n_embd=columns, n_head=1)
        ids = np.full(T, NO_TOKEN) if client else None
        embed(engine, "private", c, tables(columns), T, ids, silent, whole=False)

    def tables(columns):
        if not server:
            return None
        return {"wte": rng.standard_normal((V, columns), dtype=np.float32),
                "wpe": rng.standard_normal((T, columns), dtype=np.float32)}

    def attention(qkv):
        """block.attention() behind its first product, which block_size rows have done."""
        s = engine.op("matmul", scores, qkv, n_head=H)                         # (H, T, T)
        e = engine.op("softmax", SECURE.exponentials, s)                       # (H, T, T)
        y = engine.op("matmul", mix, e, qkv, n_head=H)                         # (H, T, d_k)
        engine.op("softmax", divide, y, e, reciprocal=SECURE.reciprocal, most=T)

    def made(columns):
        """A Matrix with a row at hand: of whatever numbers, which bytes don't depend on."""
        matrix = Matrix((d, columns), np.zeros((d, columns), np.uint64) if server else None)
        matrix.masks = np.zeros((1, d), np.uint64)
        matrix.products = np.zeros((1, columns), np.uint64)
        return matrix

    def further_row():
        """A further token's row through a layer whose products have been made ahead."""
        cache = Cache(Seats(T - 1, T - 1, 1, T) if client else None, padded=T - 1, room=1)
        place = put_place(engine, cache, 1, T)
        c = GPTConfig(block_size=T, n_embd=d, n_head=H, use_layernorm=False)
        next_block(engine.op, row, place, {"kv": shared((T, 2 * d))},
                   {"qkv": (made(3 * d),), "o": (made(d),)}, c, SECURE)

    def further_embedding(columns):
        c = GPTConfig(block_size=T, vocab_size=V, n_embd=columns, n_head=1)
        one = np.array([T - 1]) if client else None
        embed_next(engine, "private", c, tables(columns), 1, one, one, whole=False)

    parts = {"set-up": keys or twice(cost_of(partial(set_up, engine)))}
    [parts["embedding"]] = by_columns(table_columns, looked_up, [d])
    parts["Q, K, V"], parts["projection"] = products(T, weights)
    qkv = shared((T, 3 * d), (3 / LOGIT_UNIT) ** 0.5 * (H / d) ** 0.25)        # logits of 3 nats
    parts["attention"] = twice(cost_of(partial(attention, qkv)))
    x, row = shared((T, d)), shared((1, d))
    parts["means"] = twice(cost_of(partial(engine.op, "average", causal_means, x, layers=1)))
    parts["a row's attention"] = twice(cost_of(further_row, 2))
    norm = partial(engine.op, "head", SECURE.normalise, row)
    parts["a row's LayerNorm"] = twice(cost_of(norm, 2))
    parts["a row's product"] = twice(cost_of(partial(product, row, CIPHERTEXT), 2))
    parts["Q, K, V ahead"], parts["projection ahead"] = products(rows_ahead, 4 * weights)
    [parts["a row's embedding"]] = by_columns(table_columns, further_embedding, [d])
    return {part: np.array(costs).tolist() for part, costs in parts.items()}


def twice(cost):
    """Of what is run whole, at once and in blocks."""
    return cost, cost


def run_parties(names, save):
    """Both parties measure shapes; the client hands (name, what was measured) to save()."""
    addresses = free_addresses(2)
    parent_lives, parent_end = os.pipe()
    server = os.fork()  # before jax has threads
    if not server:
        os.close(parent_end)
        Thread(target=end_with, args=[parent_lives]).start()
    from private.engine import CLIENT, SERVER, Engine
    engine = Engine(CLIENT if server else SERVER, addresses, "cheetah", 3600, 60)
    keys = None
    for name in names:
        started, load = time.time(), os.getloadavg()[0]
        own = measure(engine, name, keys)
        keys = own["set-up"]
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if engine.rank == SERVER:
            engine.link.send(CLIENT, json.dumps([own, peak]))
            continue
        theirs, their_peak = json.loads(engine.link.recv(SERVER))
        parts = {part: [[*mine[:CPU], mine[CPU] + other[CPU]]
                        for mine, other in zip(costs, theirs[part])]
                 for part, costs in own.items()}
        peaks = {"client": peak, "server": their_peak}
        print(f"{name}: {time.time() - started:.0f} s", file=engine.terminal, flush=True)
        save(name, {"parts": parts, "peak_memory_bytes": peaks, "load_before": load,
                    "settings": {"block_size": block_size, "weights": weights,
                                 "rows_ahead": rows_ahead, "table_columns": table_columns},
                    **machine_and_commit()})
    if engine.rank == SERVER:
        signal.pause()  # what we sent last may be on its way: stay until the client has ended
    return engine.terminal


def end_with(parent_lives):
    os.read(parent_lives, 1)
    os._exit(0)


# ------------------------------------------------------------------------------- put together
def passes(name, parts, at_once=True):
    """
    {pass: its cost} of a shape: a prompt's, whose layers all have softmax or half of them average,
    and a further token's, with its share of the products made ahead.
    """
    L, d, _, V = SHAPES[name]
    half = L // 2
    p = {part: np.array(costs[0 if at_once else 1]) for part, costs in parts.items()}
    softmax = p["Q, K, V"] + p["attention"] + p["projection"]
    uniform = p["means"] + p["projection"]

    def row_times(columns):
        """A row's product with so many columns: its numbers come back in whole ciphertexts."""
        pieces = columns / CIPHERTEXT
        return p["a row's product"] * (math.ceil(pieces), math.ceil(pieces), pieces, pieces)

    last = p["a row's attention"] + row_times(3 * d) + row_times(d)
    head = row_times(d) + p["a row's LayerNorm"] + row_times(V)
    ends = p["set-up"] + p["embedding"] + last + head
    ahead = (p["Q, K, V ahead"] + p["projection ahead"]) / rows_ahead
    further = L * (p["a row's attention"] + ahead) + p["a row's embedding"] + head
    return {
        "a layer with softmax": softmax,
        "a layer that averages": uniform,
        "first token": (L - 1) * softmax + ends,
        "first token, half uniform": half * uniform + (L - 1 - half) * softmax + ends,
        "a further token": further,
    }


def round_trips():
    """
    {pass: (dependent round trips of a layer, of all else)}: the time that the slow link added to
    the toy's passes, less that of its bytes, in round trips. {} where the toy hasn't run.
    """
    if not all((Path(into) / file).exists() for file in ROUNDS):
        return {}
    none, wan = (json.loads((Path(into) / file).read_text())[0] for file in ROUNDS)
    bandwidth, delay = NETWORKS["wan"]
    L = none["n_layer"]

    def waits(i):
        """Of pass i, by kind of operation."""
        near, far = none["replies"][0]["passes"][i], wan["replies"][0]["passes"][i]
        return {kind: (far["seconds_by_kind"][kind] - near["seconds_by_kind"][kind]
                       - 4 * far["bytes_by_kind"][kind] / bandwidth) / (2 * delay)
                for kind in near["seconds_by_kind"]}

    found = {}
    for name, i in (("first token", 0), ("a further token", 1)):
        by_kind = waits(i)
        layer = by_kind.pop("softmax") + by_kind.pop("matmul")
        found[name] = layer / L, sum(by_kind.values())
    return found


def minutes(name, cost, rounds, bandwidth, round_trip):
    """Of a pass on a link: computing, dependent round trips, and bytes that flow both ways."""
    layer, rest = rounds
    waits = (SHAPES[name][0] * layer + rest) * round_trip
    return (cost[CPU] / CORES + waits + 4 * cost[BYTES] / bandwidth) / 60


def table(results, terminal):
    def say(*cells):
        print(f"| {' | '.join(map(str, cells))} |", file=terminal, flush=True)

    say("", "MB", "in blocks", "messages", "seconds", "CPU seconds of both")
    for name, r in results.items():
        once, blocks = passes(name, r["parts"]), passes(name, r["parts"], at_once=False)
        for one in once:
            say(f"{name}, {one}", f"{once[one][BYTES] / 1e6:,.0f}",
                f"{blocks[one][BYTES] / 1e6:,.0f}", f"{once[one][MESSAGES]:,.0f}",
                f"{once[one][SECONDS]:,.0f}", f"{once[one][CPU]:,.0f}")
        peak = max(r["peak_memory_bytes"].values()) / 1e9
        say(f"{name}, peak memory of a party", f"{peak:.1f} GB")
    for one, rounds in round_trips().items():
        say(one, f"{rounds[0]:.0f} round trips a layer, {rounds[1]:.0f} besides")
        say(f"{one}, minutes", *BANDWIDTHS)
        for name, r in results.items():
            cost = passes(name, r["parts"])[one]
            for trip, seconds in ROUND_TRIPS.items():
                say(f"{name}, {trip}", *(f"{minutes(name, cost, rounds, bits, seconds):,.1f}"
                                         for bits in BANDWIDTHS.values()))


def draw(results, path):
    """Minutes of a first and of a further token by link, a line for each shape."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    links = [(a, b) for b in ROUND_TRIPS for a in BANDWIDTHS]
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for ax, (one, rounds) in zip(axes, round_trips().items()):
        for (name, r), colour in zip(results.items(), COLOURS[1:]):
            cost = passes(name, r["parts"])[one]
            taken = [minutes(name, cost, rounds, BANDWIDTHS[a], ROUND_TRIPS[b]) for a, b in links]
            ax.plot(taken, "o-", color=colour, label=f"{name}, {cost[BYTES] / 1e9:.2g} GB")
            ax.axhline(cost[CPU] / CORES / 60, color=colour, linestyle=":")
        ax.set(yscale="log", title=one, ylabel="minutes, an estimate", xticks=range(len(links)))
        ax.set_xticklabels([f"{a}, {b}" for a, b in links], rotation=40, ha="right", fontsize=8)
        ax.set_ylim(top=6 * ax.get_ylim()[1])  # room for the legend
        ax.legend(fontsize=8, title="dotted: computing alone", loc="upper left")
    fig.suptitle(f"SM+ScFuFFN, T = {block_size}, {CORES} cores for both parties")
    write_figure(fig, str(path))


def main():
    configure(globals())
    names = [name for name in shapes.split(",") if name]
    for name in names:
        if name not in SHAPES:
            die(f"shapes are of {', '.join(SHAPES)}, and one is {name!r}", 2)
    file = Path(into) / "beyond.json"
    results = {}
    try:
        if file.exists():
            results = json.loads(file.read_text())

        def save(name, result):
            results[name] = result
            write_whole(file, (json.dumps(results, indent=1) + "\n").encode())

        terminal = run_parties(names, save) if names else sys.stdout
        table(results, terminal)
        if round_trips():
            draw(results, Path(into) / "beyond.png")
    except (OSError, ValueError) as e:
        die(e)
    os._exit(0)


if __name__ == "__main__":
    main()
