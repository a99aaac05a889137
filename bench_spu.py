"""
Run a model privately between two parties with SecretFlow SPU (two-party Cheetah): the client holds a prompt, the server
the weights, and the client alone learns the logits of the next token.

    python bench_spu.py --ckpt=out/ckpt.pt --prompt="def add(a, b):"      # both parties on this machine, two processes
    python bench_spu.py --archs=sm_ln_g,sm_ln_r,sm_scfuffn --vocab_size=512 --n_layer=2 --n_embd=64 --n_head=2   # random weights

On two machines, after `python pi_export.py` on the server's and a copy of public.json on the client's:

    python bench_spu.py --role=server --private=out/private --listen=0.0.0.0:9000 --peer=CLIENT:9000
    python bench_spu.py --role=client --public=public.json --listen=0.0.0.0:9000 --peer=SERVER:9000 --prompt="def add(a, b):"

Each side uses two ports, PORT for SPU's link and PORT + 1 to greet, agree on the model and notice the other's death.
Semi-honest security: both follow the protocol. The server learns nothing of the prompt but that it fits the context; the
client learns the logits, and what public.json says: the architecture, the tokenizer. The link is not encrypted here.
Exit status 0, or 1 with one line saying what went wrong on both sides.
"""
import hashlib
import json
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from importlib.util import find_spec

import numpy as np

from configurator import configure, die

role = "both"            # both (two processes here) | client | server
ckpt = ""                # role both: a checkpoint; the newest one under out/ if empty and no archs are given
archs = ""               # role both: config files of config/, comma-separated, with random weights instead of a checkpoint
prompt = "def add(a, b):"  # the client's secret
private = "out/private"  # server: folder of server.npz and public.json
public = ""              # client: public.json
listen = ""              # client, server: HOST:PORT where this party listens
peer = ""                # client, server: HOST:PORT where the other listens
protocol = "cheetah"     # cheetah | semi2k (whose random triples come from the client: faster, and no secrecy from it)
measure_layers = 0       # > 0: run that many layers and multiply; the logits then mean nothing
json_path = ""           # role both: write the results as a JSON list
timeout = 600            # seconds without a word from the other party's computation before giving up
connect_timeout = 30     # seconds to wait for the other party at the start
# with --archs, the model: the keys of GPTConfig; the paper's GPT-2 small
block_size = 128
vocab_size = 50257
n_layer = 12
n_head = 12
n_embd = 768
seed = 1337

CHUNK = 2048   # rows of the embedding a matrix product takes: one for all would need 88 GB at V = 50257
SCALE = 2.0**16  # the embedding is looked up as integers, exact to 1 / SCALE


