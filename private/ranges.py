"""
Do a model's numbers fit the engine? It has 18 fraction bits of 64, products up to 2^26, attention's
up to LIMITS, a LayerNorm for rows near a given unit, and products in pairs, see pairs.py, up to a
size that is chosen for each. Two parties on two machines never see what the clear would give, so
that pi_export.py asks here, before any private run.
"""
import math
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from private.block import (HEAD, NO_TOKEN, Row, add_linear, block, divide, head, last_block,
                           layers_of, linear, logits, row_of, scale_add_linear, scores, weights_of)
from private.files import PRODUCT, check_weights
from private.nonlinear import ACTIVATION_KIND, CENTRE, EPSILON, EXACT, FACTOR, LOGIT_UNIT

LIMITS = {  # of a step's numbers, where it isn't PRODUCT, because of its form in forms.py:
    "scores": 2.0**14,      # in LOGIT_UNITs; two of them must lie within 2^31 of its steps,
    "row_scores": 2.0**14,  # those that are hidden FAR below as well
    "mix": 2.0**17,         # with 42 fraction bits, or divided with 44
    "mix_rows": 2.0**17,
    "relu": 2.0**15,        # as all of these activations' inputs, with 15 in 32
    "gelu": 2.0**15,
}
FRACTION = 18              # bits of the engine's numbers, as in shares.py, which needs spu,
STEP = 2.0**-FRACTION      # its resolution,
EMBEDDING_STEP = 2.0**-16  # and that of embeddings, see embed.py
NEAR = 1 / 16              # share of a limit that is warned of, since other text may go further
BLURRED, GARBLED = 0.05, 0.5  # error of a row of logits by rounding, of its spread: warned, refused
LEAST_ROW = 1 / 32         # rows that secure_normalise() holds for: standard deviation in units
TEXT, RANDOM = 4, 2        # contexts of either that are tried
IN_PAIRS = 30              # bits of a product in pairs, without its sign
MARGIN = 4                 # how many times what was seen such a product may be
ROUNDING = 0.6             # error of a number that loses low bits, of the last that it keeps
SLIGHT = 2e-3              # error that a product in pairs may have, of its numbers' size,
SLIGHT_STEPS = 8           # or in the engine's steps, where that is more; else it is made whole
SLIGHT_NATS = 4e-3         # of logits: a weight p is off by p (1 - p) times that
TINY = 1e-30               # so that 0 / 0 is 0
CURE = "train it with more weight decay, a lower learning rate or temperatures nearer 1"


def check_range(c, arrays, text=None):
    """
    (units, bits) of a model of GPTConfig c that was exported as `arrays`: of the 2 L + 1 LayerNorms
    a list of powers of two, 1.0 where there is none; and {name: (bits, bits)}, the fraction bits of
    both factors of those products that are made in pairs. text: token ids it may be asked about.

    Raises ValueError, naming layer, figure and cure, if the engine would garble the model, and
    warns on stderr if it may. Certain for all text: every weight is a number that the engine holds.
    Tried on contexts of the text, of random tokens, of the largest and smallest embeddings, and on
    short prompts, and so not certain for others: products stay below 2^26, rows within LayerNorm's
    range, and rounding to 2^-18 after every step hardly changes the logits. Errors of the forms in
    nonlinear.py don't count.
    """
    check_weights(arrays)
    if "blocks.0.v" in arrays:  # plain.py's, whose formulas have ranges of their own
        return [1.0] * (2 * c.n_layer + 1), {}
    watch = Watch(c.n_layer)
    with jax.experimental.enable_x64():
        follow(watch, c, arrays, contexts(c, arrays["wte"], text))
    judge_products(watch)
    judge_rounding(watch)
    places = [f"layer {i // 2 + 1}'s LayerNorm" for i in range(2 * c.n_layer)]
    places.append("the final LayerNorm")
    units = [unit_of(rows, place, c.n_embd)
             for rows, place in zip(watch.rows, places, strict=True)]
    bits = {name: bits_of(product) for name, product in watch.products.items()}
    return units, {name: pair for name, pair in bits.items() if pair}


# --------------------------------------------------------------------------------- a pass, watched
class Both(NamedTuple):
    """A value twice: as it is, and as the engine rounds it; and of an array its name."""
    exact: jax.Array
    rounded: jax.Array
    name: str = ""

    @property
    def shape(self):
        return self.exact.shape


