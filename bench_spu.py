"""
Run a model privately between two parties with SecretFlow SPU (two-party Cheetah): the client holds a prompt, the server
the weights, and the client alone learns the logits of the next token. Then say what it cost, as the paper's tables do.

    python bench_spu.py --ckpt=out/ckpt.pt --prompt="def add(a, b):"      # both parties on this machine, two processes
    python bench_spu.py --archs=sm_ln_g,sm_ln_r,sm_scfuffn --timeout=3600   # the paper's Table 2, random weights
    python bench_spu.py --archs=sm_ln_g,sm_scfuffn --vocab_size=512 --n_layer=2 --n_embd=64 --n_head=2 --network=wan   # a toy, on a slow link
    python bench_spu.py --ckpt=out/ckpt.pt --windows=2                    # and how far secure is from plain on held-out text

On two machines, after `python pi_export.py` on the server's and a copy of public.json on the client's:

    python bench_spu.py --role=server --private=out/private --listen=0.0.0.0:9000 --peer=CLIENT:9000
    python bench_spu.py --role=client --public=public.json --listen=0.0.0.0:9000 --peer=SERVER:9000 --prompt="def add(a, b):"

Each side listens on PORT for SPU's link; the server also on PORT + 1, where they greet, agree on model and code and notice each
other's death. With --protocol=aby3 a third party runs --role=helper, and --peer names the two others in the order client,
server, helper. Semi-honest security: all follow the protocol. The server learns nothing of the prompt but that it fits the
context; the client learns the result, and what public.json says: the architecture, the tokenizer; if the server exported with
--embedding=public, also the embeddings.
Exit status 0; 1 with a line on each side that says what went wrong; 2 for a bad setting; 130 / 143 after Ctrl-C / SIGTERM.
"""
import hashlib
import os
import platform
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.util import find_spec
from json import dumps, load, loads

import numpy as np

from configurator import configure, die, one_of
from private.relay import NETWORKS, host_port

role = "both"            # both (all parties here, a process each) | client | server | helper (aby3's third)
ckpt = ""                # role both: a checkpoint; the newest one under out/ if empty and no archs are given
archs = ""               # role both: config files of config/, comma-separated, with random weights instead of a checkpoint
prompt = "def add(a, b):"  # the client's secret
embedding = "private"    # role both: private | public, which gives the client the token and position embeddings (see pi_export.py)
reveal = "logits"        # what the client learns: logits, or only the most likely token
windows = 0              # also judge secure against plain on that many held-out windows, all positions, revealed to the client
windows_file = ""        # client: the .bin of uint16 tokens they are cut from; role both takes the checkpoint's val.bin if empty
private = "out/private"  # server: folder of server.npz and public.json
public = ""              # client, helper: public.json
listen = ""              # one role: HOST:PORT where this party listens
peer = ""                # one role: HOST:PORT where the other listens
tls = ""                 # folder with ca.pem, cert.pem and key.pem: encrypt, and refuse a peer that ca.pem didn't sign
protocol = "cheetah"     # cheetah | semi2k (whose random triples come from the client: faster, and no secrecy from it) | aby3 (three parties)
network = "none"         # role both: none | lan | wan, the link between the processes, see relay.py
measure_layers = 0       # > 0: run that many layers, the last one and two pieces of the embedding, and multiply; the result then means nothing
plain = False            # as one would write it first: jax.nn's functions, SPU's defaults, secret-shared weights
baseline = False         # role both: each model with --plain first, and the ratio
json = ""                # write the results: a JSON list of an object per architecture, or the client's own result
logits_file = ""         # write all revealed logits as .npz; of several models, the last one's
chart = ""               # role both: draw the bytes by kind of operation as a PNG
timeout = 600            # seconds without a word in the middle of a step before giving up
connect_timeout = 20     # seconds to wait for the other party at the start; half of it for the link once they have met
# with --archs, the model: any key of GPTConfig; the paper's GPT-2 small
block_size = 128
vocab_size = 50257
n_layer = 12
n_head = 12
n_embd = 768
final_layernorm = True   # LN before the vocabulary, one row
temperature_init = 1.0   # of the architectures with learnable temperatures
bias = False             # biases in every linear layer
gelu_tanh = False        # GPT-2's tanh GELU
seed = 1337

