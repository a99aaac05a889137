"""
Numbers that the engine must hold: nonlinear.py's ranges under SPU itself, and what pi_export.py
refuses, warns of and binds together.

The engine runs in this process, its parties being threads: SPU_PROTOCOL=cheetah for the dear one.
"""
import json
import os
import re
import stat
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, run

pytest.importorskip("spu", reason="spu needs Python 3.10 or 3.11")

from spu.utils import simulation  # noqa: E402

from model import GPT, GPTConfig, save_checkpoint  # noqa: E402
from pi_export import export, write  # noqa: E402
from private import nonlinear  # noqa: E402
from private.block import row_of  # noqa: E402
from private.engine import runtime_config  # noqa: E402
from private.files import (PRODUCT, load_embedding, load_public, load_server,  # noqa: E402
                           write_whole)
from private.ranges import MARGIN, Product, bits_of, check_range  # noqa: E402

PROTOCOL = os.environ.get("SPU_PROTOCOL", "semi2k")
d = 768  # 1/768 is far from a multiple of 2^-18, at a width that is used
SMALL = dict(block_size=16, vocab_size=100, n_layer=2, n_head=2, n_embd=32)
SM_T = dict(use_layernorm=False, use_gelu=False, fuse_ffn=True, learnable_ffn_scale=True,
            learnable_temperature=True)


@pytest.fixture(scope="module")
def engine():
    """engine(function, *secrets) -> the function's value under SPU, with engine.py's settings."""
    parties = simulation.Simulator(2, runtime_config(PROTOCOL, plain=False))
    return lambda function, *secrets: np.asarray(simulation.sim_jax(parties, function)(*secrets))


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def model_of(**flags):
    torch.manual_seed(0)
    return GPT(GPTConfig(**SMALL, **flags)).eval()


# ------------------------------------------------------------------------------ under the engine
@pytest.mark.parametrize("unit", [2.0**-3, 1.0, 2.0**11])
def test_layernorm_holds_from_a_32nd_of_its_unit_to_64(engine, unit):
    deviations = unit * np.array([1 / 32, 1 / 4, 1.0, 8, 64], np.float32)
    x = deviations[:, None] * (normal(5, d) + 10)  # a mean of ten deviations
    y = engine(lambda x: nonlinear.SECURE.normalise(x, unit=unit), x)
    exact = np.asarray(nonlinear.EXACT.normalise(x))
    assert np.abs(y - exact).max() < 1e-2
    assert np.abs((y - exact).mean(-1)).max() < 2e-3  # no bias: it adds up in the next matrix


@pytest.mark.parametrize("lead", [0, 1e4, 1e7])
def test_no_padding_wins_the_last_rows_maximum(engine, lead):
    s = normal(3, 1, 16) / nonlinear.LOGIT_UNIT
    s[..., 8:] += lead
    _, hidden, left = row_of(7, 16)
    e = engine(nonlinear.SECURE.row_exponentials, s, hidden, left)
    exact = np.asarray(nonlinear.EXACT.row_exponentials(s, hidden, left))
    assert np.abs(e - exact).max() < 5e-3
    assert np.abs(e[..., 8:]).max() < 2e-5


def test_causal_logits_of_any_size(engine):
    s = normal(2, 8, 8) * np.float32(1e6)
    e = engine(nonlinear.SECURE.exponentials, s)
    assert np.abs(e - np.asarray(nonlinear.EXACT.exponentials(s))).max() < 5e-3


@pytest.mark.parametrize("name", nonlinear.EXACT.activation)
def test_activations_of_any_size(engine, name):
    x = np.array([-1e7, -1e5, -9e3, -4, -1, 0, 1, 4, 9e3, 1e5, 1e7], np.float32)[:, None]
    y = engine(nonlinear.SECURE.activation[name], x)
    assert np.abs(y - np.asarray(nonlinear.EXACT.activation[name](x))).max() < 1e-2


def test_products_hold_to_the_limit_that_check_range_knows(engine):
    x = np.full((64, 64), 0.99 * PRODUCT / 2**13 / 64, np.float32)
    y = engine(lambda x, w: x @ w, x, np.full((64, 64), 2.0**13, np.float32))
    assert np.abs(y / (0.99 * PRODUCT) - 1).max() < 1e-3


