"""
SecretFlow SPU's runtime of one rank, and its TCP link to the others: put, op, reveal; under
Cheetah also numbers and hold, a share out and in, see shares.py.

- rank 0 is the client, which holds the prompt and alone learns the result; 1 is the server, which
  holds the weights; 2 is the helper of aby3
- a party gives a value only for what it owns; of the others' secrets it knows the shape alone
- the bytes, messages and seconds of each op come from SPU's own profile, in bytes of both
  directions as this rank counts them
"""
import itertools
import os
import re
import tempfile
import threading
import time
from functools import partial

import jax
import numpy as np
import spu
import spu.utils.frontend as frontend
from spu import libspu

from private import forms, shares
from private.meet import ROLES, quit_now, tls_files
from private.shares import CLIENT, FRACTION, SERVER


class Ring:
    """SPU's runtime of this rank on integers mod 2^bits, bits being 64 or 32."""

    def __init__(self, link, size, protocol, plain, bits):
        self.bits = bits
        self.config = runtime_config(protocol, plain, bits)
        self.runtime = spu.Runtime(link, self.config)
        self.io = spu.Io(size, self.config)


class Secret:
    """
    A value that no party knows: its ring, its name there, its shape, its dtype and, where a form
    of shares makes it other than FRACTION, its fraction bits. The engine forgets the value together
    with this handle.
    """

    def __init__(self, ring, name, shape, dtype, fraction=FRACTION):
        self.ring = ring
        self.name = name
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        self.fraction = fraction

    def __del__(self):
        self.ring.runtime.del_var(self.name)


