"""pi_export.py and block.py: foldings exact in float64, the exported model equal to model.py's."""
import json

import numpy as np
import pytest
import torch
from conftest import refusals, run
from test_model import ARCHITECTURES, SMALL, build, tokens

pytest.importorskip("spu", reason="spu needs Python 3.10 or 3.11")

import jax  # noqa: E402

from model import GPT, GPTConfig, save_checkpoint  # noqa: E402
from pi_export import export  # noqa: E402
from private.block import (  # noqa: E402
    HEAD, WORDS, block, ffn, forward, head, last_block, layers_of, linear, logits, now, row_of,
    weights_of)
from private.files import check_shapes, load_weights  # noqa: E402
from private.further import Seats, forward_next, make_room  # noqa: E402
from private.nonlinear import EXACT, SECURE  # noqa: E402
from private.infer import equal_layers  # noqa: E402
from private.plain import plain_block, plain_export, plain_head  # noqa: E402

VARIANTS = {
    **ARCHITECTURES,
    "SM+WNorm(QKVO+FFN)": dict(use_layernorm=False, use_gelu=False, weight_norm="qkvo+ffn"),
    "SM+SReparam(QKVO+FFN)": dict(use_layernorm=False, use_gelu=False, sigma_reparam="qkvo+ffn"),
    "GPT-2's biases": dict(bias=True, gelu_tanh=True),
    "softmax only with biases": dict(ARCHITECTURES["SM+ScFFN"], bias=True),
    "softmax only, no ln_f": dict(ARCHITECTURES["SM+ScFuFFN"], final_layernorm=False),
    "SM+G, no ln_f": dict(ARCHITECTURES["SM+G"], final_layernorm=False),
    "SM+LN+ScFuFFN": dict(use_gelu=False, fuse_ffn=True, learnable_ffn_scale=True),
    "SM+R+ScFFN": dict(ARCHITECTURES["SM+R"], learnable_ffn_scale=True),
    "1 uniform": dict(ARCHITECTURES["SM(t)+ScFuFFN"], uniform_layers=1),
    "all uniform": dict(ARCHITECTURES["SM+ScFuFFN"], uniform_layers=2, bias=True),
    "5 uniform": dict(ARCHITECTURES["SM+ScFuFFN"], n_layer=6, uniform_layers=5, bias=True),
    "LN, 1 uniform": dict(uniform_layers=1, bias=True),
    "LN, all uniform": dict(uniform_layers=2),
    "G, 1 uniform": dict(ARCHITECTURES["SM+G"], uniform_layers=1),
    "2 positional": dict(ARCHITECTURES["SM(t)+ScFuFFN"], n_layer=4, uniform_layers=1,
                         positional_layers=2, bias=True),
    "all positional": dict(ARCHITECTURES["SM+ScFuFFN"], positional_layers=2),
    "LN, 1 positional": dict(positional_layers=1, bias=True),
}


def one_hot(idx, dtype=np.float64):
    return np.eye(SMALL["vocab_size"], dtype=dtype)[idx.numpy()]


def clear_logits(model, idx):
    """model.py's logits (T, V)."""
    return model(idx)[0][0].detach().numpy()


def exported(model, idx, **options):
    """The logits of what was exported, in float64."""
    with jax.experimental.enable_x64():
        arrays = export(model, np.float64)
        return np.asarray(forward(arrays, model.config, one_hot(idx[0]), **options))


def rounding(wanted):
    """What float64 may lose."""
    return 1e-11 * max(1, np.abs(wanted).max())


@pytest.mark.parametrize("name", VARIANTS)
def test_foldings_are_exact(name):
    """Every parameter off its initial value, float64 throughout: what is left is rounding."""
    model = build(**VARIANTS[name])
    idx = tokens(B=1, T=7)  # shorter than the context, as prompts are
    got, wanted = exported(model, idx), clear_logits(model, idx)
    assert got.dtype == np.float64
    assert np.abs(got - wanted).max() < rounding(wanted)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_last_block_by_one_row(name):
    """A next token's row, from a last block that computes no other, is that row of the whole."""
    model = build(**VARIANTS[name])
    idx = tokens(B=1, T=SMALL["block_size"])
    whole = exported(model, idx)
    for row in (0, 5, len(whole) - 1):
        one = exported(model, idx, row=row)
        assert one.shape == (1, SMALL["vocab_size"])
        assert np.abs(one[0] - whole[row]).max() < rounding(whole)


