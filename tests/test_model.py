"""model.py: every flag against the equation it implements, every refusal, every count of the paper's tables."""
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from safetensors.torch import save_file

from model import GPT, NORM_PLACES, GPTConfig, load_checkpoint, save_checkpoint

SMALL = dict(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=8)
SM = dict(use_layernorm=False, use_gelu=False)
ARCHITECTURES = {
    "SM+LN+G": {}, "SM+LN+R": dict(use_gelu=False, use_relu=True), "SM+LN": dict(use_gelu=False), "SM+G": dict(use_layernorm=False),
    "SM+R": dict(SM, use_relu=True), "SM": SM, "SM+WNorm(FFN)": dict(SM, weight_norm="ffn"), "SM+SNorm(FFN)": dict(SM, spectral_norm="ffn"),
    "SM+ScFFN": dict(SM, learnable_ffn_scale=True), "SM+ScFuFFN": dict(SM, fuse_ffn=True, learnable_ffn_scale=True),
    "SM(t)+ScFuFFN": dict(SM, fuse_ffn=True, learnable_ffn_scale=True, learnable_temperature=True),
    "SM(th)+ScFuFFN": dict(SM, fuse_ffn=True, learnable_ffn_scale=True, learnable_temperature=True, temperature_per_head=True),
}