class Watch:
    """The op() of a pass in the clear over values of Both: notes how far each step's numbers go."""

    def __init__(self, n_layer):
        self.largest = {}  # (layer, step): the largest number
        self.blur = {}     # (layer, step): the error of rounding in a row, of the numbers' size
        self.rows = [[] for _ in range(2 * n_layer + 1)]  # standard deviations into each LayerNorm
        self.products = {}  # by its name in public.json: the Product of those that pairs suit
        self.enter("the embedding", "", 0)

    def enter(self, layer, prefix, first_norm):
        self.layer = layer
        self.prefix = prefix
        self.first_norm = first_norm
        self.norms = 0

    def __call__(self, kind, function, *values, **static):
        if function is EXACT.normalise:  # ln_1 and ln_2 in turn, or ln_f
            which = min(self.first_norm + self.norms % 2, len(self.rows) - 1)
            self.rows[which].extend(np.asarray(values[0].exact.std(-1)))
            self.norms += 1
        exact = function(*(value.exact for value in values), **static)
        rounded = on_grid(function(*(value.rounded for value in values), **static), STEP)
        error = jnp.sqrt(((rounded - exact) ** 2).mean(-1))
        size = exact.std(-1) if function is logits else jnp.sqrt((exact**2).mean())
        step = self.layer, function.__name__
        numbers = values[0].exact if kind in ACTIVATION_KIND.values() else exact  # in, or out
        reach = np.nan_to_num(jnp.abs(numbers).max(), nan=np.inf, posinf=np.inf)
        self.largest[step] = max(self.largest.get(step, 0.0), float(reach))
        self.blur[step] = max(self.blur.get(step, 0.0), float((error / (size + TINY)).max()))
        name, product = product_of(function, self.prefix, values, exact)
        if product:
            before = self.products.get(name, product)
            self.products[name] = Product(*map(max, before, product))
        return Both(exact, rounded)


def on_grid(a, step):
    return jnp.round(a / step) * step


def both(a, step=STEP):
    a = jnp.asarray(a, jnp.float64)
    return Both(a, on_grid(a, step))