@pytest.mark.parametrize("name", ["SM", "SM+ScFuFFN"])
def test_a_singular_ffn_is_run(name):
    """
    beta I + W_ffn / alpha = 0 in some direction has no inverse, so no basis to hide it in: the FFN
    stays, and stays exact.
    """
    model = build(**ARCHITECTURES[name], bias=True)
    idx = tokens(B=1, T=7)
    singular = model.blocks[1]
    with torch.no_grad():
        if name == "SM+ScFuFFN":
            singular.ffn.w_ffn.weight[:] = -singular.alpha * singular.beta * torch.eye(8)
        else:
            singular.ffn.w_out.weight[:] = -torch.linalg.pinv(singular.ffn.w_in.weight)
    assert "blocks.0.ffn" in export(model)
    for row in (None, 5):
        wanted = clear_logits(model, idx)
        got = exported(model, idx, row=row)
        assert np.abs(got - (wanted if row is None else wanted[row])).max() < 1e-10


@pytest.mark.parametrize("name", VARIANTS)
def test_the_unfolded_form_is_the_same_model(name):
    """plain.py, against which the foldings are measured, is no straw man: the same logits."""
    model = build(**VARIANTS[name])
    c, idx = model.config, tokens(B=1, T=SMALL["block_size"])
    with jax.experimental.enable_x64():
        arrays = plain_export(model, np.float64)
        x = one_hot(idx[0]) @ arrays["wte"] + arrays["wpe"]
        for i in range(c.n_layer):
            x = plain_block(now, x, weights_of(arrays, f"blocks.{i}."), c)
        got = np.asarray(plain_head(now, x, weights_of(arrays, *HEAD), c))
    wanted = clear_logits(model, idx)
    assert np.abs(got - wanted).max() < rounding(wanted)


@pytest.mark.parametrize("name", [
    "SM", "SM+WNorm(FFN)", "SM+SNorm(FFN)", "SM+ScFFN", "SM+ScFuFFN", "SM(th)+ScFuFFN"])
def test_a_softmax_only_block_is_attention_alone(name):
    """Q, K, V in one matrix, the projection in another: no FFN, scale or norm is left."""
    assert shapes_of_block(name) == {"qkv": [(8, 24), (24,)], "o": [(8, 8)]}


def test_what_else_a_block_may_hold():
    per_position = shapes_of_block("SM(t)+ScFuFFN")
    assert per_position["inverse_t"] == [(2, 16, 1)]
    linear_ffn = {"qkv": [(8, 24), (24,)], "o": [(8, 8), (8,)], "ffn": [(8, 8), (8,)]}
    assert shapes_of_block("SM+LN") == linear_ffn


def test_uniform_layers_in_a_row_are_one_product():
    """Up to RUN of them, whose matrix is as large as Q, K and V's; the last layer stays apart."""
    shapes = {k: list(a.shape) for k, a in export(build(**VARIANTS["5 uniform"])).items()}
    assert layers_of(shapes) == [2, 4, 5]
    assert shapes["blocks.2.o"] == [24, 8] and shapes["blocks.4.o"] == [16, 8]
    assert "blocks.4.qkv" not in shapes and shapes["blocks.5.qkv"] == [8, 24]
    c = build(**VARIANTS["5 uniform"]).config
    check_shapes(c, shapes)
    assert equal_layers(shapes, [2, 4]) == [[2], [4]]
    for name, shape in (("blocks.2.o", [8, 8]), ("blocks.2.qkv", [8, 24])):
        with pytest.raises((ValueError, KeyError)):
            check_shapes(c, shapes | {name: shape})
    fewer = {name: shape for name, shape in shapes.items() if not name.startswith("blocks.4")}
    with pytest.raises(ValueError, match="layer 4 has no arrays"):
        check_shapes(c, fewer)


def test_layers_are_equal_by_their_shapes():
    """Uniform layers beside a LayerNorm, and those with a softmax, each have their own price."""
    arrays = export(build(n_layer=5, uniform_layers=2))
    shapes = {k: list(a.shape) for k, a in arrays.items()}
    assert equal_layers(shapes, [0, 1, 2, 3]) == [[0, 1], [2, 3]]
    bits = {"blocks.2.o": (12, 12), "blocks.3.o": (11, 13), "blocks.0.scores": (12, 12)}
    assert equal_layers(shapes, [0, 1, 2, 3], bits) == [[0], [1], [2, 3]]


