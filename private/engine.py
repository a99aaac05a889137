"""
SecretFlow SPU's runtime of one rank, and its TCP link to the others: put, run, reveal.

- rank 0 is the client (holds the prompt, alone learns the result), 1 the server (holds the weights), 2 the helper of aby3
- a party gives a value only for what it owns; for the others' secrets it knows the shape and nothing else
- bytes, messages and seconds of each step come from SPU's own profile, in bytes of both directions as this rank counts them
"""
import os
import re
import tempfile
import threading
import time

import numpy as np

from private.meet import ROLES, quit_now, tls_files


class Engine:
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
            # beyond use, without a word (experiments/spu_lsb_error.py)
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