# --------------------------------------------------------------------------- before a private run
def changed(change, **flags):
    """A model of which change(name, parameter) has changed some parameters in place."""
    model = model_of(**flags)
    with torch.no_grad():
        for name, p in model.named_parameters():
            change(name, p)
    return model


def spoiled(where, value):
    return changed(lambda name, p: p.view(-1)[3:4].fill_(value) if name == where else None)


def scaled(where, factor, **flags):
    return changed(lambda name, p: p.mul_(factor) if where in name else None, **flags)


@pytest.mark.parametrize("where, value, figure", [
    ("blocks.1.attn.qk.weight", float("nan"), "blocks.1.qkv has a nan"),
    ("blocks.1.ffn.w_out.weight", float("inf"), "blocks.1.up has a inf"),
    ("blocks.0.ffn.w_in.weight", 1e30, r"blocks.0.in has a 1.0e\+30"),
    ("wte.weight", 40_000, r"wte has a 4.0e\+04"),
])
def test_a_weight_that_the_engine_cannot_hold_is_refused(where, value, figure, tmp_path):
    with pytest.raises(ValueError, match=figure):
        write(spoiled(where, value), None, str(tmp_path / "private"))
    assert not os.listdir(tmp_path)


def test_products_beyond_the_limit_are_refused_by_layer_and_figure():
    model = scaled("attn.qk", 1e5)
    with pytest.raises(ValueError, match=r"layer \d's scores reach 1.\de\+08, .*: train it with"):
        check_range(model.config, export(model))


def test_products_near_the_limit_are_warned_of(capsys):
    model = scaled("attn.qk", 1e3)
    check_range(model.config, export(model))
    assert re.match(r"warning: layer \d's scores reach 1.\de\+04", capsys.readouterr().err)


def test_weights_that_rounding_loses_are_refused():
    model = scaled("wte", 1e-5)
    with pytest.raises(ValueError, match=r"rounding to 18 bits changes a row of logits by \d+"):
        check_range(model.config, export(model))


def test_a_common_model_is_not_warned_of(capsys):
    for flags in ({}, SM_T):
        model = model_of(**flags)
        check_range(model.config, export(model))
    assert not capsys.readouterr().err


def test_units_are_near_the_rows_of_the_text(capsys):
    """Of each LayerNorm, where its rows are far from 1 and from each other's."""
    def change(name, p):
        if name.startswith(("wte", "wpe")):
            p.mul_(3e4)

    model = changed(change)
    rows = {}
    for i, block in enumerate(model.blocks):
        for j, ln in enumerate((block.ln_1, block.ln_2)):
            ln.register_forward_pre_hook(lambda _, x, at=2 * i + j: rows.update({at: x[0].std(-1)}))
    model.ln_f.register_forward_pre_hook(lambda _, x: rows.update({4: x[0].std(-1)}))
    text = np.random.default_rng(1).integers(0, 100, 200)
    units, _ = check_range(model.config, export(model), text)
    model(torch.from_numpy(text[None, :16]))
    assert len(units) == 5
    for i, unit in enumerate(units):
        assert np.log2(unit) == round(np.log2(unit))
        assert 64 * unit > rows[i].max()
        assert unit / 32 < rows[i].min()


def test_bits_leave_room_for_what_was_seen_and_round_it_slightly():
    product = Product(reach=5.0, first=2.0, second=0.5, demand=1e3)
    first, second = bits_of(product)
    assert 2**29 / 2 < MARGIN * product.reach * 2 ** (first + second) <= 2**30
    error = 0.6 * np.hypot(product.first / 2**first, product.second / 2**second)
    assert error < 1 / product.demand
    for shift in (-1, 1):
        other = np.hypot(product.first / 2 ** (first + shift),
                         product.second / 2 ** (second - shift))
        assert 0.6 * other >= error
    assert bits_of(product._replace(demand=1e6)) is None
    assert bits_of(product._replace(reach=1e9)) is None
    assert bits_of(product._replace(reach=1e-30)) == (18, 18)


def test_products_that_a_few_bits_would_garble_are_made_whole():
    _, common = check_range(*of(model_of()))
    _, great = check_range(*of(scaled("attn.qk", 1e3)))
    assert {"blocks.0.qkv", "blocks.0.scores", "blocks.0.divide", "blocks.1.o"} <= common.keys()
    assert not any(name.endswith("scores") for name in great)


def of(model):
    return model.config, export(model)


