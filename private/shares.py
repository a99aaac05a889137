"""
Shares as NumPy arrays, and what a party may do with its own.

A secret x is two integers, x_0 of the client's and x_1 of the server's, with x_0 + x_1 = x 2^f mod
2^64, f its fraction bits. Either alone tells nothing of x. So whatever a party computes of its own
share costs nothing and tells nobody anything; only an op() goes over the link, and what ahead.py
sends, and a seed for wraps.py. Three local functions are of use:

- a linear one with integer coefficients, such as a sum: its value is exactly the sum's. So is
  a + 2^32 b, two numbers in one, which a product by a third multiplies both at once;
- dropping m low bits and keeping the 32 above: shares mod 2^32 of the value with m bits fewer, less
  a last bit or not. The carry into the bits above the 64 is a multiple of 2^32, whatever the shares
  were, so that this is right for all of them. In the ring mod 2^32 a comparison costs half;
- any function at all, where an identity turns sums of shares into products: exp(a + b).

What rests on these is in forms.py, pairs.py and ahead.py.
"""
import numpy as np
import spu
from spu import libspu

VERSION = "0.9.5"  # of SPU: what a share's bytes mean is no promise of its interface
CHUNK = 2**26      # bytes of a share in one protobuf
CLIENT, SERVER = 0, 1  # ranks, in the order of meet.ROLES
FRACTION = 18      # bits of a float32, and those that a product of two of them drops
HALF = 32          # bits of each where two numbers are in one, a + 2^32 b
SPARE = 20         # and that b may lose by a shift, as wraps.py needs the other 44


# ------------------------------------------------------------------------------ a share, out and in
def check_version():
    """RuntimeError if this isn't the SPU whose shares are known."""
    if spu.__version__ != VERSION:
        raise RuntimeError(f"SPU {spu.__version__} is installed, and what its shares mean is known "
                           f"of {VERSION} alone: pip install spu=={VERSION}")


def storage(bits, dtype=np.int32):
    """SPU's name of a share mod 2^bits: additive, but of bits a sum mod 2."""
    return f"cheetah.BShr<FM{bits},1>" if dtype == np.bool_ else f"cheetah.AShr<FM{bits}>"


def owned(bits, owner):
    """SPU's name of what is one party's own: to the other it is 0."""
    return f"Priv2k<FM{bits},{owner}>"


def numbers(share, bits, shape, dtype, rank):
    """
    The integers mod 2^bits of a libspu.Share. What XLA found to be public, such as x - x, is the
    client's share, and the server's is 0; what is one party's own is its share, and the other's 0.
    RuntimeError if it is another kind of share.
    """
    meta = libspu.ValueMeta()
    meta.ParseFromString(share.meta)
    public = meta.storage_type == f"Pub2k<FM{bits}>"
    known = {storage(bits, dtype), owned(bits, CLIENT), owned(bits, SERVER)}
    content = b"".join(content_of(chunk) for chunk in share.share_chunks)
    size = int(np.prod(shape)) * bits // 8
    if not (public or meta.storage_type in known) or len(content) != size:
        raise RuntimeError(f"a share is {meta.storage_type} of {len(content)} bytes, where "
                           f"{storage(bits, dtype)} of {size} is due")
    found = np.frombuffer(content, f"u{bits // 8}").reshape(shape)
    return np.zeros_like(found) if public and rank != CLIENT else found


def content_of(chunk):
    parsed = libspu.ValueChunk()
    parsed.ParseFromString(chunk)
    return parsed.content


def share_of(array, bits, dtype, owner=None):
    """
    The libspu.Share of integers mod 2^bits, of dtype int32 or float32; or of bits, of dtype bool.
    owner: the rank that has them all, if one has.
    """
    types = {np.float32: libspu.DataType.DT_F32, np.int32: libspu.DataType.DT_I32,
             np.bool_: libspu.DataType.DT_I1}
    meta = libspu.ValueMeta()
    meta.data_type = types[dtype]
    meta.visibility = spu.Visibility.VIS_SECRET
    meta.storage_type = storage(bits, dtype)
    if owner is not None:
        meta.visibility = spu.Visibility.VIS_PRIVATE
        meta.storage_type = owned(bits, owner)
    meta.shape = list(array.shape)
    share = libspu.Share()
    share.meta = meta.SerializeToString()
    content = np.ascontiguousarray(array, f"u{bits // 8}").tobytes()
    share.share_chunks = [chunk_of(content, at) for at in range(0, len(content) or 1, CHUNK)]
    return share