PUBLISHED = {  # (n_layer, block_size): {arch: (GB, minutes)} of the paper's Tables 2, 6, 7 and 3, at n_embd 768
    (12, 128): {"SM+LN+G": (25.32, 8.21), "SM+LN+R": (9.44, 6.06), "SM+ScFuFFN": (6.43, 4.76)},
    (12, 256): {"SM+LN+G": (58.51, 16.57), "SM+LN+R": (26.73, 12.59), "SM+ScFuFFN": (20.72, 10.45)},
    (18, 128): {"SM+LN+G": (37.17, 10.77), "SM+LN+R": (13.34, 8.04), "SM+ScFuFFN": (8.83, 6.07)},
    (12, 512): {"SM+LN+G": (145.24, 30.74), "SM+LN+R": (81.71, 23.54), "SM+ScFuFFN": (69.68, 19.44)},
}
HERE = os.path.dirname(os.path.abspath(__file__))
AGREED = ("protocol", "measure_layers", "reveal", "windows", "plain")  # besides the model, the code and its libraries
CODE = ("bench_spu.py", "model.py", "pi_export.py", *(f"private/{name}.py" for name in ("block", "engine", "files", "infer", "lookup", "meet", "nonlinear", "plain")))  # what both run: another of these would make garbage of the result


# ------------------------------------------------------------------------------------------------ one party
def read_json(path):
    try:
        with open(path) as f:
            return load(f)
    except (OSError, ValueError) as e:
        die(f"can't read {path}: {e}")


def write_json(path, value):
    from pi_export import write_whole
    write_whole(path, lambda f: f.write(dumps(value, indent=1).encode()))


def tokenizer_of(public):
    from data.prepare import load_tokenizer
    return load_tokenizer(public["tokenizer"])


def tokenize(public, text):
    """The prompt's token ids. Exits with a line if there is no tokenizer, nothing to tokenize or too much."""
    V, T = public["config"]["vocab_size"], public["config"]["block_size"]
    if public["tokenizer"] is None:  # random weights: any tokens will do
        return np.random.default_rng(seed).integers(0, V, T)
    ids = tokenizer_of(public).encode_ordinary(text)
    if not ids:
        die("the prompt is empty: give --prompt")
    if len(ids) > T:
        die(f"the prompt has {len(ids)} tokens and the model's context is {T}: shorten it")
    return in_vocabulary(np.array(ids), V, "the prompt")


def in_vocabulary(ids, V, what):
    return ids if ids.max() < V else die(f"{what} has token {ids.max()}, outside the model's vocabulary of {V}")


def held_out(public, path):
    """(windows, T + 1) token ids, evenly spread over a .bin of uint16 tokens: T inputs and their targets."""
    T = public["config"]["block_size"]
    try:
        tokens = np.fromfile(path, np.uint16).astype(np.int64)
    except OSError as e:
        die(f"can't read held-out text for --windows: {e}; give --windows_file")
    if len(tokens) < T + 1:
        die(f"{path} has {len(tokens)} tokens, and a window takes {T + 1}")
    starts = np.linspace(0, len(tokens) - T - 1, windows).astype(int)
    return in_vocabulary(np.stack([tokens[s:s + T + 1] for s in starts]), public["config"]["vocab_size"], path)


def check_layers(embedding):
    if embedding != "private" and measure_layers == 1:
        die("--measure_layers must be 0 or at least 2 with a public embedding: the first layer, its input the client's own, is cheaper than the rest", 2)