def build(seed=0, **flags):
    """A small model in float64 and eval mode whose every parameter, gains and temperatures too, is off its initial value."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**SMALL, **flags})).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def tokens(B=3, T=16, seed=1):
    return torch.randint(0, SMALL["vocab_size"], (B, T), generator=torch.Generator().manual_seed(seed))


def by_the_equations(model, idx):
    """Logits (T, V) and entropies (L, H, T) of one sequence, a row at a time, from eq. 1, 3, 4, 6, 7, 8 and 9."""
    c, T, d_k = model.config, len(idx), model.config.n_embd // model.config.n_head

    def ln(module, x, used=c.use_layernorm):
        return F.layer_norm(x, (c.n_embd,), module.weight, module.bias) if used else x

    x, entropies = torch.stack([model.wte.weight[t] + model.wpe.weight[i] for i, t in enumerate(idx)]), []
    for block in model.blocks:
        h = ln(block.ln_1, x)
        Q, K = (h @ block.attn.qk.weight.T + block.attn.qk.bias).split(c.n_embd, -1)
        V, heads = h @ block.attn.v.weight.T, []
        for head in range(c.n_head):
            cut = slice(head * d_k, (head + 1) * d_k)
            out, ent = [], []
            for i in range(T):
                t = block.attn.temperature[head, 0 if c.temperature_per_head else i] if c.learnable_temperature else 1.0
                A = F.softmax(torch.stack([Q[i, cut] @ K[j, cut] / (t * math.sqrt(d_k)) for j in range(i + 1)]), 0)
                out.append(sum(A[j] * V[j, cut] for j in range(i + 1)))
                ent.append(-torch.xlogy(A, A).sum())
            heads.append(torch.stack(out))
            entropies.append(torch.stack(ent))
        x = x + torch.cat(heads, -1) @ block.attn.o.weight.T
        h = ln(block.ln_2, x)
        if c.fuse_ffn:
            y = h @ block.ffn.w_ffn.weight.T
        else:
            y = h @ block.ffn.w_in.weight.T
            y = (F.gelu(y) if c.use_gelu else y.clamp(min=0) if c.use_relu else y) @ block.ffn.w_out.weight.T
        x = block.beta * x + y / block.alpha if c.learnable_ffn_scale else x + y
    return ln(model.ln_f, x, c.final_layernorm) @ model.wte.weight.T, torch.stack(entropies).view(c.n_layer, c.n_head, T)


@pytest.mark.parametrize("final_layernorm", (True, False))
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_its_equations(name, final_layernorm):
    model, idx = build(**ARCHITECTURES[name], final_layernorm=final_layernorm), tokens(T=7)
    assert model.config.name == name + ("" if final_layernorm else ", no ln_f")
    # the entropy's eps, 1e-9, is all that separates them from float64 precision
    logits, loss, entropy = model(idx, idx, return_entropy=True)
    wanted, wanted_entropy = by_the_equations(model, idx[0])
    assert torch.allclose(logits[0], wanted, atol=1e-9)
    assert entropy.shape == (2, 3, 2, 7) and torch.allclose(entropy[:, 0], wanted_entropy, atol=1e-7)
    fast, none, no_entropy = model(idx)  # scaled_dot_product_attention
    assert none is None and no_entropy is None and torch.allclose(fast, logits, atol=1e-9)
    assert loss.item() == pytest.approx(F.cross_entropy(logits.flatten(0, 1), idx.flatten()).item())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_config_files_are_the_architectures(name):
    files = {"SM+WNorm(FFN)": "sm_wnorm_ffn", "SM+SNorm(FFN)": "sm_snorm_ffn", "SM(t)+ScFuFFN": "sm_t_scfuffn", "SM(th)+ScFuFFN": "sm_th_scfuffn"}
    path = ROOT / "config" / f"{files.get(name, name.lower().replace('+', '_'))}.py"
    flags = {}
    exec(path.read_text(), {}, flags)
    assert GPTConfig(**flags).name == name
    assert 3 <= len(path.read_text().splitlines()) <= 10


@pytest.mark.parametrize("flags, sentence", [
    (dict(use_gelu=True, use_relu=True), "use_gelu and use_relu are both on"),
    (dict(fuse_ffn=True), "fuse_ffn needs an FFN without activation"),
    (dict(use_gelu=False, use_relu=True, fuse_ffn=True), "fuse_ffn needs an FFN without activation"),
    (dict(n_embd=10, n_head=3), "cannot be split"),
    (dict(n_layer=0), "n_layer must be at least 1"),
    (dict(temperature_init=0.0), "temperature_init must be positive"),
    (dict(weight_norm="mlp"), "weight_norm must be one of none, qk, ffn"),
    (dict(weight_norm="ffn", spectral_norm="qk"), "choose one"),
])
def test_contradictions_are_refused(flags, sentence):
    with pytest.raises(ValueError, match=sentence):
        GPTConfig(**flags)


def test_no_position_sees_its_future():
    model, idx = build(), tokens()
    changed = idx.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % SMALL["vocab_size"]
    assert torch.allclose(model(idx)[0][:, :9], model(changed)[0][:, :9])
    assert not torch.allclose(model(idx)[0][:, 9:], model(changed)[0][:, 9:])


def test_too_long_a_context_is_refused():
    with pytest.raises(ValueError, match="17 tokens do not fit into block_size=16"):
        build()(tokens(T=17))


def test_initialisation():
    model = GPT(GPTConfig(learnable_temperature=True, temperature_init=1e-2, learnable_ffn_scale=True))
    for name, p in model.named_parameters():
        if name.endswith("temperature"):
            assert p.shape == (6, 128)
        elif name.endswith(("alpha", "beta")):
            assert p == 1
        elif name.endswith(".weight") and ".ln_" not in name and not name.startswith("ln_"):
            assert p.std().item() == pytest.approx(0.02, rel=0.05) and abs(p.mean().item()) < 1e-3, name
    assert torch.allclose(model.blocks[0].attn.temperature, torch.tensor(1e-2))
    assert [n for n, _ in model.named_parameters() if n.endswith("bias") and ".0." in n] == \
        ["blocks.0.ln_1.bias", "blocks.0.ln_2.bias", "blocks.0.attn.qk.bias"]


def test_temperatures_stay_positive_under_adam():
    """AdamW at a rate of 0.3 pushed down for 50 steps: t itself would cross zero in the first."""
    model = GPT(GPTConfig(**SMALL, learnable_temperature=True, temperature_init=1e-2))
    optimizer = torch.optim.AdamW([b.attn.log_temperature for b in model.blocks], lr=0.3)
    for _ in range(50):
        optimizer.zero_grad()
        sum(b.attn.temperature.sum() for b in model.blocks).backward()
        optimizer.step()
    for block in model.blocks:
        assert (block.attn.temperature > 0).all() and (block.attn.temperature < 1e-2).all()
    assert model(tokens())[0].isfinite().all()


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
@pytest.mark.parametrize("place", NORM_PLACES)
def test_norms_cover_the_linears_they_name(kind, place):
    model = GPT(GPTConfig(**SMALL, **SM, **{kind: place}))
    normed = {name.split(".parametrizations")[0].removeprefix("blocks.0.") for name, _ in model.blocks.named_parameters(prefix="blocks")
              if ".parametrizations." in name and name.startswith("blocks.0.")}
    letters = {"qk": "attn.qk", "v": "attn.v", "o": "attn.o", "ffn": "ffn.w_in ffn.w_out"}
    wanted = {"none": "", "qk": "qk", "ffn": "ffn", "qk+ffn": "qk ffn", "qkv+ffn": "qk v ffn", "qkvo+ffn": "qk v o ffn"}[place]
    assert normed == {linear for part in wanted.split() for linear in letters[part].split()}


def test_norms_do_what_they_say():
    spectral = GPT(GPTConfig(**SMALL, **SM, spectral_norm="ffn"))
    with torch.no_grad():
        for _ in range(50):  # power iterations happen in training mode
            spectral.train()(tokens())
    assert torch.linalg.matrix_norm(spectral.eval().blocks[0].ffn.w_in.weight, 2).item() == pytest.approx(1, abs=1e-3)
    weight = GPT(GPTConfig(**SMALL, **SM, weight_norm="ffn")).blocks[0].ffn.w_in
    with torch.no_grad():
        weight.parametrizations.weight.original0.fill_(2.0)  # the gain: the norm of each row
    assert torch.allclose(weight.weight.norm(dim=1), torch.tensor(2.0))


@pytest.mark.parametrize("flags", [dict(learnable_temperature=True, learnable_ffn_scale=True), dict(SM, weight_norm="qkvo+ffn"),
                                   dict(SM, spectral_norm="ffn"), dict(bias=True)])
def test_weight_decay_spares_all_but_matrices(flags):
    model = GPT(GPTConfig(**SMALL, **flags))
    decayed, spared = ({id(p) for p in group["params"]} for group in model.param_groups(0.1))
    assert [group["weight_decay"] for group in model.param_groups(0.1)] == [0.1, 0.0]
    for name, p in model.named_parameters():
        gain = any(word in name for word in ("bias", "ln_", "temperature", "alpha", "beta", "original0"))
        assert (id(p) in spared) == gain and (id(p) in decayed) == (not gain), name


BASE = dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50257)


# Every cell of SPEC's section 5: layers, T, FFN FLOPs with and without fusion, attention FLOPs (all in 1e9)
@pytest.mark.parametrize("L, T, ffn, fused, attn", [(12, 128, 14.5, 1.8, 7.7), (12, 256, 29.0, 3.6, 16.3), (18, 128, 21.7, 2.7, 11.6),
                                                    (12, 512, 58.0, 7.3, 36.2)])
def test_counts_are_the_published_tables(L, T, ffn, fused, attn):
    def counts(**flags):
        with torch.device("meta"):  # counts need no weights
            model = GPT(GPTConfig(**{**BASE, "n_layer": L, "block_size": T, **flags}))
        return model.nonlinear_ops(), {k: v / 1e9 for k, v in model.flops().items()}

    softmax = {"SM": (L * 12, (T, T))}
    ln = {"LN": (2 * L, (T, 768))}
    def published(**cells):  # printed to 0.1; the paper rounds 7.248 up to 7.3, hence a little more than half a digit
        return pytest.approx(cells, abs=0.053)

    for flags, ops, ffn_flops in (({}, softmax | ln | {"G": (L, (T, 3072))}, ffn),
                                  (ARCHITECTURES["SM+LN+R"], softmax | ln | {"R": (L, (T, 3072))}, ffn),
                                  (ARCHITECTURES["SM+ScFuFFN"], softmax, fused), (ARCHITECTURES["SM(t)+ScFuFFN"], softmax, fused)):
        ours, flops = counts(**flags)
        assert ours == ops and flops == published(ffn=ffn_flops, attn=attn)


def test_generate():
    model, prompt = build(), tokens(B=2, T=5)
    out = model.generate(prompt, 20, generator=torch.Generator().manual_seed(0))  # runs past block_size
    assert out.shape == (2, 25) and torch.equal(out[:, :5], prompt) and (out < SMALL["vocab_size"]).all()
    assert torch.equal(out, model.generate(prompt, 20, generator=torch.Generator().manual_seed(0)))
    greedy = model.generate(prompt, 3, temperature=0)
    for t in (5, 6, 7):
        assert torch.equal(greedy[:, t], model(greedy[:, :t])[0][:, -1].argmax(-1))
    assert torch.equal(model.generate(prompt, 3, top_k=1), greedy)
    with pytest.raises(ValueError, match="token 50, outside the vocabulary of 50"):
        model.generate(torch.tensor([[50]]), 1)
    with pytest.raises(ValueError, match="empty"):
        model.generate(torch.zeros(1, 0, dtype=torch.long), 1)


# ------------------------------------------------------------------------------------------------ GPT-2 weights
def gpt2_file(folder, prefix="", d=128, V=60, T=12, L=2):
    """A small random GPT-2 in Hugging Face's layout: matrices (in, out), q, k and v in one, mask buffers beside them."""
    g = torch.Generator().manual_seed(0)
    r = lambda *shape: 0.1 * torch.randn(*shape, generator=g)
    t = {"wte.weight": r(V, d), "wpe.weight": r(T, d), "ln_f.weight": 1 + r(d), "ln_f.bias": r(d)}
    for i in range(L):
        for name, a, b in (("attn.c_attn", d, 3 * d), ("attn.c_proj", d, d), ("mlp.c_fc", d, 4 * d), ("mlp.c_proj", 4 * d, d)):
            t |= {f"h.{i}.{name}.weight": r(a, b), f"h.{i}.{name}.bias": r(b)}
        for name in ("ln_1", "ln_2"):
            t |= {f"h.{i}.{name}.weight": 1 + r(d), f"h.{i}.{name}.bias": r(d)}
        t[f"h.{i}.attn.bias"] = torch.ones(T, T).tril().view(1, 1, T, T)
    save_file({prefix + name: tensor.contiguous() for name, tensor in t.items()}, folder / "model.safetensors")
    return {name: tensor.double().numpy() for name, tensor in t.items()}