def chunk_of(content, at):
    chunk = libspu.ValueChunk()
    chunk.total_bytes = len(content)
    chunk.chunk_offset = at
    chunk.content = content[at:at + CHUNK]
    return chunk.SerializeToString()


def signed(a):
    """Whole numbers of either sign, as integers mod 2^64."""
    return a.astype(np.int64).view(np.uint64)


# ------------------------------------------------------------------------------------- fewer bits
def without_low_bits(share, bits):
    """Shares mod 2^64 -> shares mod 2^32 of the value without that many low bits."""
    return (share >> np.uint64(bits)).astype(np.uint32)


def scaled(x, bits):
    """
    x 2^bits, bits from -16 on. A step of its own: XLA makes (y 2^a) r 2^b into y r 2^(a + b), and
    of a smaller factor SPU makes a larger one and a second truncation, right up to 2^45 alone.
    """
    return x * 2.0**bits


ODD = 65537  # 2^-18 ODD is no small factor
ODD_INVERSE = np.uint64(pow(ODD, -1, 2**64))


def times_odd(x):
    return x * (ODD * 2.0**-FRACTION)


def truncated(op, engine, share):
    """
    The secret of a share's numbers without 18 of their fraction bits. They are divided by ODD
    first, mod 2^64, whatever that makes of them, as the factor has ODD again.
    """
    return op(times_odd, engine.hold(share * ODD_INVERSE, dtype=np.float32))


def dropped(op, engine, share, bits):
    """
    A party's share of the value without so many low bits, rounded: wrong by 2 at most, by 0.6 in
    the mean square. Price: 3 bytes for every 18 bits begun. Range: values below 2^62, or of fewer
    than 18 bits below 2^(44 + bits), as the engine multiplies before it drops 18.
    """
    while bits > 0:
        now = FRACTION if bits >= FRACTION else min(bits, 16)
        if engine.rank == CLIENT:  # as the engine rounds down
            share = share + np.uint64(1 << (now - 1))
        if now == FRACTION:
            secret = truncated(op, engine, share)
        else:
            secret = op(scaled, engine.hold(share, dtype=np.float32), bits=-now)
        share, bits = engine.numbers(secret), bits - now
    return share


def of_fraction(op, engine, secret):
    """A secret as it is, or of the engine's fraction bits where a float32 has more."""
    if secret.dtype != np.float32 or secret.fraction == FRACTION:
        return secret
    share = dropped(op, engine, engine.numbers(secret), secret.fraction - FRACTION)
    return engine.hold(share, dtype=np.float32)


# ------------------------------------------------------------------------------ two numbers in one
def without(op, engine, a, b, bits):
    """
    Shares of a and b, to be paired, both without so many low bits: of a mod 2^64, and of b mod
    2^44, which is right whatever the shares are, but for the last bit. Price: 3 bytes for every 18
    bits of a begun; of b nothing up to SPARE, and beyond that the same.
    """
    if bits > SPARE:
        both = dropped(op, engine, np.stack((a, b)), FRACTION)
        return without(op, engine, *both, bits - FRACTION)
    if bits:
        b = (b + np.uint64(1 << (bits - 1))) >> np.uint64(bits)
    return dropped(op, engine, a, bits), b


def paired(a, b):
    return a + (b << np.uint64(HALF))


def kept(bits):
    """
    The fraction bits in which a product in pairs is read, of factors of these: those that two
    truncations leave, or the engine's if they are more.
    """
    return max(FRACTION, HALF + sum(bits) - 2 * FRACTION)


def apart(op, engine, share, bits, axis):
    """
    A share of a and b without so many low bits, side by side along an axis, from a share of
    a + 2^32 b, |a| and |b| < 2^30. Moved up, it is one of 2^32 a; and as it is, of 2^32 b but for
    a, which is less than b's last bit.
    """
    both = np.concatenate((share << np.uint64(HALF), share), axis)
    return dropped(op, engine, both, HALF + bits)