def test_text_outside_the_vocabulary_is_refused():
    model = model_of()
    with pytest.raises(ValueError, match="token 100, outside the vocabulary of 100"):
        check_range(model.config, export(model), np.full(16, 100))


def test_a_private_run_of_great_numbers_is_right(tmp_path):
    """Rows of standard deviation 400 to 700 enter every LayerNorm, logits differ by thousands."""
    def change(name, p):
        if name.startswith(("wte", "wpe")):
            p.mul_(2e4)
        if name.endswith("attn.qk.weight"):
            p.mul_(1e3)

    model = changed(change)
    ids = [3, 5, 8, 13, 21]  # the rest of the context is padding
    clear = model(torch.tensor([ids]))[0][0, -1].detach()
    save_checkpoint(str(tmp_path / "ckpt.pt"), model)
    run("bench_spu.py", f"--ckpt={tmp_path / 'ckpt.pt'}", f"--json={tmp_path / 'r.json'}",
        f"--prompt_ids={','.join(map(str, ids))}", "--protocol=semi2k")
    result, = json.loads((tmp_path / "r.json").read_text())
    assert result["token"] == clear.argmax()
    assert result["max_abs_err"] < 2e-3 * clear.std()


# ---------------------------------------------------------------------------------------- the files
@pytest.fixture
def folder(tmp_path):
    """An export with a public embedding."""
    write(model_of(), None, str(tmp_path / "a"), embedding="public")
    return tmp_path / "a"


def edit(path, change):
    public = json.loads(path.read_text())
    change(public)
    path.write_text(json.dumps(public))


def edit_arrays(path, change):
    with np.load(path) as f:
        arrays = dict(f)
    change(arrays)
    np.savez(path, **arrays)


def test_what_was_written_is_read(folder):
    model = model_of()
    public, weights = load_server(folder)
    assert public == load_public(folder / "public.json")
    assert weights.keys() == export(model).keys()
    assert all(np.array_equal(weights[name], a) for name, a in export(model).items())
    assert np.array_equal(load_embedding(folder, public)["wte"], weights["wte"])


def test_files_of_two_models_of_one_shape_are_refused(folder, tmp_path):
    write(spoiled("wpe.weight", 0.5), None, str(tmp_path / "b"), embedding="public")
    os.replace(tmp_path / "b" / "server.npz", folder / "server.npz")
    with pytest.raises(ValueError, match="not of one export"):
        load_server(folder)
    os.replace(tmp_path / "b" / "embedding.npz", folder / "embedding.npz")
    with pytest.raises(ValueError, match="another model's"):
        load_embedding(folder, load_public(folder / "public.json"))


@pytest.mark.parametrize("change", [
    lambda public: public["config"].update(gelu_tanh=True),
    lambda public: public["config"].update(n_head=4),
    lambda public: public["layernorm_units"].__setitem__(0, 2.0),
    lambda public: public.update(embedding="private"),
    lambda public: public.update(tokenizer={"pattern": "", "special": {}, "ranks": {}}),
])
def test_an_edited_public_json_is_refused_by_the_server(folder, change):
    edit(folder / "public.json", change)
    with pytest.raises(ValueError, match="not of one export"):
        load_server(folder)


@pytest.mark.parametrize("change", [
    lambda a: a["blocks.1.o"].__setitem__((3, 4), 0.25),
    lambda a: a["wte"].__setitem__((3, 4), np.nan),
    lambda a: a.update({"blocks.1.o": a["blocks.0.o"], "blocks.0.o": a["blocks.1.o"]}),
    lambda a: a.pop("blocks.1.o"),
])
def test_edited_weights_are_refused(folder, change):
    edit_arrays(folder / "server.npz", change)
    with pytest.raises(ValueError, match="not of one export"):
        load_server(folder)