def totals(costs):
    """The costs of infer() added up, in all and by kind of operation."""
    by_kind = {}
    for kind, times, cost in costs:
        by_kind[kind] = by_kind.get(kind, 0) + times * cost
    total = sum(by_kind.values())
    return {"bytes_total": int(total[0]), "bytes_by_kind": {k: int(v[0]) for k, v in by_kind.items()}, "bytes_of_truncations": int(total[3]),
            "rounds": int(total[1]), "rounds_by_kind": {k: int(v[1]) for k, v in by_kind.items()},
            "seconds": float(total[2]), "seconds_by_kind": {k: float(v[2]) for k, v in by_kind.items()}}


def one_party():
    """Role client, server or helper: meet, compute, tell. The client prints the token and writes its result."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler would wait for the step that C++ is in
    from model import GPTConfig
    from private.engine import Engine
    from private.infer import infer
    from private.meet import ROLES, greet, quit_now
    from pi_export import load_embedding, load_public, load_server
    rank, weights, ids = ROLES.index(role), None, None
    path = os.path.join(private, "public.json") if role == "server" else public or die(f"--role={role} needs --public, the server's public.json", 2)
    try:
        shared = load_public(path)
        check_layers(shared["embedding"])
        c = asdict(GPTConfig(**shared["config"]))
        if plain != ("blocks.0.qk" in shared["shapes"]):
            die("--plain takes other weights than pi_export.py writes: it is for --role=both, which exports them itself", 2)
        if role == "server":
            shared, weights = load_server(private)
        if role == "client":
            ids, texts = tokenize(shared, prompt), held_out(shared, windows_file) if windows else []
            weights = None if shared["embedding"] == "private" else load_embedding(os.path.dirname(path), shared)
    except ValueError as e:
        die(e)
    import jax
    import spu
    addresses = [":".join(map(str, host_port(a, "--peer"))) for a in peer.split(",")]
    addresses.insert(rank, ":".join(map(str, host_port(listen, "--listen"))))
    if len(addresses) != (3 if protocol == "aby3" else 2):
        die(f"--peer must name {'two others' if protocol == 'aby3' else 'one other'}, and is {peer!r}", 2)
    try:  # SPU's own message for this is none
        socket.create_server(host_port(listen, "--listen")).close()
    except OSError as e:
        die(f"can't listen on {listen}: {e}")
    same = {"model": dumps(shared, sort_keys=True).encode(), "code": b"".join(open(os.path.join(HERE, name), "rb").read() for name in CODE)}
    same = {k: hashlib.sha256(v).hexdigest()[:16] for k, v in same.items()} | {"SPU version": spu.__version__, "jax version": jax.__version__}
    session, farewell = greet(rank, addresses, same | {k: globals()[k] for k in AGREED}, connect_timeout, timeout, tls)
    started = time.time()
    try:
        party = Engine(rank, addresses, protocol, timeout, connect_timeout / 2, tls, plain, session)

        def told(stage, costs, what=""):
            print(f"{what}{stage:<24} {sum(cost[0] for _, _, cost in costs) / 1e6:10.1f} MB {time.time() - started:8.1f} s", file=party.terminal, flush=True)

        result, costs = infer(party, shared, weights, ids, told, measure_layers, reveal)
        if role == "client":  # told and written here: a window may fail yet
            r = totals(costs) | {"seconds_wall": time.time() - started, "measured_layers": min(measure_layers or c["n_layer"], c["n_layer"])}
            if r["measured_layers"] == c["n_layer"]:
                token = r["token"] = int(result.argmax() if reveal == "logits" else result)
                known = shared["tokenizer"] and token < tokenizer_of(shared).n_vocab  # the model's vocabulary may be padded beyond it
                text = repr(tokenizer_of(shared).decode([token])) if known else ""
                print(f"next token: {token} {text}", file=party.terminal, flush=True)
            keep(r, result, [])
        all_logits = []
        for i in range(windows):
            all_logits.append(infer(party, shared, weights, texts[i][:-1] if ids is not None else None,
                                    lambda stage, costs: told(stage, costs, f"window {i + 1}/{windows}, "), every_row=True)[0])
    except RuntimeError as e:
        time.sleep(1)  # if the other party died, the watcher says so better
        words = [line.strip() for line in str(e).replace("what:", "").splitlines() if line.strip()]
        quit_now(f"SPU stopped: {words[0] if words else type(e).__name__}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    others = farewell({role: peak} if role == "server" else {})  # the client says nothing: its memory could tell of its text
    if role != "client":
        return
    r["peak_memory_bytes"] = {k: v for word in ({"client": peak}, *others) for k, v in word.items()}
    if windows:
        r |= {"windows": windows, "secure_perplexity": perplexity(np.array(all_logits), texts[:, 1:])}
        print(f"perplexity of {windows} x {c['block_size']} held-out tokens: {r['secure_perplexity']:.2f}", file=party.terminal, flush=True)
    keep(r, result, all_logits)


def keep(r, logits, of_windows):
    """Write the client's result, and the revealed logits of a whole model, where asked for."""
    if json:
        write_json(json, r)
    if logits_file and "token" in r and reveal == "logits":
        from pi_export import write_whole
        write_whole(logits_file, lambda f: np.savez(f, next=logits, windows=np.array(of_windows, np.float32)))


