"""
One side of a private inference: SecretFlow SPU's runtime, its TCP link to the other side, and the model run over both.

- rank 0 is the client (holds the prompt, alone learns the result), 1 the server (holds the weights), 2 the helper of aby3
- a party gives a value only for what it owns; for the others' secrets it knows the shape and nothing else
- bytes, messages and seconds of each step come from SPU's own profile, in bytes of both directions as this rank counts them
- a second connection, on the server's PORT + 1, where the parties greet, agree on the model and notice each other's death
"""
import json
import os
import queue
import re
import secrets
import socket
import ssl
import sys
import tempfile
import threading
import time

import numpy as np

from configurator import die

ROLES = ("client", "server", "helper")
CHUNK = 2048     # rows of the embedding a one-hot product takes: one for all would need 88 GB at V = 50257
BUCKETED = 8 * CHUNK  # from this vocabulary on, if T is 32 or more, the embedding is looked up by buckets (lookup.py)
GROUP = 8        # buckets a product takes
SCALE = 2.0**16  # the embedding is looked up as integers, exact to 1 / SCALE
GONE = "the other party is gone (its process ended or the connection broke)"


def quit_now(message):
    """End the process from a thread, whatever C++ is waiting for in the main one."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(1)


class Party:
    """
    SPU's runtime of one rank. addresses: HOST:PORT by rank, this rank's own being where it listens. protocol: cheetah,
    semi2k or aby3. timeout: seconds without a word in the middle of a step, connect_timeout: until the link stands, or the
    process ends with a line. tls: a folder, see tls_files(), or "". session: greet()'s, the name of the link.
    plain: SPU's default settings and secret-shared weights, what plain.py is measured under.
    """

    def __init__(self, rank, addresses, protocol, timeout, connect_timeout, tls="", plain=False, session="root"):
        import spu
        from spu import libspu
        self.spu, self.rank, self.size, self.plain, self.session = spu, rank, len(addresses), plain, session
        # SPU's profile is written by C++ to stdout: send that to a file, and keep the terminal for ourselves
        self.profile = tempfile.TemporaryFile("a+")  # appending: C++ writes at the end wherever we read
        self.terminal = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(self.profile.fileno(), 1)
        desc = libspu.link.Desc()
        desc.id = session  # SPU files what arrives under this name: what another run sent to a port of ours must not pass for our peer's
        for name, address in zip(ROLES, addresses):
            desc.add_party(name, address)
        desc.recv_timeout_ms = desc.http_timeout_ms = timeout * 1000
        if tls:
            ca, cert, key = tls_files(tls)
            desc.enable_ssl = True
            for options in (desc.client_ssl_opts, desc.server_ssl_opts):
                options.cert.certificate_path, options.cert.private_key_path = cert, key
                options.verify.ca_file_path, options.verify.verify_depth = ca, 1
        others = " and ".join(a for i, a in enumerate(addresses) if i != rank)
        late = threading.Timer(connect_timeout, lambda: quit_now(f"no link with {others} within {connect_timeout:g} seconds: can each side reach the other's "
                                                                 "--listen, and is that what its --peer names?"))
        late.daemon = True
        late.start()  # SPU itself would wait as long as for a step
        try:
            self.link = libspu.link.create_brpc(desc, rank)
        finally:
            late.cancel()
        config = libspu.RuntimeConfig(protocol=getattr(libspu.ProtocolKind, protocol.upper()), field=libspu.FieldType.FM64, fxp_fraction_bits=18)
        config.enable_pphlo_profile = config.enable_hal_profile = True
        if not plain:
            config.experimental_enable_colocated_optimization = True  # private x secret is a third of secret x secret
            config.fxp_exp_iters = 1  # nonlinear.square
            # cheetah_2pc_config.enable_mul_lsb_error stays off: a quarter fewer bytes a product, and now and then 8192 of them wrong
            # beyond use, without a word (results/spu_lsb_error.py)
            # Not bound in Python: cheetah_2pc_config.ot_kind = EMP_Ferret, the same bytes in an eighth of the messages
            config.ParseFromString(config.SerializeToString() + bytes([0xC2, 0x04, 0x02, 0x18, 2]))
        self.config = config
        self.runtime, self.io, self.compiled = spu.Runtime(self.link, config), spu.Io(self.size, config), {}

    def put(self, name, shape, owner, value=None, dtype=np.float32):
        """A secret input of `owner`'s: it alone gives a value, the others only the shape."""
        value = np.array(value, dtype) if self.rank == owner else np.zeros(shape, dtype)
        assert value.shape == tuple(shape), (name, value.shape, shape)
        shares = self.io.make_shares(value, self.spu.Visibility.VIS_SECRET, owner)
        share = shares[self.rank]
        if self.plain:  # random shares, the owner deals them; colocated, the owner's share is the value and nothing travels
            if self.rank == owner:
                for rank in range(self.size):
                    if rank != owner:
                        self.send(rank, shares[rank])
            else:
                share = self.receive(owner)
        self.runtime.set_var(name, share)

    def send(self, rank, share):
        for part in (share.meta, len(share.share_chunks).to_bytes(4, "big"), *share.share_chunks):
            self.link.send(rank, part)

    def receive(self, rank):
        share = self.spu.libspu.Share()
        share.meta = self.link.recv(rank)
        share.share_chunks = [self.link.recv(rank) for _ in range(int.from_bytes(self.link.recv(rank), "big"))]
        return share

    def reveal(self, name):
        """The value, to the client alone: the others send their shares and learn nothing."""
        share = self.runtime.get_var(name)
        if self.rank:
            return self.send(0, share)
        return self.io.reconstruct([share] + [self.receive(rank) for rank in range(1, self.size)])

    def run(self, key, function, inputs, output):
        """
        Compile (once per key) and run function over the named values. inputs: {name: (shape, dtype)}. Returns the output's
        shape and dtype, and the cost, an array: bytes of both directions, messages of the busier direction (at most this many
        round trips), seconds, and which of the bytes were truncations'.
        """
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
        link = r"Link details: total send bytes (\d+), recv bytes (\d+), send actions (\d+), recv actions (\d+)"
        sent, received, sends, receives = map(int, re.findall(link, log)[-1])
        truncation = sum(int(a) + int(b) for a, b in re.findall(r"- trunc\w*, executed .*?send bytes (\d+) recv bytes (\d+)", log))
        out = self.compiled[key][1]
        return (out.shape, out.dtype), np.array([sent + received, max(sends, receives), seconds, truncation])