@pytest.mark.parametrize("change", [
    lambda public: public["config"].update(block_size=4096),
    lambda public: public["config"].update(block_size=2**40),
    lambda public: public["config"].update(n_layer=10**9),
    lambda public: public["config"].update(n_layer=1e9),
    lambda public: public["config"].update(n_layer=True),
    lambda public: public["config"].update(n_layer=3),
    lambda public: public["config"].update(n_head=2.0),
    lambda public: public["config"].update(n_head=-2),
    lambda public: public["config"].update(n_head="2"),
    lambda public: public["config"].update(vocab_size=float("nan")),
    lambda public: public["config"].update(unknown=1),
    lambda public: public["config"].pop("bias"),
    lambda public: public["shapes"].pop("head"),
    lambda public: public["shapes"].pop("blocks.0.o"),
    lambda public: public["shapes"].update({"blocks.0.o": [32, -32]}),
    lambda public: public["shapes"].update({"blocks.0.o": 7}),
    lambda public: public["shapes"].update({"blocks.0.x": [32, 32]}),
    lambda public: public["shapes"].update({"blocks.o": [32, 32]}),
    lambda public: public.update(shapes=[]),
    lambda public: public.update(config=None),
    lambda public: public.update(layernorm_units=[1.0, 1.0]),
    lambda public: public.update(layernorm_units=[0.0] * 5),
    lambda public: public.update(layernorm_units=[3.0] * 5),
    lambda public: public.update(layernorm_units=[float("inf")] * 5),
    lambda public: public.update(bits={"blocks.0.o": [0, 12]}),
    lambda public: public.update(bits={"blocks.0.o": [12, 19]}),
    lambda public: public.update(bits={"blocks.0.o": [12, 12, 12]}),
    lambda public: public.update(bits={"blocks.0.o": [12.0, 12]}),
    lambda public: public.update(bits={"blocks.0.o_b": [12, 12]}),
    lambda public: public.update(bits={"blocks.2.scores": [12, 12]}),
    lambda public: public.update(bits={"blocks.0.scores": [14, 14]}),
    lambda public: public.update(bits=[]),
    lambda public: public.update(tokenizer="gpt2"),
    lambda public: public.update(tokenizer={}),
    lambda public: public.update(embedding=7),
    lambda public: public.update(embedding="public"),
    *[lambda public, key=key: public.pop(key) for key in
      ("config", "shapes", "tokenizer", "embedding", "layernorm_units", "bits", "hash")],
])
def test_odd_numbers_in_public_json_are_one_line(folder, change):
    edit(folder / "public.json", change)
    with pytest.raises(ValueError, match="is not a public.json") as e:
        load_public(folder / "public.json")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("text", [b"", b"{}", b"[1, 2]", b"7", b"null", b"\xff\xfe", b"[" * 99_999])
def test_what_is_no_public_json_is_one_line(tmp_path, text):
    (tmp_path / "public.json").write_bytes(text)
    with pytest.raises(ValueError, match="is not a public.json"):
        load_public(tmp_path / "public.json")


def test_a_missing_public_json_is_named():
    with pytest.raises(ValueError, match="can't read nowhere.json: No such file"):
        load_public("nowhere.json")


# ------------------------------------------------------------------------------------ the disk
def permissions(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def test_the_weights_are_the_servers_alone(folder):
    assert permissions(folder / "server.npz") == 0o600
    os.chmod(folder / "server.npz", 0o644)
    (folder / "server.npz.tmp").touch(0o666)  # of a run that was killed
    write(model_of(), None, str(folder))
    assert permissions(folder / "server.npz") == 0o600
    assert permissions(folder / "public.json") & 0o444  # the client's copy


def test_a_secret_is_unreadable_from_its_first_byte(tmp_path):
    seen = []
    write_whole(str(tmp_path / "s"), lambda f: seen.append(permissions(f.name)), secret=True)
    assert seen == [0o600]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    def fail(f):
        f.write(b"half")
        raise error

    (tmp_path / "s").write_bytes(b"old")
    with pytest.raises(type(error)):
        write_whole(str(tmp_path / "s"), fail)
    assert os.listdir(tmp_path) == ["s"]
    assert (tmp_path / "s").read_bytes() == b"old"


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path):
    save_checkpoint(str(tmp_path / "ckpt.pt"), model_of())
    arguments = f"--ckpt={tmp_path / 'ckpt.pt'} --out={tmp_path / 'private'}"
    command = f"ulimit -f 8; exec {sys.executable} pi_export.py {arguments}"  # 8 KiB a file
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    server = tmp_path / "private" / "server.npz"
    assert done.stderr == f"error: can't write {server}: File too large\n"
    assert not os.listdir(tmp_path / "private")


def test_an_export_says_what_it_wrote(tmp_path):
    save_checkpoint(str(tmp_path / "ckpt.pt"), model_of())
    out = run("pi_export.py", f"--ckpt={tmp_path / 'ckpt.pt'}", f"--out={tmp_path}",
              "--embedding=public")
    for name in ("server.npz", "public.json", "embedding.npz"):
        assert f"{tmp_path / name}: " in out