def perplexity(logits, targets):
    """exp of the mean cross-entropy: logits (N, T, V), targets (N, T)."""
    import torch
    return torch.nn.functional.cross_entropy(torch.from_numpy(logits).double().flatten(0, 1), torch.from_numpy(targets).flatten()).exp().item()


# ------------------------------------------------------------------------------------------------ all parties here
def both(model, tokenizer, val, plain=False, done=()):
    """Export the model, run every party as a process of its own, return the client's result with plain logits beside it. done: earlier results."""
    import torch
    from pi_export import export, write
    from private.plain import plain_export
    from private.meet import ROLES, free_addresses
    me, parties, c = [sys.executable, os.path.join(HERE, "bench_spu.py")], [], model.config
    roles = ROLES[:3 if protocol == "aby3" else 2]
    with tempfile.TemporaryDirectory() as folder:
        secret, result, logits = os.path.join(folder, "server"), os.path.join(folder, "result.json"), logits_file or os.path.join(folder, "logits.npz")
        try:
            write(model, tokenizer, secret, plain_export if plain else export, embedding)
        except ValueError as e:
            die(e)
        shared = os.path.join(secret, "public.json")
        ids, texts = tokenize(read_json(shared), prompt), held_out(read_json(shared), val) if windows else None
        addresses = free_addresses(2 * len(roles))
        own = seen = addresses[:len(roles)]
        relay = None
        common = [f"--{k}={globals()[k]}" for k in (*AGREED, "timeout", "connect_timeout", "seed", "tls")] + [f"--plain={plain}"]
        extra = {"client": [f"--public={shared}", f"--prompt={prompt}", f"--windows_file={val}", f"--json={result}", f"--logits_file={logits}"],
                 "server": [f"--private={secret}"], "helper": [f"--public={shared}"]}
        try:
            if network != "none":
                seen = addresses[len(roles):]
                relay = subprocess.Popen([sys.executable, os.path.join(HERE, "private", "relay.py"), f"--network={network}", f"--client={own[0]}",
                                          f"--server={own[1]}", f"--client_front={seen[0]}", f"--server_front={seen[1]}"], stdout=subprocess.PIPE, text=True)
                print(relay.stdout.readline(), end="", flush=True)
            for rank, name in enumerate(roles):
                others = ",".join(seen[i] for i in range(len(roles)) if i != rank)
                parties.append(subprocess.Popen([*me, f"--role={name}", f"--listen={own[rank]}", f"--peer={others}", *extra[name], *common],
                                                stdout=None if name == "client" else subprocess.DEVNULL))
            while any(p.poll() is None for p in parties) and not any(p.poll() for p in parties):
                time.sleep(0.1)
            failed = [(name, p.returncode) for name, p in zip(roles, parties) if p.returncode]
            for p in parties:  # if one failed the others notice by themselves, and say so
                p.wait(timeout=20)
        except subprocess.TimeoutExpired:
            pass
        finally:  # Ctrl-C and SIGTERM come here too
            for p in parties:
                p.kill()
                p.wait()
            if relay:
                relay.terminate()
                passed = relay.communicate()[0]
        if failed:
            name, status = failed[0]
            if json and os.path.exists(result):  # the next token was there before a window failed
                write_json(json, [*done, read_json(result)])
            die(f"the private run failed, see above ({name}: " + (f"exit {status})" if status > 0 else f"killed by {signal.Signals(-status).name})"))
        r = read_json(result)
        if relay:
            r["bytes_tcp"] = sum(loads(passed).values())
        if "token" in r:
            with torch.no_grad():
                clear = model(torch.from_numpy(ids)[None])[0][0, -1].numpy()
                r["plain_token"] = int(clear.argmax())
                if reveal == "logits":
                    secure = np.load(logits)
                    errors = [np.abs(secure["next"] - clear).max()]
                    if windows:
                        clear = model(torch.from_numpy(texts[:, :-1]))[0].numpy()
                        errors.append(np.abs(secure["windows"] - clear).max())
                        r["plain_perplexity"] = perplexity(clear, texts[:, 1:])
                        r["top1_agreement"] = float((clear.argmax(-1) == secure["windows"].argmax(-1)).mean())
                    r["max_abs_err"] = float(max(errors))
    import spu
    sizes = {k: getattr(c, k) for k in ("n_layer", "block_size", "n_embd", "n_head", "vocab_size")}
    return {"arch": c.name + " plain" * plain, **sizes, "network": network, "protocol": protocol, "max_abs_err": None, **r,
            "nonlinear_ops": {k: f"{n} x {a}x{b}" for k, (n, (a, b)) in model.nonlinear_ops().items()}, "flops": model.flops(),
            "settings": {"reveal": reveal, "embedding": embedding, "tls": bool(tls), "seed": seed, "plain": plain, "weights": "random" if archs else "trained"},
            "versions": {"spu": spu.__version__, "torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()},
            "machine": f"{platform.machine()}, {os.cpu_count()} cores for all parties"}


def models():
    """(model, tokenizer or None, path of val.bin) of the checkpoint, or of every architecture asked for, its weights random and seeded."""
    import torch
    from model import GPT, GPTConfig, load_checkpoint
    if not archs:
        from glob import glob
        found = [ckpt] if ckpt else sorted(glob("out/**/ckpt.pt", recursive=True), key=os.path.getmtime)
        if not found:
            die("no checkpoint under out/: train one with python train.py, or give --ckpt or --archs")
        try:
            checkpoint = load_checkpoint(found[-1])
        except (OSError, ValueError) as e:
            die(e)
        s = checkpoint.get("settings", {})
        val = os.path.join(s.get("data_dir", "data"), s.get("dataset", "pycode"), "val.bin")
        yield GPT.from_checkpoint(checkpoint), checkpoint.get("tokenizer"), windows_file or val
        return
    for name in archs.split(","):  # all of them are read before the first is run
        if not os.path.isfile(os.path.join(HERE, "config", name + ".py")):
            die(f"no architecture {name!r}: --archs takes names of config/, such as sm_ln_g,sm_scfuffn", 2)
    keys = [k for k in GPTConfig.__dataclass_fields__ if k in globals()]
    for name in archs.split(","):
        flags = {}
        with open(os.path.join(HERE, "config", name + ".py")) as f:
            exec(f.read(), {}, flags)
        flags = {k: v for k, v in flags.items() if k in GPTConfig.__dataclass_fields__}
        torch.manual_seed(seed)
        try:
            yield GPT(GPTConfig(**{k: globals()[k] for k in keys} | flags)).eval(), None, windows_file
        except ValueError as e:
            die(e, 2)


# ------------------------------------------------------------------------------------------------ what it cost
def published(r):
    """(GB, minutes) that the paper prints for a run's architecture and size, or None."""
    if (r["n_embd"], r["n_head"], r["vocab_size"], r["protocol"]) == (768, 12, 50257, "cheetah"):
        return PUBLISHED.get((r["n_layer"], r["block_size"]), {}).get(r["arch"].removesuffix(" plain"))


def table(results):
    """The results side by side, a column for each, as the paper's tables have them."""
    first, rows = results[0], [["", *(r["arch"] for r in results)]]

    def row(name, cell):
        rows.append([name, *(cell(r) or "" for r in results)])

    for kind, name in dict(SM="softmaxes", LN="LayerNorms", G="GELUs", R="ReLUs").items():
        if any(kind in r["nonlinear_ops"] for r in results):
            row(name, lambda r: r["nonlinear_ops"].get(kind))
    row("FLOPs, FFN / attention", lambda r: " / ".join(f"{r['flops'][k] / 1e9:.1f}B" if r["flops"][k] > 1e8 else f"{r['flops'][k] / 1e6:.2f}M" for k in ("ffn", "attn")))
    row("MB, both directions" + " of the client's links" * (first["protocol"] == "aby3"), lambda r: f"{r['bytes_total'] / 1e6:,.1f}")
    for kind in dict.fromkeys(kind for r in results for kind in r["bytes_by_kind"]):
        row(f"  {kind}", lambda r: f"{r['bytes_by_kind'].get(kind, 0) / 1e6:,.1f}")
    row("  (truncations, of all)", lambda r: f"{r['bytes_of_truncations'] / 1e6:,.1f}")
    row("messages (round trips at most)", lambda r: f"{r['rounds']:,}")
    row(f"seconds, link {first['network']}", lambda r: f"{r['seconds']:.1f}")
    row("layers run, of", lambda r: f"all {r['n_layer']}" if r["measured_layers"] == r["n_layer"] else
        f"{r['measured_layers']}{' + last' * (not r['settings']['plain'])}, {r['n_layer']} (multiplied)")
    if len(results) > 1:
        row(f"fewer bytes than {first['arch']}", lambda r: f"{first['bytes_total'] / r['bytes_total']:.2f}x")
        row(f"faster than {first['arch']}", lambda r: f"{first['seconds'] / r['seconds']:.2f}x")
    if any(map(published, results)):
        row("published by the paper: GB", lambda r: published(r) and f"{published(r)[0]:.2f}")
        row("  minutes, its machines", lambda r: published(r) and f"{published(r)[1]:.2f}")
    row("peak memory of a party, GB", lambda r: f"{max(r['peak_memory_bytes'].values()) / 1e9:.1f}")
    if any("token" in r for r in results):
        row("max |secure - plain| logit", lambda r: f"{r['max_abs_err']:.1e}" if r["max_abs_err"] is not None else "")
        row("same token as in plain", lambda r: {True: "yes", False: "NO", None: ""}[r["token"] == r["plain_token"] if "token" in r else None])
    if windows:
        row("top-1 agreement", lambda r: f"{r['top1_agreement']:.1%} of {windows * r['block_size']}")
        row("perplexity, secure / plain", lambda r: f"{r['secure_perplexity']:.3f} / {r['plain_perplexity']:.3f}")
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip() for row in rows)