# ------------------------------------------------------------------------------------------------ one party
class Party:
    """One side of the computation: SPU's runtime and link, and what its profile says. rank 0 is the client, 1 the server."""

    def __init__(self, rank, addresses):
        import spu
        from spu import libspu
        self.spu, self.rank, self.total, self.by_kind = spu, rank, np.zeros(4), {}
        # SPU's profile is written by C++ to stdout: send that to a file, and keep the terminal for ourselves
        self.profile = tempfile.TemporaryFile("w+")
        self.terminal = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(self.profile.fileno(), 1)
        desc = libspu.link.Desc()
        for name, address in zip(("client", "server"), addresses):
            desc.add_party(name, address)
        desc.recv_timeout_ms = desc.http_timeout_ms = timeout * 1000
        self.link = libspu.link.create_brpc(desc, rank)
        kind = {"cheetah": libspu.ProtocolKind.CHEETAH, "semi2k": libspu.ProtocolKind.SEMI2K}[protocol]
        config = libspu.RuntimeConfig(protocol=kind, field=libspu.FieldType.FM64, fxp_fraction_bits=18)
        config.experimental_enable_colocated_optimization = True  # private x secret is a third of secret x secret
        config.fxp_exp_iters = 1  # pi_export.square
        config.enable_pphlo_profile = config.enable_hal_profile = True
        self.config = libspu.RuntimeConfig()
        # Not bound in Python: cheetah_2pc_config.ot_kind = EMP_Ferret, the same bytes in an eighth of the messages
        self.config.ParseFromString(config.SerializeToString() + bytes([0xC2, 0x04, 0x02, 0x18, 2]))
        self.runtime, self.io, self.compiled = spu.Runtime(self.link, self.config), spu.Io(2, self.config), {}

    def put(self, name, shape, owner, value=None, dtype=np.float32):
        """A secret input of `owner`'s: it alone gives a value, the other party only the shape."""
        value = np.ascontiguousarray(value, dtype) if self.rank == owner else np.zeros(shape, dtype)
        assert value.shape == tuple(shape), (name, value.shape, shape)
        self.runtime.set_var(name, self.io.make_shares(value, self.spu.Visibility.VIS_SECRET, owner)[self.rank])

    def run(self, key, function, inputs, output, kind):
        """Compile (once per key) and run function over the named values; add its bytes to `kind`. inputs: {name: (shape, dtype)}."""
        import jax
        import spu.utils.frontend as frontend
        if key not in self.compiled:
            example = [jax.ShapeDtypeStruct(*spec) for spec in inputs.values()]
            self.compiled[key] = frontend.compile(frontend.Kind.JAX, function, example, {}, list(inputs), [self.spu.Visibility.VIS_SECRET] * len(example),
                                                  lambda flat: [output], copts=self.spu.libspu.CompilerOptions())
        start, at = time.time(), os.fstat(self.profile.fileno()).st_size
        self.runtime.run(self.compiled[key][0])
        seconds = time.time() - start
        self.profile.seek(at)
        log = self.profile.read()
        sent, received, sends, receives = map(int, re.findall(r"Link details: total send bytes (\d+), recv bytes (\d+), send actions (\d+), recv actions (\d+)", log)[-1])
        truncation = sum(int(a) + int(b) for a, b in re.findall(r"- trunc\w*, executed .*?send bytes (\d+) recv bytes (\d+)", log))
        spent = np.array([sent + received, max(sends, receives), seconds, truncation])
        self.by_kind[kind] = self.by_kind.get(kind, 0) + spent
        self.total = self.total + spent
        return self.compiled[key][1]

    def reveal(self, name):
        """The value, to the client alone: the server sends its share and learns nothing."""
        share = self.runtime.get_var(name)
        if self.rank == 1:
            for part in (share.meta, *share.share_chunks):
                self.link.send(0, part)
            return None
        theirs = self.spu.libspu.Share()
        theirs.meta = self.link.recv(1)
        theirs.share_chunks = [self.link.recv(1) for _ in share.share_chunks]
        return self.io.reconstruct([share, theirs])


def infer(party, public, weights, ids, progress):
    """
    One private next token. public: public.json's dict; weights: server.npz's arrays on the server, None on the client;
    ids: the prompt's tokens on the client, None on the server. Returns the logits (V,) on the client, None on the server.
    """
    import jax.numpy as jnp
    from model import GPTConfig
    from pi_export import SECURE, block_steps, head_steps, square
    c, shapes = GPTConfig(**public["config"]), {k: tuple(v) for k, v in public["shapes"].items()}
    T, V, d = c.block_size, c.vocab_size, c.n_embd
    server = weights is not None
    one_hot = last = None
    if ids is not None:
        one_hot, last = np.zeros((T, V), np.int32), np.zeros((1, T), np.float32)
        one_hot[np.arange(len(ids)), ids] = 1  # rows past the prompt are empty: no position before them sees them
        last[0, len(ids) - 1] = 1

    specs = {}

    def put(name, shape, owner, value, dtype=np.float32):
        specs[name] = (tuple(shape), dtype)
        party.put(name, shape, owner, value, dtype)

    def step(kind, output, function, inputs, scope):
        out = party.run((scope, output, tuple(inputs), kind), function, {name: specs[name] for name in inputs}, output, kind)
        specs[output] = (out.shape, out.dtype)

    # a first truncation, comparison and square between shares make both sides' oblivious-transfer set-up, counted apart
    put("mine", (2, 2), 0, None if server else np.ones((2, 2)))
    put("theirs", (2, 2), 1, np.ones((2, 2)) if server else None)
    step("set-up", "ready", lambda a, b: jnp.maximum(square(a + b) @ (a + b), a), ["mine", "theirs"], "set-up")
    progress("set-up")

    for start in range(0, V, CHUNK):
        rows = min(CHUNK, V - start)
        put("hot", (T, rows), 0, None if server else one_hot[:, start:start + rows], np.int32)
        put("wte", (rows, d), 1, np.round(weights["wte"][start:start + rows] * SCALE) if server else None, np.int32)
        step("embedding", "found", (lambda h, w: h @ w) if start == 0 else (lambda h, w, found: found + h @ w),
             ["hot", "wte"] + ["found"] * (start > 0), f"embedding {rows}")
        progress(f"embedding {min(V, start + CHUNK)}/{V}")
    put("wpe", (T, d), 1, weights["wpe"] if server else None)
    step("embedding", "x", lambda found, wpe: found.astype(np.float32) * (1 / SCALE) + wpe, ["found", "wpe"], "embedding")

    for layer in range(min(measure_layers or c.n_layer, c.n_layer)):
        block = {name.split(".")[2]: shape for name, shape in shapes.items() if name.startswith(f"blocks.{layer}.")}
        for name, shape in block.items():
            put(f"W.{name}", shape, 1, weights[f"blocks.{layer}.{name}"] if server else None)
        for i, (kind, output, function, inputs) in enumerate(block_steps(c, block, SECURE)):
            step(kind, output, function, inputs, f"step {i} {block.keys()}")
        progress(f"layer {layer + 1}/{c.n_layer}")

    put("last", (1, T), 0, last)
    step("head", "x", lambda last, x: last @ x, ["last", "x"], "select")  # the next token needs one row; which one is the client's secret
    for name in ("head", "head_b"):
        if name in shapes:
            put(f"W.{name}", shapes[name], 1, weights[name] if server else None)
    for kind, output, function, inputs in head_steps(c, shapes, SECURE):
        step(kind, output, function, inputs, "head")
    logits = party.reveal("logits")
    progress("done")
    return None if server else logits[0]


