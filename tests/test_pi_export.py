"""pi_export.py: every folding exact in float64, and the exported model equal to model.py's."""
import json

import numpy as np
import pytest
import torch
from conftest import run
from test_model import ARCHITECTURES, SMALL, build, tokens

jax = pytest.importorskip("jax", reason="jax comes with spu, which needs Python 3.10 or 3.11")

from model import GPT, GPTConfig, save_checkpoint  # noqa: E402
from private.nonlinear import SECURE  # noqa: E402
from pi_export import export, forward, head_steps, load_weights, matmul, of_block  # noqa: E402
from private.plain import plain_block_steps, plain_export, plain_head_steps  # noqa: E402


def one_hot(idx, dtype=np.float64):
    return np.eye(SMALL["vocab_size"], dtype=dtype)[idx.numpy()]


VARIANTS = {**ARCHITECTURES, "SM+WNorm(QKVO+FFN)": dict(use_layernorm=False, use_gelu=False, weight_norm="qkvo+ffn"),
            "GPT-2's biases": dict(bias=True, gelu_tanh=True), "softmax only with biases": dict(ARCHITECTURES["SM+ScFFN"], bias=True),
            "softmax only, no ln_f": dict(ARCHITECTURES["SM+ScFuFFN"], final_layernorm=False), "SM+G, no ln_f": dict(ARCHITECTURES["SM+G"], final_layernorm=False),
            "SM+LN+ScFuFFN": dict(use_gelu=False, fuse_ffn=True, learnable_ffn_scale=True), "SM+R+ScFFN": dict(ARCHITECTURES["SM+R"], learnable_ffn_scale=True)}


@pytest.mark.parametrize("name", VARIANTS)
def test_foldings_are_exact(name):
    """Every parameter off its initial value, float64 throughout: what is left is rounding."""
    model, idx = build(**VARIANTS[name]), tokens(B=1, T=7)  # shorter than the context, as prompts are
    with jax.experimental.enable_x64():
        logits = np.asarray(forward(export(model, np.float64), model.config, one_hot(idx[0])))
    wanted = model(idx)[0][0].detach().numpy()
    assert logits.dtype == np.float64 and np.abs(logits - wanted).max() < 1e-11 * max(1, np.abs(wanted).max())


@pytest.mark.parametrize("name", VARIANTS)
def test_the_last_block_by_one_row(name):
    """The row that a next token needs, from a last block that computes no other: that row of the whole."""
    model, idx = build(**VARIANTS[name]), tokens(B=1, T=SMALL["block_size"])
    with jax.experimental.enable_x64():
        arrays, hot = export(model, np.float64), one_hot(idx[0])
        whole = np.asarray(forward(arrays, model.config, hot))
        for row in (0, 5, len(hot) - 1):
            one = np.asarray(forward(arrays, model.config, hot, row=row))
            assert one.shape == (1, SMALL["vocab_size"]) and np.abs(one[0] - whole[row]).max() < 1e-11 * max(1, np.abs(whole).max())


@pytest.mark.parametrize("name", ["SM", "SM+ScFuFFN"])
def test_a_singular_ffn_is_run(name):
    """beta I + W_ffn / alpha = 0 in some direction has no inverse, so no basis to hide it in: the FFN stays, and stays exact."""
    model, idx = build(**ARCHITECTURES[name], bias=True), tokens(B=1, T=7)
    with torch.no_grad():
        ffn = model.blocks[1].ffn
        (ffn.w_ffn if name == "SM+ScFuFFN" else ffn.w_out).weight[:] = -(model.blocks[1].alpha * model.blocks[1].beta if name == "SM+ScFuFFN" else 1) * (
            torch.eye(8) if name == "SM+ScFuFFN" else torch.linalg.pinv(ffn.w_in.weight))
    with jax.experimental.enable_x64():
        arrays = export(model, np.float64)
        logits = np.asarray(forward(arrays, model.config, one_hot(idx[0])))
    assert "blocks.0.ffn" in arrays and np.abs(logits - model(idx)[0][0].detach().numpy()).max() < 1e-10


@pytest.mark.parametrize("name", VARIANTS)
def test_the_unfolded_form_is_the_same_model(name):
    """plain_export and its steps, against which the foldings are measured, are no straw man: they give the same logits."""
    model, idx = build(**VARIANTS[name]), tokens(B=1, T=7)
    with jax.experimental.enable_x64():
        logits = np.asarray(forward(plain_export(model, np.float64), model.config, one_hot(idx[0]), None,
                                    (plain_block_steps, plain_head_steps)))
    wanted = model(idx)[0][0].detach().numpy()
    assert np.abs(logits - wanted).max() < 1e-11 * max(1, np.abs(wanted).max())