def draw(results, path):
    """A bar of bytes for each architecture, split by kind of operation."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    kinds = sorted({kind for r in results for kind in r["bytes_by_kind"]}, key=lambda k: -max(r["bytes_by_kind"].get(k, 0) for r in results))
    fig, ax = plt.subplots(figsize=(9, 1.6 + 0.6 * len(results)), layout="constrained")
    unit, name = (1e9, "GB") if max(r["bytes_total"] for r in results) > 1e9 else (1e6, "MB")
    y, left = np.arange(len(results))[::-1], np.zeros(len(results))
    for i, kind in enumerate(kinds):
        width = np.array([r["bytes_by_kind"].get(kind, 0) / unit for r in results])
        color = plt.cm.viridis(0.05 + 0.9 * i / max(1, len(kinds) - 1))
        ax.barh(y, width, left=left, label=kind, color=color, edgecolor="white", linewidth=0.8)
        left += width
    for at, total in zip(y, left):
        ax.text(total, at, f" {total:.2f} {name}", va="center")
    r = results[0]
    ax.set(yticks=y, yticklabels=[r["arch"] for r in results], xlim=(0, 1.15 * left.max()), xlabel=f"{name} of one private next token, both directions",
           title=f"{r['n_layer']} layers{', ' + str(r['measured_layers']) + ' measured' if r['measured_layers'] < r['n_layer'] else ''}, width {r['n_embd']}, "
                 f"T = {r['block_size']}, vocabulary {r['vocab_size']:,}, {r['protocol']}")
    ax.legend(ncols=1, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=150)


def main():
    configure(globals())
    one_of(globals(), role=("both", "client", "server", "helper"), protocol=("cheetah", "semi2k", "aby3"), network=("none", *NETWORKS),
           reveal=("logits", "token"), embedding=("private", "public"))
    for key, least in dict(measure_layers=0, windows=0, seed=0, timeout=1, connect_timeout=1).items():
        if globals()[key] < least:
            die(f"{key} must be at least {least}, and is {globals()[key]}", 2)
    for key in ("private", "public", "windows_file", "tls", "json", "logits_file", "chart"):
        globals()[key] = os.path.expanduser(globals()[key])
    for path in filter(None, (json, logits_file, chart)):
        if os.path.isdir(path) or not os.access(os.path.join(os.path.dirname(path), "."), os.W_OK):
            die(f"can't write {path}: its folder is missing or not ours to write, or it is one itself", 2)
    if chart and not (chart.endswith(".png") and find_spec("matplotlib")):
        die(f"chart, {chart!r}, must end in .png, and drawing needs matplotlib: pip install matplotlib", 2)
    if embedding == "public" and role != "both":
        die("--embedding is chosen by pi_export.py, and here for --role=both", 2)
    check_layers(embedding)
    if windows and (reveal == "token" or measure_layers or archs):
        die("--windows compares the logits of a whole trained model: not with --reveal=token, --measure_layers or --archs", 2)
    if network != "none" and protocol == "aby3":
        die("--network joins two parties, and aby3 has three", 2)
    if not find_spec("spu"):
        die("spu is not installed: it needs Python 3.10 or 3.11, then pip install -r requirements.txt")
    if tls:
        from private.meet import tls_files
        tls_files(tls)
    if role != "both":
        one_party()
        sys.stderr.flush()
        os._exit(0)  # SPU's threads outlive main(), and freeing what they use ended one run in seventy by SIGSEGV, its result written
    for number in (signal.SIGINT, signal.SIGTERM):  # so that no party outlives us
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    results = []
    for model, tokenizer, val in models():
        for as_first in [True] * baseline + [plain]:
            print(f"--- {model.config.name}{' plain' * as_first}", flush=True)
            results.append(both(model, tokenizer, val, as_first, results))
            if json:  # after each, so that an interrupted comparison keeps what it has
                write_json(json, results)
    print(table(results))
    if measure_layers:
        print("multiplied: equal layers that were not run, and the embedding beyond two pieces, count as the last that was")
    if chart:
        draw(results, chart)


if __name__ == "__main__":
    try:
        main()
    except OSError as e:  # a full disk, maybe with SPU's threads alive, see above
        from private.meet import quit_now
        quit_now(e)