# ------------------------------------------------------------------------------------------------ the other party
def host_port(text, key):
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65535:
        die(f"{key} must be HOST:PORT, and is {text!r}", 2)
    return host, int(port)


def greet(mine):
    """
    Meet the other party on PORT + 1 and compare what both must agree on: exits with a line if it doesn't come or differs.
    Returns the socket; a thread watches it and ends this process with a line when the other's does.
    """
    host, port = host_port(listen if role == "server" else peer, "--listen" if role == "server" else "--peer")
    deadline, sock = time.time() + connect_timeout, None
    try:
        if role == "server":
            with socket.create_server((host, port + 1)) as server:
                server.settimeout(connect_timeout)
                sock, _ = server.accept()
        while sock is None:
            try:
                sock = socket.create_connection((host, port + 1), timeout=2)
            except OSError:
                if time.time() > deadline:
                    raise TimeoutError
                time.sleep(0.2)
        sock.settimeout(connect_timeout)
        sock.sendall(json.dumps(mine).encode() + b"\n")
        theirs = json.loads(sock.makefile().readline() or "{}")
    except TimeoutError:
        die(f"the other party did not come to {host}:{port + 1} within {connect_timeout} seconds: start it, or check --listen and --peer")
    except (OSError, ValueError) as e:
        die(f"can't talk to the other party at {host}:{port + 1}: {e}")
    for key in mine:
        if theirs.get(key) != mine[key]:
            die(f"the other party has another {key}: {theirs.get(key, 'none')!r} against {mine[key]!r} here")
    sock.settimeout(None)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def watch():
        try:
            word = sock.recv(1)
        except OSError:
            word = b""
        if word != b".":  # its farewell
            print("error: the other party is gone (its process ended or the connection broke)", file=sys.stderr, flush=True)
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    return sock


def digest(public):
    return hashlib.sha256(json.dumps(public, sort_keys=True).encode()).hexdigest()[:16]


def read_json(path):
    try:
        with open(path) as f:
            return json.load(f)
    except (OSError, ValueError) as e:
        die(f"can't read {path}: {e}")


def tokenize(public, text):
    """The prompt's token ids. Exits with a line if there is no tokenizer, nothing to tokenize or too much."""
    V, T = public["config"]["vocab_size"], public["config"]["block_size"]
    if public["tokenizer"] is None:  # random weights: any tokens will do
        return np.random.default_rng(seed).integers(0, V, T)
    from data.prepare import load_tokenizer
    ids = load_tokenizer(public["tokenizer"]).encode_ordinary(text)
    if not ids:
        die("the prompt is empty: give --prompt")
    if len(ids) > T:
        die(f"the prompt has {len(ids)} tokens and the model's context is {T}: shorten it")
    if max(ids) >= V:
        die(f"the prompt has token {max(ids)}, outside the model's vocabulary of {V}")
    return np.array(ids)