def shapes_of_block(name):
    w = weights_of(export(build(**ARCHITECTURES[name])), "blocks.0.")
    return {k: [a.shape for a in arrays] for k, arrays in w.items()}


def test_weights_are_found_by_prefix_each_with_its_bias():
    arrays = {"blocks.1.o": 1, "blocks.1.qkv": 2, "blocks.1.qkv_b": 3, "blocks.10.o": 4, "head": 5}
    assert weights_of(arrays, "blocks.1.") == {"o": (1,), "qkv": (2, 3)}
    assert weights_of(arrays, *HEAD) == {"head": (5,)}


@pytest.mark.parametrize("name", ["SM+LN+G", "SM+R+ScFFN", "SM(t)+ScFuFFN"])
def test_every_step_is_cached_by_what_it_is(name):
    """
    Two blocks of a model are the same list of (kind, function, static keywords): compiled once. So
    no step may be a closure that is made anew.
    """
    model = build(**VARIANTS[name])
    c, T = model.config, SMALL["block_size"]
    x = np.ones((T, c.n_embd), np.float32)
    for form in (lambda op, w: block(op, x, w, c, SECURE),
                 lambda op, w: last_block(op, x, row_of(3, T), w, c, SECURE)):
        steps = []
        for i in (0, 1):
            steps.append([])

            def op(kind, function, *values, **static):
                steps[-1].append((kind, function, tuple(sorted(static.items()))))
                return function(*values, **static)

            form(op, weights_of(export(model), f"blocks.{i}."))
        assert {*steps[0]} == {*steps[1]}


def test_a_new_activation_needs_no_edit_here(monkeypatch):
    """An entry in model.ACTIVATIONS and one in nonlinear.py: the block takes both."""
    kinds = []

    def op(kind, function, *values, **static):
        kinds.append(kind)
        return function(*values, **static)

    c = GPTConfig(**SMALL, use_layernorm=False)
    monkeypatch.setitem(EXACT.activation, "silu", jax.nn.silu)
    monkeypatch.setitem(__import__("model").ACTIVATIONS, "silu", ("S", torch.nn.SiLU()))
    monkeypatch.setattr(GPTConfig, "activation", "silu")
    x, W_in, W_out = (np.random.default_rng(0).normal(size=s) for s in ((3, 8), (8, 32), (32, 8)))
    got = np.asarray(ffn(op, x, {"in": (W_in,), "up": (W_out,)}, c, EXACT))
    wanted = x + torch.nn.functional.silu(torch.from_numpy(x @ W_in)).numpy() @ W_out
    assert np.abs(got - wanted).max() < 1e-4
    assert kinds == ["matmul", "SiLU", "matmul"]


def test_the_head_of_many_rows_goes_in_pieces():
    """At once it took more than 24 GB at the paper's size; of a next token's row nothing is cut."""
    rng = np.random.default_rng(0)
    c = GPTConfig(use_layernorm=False, final_layernorm=False)
    x, W, b = rng.normal(size=(5, 8)), rng.normal(size=(8, 2 * WORDS + 904)), rng.normal(size=5000)

    def columns(rows):
        products = [e for e in jax.make_jaxpr(logits)(rows, W, b).eqns
                    if e.primitive.name == "dot_general"]
        return [e.outvars[0].aval.shape[1] for e in products]

    with jax.experimental.enable_x64():
        got = np.asarray(head(now, x, {"head": (W, b)}, c, SECURE))
        assert np.abs(got - (x @ W + b)).max() < 1e-12
        assert columns(x) == [WORDS, WORDS, 904]
        assert columns(x[:1]) == [5000]