def contexts(c, wte, text):
    """T token ids each: of the text, at random, those of extreme embeddings, and short prompts."""
    T, V = c.block_size, c.vocab_size
    found = list(np.random.default_rng(0).integers(0, V, (RANDOM, T)))
    by_size = np.argsort(np.linalg.norm(wte, axis=1))
    found += [np.resize(by_size[:T], T), np.resize(by_size[-T:], T)]
    if text is not None:
        if len(text) < T:
            raise ValueError(f"the text has {len(text)} tokens, and a context takes {T}")
        if text.max() >= V:
            raise ValueError(f"the text has token {text.max()}, outside the vocabulary of {V}")
        starts = np.linspace(0, len(text) - T, TEXT).astype(int)
        found += [text[start:start + T] for start in starts]
    return found + [np.where(np.arange(T) < n, found[-1], NO_TOKEN) for n in (1, T // 2)]


def follow(watch, c, arrays, contexts):
    """Take all contexts through the model by layers, the last both whole and by its one row."""
    def weights(*prefixes):
        mine = {name: both(a)._replace(name=name) for name, a in arrays.items()
                if name.startswith(prefixes)}
        return weights_of(mine, *prefixes)

    def embedded(ids):
        found = both(np.where(ids[:, None] == NO_TOKEN, 0, arrays["wte"][ids]), EMBEDDING_STEP)
        return Both(found.exact + wpe.exact, found.rounded + wpe.rounded)

    wpe = both(arrays["wpe"])
    row = Row(*(both(mask) for mask in row_of(c.block_size - 1, c.block_size)))
    xs = [embedded(ids) for ids in contexts]
    for i in layers_of(arrays):
        watch.enter(f"layer {i + 1}", f"blocks.{i}.", 2 * i)
        w = weights(f"blocks.{i}.")
        if i == c.n_layer - 1:
            rows = [last_block(watch, x, row, w, c, EXACT) for x in xs]
        xs = [block(watch, x, w, c, EXACT) for x in xs]
    watch.enter("the head", "", 2 * c.n_layer)
    w = weights(*HEAD)
    for x in xs + rows:
        head(watch, x, w, c, EXACT)


# ------------------------------------------------------------------------- what is made in pairs
class Product(NamedTuple):
    """What decides on the fraction bits of a product's two factors, the most that was seen."""
    reach: float   # the largest number
    first: float   # its error by an error of 1 in each number of the first factor,
    second: float  # and of the second
    demand: float  # one over the error that is slight


MATRIX = {linear: (0, 1), add_linear: (1, 2), scale_add_linear: (1, 3)}  # x and W among the values


def rms(a):
    return float(jnp.sqrt((a**2).mean())) + TINY


def largest(a):
    return float(jnp.abs(a).max()) + TINY


def slight(a):
    """The error that is slight, of numbers like these; the engine's own is a step or two."""
    return max(SLIGHT * rms(a), SLIGHT_STEPS * STEP)


def product_of(function, prefix, values, exact):
    """(its name in public.json, its Product) of a step that can be made in pairs; else Nones."""
    factors = [value.exact for value in values]
    if function in MATRIX and prefix:
        x, W = (factors[place] for place in MATRIX[function])
        y, terms = x @ W, math.sqrt(len(W))
        product = Product(largest(y), terms * rms(W), terms * rms(x), 1 / slight(y))
        return values[MATRIX[function][1]].name, product
    if function is scores:
        q, k, _ = jnp.split(factors[0], 3, axis=1)
        nats = LOGIT_UNIT * math.sqrt(q.shape[1] / len(exact))
        product = Product(FACTOR * max(1.0, largest(exact)), nats * rms(k) / FACTOR, nats * rms(q),
                          1 / SLIGHT_NATS)
        return prefix + "scores", product
    if function is divide:
        y, e = factors
        product = Product(largest(exact), rms(1 / e.sum(-1)), rms(y), 1 / slight(exact))
        return prefix + "divide", product
    return None, None


def bits_of(product):
    """The fraction bits (first, second) of a Product's factors; None if too few for its demand."""
    total = IN_PAIRS - math.ceil(math.log2(MARGIN * product.reach))
    if total < 4:  # or dropped() is given more than it holds
        return None
    first = round((total + math.log2(product.first / product.second)) / 2)
    first = min(max(first, 1), FRACTION, total - 1)
    second = min(total - first, FRACTION)
    error = ROUNDING * math.hypot(product.first / 2**first, product.second / 2**second)
    return (first, second) if error * product.demand < 1 else None


# ----------------------------------------------------------------------------------------- verdicts
def warn(message):
    print(f"warning: {message}", file=sys.stderr)


def judge_products(watch):
    def share(item):
        (_, step), largest = item
        return largest / LIMITS.get(step, PRODUCT)

    (layer, step), largest = worst = max(watch.largest.items(), key=share)
    limit = LIMITS.get(step, PRODUCT)
    figures = f"{layer}'s {step} reach {largest:.1e}, and a private run holds {limit:.1e}"
    if not share(worst) < 1:
        raise ValueError(f"{figures}: {CURE}")
    if share(worst) > NEAR:
        warn(f"{figures}: other text may go further")


def judge_rounding(watch):
    blur = watch.blur["the head", "logits"]
    if blur < BLURRED:
        return
    layer, step = next(step for step, error in watch.blur.items() if error >= BLURRED)
    figures = (f"from {layer}'s {step} on, rounding to 18 bits changes a row of logits by "
               f"{blur:.1%} of its spread")
    if not blur < GARBLED:
        raise ValueError(f"{figures}, and a private run would be wrong: {CURE}")
    warn(figures)


def unit_of(rows, place, d):
    """
    The power of two in the middle of rows' standard deviations, or nearer the largest: beyond the
    range these are lost, and the smallest only inexact. place: the LayerNorm, in words.
    """
    if not rows:
        return 1.0
    least, most = max(min(rows), math.sqrt(EPSILON)), max(rows)
    unit = max(math.sqrt(least * most), NEAR * most)
    unit = 2.0 ** round(math.log2(unit))
    if unit > CENTRE / (STEP * math.sqrt(d)):
        raise ValueError(f"{place} has rows of standard deviation {most:.1e}, more than a private "
                         f"run can scale: {CURE}")
    if least < LEAST_ROW * unit:
        warn(f"{place} has rows of standard deviation {least:.1e} to {most:.1e}: the smallest will "
             "be inexact")
    return unit