def infer(party, public, weights, ids, told=lambda stage, costs: None, layers=0, reveal="logits", every_row=False):
    """
    One private forward pass. public: public.json's dict; weights: server.npz's arrays on the server, embedding.npz's on the client if
    the embedding is public, else None; ids: the prompt's tokens on the client, else None; reveal: "logits" or "token"; layers: how
    many equal layers to run, 0 for all; the last one, which computes one row, comes besides (plain's is equal). With fewer than all
    only two pieces of the embedding are looked up, and the result means nothing.

    Returns (result, costs). result, None but on the client: logits (V,) of the last position, or its most likely token, or
    with every_row the logits (T, V). costs: [(kind, times, cost of Party.run)] in the order run; times is how many equal
    pieces this one stands for, itself included. told(stage, costs) is called after each stage.
    """
    import jax.numpy as jnp
    from lookup import QUERIES, buckets, queries
    from model import GPTConfig
    from nonlinear import SECURE, secure_argmax
    from pi_export import block_steps, head_steps, of_block, one_of_each
    from plain import plain_block_steps, plain_head_steps
    c, shapes = GPTConfig(**public["config"]), {k: tuple(v) for k, v in public["shapes"].items()}
    T, V, d, server, client = c.block_size, c.vocab_size, c.n_embd, party.rank == 1, party.rank == 0
    block_steps_of, head_steps_of = (plain_block_steps, plain_head_steps) if party.plain else (block_steps, head_steps)
    one_row = not every_row and not party.plain  # the last block computes only what a next token needs
    whole = not layers or layers >= c.n_layer
    if client:
        end, ids = len(ids) - 1, np.pad(ids, (0, T - len(ids)), constant_values=-1)  # no position sees those past the prompt
    specs, costs = {}, []

    def put(name, shape, owner, value, dtype=np.float32):
        specs[name] = (tuple(shape), dtype)
        party.put(name, shape, owner, value, dtype)

    def step(kind, output, function, inputs, scope, times=1):
        specs[output], cost = party.run((scope, output, tuple(inputs), kind), function, {name: specs[name] for name in inputs}, output)
        costs.append((kind, times, cost))

    def look_up():
        """x, the embedded prompt, by encrypted one-hot rows of the tokens, or of their places in the buckets."""
        bucketed = V >= BUCKETED and T >= 32 and not party.plain
        if bucketed:
            dealt = buckets(V, T, party.session.encode())
            hot, chosen = queries(ids, dealt) if client else (None, None)
            tokens = [dealt[i:i + GROUP] for i in range(0, len(dealt), GROUP)]
            asked = [hot[i:i + GROUP] for i in range(0, len(dealt), GROUP)] if client else None
        else:
            tokens = [np.arange(start, min(start + CHUNK, V)) for start in range(0, V, CHUNK)]
            asked = [ids[:, None] == piece for piece in tokens] if client else None
        table = np.round(np.vstack((weights["wte"], np.zeros((1, d)))) * SCALE).astype(np.int32) if server else None  # row V stands for no token
        run = len(tokens) if whole else min(len(tokens), 2)
        for i in range(run):
            *bucket, rows = tokens[i].shape
            put("hot", (*bucket, QUERIES if bucketed else T, rows), 0, asked[i] if client else None, np.int32)
            put("table", (*bucket, rows, d), 1, table[tokens[i]] if server else None, np.int32)
            times = 1 if i + 1 < run else sum(piece.size for piece in tokens[i:]) / tokens[i].size
            step("embedding", f"found {i}", lambda h, w: (h @ w).reshape(-1, d), ["hot", "table"], f"embedding {rows}", times)
            told(f"embedding {i + 1}/{len(tokens)}", costs)
        found = [f"found {i}" for i in range(run)]
        if bucketed:
            put("chosen", (T, len(dealt) * QUERIES), 0, chosen, np.int32)
            step("embedding", "found", lambda chosen, *found: chosen @ jnp.vstack([found[min(i, run - 1)] for i in range(len(tokens))])[:chosen.shape[1]],
                 ["chosen"] + found, "choose")
        else:
            step("embedding", "found", lambda *found: sum(found), found, "sum")
        put("wpe", (T, d), 1, weights["wpe"] if server else None)
        step("embedding", "x", lambda found, wpe: found.astype(np.float32) * (1 / SCALE) + wpe, ["found", "wpe"], "embedding")

    put("mine", (2, 2), 0, np.ones((2, 2)) if client else None)
    put("theirs", (2, 2), 1, np.ones((2, 2)) if server else None)
    step("set-up", "ready", one_of_each, ["mine", "theirs"], "set-up")
    told("set-up", costs)

    if public["embedding"] == "private":
        look_up()
    else:  # the client's own doing
        put("x", (T, d), 0, np.where(ids[:, None] < 0, 0, weights["wte"][ids]) + weights["wpe"] if client else None)

    if not every_row:  # which row is the last is the client's secret
        put("last", (1, T), 0, np.eye(T)[end:end + 1] if client else None)
    if one_row:
        put("seen", (1, T), 0, np.tri(T)[end:end + 1] if client else None)
    equal = c.n_layer - one_row
    for layer in [*range(equal if whole else min(layers, equal)), *[equal] * one_row]:
        block = of_block(shapes, layer)
        for name, shape in block.items():
            put(f"W.{name}", shape, 1, weights[f"blocks.{layer}.{name}"] if server else None)
        times = 1 if whole or layer + 1 < layers or layer == equal else equal - layer
        for i, (kind, output, function, inputs) in enumerate(block_steps_of(c, block, SECURE, layer == equal)):
            step(kind, output, function, inputs, f"step {i} {block.keys()} {layer == equal}", times)
        told(f"layer {layer + 1}/{c.n_layer}", costs)

    if party.plain and not every_row:
        step("head", "x", lambda last, x: last @ x, ["last", "x"], "select")
    for name, shape in shapes.items():
        if not name.startswith("blocks.") and name not in ("wte", "wpe"):
            put(f"W.{name}", shape, 1, weights[name] if server else None)
    for kind, output, function, inputs in head_steps_of(c, shapes, SECURE):
        step(kind, output, function, inputs, f"head {every_row}")
    if reveal == "token":
        step("argmax", "logits", secure_argmax, ["logits"], "argmax")
    result = party.reveal("logits")
    told("done", costs)
    return result if result is None or every_row else result[0], costs