def test_a_trained_checkpoint(data_dir, tmp_path):
    """train.py -> pi_export.py -> server.npz, in float32: the same logits to 1e-4."""
    run("train.py", "config/ereg_sm_t_scfuffn.py", "--spectral_norm=ffn", "--dataset=mine",
        f"--data_dir={data_dir}", f"--out_dir={tmp_path}", "--max_iters=50", "--n_layer=3",
        "--n_head=2", "--n_embd=32", "--block_size=32", "--eval_windows=4", "--sample_tokens=0",
        "--learning_rate=1e-2")
    folder = tmp_path / "private"
    run("pi_export.py", f"--ckpt={tmp_path / 'ckpt.pt'}", f"--out={folder}")
    public = json.loads((folder / "public.json").read_text())
    arrays = load_weights(folder / "server.npz")
    model = GPT.from_checkpoint(str(tmp_path / "ckpt.pt"))
    config = GPTConfig(**public["config"])
    assert config == model.config
    assert public["tokenizer"]["ranks"]
    assert public["shapes"] == {k: list(v.shape) for k, v in arrays.items()}

    ids = np.fromfile(data_dir / "mine" / "val.bin", np.uint16)[:32].astype(np.int64)
    got = np.asarray(forward(arrays, config, np.eye(config.vocab_size, dtype=np.float32)[ids]))
    wanted = clear_logits(model, torch.from_numpy(ids)[None])
    assert np.abs(wanted).max() > 1
    assert np.abs(got - wanted).max() < 1e-4


def test_what_goes_wrong_is_said(tmp_path):
    ckpt, broken = tmp_path / "ckpt.pt", tmp_path / "broken.pt"
    broken.write_bytes(b"PK not a checkpoint")
    save_checkpoint(str(ckpt), GPT(GPTConfig(**SMALL)))
    told = refusals("pi_export.py", [
        [f"--ckpt={tmp_path / 'none.pt'}"], [f"--ckpt={broken}"],
        [f"--ckpt={ckpt}", "--out=/dev/null/x"], [f"--ckpt={ckpt}", f"--out={tmp_path}"]])
    assert [status for status, _ in told] == [1, 1, 1, 0]
    for (_, line), words in zip(told, ("no checkpoint at", "not a whole checkpoint", "/dev/null")):
        assert line.startswith("error: ") and words in line and line.count("\n") == 1
    whole = (tmp_path / "server.npz").read_bytes()
    (tmp_path / "server.npz").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="not a whole server.npz"):
        load_weights(tmp_path / "server.npz")


@pytest.mark.parametrize("T", [1, 128, 129, 300])
def test_a_product_by_rows(T):
    rng = np.random.default_rng(T)
    x, W, b = (rng.standard_normal(shape) for shape in ((T, 5), (5, 7), (7,)))
    with jax.experimental.enable_x64():
        assert np.allclose(linear(x, W, b), x @ W + b, atol=1e-12)
        assert np.allclose(linear(x, W), x @ W, atol=1e-12)


@pytest.mark.parametrize("name", ["SM+LN+G", "SM+LN+R", "SM(t)+ScFuFFN"])
def test_the_secure_forward_pass_is_near_the_exact_one(in_the_clear, name):
    model = GPT(GPTConfig(**SMALL, **ARCHITECTURES[name])).eval()
    idx = tokens(B=1)
    exact = clear_logits(model, idx)
    hot = one_hot(idx[0], np.float32)
    for row in (None, 9):
        secure = np.asarray(forward(export(model), model.config, hot, SECURE, row=row))
        assert np.abs(secure - (exact if row is None else exact[row])).max() < 1e-2


@pytest.mark.parametrize("passes", [
    [(1, 1)] * 5,
    [(3, 1), (3, 3), (1, 1)],
    [(2, 1), (4, 2), (3, 2)],
])
@pytest.mark.parametrize("name", VARIANTS)
def test_further_tokens_by_their_rows(name, passes):
    """
    Behind a prompt of 5, padded to 8 by whatever: the rows at its own positions in the clear.
    passes: of how many rows, and how many of these count; the others are of any tokens, and
    dropped.
    """
    model = build(**VARIANTS[name])
    c, T = model.config, SMALL["block_size"]
    idx = tokens(B=1, T=T)
    wanted, hot = clear_logits(model, idx), one_hot(idx[0])
    padded = np.concatenate((hot[:5], np.roll(hot[:3], 1, axis=1)))
    caches, room = {}, sum(k for k, _ in passes)
    seats = Seats(5, 8, room, T)
    with jax.experimental.enable_x64():
        arrays = export(model, np.float64)
        last = row_of(4, 8).last
        got = [forward(arrays, c, padded, row=4, caches=caches)]
        make_room(now, last, caches, room)
        for k, count in passes:
            fed = np.roll(hot[seats.positions(k)], 1, axis=1)
            fed[:count] = hot[seats.positions(count)]
            got.append(forward_next(arrays, c, fed, seats.seat(k), caches)[:count])
            seats.drop(k - count)
    got = np.concatenate(got)
    assert np.abs(got - wanted[4:4 + len(got)]).max() < rounding(wanted)