class Engine:
    """
    SPU's runtime of one rank. addresses: HOST:PORT by rank, this rank's own being where it
    listens. protocol: cheetah, semi2k or aby3. timeout: seconds without a word in the middle of an
    op; connect_timeout: seconds until the link stands, or the process ends with a line. tls: a
    folder, see tls_files(), or "". session: greet()'s, the name of the link. plain: SPU's default
    settings and secret-shared weights, under which plain.py is measured.

    Under Cheetah op() computes a function of forms.FORMS by its form there, which needs a second
    ring, mod 2^32. Its messages go over the same connection, as a link of its own name. And one of
    ahead.py's or pairs.py's forms, where it takes a matrix of theirs in a Secret's place.

    .costs: what op() has cost so far, a list of (kind, times, array); the array holds bytes of both
    directions, messages of the busier direction (at most this many round trips), seconds, and how
    many of the bytes were truncations'. .terminal: stdout, a file; SPU's profile takes its place.
    """

    def __init__(self, rank, addresses, protocol, timeout, connect_timeout,
                 tls="", plain=False, session="root"):
        self.rank = rank
        self.size = len(addresses)
        self.plain = plain
        self.session = session
        self.terminal, self.profile = divert_stdout()
        description = link_description(addresses, timeout, tls, session)
        others = [address for i, address in enumerate(addresses) if i != rank]
        self.link = connect(description, rank, others, connect_timeout)
        self.rings = {64: Ring(self.link, self.size, protocol, plain, 64)}
        self.runtime, self.io = self.rings[64].runtime, self.rings[64].io
        self.forms = {}
        self.wraps = None  # during infer(), see wraps.py
        if protocol == "cheetah" and not plain:
            shares.check_version()
            self.rings[32] = Ring(self.link.spawn(), self.size, protocol, plain, 32)
            self.forms = forms.FORMS
        self.compiled = {}
        self.costs = []
        self.seconds = 0.0  # spent in op() by functions that have no form
        self.sent = np.zeros(2)  # bytes and messages outside of the engine, by to_server()
        self.names = (f"value {i}" for i in itertools.count())

    def put(self, shape, owner, value=None, dtype=np.float32):
        """A secret of `owner`'s, which alone gives the value; the others' is not looked at."""
        value = np.array(value, dtype) if self.rank == owner else np.zeros(shape, dtype)
        if value.shape != tuple(shape):
            raise ValueError(f"a value of shape {value.shape} was put where {tuple(shape)} is due")
        shares = self.io.make_shares(value, spu.Visibility.VIS_SECRET, owner)
        share = shares[self.rank]
        if self.plain:  # the owner deals random shares; else its share is the value, sent nowhere
            if self.rank == owner:
                for rank in set(range(self.size)) - {owner}:
                    self.send(rank, shares[rank])
            else:
                share = self.receive(owner)
        return self.named(share, self.rings[64], shape, dtype)

    def named(self, share, ring, shape, dtype, fraction=FRACTION):
        secret = Secret(ring, next(self.names), shape, dtype, fraction)
        ring.runtime.set_var(secret.name, share)
        return secret

    def hold(self, array, bits=64, dtype=np.int32, fraction=FRACTION):
        """
        The secret of which `array` is this party's share, integers mod 2^bits. dtype: int32, which
        the engine takes as they are; float32, in units of 2^-fraction; or bool, of bits that add
        mod 2. With another fraction than the engine's, op() drops the bits that are too many.
        """
        share = shares.share_of(array, bits, dtype)
        return self.named(share, self.rings[bits], array.shape, dtype, fraction)

    def own(self, shape, owner, array=None):
        """The secret of integers mod 2^64 that are `owner`'s, which alone gives them."""
        if self.rank != owner:
            array = np.zeros(shape, np.uint64)
        share = shares.share_of(array, 64, np.int32, owner)
        return self.named(share, self.rings[64], shape, np.int32)

    def to_server(self, array):
        """The client's array, which it sends the server; its cost is entered by by_form()."""
        self.sent += np.array([array.nbytes, 1])
        if self.rank == CLIENT:
            return self.link.send(SERVER, array.tobytes())
        return np.frombuffer(self.link.recv(CLIENT), array.dtype).reshape(array.shape)

    def numbers(self, secret):
        """This party's share of a secret: an array of unsigned integers mod 2^(the ring's bits)."""
        share = secret.ring.runtime.get_var(secret.name)
        return shares.numbers(share, secret.ring.bits, secret.shape, secret.dtype, self.rank)

    def op(self, kind, function, *secrets, times=1, **static):
        """
        The secret function(*secrets, **static), computed under encryption. It is compiled once for
        each function, static keywords and shapes. What it cost is appended to .costs under `kind`,
        and counts `times` times: for itself and for equal ones that are not run.
        """
        others = [secret for secret in secrets if not isinstance(secret, Secret)]
        form = (others[0].forms if others else self.forms).get(function)
        if form:
            return self.by_form(form, kind, *secrets, times=times, **static)
        step = partial(self.op, kind, times=times)
        secrets = [shares.of_fraction(step, self, secret) for secret in secrets]
        start = time.time()
        ring = secrets[0].ring
        key = function, tuple(sorted(static.items())), tuple((s.shape, s.dtype) for s in secrets)
        if key not in self.compiled:
            self.compiled[key] = compile_for(secrets, partial(function, **static))
        executable, out = self.compiled[key]
        name = next(self.names)
        executable.input_names = [secret.name for secret in secrets]
        executable.output_names = [name]
        self.costs.append((kind, times, self.run(executable, ring.runtime)))
        self.seconds += time.time() - start
        return Secret(ring, name, out.shape, out.dtype)

    def by_form(self, form, kind, *secrets, times, **static):
        """
        op() by a function's form, which makes ops of its own. What a party does alone in between is
        one more entry of .costs, with what it sends there.
        """
        start, before = time.time(), self.seconds
        self.sent = np.zeros(2)  # bytes, messages
        result = form(partial(self.op, kind, times=times), self, *secrets, **static)
        alone = time.time() - start - (self.seconds - before)
        self.costs.append((kind, times, np.array([*self.sent, alone, 0])))
        return result

    def reveal(self, secret):
        """The value, to the client alone; None to the others, who send their shares."""
        share = secret.ring.runtime.get_var(secret.name)
        if self.rank != CLIENT:
            return self.send(CLIENT, share)
        others = [self.receive(rank) for rank in range(1, self.size)]
        value = secret.ring.io.reconstruct([share, *others])
        if secret.dtype == np.float32:  # which SPU takes to have the engine's fraction bits
            value = value / np.float32(2.0 ** (secret.fraction - FRACTION))
        return value

    def run(self, executable, runtime):
        """Run what was compiled. Returns its cost, see .costs."""
        begin = os.fstat(self.profile.fileno()).st_size
        start = time.time()
        runtime.run(executable)
        seconds = time.time() - start
        self.profile.seek(begin)
        traffic, truncation = read_profile(self.profile.read())
        sent, received, sends, receives = traffic
        return np.array([sent + received, max(sends, receives), seconds, truncation])

    def send(self, rank, share):
        self.link.send(rank, share.meta)
        self.link.send(rank, str(len(share.share_chunks)))
        for chunk in share.share_chunks:
            self.link.send(rank, chunk)

    def receive(self, rank):
        share = libspu.Share()
        share.meta = self.link.recv(rank)
        chunks = int(self.link.recv(rank))
        share.share_chunks = [self.link.recv(rank) for _ in range(chunks)]
        return share