def gpt2_by_numpy(t, idx, n_head, L=2):
    """GPT-2's forward pass on that layout, in float64 NumPy: an implementation of its own."""
    norm = lambda x, p: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * t[p + ".weight"] + t[p + ".bias"]
    dense = lambda x, p: x @ t[p + ".weight"] + t[p + ".bias"]
    gelu = lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    x = t["wte.weight"][idx] + t["wpe.weight"][:len(idx)]
    for i in range(L):
        heads = []
        for q, k, v in zip(*(np.split(z, n_head, -1) for z in np.split(dense(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn"), 3, -1))):
            s = q @ k.T / np.sqrt(q.shape[-1]) - 1e10 * (1 - np.tri(len(idx)))
            a = np.exp(s - s.max(-1, keepdims=True))
            heads.append(a / a.sum(-1, keepdims=True) @ v)
        x = x + dense(np.concatenate(heads, -1), f"h.{i}.attn.c_proj")
        x = x + dense(gelu(dense(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")), f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ t["wte.weight"].T


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2_weights(tmp_path, prefix):
    theirs, idx = gpt2_file(tmp_path, prefix), np.arange(12) * 5
    wanted = gpt2_by_numpy(theirs, idx, n_head=2)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        model = GPT.from_gpt2(str(path))  # no config.json: heads of 64, as in every released GPT-2
        assert model.config.n_head == 2 and model.config.bias and model.config.block_size == 12
        assert np.abs(model(torch.tensor(idx)[None])[0][0].detach().numpy() - wanted).max() < 1e-4
    (tmp_path / "config.json").write_text(json.dumps({"n_head": 4}))
    four = GPT.from_gpt2(str(tmp_path))
    assert np.abs(four(torch.tensor(idx)[None])[0][0].detach().numpy() - gpt2_by_numpy(theirs, idx, 4)).max() < 1e-4
    assert four(torch.tensor(idx)[None], return_entropy=True)[2].shape == (2, 1, 4, 12)


def test_gpt2_weights_refused(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="does not hold a GPT-2"):
        GPT.from_gpt2(str(tmp_path))
    save_file({"wte.weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not hold a GPT-2"):
        GPT.from_gpt2(str(tmp_path))
    code = "from model import GPT\ntry: GPT.from_gpt2('no-such/gpt2')\nexcept FileNotFoundError as e: print(e)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}, capture_output=True, text=True)
    assert "no file or folder 'no-such/gpt2'" in done.stdout and "pass their folder" in done.stdout, done.stderr


# ------------------------------------------------------------------------------------------------ checkpoints
def test_checkpoint_round_trip(tmp_path):
    path = str(tmp_path / "ckpt.pt")
    model = GPT(GPTConfig(**SMALL, **dict(SM, weight_norm="ffn"))).eval()
    save_checkpoint(path, model, step=3)
    again = GPT.from_checkpoint(path)
    assert again.config == model.config and load_checkpoint(path)["step"] == 3
    assert torch.equal(again(tokens())[0], model(tokens())[0])
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]


def test_broken_checkpoints_are_refused(tmp_path):
    path = tmp_path / "ckpt.pt"
    with pytest.raises(FileNotFoundError, match="train one first"):
        load_checkpoint(str(path))
    save_checkpoint(str(path), GPT(GPTConfig(**SMALL)))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        load_checkpoint(str(path))
    with pytest.raises(OSError, match="can't write"):
        save_checkpoint(str(tmp_path / "no" / "folder.pt"), GPT(GPTConfig(**SMALL)))
    torch.save({"other": 1}, path)
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        load_checkpoint(str(path))
