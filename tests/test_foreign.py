"""plot.py and the README's snippet on Hugging Face models, by transformers, which is optional."""
import json
import re
from importlib.util import find_spec

import pytest
import torch
from conftest import ROOT, run

from data.tokenizer import EOT, GPT2_PATTERN, byte_level, tokenizer_spec
from foreign import open_foreign
from hf_export import write_json

TEXT = "def add(a, b):\n    return a + b\n" * 20
SMALL = dict(vocab_size=257, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=32, bos_token_id=0, eos_token_id=0, pad_token_id=0)


def byte_tokenizer_beside(folder):
    """A tokenizer, as hf_export.py writes it, of which each byte is a token."""
    spec = tokenizer_spec(GPT2_PATTERN, {bytes([b]): b for b in range(256)}, {EOT: 256})
    write_json(folder / "tokenizer.json", byte_level(spec))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def folder_of(kind, folder, **more):
    """A small random model of that class of configuration, saved with a tokenizer of bytes."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SMALL | more)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        p.data.mul_(5)  # attention that is not nearly uniform
    model.save_pretrained(folder)
    byte_tokenizer_beside(folder)
    (folder / "text").write_text(TEXT)
    return model.eval()


MODELS = {"Llama": dict(num_key_value_heads=2, intermediate_size=64),
          "OPT": dict(ffn_dim=64, word_embed_proj_dim=32)}


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
def test_any_causal_model_is_measured_and_drawn(kind, tmp_path):
    """Entropies and attention to the first position, against the model's own attentions."""
    model = folder_of(kind, tmp_path, **MODELS[kind])
    out = run("plot.py", f"--ckpt={tmp_path}", f"--text={tmp_path}/text",
              f"--png={tmp_path}/a.png")
    assert f"{kind}ForCausalLM: entropy overload:" in out and (tmp_path / "a.png").exists()
    [seen] = json.loads((tmp_path / "a.json").read_text())
    ids = torch.tensor(list(TEXT.encode()))[:608].view(-1, 32)  # a byte is its own token
    model.set_attn_implementation("eager")
    A = torch.stack(model(ids, output_attentions=True).attentions)  # (L, B, H, T, T)
    entropy = torch.special.entr(A).sum(-1).mean((1, 3))
    assert torch.allclose(torch.tensor(seen["head_entropy"]), entropy, atol=1e-4)
    assert torch.allclose(torch.tensor(seen["first_position"]), A[..., 1:, 0].mean((1, 3)),
                          atol=1e-4)
    assert seen["block_size"] == 32 and sum(seen["quartiles"]) == pytest.approx(1)


def test_attention_that_looks_ahead_is_refused(tmp_path):
    folder_of("Bert", tmp_path, intermediate_size=64)
    _, weights, tokens, T = open_foreign(str(tmp_path), str(tmp_path / "text"), T=16)
    with pytest.raises(ValueError, match="looks ahead"):
        weights(torch.from_numpy(tokens[None, :T]))


def test_what_is_missing_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "text").write_text(TEXT)
    out = run("plot.py", f"--ckpt={tmp_path}", f"--text={tmp_path}/text", status=1)
    told = "" if find_spec("transformers") else "needs transformers, pip install transformers"
    assert out.startswith(f"error: {tmp_path} ") and told in out and out.count("\n") == 1


def test_the_readmes_snippet_runs_as_written(tmp_path, monkeypatch):
    """With a small random GPT-2 and a tokenizer of bytes where it says "gpt2"."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0)
    config = transformers.GPT2Config(vocab_size=257, **sizes)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    byte_tokenizer_beside(tmp_path)
    snippet = re.search(r"```python\n(import torch\nfrom transformers.+?)```",
                        (ROOT / "README.md").read_text(), re.S)[1]
    assert snippet.count('"gpt2"') == 2
    held = {}
    exec(snippet.replace('"gpt2"', repr(str(tmp_path))), held)
    assert held["entropy"].shape == (2, 1, 4, len("def add(a, b):"))
    held["loss"].backward()
    assert held["regularizer"].threshold.grad is not None
    assert all(p.grad.isfinite().all() for p in held["model"].parameters())