def test_a_softmax_only_block_is_attention_alone():
    """Q, K, V in one matrix and the projection in the other: no FFN, no scale, no norm is left to multiply."""
    for name in ("SM", "SM+WNorm(FFN)", "SM+SNorm(FFN)", "SM+ScFFN", "SM+ScFuFFN", "SM(th)+ScFuFFN"):
        block = of_block(export(build(**ARCHITECTURES[name])), 0)
        assert {k: v.shape for k, v in block.items()} == {"qkv": (8, 24), "qkv_b": (24,), "o": (8, 8)}, name
    assert export(build(**ARCHITECTURES["SM(t)+ScFuFFN"]))["blocks.0.inverse_t"].shape == (2, 16, 1)
    assert {k: v.shape for k, v in of_block(export(build(**ARCHITECTURES["SM+LN"])), 0).items()} == \
        {"qkv": (8, 24), "qkv_b": (24,), "o": (8, 8), "o_b": (8,), "ffn": (8, 8), "ffn_b": (8,)}


def test_the_head_of_many_rows_goes_in_pieces():
    """All of it at once took more than 24 GB at the paper's size; of the one row of a next token nothing is cut."""
    rng, c = np.random.default_rng(0), GPTConfig(use_layernorm=False, final_layernorm=False)
    x, W, b = rng.normal(size=(5, 8)), rng.normal(size=(8, 5000)), rng.normal(size=5000)
    (_, output, logits, inputs), = head_steps(c, {"head": W, "head_b": b}, SECURE)
    assert (output, inputs) == ("logits", ["x", "W.head", "W.head_b"])
    with jax.experimental.enable_x64():
        assert np.abs(np.asarray(logits(x, W, b)) - (x @ W + b)).max() < 1e-12
        columns = [[e.outvars[0].aval.shape[1] for e in jax.make_jaxpr(logits)(rows, W, b).eqns if e.primitive.name == "dot_general"] for rows in (x, x[:1])]
    assert columns == [[2048, 2048, 904], [5000]]


@pytest.mark.parametrize("arch", ["ereg_sm_t_scfuffn", "sm_ln_g", "sm_snorm_ffn"])
def test_a_trained_checkpoint(arch, data_dir, tmp_path):
    """train.py -> pi_export.py -> server.npz, in float32: the same logits to 1e-4."""
    run("train.py", f"config/{arch}.py", "--dataset=mine", f"--data_dir={data_dir}", f"--out_dir={tmp_path}", "--max_iters=50", "--n_layer=3",
        "--n_head=2", "--n_embd=32", "--block_size=32", "--eval_windows=4", "--sample_tokens=0", "--learning_rate=1e-2")
    run("pi_export.py", f"--ckpt={tmp_path / 'ckpt.pt'}", f"--out={tmp_path / 'private'}")
    public = json.loads((tmp_path / "private" / "public.json").read_text())
    config, arrays = GPTConfig(**public["config"]), load_weights(tmp_path / "private" / "server.npz")
    model = GPT.from_checkpoint(str(tmp_path / "ckpt.pt"))
    assert config == model.config and public["tokenizer"]["ranks"]
    assert public["shapes"] == {k: list(v.shape) for k, v in np.load(tmp_path / "private" / "server.npz").items()}
    idx = torch.from_numpy(np.fromfile(data_dir / "mine" / "val.bin", np.uint16)[:32].astype(np.int64))
    logits = np.asarray(forward(arrays, config, np.eye(config.vocab_size, dtype=np.float32)[idx.numpy()]))
    wanted = model(idx[None])[0][0].detach().numpy()
    assert np.abs(logits - wanted).max() < 1e-4 and np.abs(wanted).max() > 1


def test_what_goes_wrong_is_said(tmp_path):
    assert "error: no checkpoint at" in run("pi_export.py", f"--ckpt={tmp_path / 'none.pt'}", status=1)
    (tmp_path / "ckpt.pt").write_bytes(b"PK not a checkpoint")
    assert "not a whole checkpoint" in run("pi_export.py", f"--ckpt={tmp_path / 'ckpt.pt'}", status=1)
    save_checkpoint(str(tmp_path / "ckpt.pt"), GPT(GPTConfig(**SMALL)))
    assert "error:" in run("pi_export.py", f"--ckpt={tmp_path / 'ckpt.pt'}", "--out=/dev/null/x", status=1)
    run("pi_export.py", f"--ckpt={tmp_path / 'ckpt.pt'}", f"--out={tmp_path}")
    whole = (tmp_path / "server.npz").read_bytes()
    (tmp_path / "server.npz").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="not a whole server.npz"):
        load_weights(tmp_path / "server.npz")


@pytest.mark.parametrize("T", [1, 128, 129, 300])
def test_a_product_by_rows(T):
    x, W, b = (np.random.default_rng(T).standard_normal(shape) for shape in ((T, 5), (5, 7), (7,)))
    with jax.experimental.enable_x64():
        assert np.allclose(matmul(x, W, b), x @ W + b, atol=1e-12) and np.allclose(matmul(x, W), x @ W, atol=1e-12)


@pytest.mark.parametrize("name", ["SM+LN+G", "SM+LN+R", "SM(t)+ScFuFFN"])
def test_the_secure_forward_pass_is_near_the_exact_one(in_the_clear, name):
    model, idx = GPT(GPTConfig(**SMALL, **ARCHITECTURES[name])).eval(), tokens(B=1)
    exact = model(idx)[0][0].detach().numpy()
    for row in (None, 9):
        secure = np.asarray(forward(export(model), model.config, one_hot(idx[0], np.float32), SECURE, row=row))
        assert np.abs(secure - (exact if row is None else exact[row])).max() < 1e-2