def free_addresses(n):
    """n addresses on this machine, each with its port and the next one free, below where outgoing connections take theirs."""
    for _ in range(100):  # at random: another run may be choosing, too
        port = int(np.random.default_rng().integers(10000, 32000))
        try:
            for p in range(port, port + 2 * n):
                socket.create_server(("127.0.0.1", p)).close()
            return [f"127.0.0.1:{port + 2 * i}" for i in range(n)]
        except OSError:
            continue
    die(f"no {2 * n} free ports in a row on 127.0.0.1 between 10000 and 32000")


def tls_files(folder):
    """(ca.pem, cert.pem, key.pem) of a folder: who may sign either side's certificate, and one's own."""
    files = [os.path.join(folder, name) for name in ("ca.pem", "cert.pem", "key.pem")]
    for path in files:
        if not os.path.isfile(path):
            die(f"no {path}: --tls is a folder with ca.pem (who may sign the other side's certificate), cert.pem and key.pem", 2)
    return files


def tls_context(folder, server):
    """A mutual one: each side shows its certificate and refuses a peer whose isn't signed by ca.pem."""
    ca, cert, key = tls_files(folder)
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False  # the ca is the two parties' own: whoever it signed is who they mean
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(ca)
        context.load_cert_chain(cert, key)
    except (OSError, ValueError) as e:
        die(f"can't use the certificates in {folder}: {e}", 2)
    return context


