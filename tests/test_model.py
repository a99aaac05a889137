"""model.py: every flag against its equation, every refusal, every count of the paper's tables."""
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from model import (ACTIVATIONS, GPT, NORM_PLACES, NORMS, GPTConfig, causal_mean, load_checkpoint,
                   save_checkpoint)

SMALL = dict(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=8)
SM = dict(use_layernorm=False, use_gelu=False)
SCALED = dict(SM, fuse_ffn=True, learnable_ffn_scale=True)
ARCHITECTURES = {
    "SM+LN+G": {},
    "SM+LN+R": dict(use_gelu=False, use_relu=True),
    "SM+LN": dict(use_gelu=False),
    "SM+G": dict(use_layernorm=False),
    "SM+R": dict(SM, use_relu=True),
    "SM": SM,
    "SM+WNorm(FFN)": dict(SM, weight_norm="ffn"),
    "SM+SNorm(FFN)": dict(SM, spectral_norm="ffn"),
    "SM+ScFFN": dict(SM, learnable_ffn_scale=True),
    "SM+ScFuFFN": SCALED,
    "SM(t)+ScFuFFN": dict(SCALED, learnable_temperature=True),
    "SM(th)+ScFuFFN": dict(SCALED, learnable_temperature=True, temperature_per_head=True),
}