def one_party():
    """Role client or server: meet, compute, tell. The client prints the token, or sends its result to the parent if there is one."""
    rank = ("client", "server").index(role)
    weights = ids = None
    if role == "server":
        from pi_export import flatten, load_weights
        shared = read_json(os.path.join(private, "public.json"))
        try:
            weights = flatten(load_weights(os.path.join(private, "server.npz")))
        except ValueError as e:
            die(e)
        if {k: list(v.shape) for k, v in weights.items()} != shared["shapes"]:
            die(f"{private}/server.npz and public.json are not of one model: run python pi_export.py again")
    else:
        shared = read_json(public)
        ids = tokenize(shared, prompt)
    import spu
    host_port(peer, "--peer")
    try:  # SPU's own message for this is none
        socket.create_server(host_port(listen, "--listen")).close()
    except OSError as e:
        die(f"can't listen on {listen}: {e}")
    sock = greet(dict(model=digest(shared), protocol=protocol, spu=spu.__version__, measure_layers=measure_layers))
    started = time.time()
    try:
        party = Party(rank, (listen, peer) if rank == 0 else (peer, listen))

        def progress(stage):
            if role == "client":
                print(f"{stage:<24} {party.total[0] / 1e6:10.1f} MB {time.time() - started:8.1f} s", file=party.terminal, flush=True)

        logits = infer(party, shared, weights, ids, progress)
    except RuntimeError as e:
        time.sleep(1)  # if the other party died, the watcher says so better
        words = [line.strip() for line in str(e).replace("what:", "").splitlines() if line.strip()]
        die(f"SPU stopped: {words[0] if words else type(e).__name__}")
    sock.sendall(b".")
    seconds = time.time() - started
    if role == "server":
        return
    multiply = shared["config"]["n_layer"] / measure_layers if measure_layers else 1
    by_kind = {kind: spent * (1 if kind in ("set-up", "embedding", "head") else multiply) for kind, spent in party.by_kind.items()}
    total = sum(by_kind.values())
    result = {"bytes_total": int(total[0]), "bytes_by_kind": {k: int(v[0]) for k, v in by_kind.items()}, "messages": int(total[1]),
              "seconds": seconds if multiply == 1 else float(total[2]), "seconds_by_kind": {k: float(v[2]) for k, v in by_kind.items()},
              "bytes_of_truncations": int(total[3]), "measured_layers": measure_layers or shared["config"]["n_layer"]}
    if multiply == 1:
        result |= {"token": int(logits.argmax()), "logits": logits.tolist()}
        if shared["tokenizer"]:
            from data.prepare import load_tokenizer
            tokenizer = load_tokenizer(shared["tokenizer"])  # whose vocabulary the model's may be padded beyond
            text = repr(tokenizer.decode([result["token"]])) if result["token"] < tokenizer.n_vocab else ""
            print(f"next token: {result['token']} {text}", file=party.terminal, flush=True)
    if json_path:
        with open(json_path, "w") as f:
            json.dump(result, f)


# ------------------------------------------------------------------------------------------------ both parties here
def free_addresses():
    """Two addresses on this machine, (client's, server's), each with its port and the next one free."""
    for port in range(20000 + os.getpid() % 20000, 60000, 4):
        try:
            for p in range(port, port + 4):
                socket.create_server(("127.0.0.1", p)).close()
            return f"127.0.0.1:{port}", f"127.0.0.1:{port + 2}"
        except OSError:
            continue
    die("no four free ports in a row on 127.0.0.1")