def compile_for(secrets, function):
    """
    (executable, the output's shape and dtype) of a function of one output, for inputs like
    `secrets`. Engine.op names the inputs and the output before each run.
    """
    example = [jax.ShapeDtypeStruct(secret.shape, secret.dtype) for secret in secrets]
    unnamed = [f"input {i}" for i in range(len(secrets))]
    visibility = [spu.Visibility.VIS_SECRET] * len(secrets)
    return frontend.compile(frontend.Kind.JAX, function, example, {}, unnamed, visibility,
                            lambda outputs: ["output"], copts=libspu.CompilerOptions())


def read_profile(log):
    """
    What SPU logs of one run: ((bytes sent, bytes received, messages sent, messages received), and
    how many of the bytes were truncations').
    """
    counts = r"send bytes (\d+), recv bytes (\d+), send actions (\d+), recv actions (\d+)"
    traffic = map(int, re.findall("Link details: total " + counts, log)[-1])
    truncations = re.findall(r"- trunc\w*, executed .*?send bytes (\d+) recv bytes (\d+)", log)
    return tuple(traffic), sum(int(sent) + int(received) for sent, received in truncations)


# --------------------------------------------------------------------------------- how it is set up
def divert_stdout():
    """
    (terminal, profile), two files. SPU's C++ writes its profile to stdout: from here on that goes
    to `profile`, and what we print for the user goes to `terminal`.
    """
    profile = tempfile.TemporaryFile("a+")  # appending: C++ writes at the end, wherever we read
    terminal = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(profile.fileno(), 1)
    return terminal, profile


def link_description(addresses, timeout, tls, session):
    """What SPU's link is to be."""
    description = libspu.link.Desc()
    description.id = session  # SPU files messages by it: another run's must not pass for ours
    for name, address in zip(ROLES, addresses):
        description.add_party(name, address)
    description.recv_timeout_ms = timeout * 1000
    description.http_timeout_ms = timeout * 1000
    if tls:
        ca, cert, key = tls_files(tls)
        description.enable_ssl = True
        for options in (description.client_ssl_opts, description.server_ssl_opts):
            options.cert.certificate_path = cert
            options.cert.private_key_path = key
            options.verify.ca_file_path = ca
            options.verify.verify_depth = 1
    return description


def connect(description, rank, others, connect_timeout):
    """The link, once it stands. SPU itself would wait for it as long as for an op."""
    late = threading.Timer(connect_timeout, quit_now, [
        f"no link with {' and '.join(others)} within {connect_timeout:g} seconds, half of "
        "--connect_timeout: can each side reach the other's --listen, and does --peer name that?"])
    late.daemon = True
    late.start()
    try:
        return libspu.link.create_brpc(description, rank)
    finally:
        late.cancel()


def runtime_config(protocol, plain, bits=64):
    """SPU's settings on integers mod 2^bits. plain: its defaults."""
    config = libspu.RuntimeConfig(protocol=getattr(libspu.ProtocolKind, protocol.upper()),
                                  field=getattr(libspu.FieldType, f"FM{bits}"),
                                  fxp_fraction_bits=FRACTION if bits == 64 else 0)
    config.enable_pphlo_profile = True
    config.enable_hal_profile = True
    if not plain:
        config.experimental_enable_colocated_optimization = True  # private x secret is cheaper
        config.fxp_exp_iters = 1  # exp() becomes the cheap square, see nonlinear.square
        # cheetah_2pc_config.enable_mul_lsb_error stays off: it saves a quarter of a product's
        # bytes, but now and then a whole ciphertext is wrong (experiments/spu_lsb_error.py).
        config.ParseFromString(config.SerializeToString() + EMP_OT)
    return config


def protobuf(number, value):
    """A protobuf field: an int as a varint, wire type 0, or bytes behind their length, type 2."""
    if isinstance(value, int):
        return varint(number << 3 | 0) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(n):
    """n in groups of 7 bits, the lowest first; the top bit of a byte says that more follow."""
    low, rest = n & 0x7F, n >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


# RuntimeConfig.cheetah_2pc_config (field 72) .ot_kind (3) = EMP_Ferret (2): the same bytes in an
# eighth of the messages. SPU's Python can't set it, so that it is appended in protobuf.
EMP_OT = protobuf(72, protobuf(3, 2))