def build(seed=0, **flags):
    """A small model in float64 and eval mode whose every parameter is off its initial value."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**SMALL, **flags})).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def tokens(B=3, T=16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SMALL["vocab_size"], (B, T), generator=generator)


def by_the_equations(model, idx):
    """
    Logits (T, V) and entropies (L, H, T) of one sequence, a row at a time, from eq. 1, 3, 4, 6, 7,
    8 and 9.
    """
    c, T, d_k = model.config, len(idx), model.config.n_embd // model.config.n_head

    def ln(module, x, used=c.use_layernorm):
        return F.layer_norm(x, (c.n_embd,), module.weight, module.bias) if used else x

    def act(y):
        if c.use_gelu:
            return F.gelu(y)
        return y.clamp(min=0) if c.use_relu else y

    def temperature(block, head, i):
        if not c.learnable_temperature:
            return 1.0
        return block.attn.temperature[head, 0 if c.temperature_per_head else i]

    x = torch.stack([model.wte.weight[t] + model.wpe.weight[i] for i, t in enumerate(idx)])
    entropies = []
    for block in model.blocks:
        h = ln(block.ln_1, x)
        of_text = hasattr(block.attn, "qk")
        if of_text:
            Q, K = (h @ block.attn.qk.weight.T + block.attn.qk.bias).split(c.n_embd, -1)
        V, heads = h @ block.attn.v.weight.T, []
        for head in range(c.n_head):
            cut = slice(head * d_k, (head + 1) * d_k)
            out, ent = [], []
            for i in range(T):
                A = torch.full((i + 1,), 1 / (i + 1), dtype=torch.float64)
                if hasattr(block.attn, "by_distance"):
                    A = F.softmax(block.attn.by_distance[head, :i + 1].flip(0), 0)
                if of_text:
                    scale = temperature(block, head, i) * math.sqrt(d_k)
                    z = torch.stack([Q[i, cut] @ K[j, cut] / scale for j in range(i + 1)])
                    A = F.softmax(z, 0)
                out.append(sum(A[j] * V[j, cut] for j in range(i + 1)))
                ent.append(-torch.xlogy(A, A).sum())
            heads.append(torch.stack(out))
            entropies.append(torch.stack(ent))
        x = x + torch.cat(heads, -1) @ block.attn.o.weight.T
        h = ln(block.ln_2, x)
        if c.fuse_ffn:
            y = h @ block.ffn.w_ffn.weight.T
        else:
            y = act(h @ block.ffn.w_in.weight.T) @ block.ffn.w_out.weight.T
        x = block.beta * x + y / block.alpha if c.learnable_ffn_scale else x + y
    logits = ln(model.ln_f, x, c.final_layernorm) @ model.wte.weight.T
    return logits, torch.stack(entropies).view(c.n_layer, c.n_head, T)


@pytest.mark.parametrize("final_layernorm", (True, False))
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_its_equations(name, final_layernorm):
    idx = tokens(T=7)
    model = build(**ARCHITECTURES[name], final_layernorm=final_layernorm)
    assert model.config.name == name + ("" if final_layernorm else ", no ln_f")
    # the entropy's eps, 1e-9, is all that separates them from float64 precision
    logits, loss, entropy = model(idx, idx, return_entropy=True)
    wanted, wanted_entropy = by_the_equations(model, idx[0])
    assert torch.allclose(logits[0], wanted, atol=1e-9)
    assert entropy.shape == (2, 3, 2, 7)
    assert torch.allclose(entropy[:, 0], wanted_entropy, atol=1e-7)
    fast, none, no_entropy = model(idx)  # scaled_dot_product_attention
    assert none is None and no_entropy is None and torch.allclose(fast, logits, atol=1e-9)
    assert loss.item() == pytest.approx(F.cross_entropy(logits.flatten(0, 1), idx.flatten()).item())


@pytest.mark.parametrize("name", ["SM+LN+G", "SM(t)+ScFuFFN"])
def test_uniform_layers_average(name):
    """C X by loops, log i nats in row i; no Q, K or temperature; the layers after are as ever."""
    idx = tokens(T=7)
    model = build(**ARCHITECTURES[name], uniform_layers=1)
    assert model.config.name == name + ", 1 uniform layer"
    logits, _, entropy = model(idx, return_entropy=True)
    wanted, wanted_entropy = by_the_equations(model, idx[0])
    assert torch.allclose(logits[0], wanted, atol=1e-9)
    assert torch.allclose(entropy[:, 0], wanted_entropy, atol=1e-7)
    assert entropy[0].mean().item() == pytest.approx(math.lgamma(8) / 7)  # log(T!)/T
    assert torch.allclose(model(idx)[0], logits, atol=1e-9)
    assert {n.split(".")[0] for n, _ in model.blocks[0].attn.named_parameters()} == {"v", "o"}


@pytest.mark.parametrize("name", ["SM+LN+G", "SM(t)+ScFuFFN"])
def test_positional_layers_attend_by_distance(name):
    """At first as uniform ones do, then by what is learned of each head and distance."""
    idx = tokens(T=7)
    model = build(**ARCHITECTURES[name], n_layer=3, uniform_layers=1, positional_layers=1)
    assert model.config.name == name + ", 1 uniform layer, 1 positional layer"
    torch.nn.init.zeros_(model.blocks[1].attn.by_distance)
    average = build(**ARCHITECTURES[name], n_layer=3, uniform_layers=2)
    average.load_state_dict(model.state_dict(), strict=False)
    assert torch.allclose(model(idx)[0], average(idx)[0], atol=1e-9)
    torch.nn.init.normal_(model.blocks[1].attn.by_distance)
    logits, _, entropy = model(idx, return_entropy=True)
    wanted, wanted_entropy = by_the_equations(model, idx[0])
    assert torch.allclose(logits[0], wanted, atol=1e-9)
    assert torch.allclose(entropy[:, 0], wanted_entropy, atol=1e-7)
    assert torch.allclose(model(idx)[0], logits, atol=1e-9)


def test_uniform_layers_are_summed_in_float32():
    """Ones in bfloat16, which has no 257: a sum of 300 of them would end at 256."""
    assert (causal_mean(torch.ones(1, 300, 1, dtype=torch.bfloat16)) == 1).all()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_config_files_are_the_architectures(name):
    file = name.lower().replace("+", "_").replace("(t)", "_t").replace("(th)", "_th")
    path = ROOT / "config" / f"{file.replace('norm(ffn)', 'norm_ffn')}.py"
    flags = {}
    exec(path.read_text(), {}, flags)
    assert GPTConfig(**flags).name == name
    assert 3 <= len(path.read_text().splitlines()) <= 10


def test_a_config_file_for_positional_layers():
    flags = {}
    exec((ROOT / "config" / "sm_scfuffn_positional.py").read_text(), {}, flags)
    assert GPTConfig(**flags).name == "SM+ScFuFFN, 3 positional layers"


@dataclass
class WithSiLU(GPTConfig):
    use_silu: bool = False  # S: SiLU in the FFN


def test_an_activation_of_your_own_is_a_flag_and_an_entry(monkeypatch):
    monkeypatch.setitem(ACTIVATIONS, "silu", ("S", torch.nn.SiLU()))
    config = WithSiLU(**SMALL, use_gelu=False, use_silu=True)
    model, x = GPT(config), torch.randn(5, 8)
    ffn = model.blocks[0].ffn
    assert config.name == "SM+LN+S" and config.activation == "silu"
    assert torch.allclose(ffn(x), F.silu(x @ ffn.w_in.weight.T) @ ffn.w_out.weight.T, atol=1e-6)
    assert model.nonlinear_ops()["S"] == (2, (16, 32))
    with pytest.raises(ValueError, match="use_gelu and use_silu are both on"):
        WithSiLU(use_silu=True)


@pytest.mark.parametrize("flags, sentence", [
    (dict(use_gelu=True, use_relu=True), "use_gelu and use_relu are both on"),
    (dict(fuse_ffn=True), "fuse_ffn needs an FFN without activation"),
    (dict(use_gelu=False, use_relu=True, fuse_ffn=True), "fuse_ffn needs an FFN without"),
    (dict(n_embd=10, n_head=3), "cannot be split"),
    (dict(n_layer=0), "n_layer must be at least 1"),
    (dict(n_layer=10**9), "n_layer must be at least 1 and at most 1024"),
    (dict(n_head=2.0), "n_head must be int, and is 2.0"),
    (dict(use_gelu=1), "use_gelu must be bool, and is 1"),
    (dict(temperature_init=0.0), "temperature_init must be at least 1e-06"),
    (dict(temperature_init=math.inf), "temperature_init must be at least 1e-06 and at most"),
    (dict(temperature_init=math.nan), "temperature_init must be at least 1e-06 and at most"),
    (dict(weight_norm="mlp"), "weight_norm must be one of none, qk, ffn"),
    (dict(weight_norm="ffn", spectral_norm="qk"), "choose one"),
    (dict(sigma_reparam="ffn", spectral_norm="qk"), "choose one"),
    (dict(uniform_layers=7), "uniform_layers must be at least 0 and at most n_layer=6, and is 7"),
    (dict(uniform_layers=3, positional_layers=4),
     "positional_layers must be at least 0, and with uniform_layers at most n_layer=6, and is 4"),
    (dict(uniform_layers=-1), "uniform_layers must be at least 0"),
    (dict(uniform_layers=True), "uniform_layers must be int"),
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
    model = GPT(GPTConfig(learnable_temperature=True, learnable_ffn_scale=True))
    for name, p in model.named_parameters():
        if name.endswith("temperature"):
            assert p.shape == (6, 128)
        elif name.endswith(("alpha", "beta")):
            assert p == 1
        elif name.endswith(".weight") and ".ln_" not in name and not name.startswith("ln_"):
            assert p.std().item() == pytest.approx(0.02, rel=0.05), name
            assert abs(p.mean().item()) < 1e-3, name
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


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("place", NORM_PLACES)
def test_norms_cover_the_linears_they_name(kind, place):
    model = GPT(GPTConfig(**SMALL, **SM, **{kind: place}))
    normed = {name.split(".parametrizations")[0] for name, _ in model.blocks[0].named_parameters()
              if ".parametrizations." in name}
    letters = {"qk": "attn.qk", "v": "attn.v", "o": "attn.o", "ffn": "ffn.w_in ffn.w_out"}
    wanted = {"none": "", "qk": "qk", "ffn": "ffn", "qk+ffn": "qk ffn", "qkv+ffn": "qk v ffn",
              "qkvo+ffn": "qk v o ffn"}[place]
    assert normed == {linear for part in wanted.split() for linear in letters[part].split()}


def test_norms_do_what_they_say():
    spectral = GPT(GPTConfig(**SMALL, **SM, spectral_norm="ffn"))
    with torch.no_grad():
        for _ in range(50):  # power iterations happen in training mode
            spectral.train()(tokens())
    w_in = spectral.eval().blocks[0].ffn.w_in.weight
    assert torch.linalg.matrix_norm(w_in, 2).item() == pytest.approx(1, abs=1e-3)
    reparam = GPT(GPTConfig(**SMALL, **SM, sigma_reparam="ffn"))
    with torch.no_grad():
        for _ in range(50):
            reparam.train()(tokens())
        w_in = reparam.eval().blocks[0].ffn.w_in
        w_in.parametrizations.weight[1].gain.fill_(3.0)
    assert torch.linalg.matrix_norm(w_in.weight, 2).item() == pytest.approx(3, abs=3e-3)
    weight = GPT(GPTConfig(**SMALL, **SM, weight_norm="ffn")).blocks[0].ffn.w_in
    with torch.no_grad():
        weight.parametrizations.weight.original0.fill_(2.0)  # the gain: the norm of each row
    assert torch.allclose(weight.weight.norm(dim=1), torch.tensor(2.0))


@pytest.mark.parametrize("flags", [
    dict(learnable_temperature=True, learnable_ffn_scale=True),
    dict(SM, weight_norm="qkvo+ffn"),
    dict(SM, spectral_norm="ffn"),
    dict(SM, sigma_reparam="qkvo+ffn"),
    dict(bias=True),
])
def test_weight_decay_spares_all_but_matrices(flags):
    model = GPT(GPTConfig(**SMALL, **flags))
    decayed, spared = ({id(p) for p in group["params"]} for group in model.param_groups(0.1))
    assert [group["weight_decay"] for group in model.param_groups(0.1)] == [0.1, 0.0]
    for name, p in model.named_parameters():
        spares = ("bias", "ln_", "temperature", "alpha", "beta", "original0", ".gain")
        gain = any(word in name for word in spares)
        assert (id(p) in spared) == gain and (id(p) in decayed) == (not gain), name


BASE = dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50257)


# Every cell of the paper's tables, in 1e9: FFN FLOPs with and without fusion, attention FLOPs
@pytest.mark.parametrize("L, T, ffn, fused, attn", [
    (12, 128, 14.5, 1.8, 7.7),
    (12, 256, 29.0, 3.6, 16.3),
    (18, 128, 21.7, 2.7, 11.6),
    (12, 512, 58.0, 7.3, 36.2),
])
def test_counts_are_the_published_tables(L, T, ffn, fused, attn):
    softmax = {"SM": (L * 12, (T, T))}
    ln = {"LN": (2 * L, (T, 768))}
    for name, ops, ffn_flops in (("SM+LN+G", softmax | ln | {"G": (L, (T, 3072))}, ffn),
                                 ("SM+LN+R", softmax | ln | {"R": (L, (T, 3072))}, ffn),
                                 ("SM+ScFuFFN", softmax, fused),
                                 ("SM(t)+ScFuFFN", softmax, fused)):
        sizes = {**BASE, "n_layer": L, "block_size": T}
        with torch.device("meta"):  # counts need no weights
            model = GPT(GPTConfig(**sizes, **ARCHITECTURES[name]))
        assert model.nonlinear_ops() == ops
        # printed to 0.1, and the paper rounds 7.248 up to 7.3: a little more than half a digit
        flops = {part: count / 1e9 for part, count in model.flops().items()}
        assert flops == pytest.approx({"ffn": ffn_flops, "attn": attn}, abs=0.053)


@pytest.mark.parametrize("kind, mixing, patterns", [("uniform", 2 * 128 * 768, 0),
                                                    ("positional", 128 * 128 * 768, 12 * 128)])
def test_counts_of_layers_without_softmax(kind, mixing, patterns):
    """No softmax, Q K^T or Q and K with its bias, half of the matrices; the mixing of rows."""
    L, k, T, d = 12, 5, 128, 768
    with torch.device("meta"):
        whole, model = (GPT(GPTConfig(**BASE, **SCALED, learnable_temperature=True,
                                      **{f"{kind}_layers": layers})) for layers in (0, k))
    assert model.nonlinear_ops() == {"SM": ((L - k) * 12, (T, T))}
    of_one = whole.flops()["attn"] // L
    assert model.flops() == {"ffn": whole.flops()["ffn"],
                             "attn": (L - k) * of_one + k * (4 * T * d * d + mixing)}
    fewer = k * (2 * d * d + 2 * d + 12 * T - patterns)
    parameters, left = (sum(p.numel() for p in m.parameters()) for m in (whole, model))
    assert left == parameters - fewer


@pytest.mark.parametrize("flags", [{}, dict(learnable_temperature=True, temperature_init=0.5),
                                   dict(learnable_temperature=True, temperature_per_head=True),
                                   dict(uniform_layers=1), dict(uniform_layers=2),
                                   dict(positional_layers=1)])
def test_cached_keys_and_values_give_the_same_text(flags):
    """Within block_size and past it, where the context is the last block_size tokens."""
    model, prompt = build(**flags), tokens(B=2, T=5)
    T = model.config.block_size
    idx = prompt
    for _ in range(T + 3):
        logits = model(idx[:, -T:])[0][:, -1]
        idx = torch.cat((idx, logits.argmax(-1, keepdim=True)), 1)
    assert torch.equal(model.generate(prompt, T + 3, temperature=0), idx)
    cache = [{} for _ in model.blocks]
    model(idx[:, :T - 1], cache=cache)
    last = model(idx[:, T - 1:T], cache=cache)[0][:, -1]
    assert torch.allclose(last, model(idx[:, :T])[0][:, -1], atol=1e-5)
    with pytest.raises(ValueError, match=f"{T + 1} tokens do not fit"):
        model(idx[:, :1], cache=cache)


def test_generate():
    model, prompt = build(), tokens(B=2, T=5)

    def generate(n):
        return model.generate(prompt, n, generator=torch.Generator().manual_seed(0))

    out = generate(20)  # runs past block_size
    assert out.shape == (2, 25) and torch.equal(out[:, :5], prompt)
    assert (out < SMALL["vocab_size"]).all()
    assert torch.equal(out, generate(20))
    greedy = model.generate(prompt, 3, temperature=0)
    for t in (5, 6, 7):
        assert torch.equal(greedy[:, t], model(greedy[:, :t])[0][:, -1].argmax(-1))
    assert torch.equal(model.generate(prompt, 3, top_k=1), greedy)
    assert torch.equal(model.generate(prompt, 3, temperature=1e-40), greedy)  # and not NaN
    with pytest.raises(ValueError, match="token 50, outside the vocabulary of 50"):
        model.generate(torch.tensor([[50]]), 1)
    with pytest.raises(ValueError, match="empty"):
        model.generate(torch.zeros(1, 0, dtype=torch.long), 1)


# ------------------------------------------------------------------------------------ checkpoints
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
    torch.save({"other": 1}, path)
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        load_checkpoint(str(path))


def test_a_checkpoint_that_lacks_what_is_asked_for_is_refused(tmp_path):
    path = str(tmp_path / "ckpt.pt")
    save_checkpoint(path, GPT(GPTConfig(**SMALL)), step=3)
    with pytest.raises(ValueError, match="ckpt.pt has no 'optimizer'"):
        load_checkpoint(path, "step", "optimizer")


@pytest.mark.parametrize("config", [
    {"n_layer": 10**9}, {"n_head": 2.0}, {"n_layer": 3}, {"n_embd": 16}, {"other": 1}, 5,
])
def test_a_checkpoint_whose_config_is_not_its_weights_is_refused(config, tmp_path):
    path = str(tmp_path / "ckpt.pt")
    save_checkpoint(path, GPT(GPTConfig(**SMALL)))
    content = torch.load(path, weights_only=True)
    content["model_config"] = {**content["model_config"], **config} if config != 5 else 5
    torch.save(content, path)
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        load_checkpoint(path)


def test_loading_copies_into_a_model_whatever_the_file_marks(tmp_path):
    """An optimizer made before would else go on with parameters that are the model's no more."""
    path = str(tmp_path / "ckpt.pt")
    model = GPT(GPTConfig(**SMALL))
    save_checkpoint(path, model)
    before = list(model.parameters())
    model.load_state_dict(load_checkpoint(path)["model"])
    assert all(p is q for p, q in zip(before, model.parameters()))


@pytest.mark.parametrize("place, cause", [
    ("no/ckpt.pt", "No such file or directory"),
    ("ckpt.pt", "No space left on device"),
])
def test_a_checkpoint_that_cannot_be_written_names_file_and_cause(place, cause, tmp_path):
    (tmp_path / "ckpt.pt").write_text("the old one")
    (tmp_path / "ckpt.pt.tmp").symlink_to("/dev/full")  # every write to it fails as on a full disk
    with pytest.raises(OSError, match=f"can't write .*{place}: {cause}"):
        save_checkpoint(str(tmp_path / place), GPT(GPTConfig(**SMALL)))
    assert (tmp_path / "ckpt.pt").read_text() == "the old one"


def test_no_half_checkpoint_is_left_on_a_full_disk(tmp_path):
    (tmp_path / "ckpt.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError):
        save_checkpoint(str(tmp_path / "ckpt.pt"), GPT(GPTConfig(**SMALL)))
    assert list(tmp_path.iterdir()) == []