def both(model, tokenizer):
    """Export the model, run client and server as two processes, return the client's result with plain logits beside it."""
    import torch
    from pi_export import write
    with tempfile.TemporaryDirectory() as folder:
        write(model, tokenizer, os.path.join(folder, "server"))
        shared = os.path.join(folder, "server", "public.json")
        result = os.path.join(folder, "result.json")
        a, b = free_addresses()
        common = [f"--{k}={globals()[k]}" for k in ("protocol", "measure_layers", "timeout", "connect_timeout", "seed")]
        me = [sys.executable, os.path.abspath(__file__)]
        parties = [subprocess.Popen([*me, "--role=client", f"--public={shared}", f"--prompt={prompt}", f"--listen={a}", f"--peer={b}", f"--json_path={result}", *common]),
                   subprocess.Popen([*me, "--role=server", f"--private={os.path.join(folder, 'server')}", f"--listen={b}", f"--peer={a}", *common])]
        try:
            while any(p.poll() is None for p in parties) and not any(p.poll() for p in parties):
                time.sleep(0.1)
            for p in parties:  # if one failed the other notices by itself, and says so
                p.wait(timeout=20)
        except subprocess.TimeoutExpired:
            pass
        finally:
            for p in parties:
                p.kill()
                p.wait()
        if any(p.returncode for p in parties):
            die("the private run failed, see above")
        r = read_json(result)
        if "logits" in r:
            ids = tokenize(read_json(shared), prompt)
            with torch.no_grad():
                plain = model(torch.from_numpy(ids)[None])[0][0, -1].numpy()
            r |= {"max_abs_err": float(np.abs(np.array(r.pop("logits")) - plain).max()), "plain_token": int(plain.argmax())}
    return {"arch": model.config.name, "n_layer": model.config.n_layer, "block_size": model.config.block_size, "vocab_size": model.config.vocab_size,
            "n_embd": model.config.n_embd, "n_head": model.config.n_head, "network": "none", "protocol": protocol, **r,
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores", "python": platform.python_version()}


def newest_checkpoint():
    from glob import glob
    found = sorted(glob("out/**/ckpt.pt", recursive=True), key=os.path.getmtime)
    return found[-1] if found else die("no checkpoint under out/: train one with python train.py, or give --ckpt or --archs")


def models():
    """(model, tokenizer or None) of the checkpoint, or of every architecture asked for, its weights random and seeded."""
    import torch
    from model import GPT, GPTConfig, load_checkpoint
    if not archs:
        try:
            checkpoint = load_checkpoint(ckpt or newest_checkpoint())
        except (OSError, ValueError) as e:
            die(e)
        yield GPT.from_checkpoint(checkpoint), checkpoint.get("tokenizer")
        return
    for name in archs.split(","):
        path, flags = os.path.join(os.path.dirname(os.path.abspath(__file__)), "config", name + ".py"), {}
        if not os.path.isfile(path):
            die(f"no architecture {name!r}: --archs takes names of config/, such as sm_ln_g,sm_scfuffn", 2)
        with open(path) as f:
            exec(f.read(), {}, flags)
        size = dict(block_size=block_size, vocab_size=vocab_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
        torch.manual_seed(seed)
        try:
            yield GPT(GPTConfig(**size, **{k: v for k, v in flags.items() if k in GPTConfig.__dataclass_fields__})).eval(), None
        except ValueError as e:
            die(e, 2)


def table(results):
    kinds = list(dict.fromkeys(kind for r in results for kind in r["bytes_by_kind"]))
    rows = [["", *(r["arch"] for r in results)], ["total MB, both directions", *(f"{r['bytes_total'] / 1e6:,.1f}" for r in results)]]
    rows += [[f"  {kind}", *(f"{r['bytes_by_kind'].get(kind, 0) / 1e6:,.1f}" for r in results)] for kind in kinds]
    rows += [["  (truncations, of all)", *(f"{r['bytes_of_truncations'] / 1e6:,.1f}" for r in results)],
             ["messages", *(f"{r['messages']:,}" for r in results)], ["seconds", *(f"{r['seconds']:.1f}" for r in results)],
             ["layers run / multiplied to", *(f"{r['measured_layers']} / {r['n_layer']}" for r in results)],
             ["max |secure - plain| logit", *(f"{r['max_abs_err']:.1e}" if "max_abs_err" in r else "" for r in results)],
             ["same token as in plain", *({True: "yes", False: "NO"}[r["token"] == r["plain_token"]] if "token" in r else "" for r in results)]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))) for row in rows)


def main():
    configure(globals())
    for key, allowed in dict(role=("both", "client", "server"), protocol=("cheetah", "semi2k")).items():
        if globals()[key] not in allowed:
            die(f"{key} must be one of {', '.join(allowed)}, and is {globals()[key]!r}", 2)
    if not find_spec("spu"):
        die("spu is not installed: it needs Python 3.10 or 3.11, then pip install -r requirements.txt")
    if role != "both":
        return one_party()
    results = []
    for model, tokenizer in models():
        print(f"--- {model.config.name}", flush=True)
        results.append(both(model, tokenizer))
        if json_path:  # after each, so that an interrupted comparison keeps what it has
            with open(json_path + ".tmp", "w") as f:
                json.dump(results, f, indent=1)
            os.replace(json_path + ".tmp", json_path)
    print(table(results))


if __name__ == "__main__":
    main()