def greet(rank, addresses, mine, connect_timeout, timeout, tls=""):
    """
    Meet the other parties on the server's PORT + 1 and compare what all must agree on, the dict `mine`: exits with a line if
    one doesn't come within `connect_timeout` seconds or differs. A thread for each then watches, and ends this process with a line
    when the other's dies.

    Returns (session, farewell): a name of this run that the server drew; farewell(word): tell the others the JSON value
    `word`, and return theirs, when all have finished, or exit with a line after `timeout` seconds. The server answers last: nobody leaves while another still needs them.
    """
    host, port = addresses[1].rpartition(":")[0], int(addresses[1].rpartition(":")[2]) + 1
    context = tls_context(tls, rank == 1) if tls else None
    deadline, met, words, session = time.time() + connect_timeout, [], queue.Queue(), secrets.token_hex(8)

    def meet(sock):
        sock.settimeout(max(0.01, deadline - time.time()))
        sock = context.wrap_socket(sock, server_side=rank == 1) if context else sock
        try:
            sock.sendall(json.dumps(mine | {"session": session}).encode() + b"\n")
            lines = sock.makefile()
            met.append((sock, lines, json.loads(lines.readline())))
        except (ConnectionError, ssl.SSLEOFError, ValueError):
            if context:  # a server refuses a certificate after the client's part of the handshake is done
                raise ssl.SSLError("our certificate was not accepted") from None
            raise

    try:
        if rank == 1:
            with socket.create_server((host, port)) as server:
                came = []
                while len(came) < len(addresses) - 1:  # all of them, before the first is answered
                    server.settimeout(max(0.01, deadline - time.time()))
                    came.append(server.accept()[0])
            for sock in came:
                meet(sock)
        while not met:
            try:
                meet(socket.create_connection((host, port), timeout=2))
            except (OSError, ValueError) as e:  # not there yet, or a relay in its place
                if isinstance(e, ssl.SSLError) and not isinstance(e, ssl.SSLEOFError):
                    raise
                if time.time() > deadline:
                    raise TimeoutError from None
                time.sleep(0.2)
    except TimeoutError:
        die(f"the other party did not come to {host}:{port} within {connect_timeout} seconds: start it, or check --listen and --peer")
    except ssl.SSLError as e:
        why = e.verify_message if isinstance(e, ssl.SSLCertVerificationError) else getattr(e, "reason", None) or e
        die(f"no secure connection at {host}:{port}: {why} (both sides need --tls, and certificates that the other's ca.pem signed)")
    except (OSError, ValueError) as e:
        die(f"can't talk to the other party at {host}:{port}: {e}")
    for _, _, word in met:
        for key in mine:
            if word.get(key) != mine[key]:
                die(f"the other party has another {key}: {word.get(key, 'none')!r} against {mine[key]!r} here")

    def watch(lines):
        try:
            word = lines.readline()
        except OSError:
            word = ""
        if not word:
            quit_now(GONE)
        words.put(json.loads(word))

    for sock, lines, _ in met:
        sock.settimeout(None)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        threading.Thread(target=watch, args=(lines,), daemon=True).start()

    def farewell(word):
        def say():
            try:
                for sock, *_ in met:
                    sock.sendall(json.dumps(word).encode() + b"\n")
            except OSError:
                quit_now(GONE)

        if rank != 1:
            say()
        try:
            said = [words.get(timeout=timeout) for _ in met]
        except queue.Empty:
            quit_now("the other party did not say that it is done")
        if rank == 1:
            say()
        return said

    return session if rank == 1 else met[0][2]["session"], farewell
