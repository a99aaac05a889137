"""engine.py with two real parties, and infer.py on a model that only a real pass shows right."""
import base64
import json
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, run, tell, told_by_two_parties

pytest.importorskip("spu", reason="spu needs Python 3.10 or 3.11")

from model import GPT, GPTConfig, save_checkpoint  # noqa: E402

X = np.array([[1.0, 2.0, -3.0], [0.5, 0.0, 4.0]])
W = np.array([[1.0, -1.0], [2.0, 0.5], [0.0, 3.0]])


def times_itself(x, y):
    return x * y


def power(x, exponent):
    return x**exponent


def party(rank, addresses):
    """What either party runs: prints a JSON object of what it saw."""
    from private.block import linear
    from private.engine import CLIENT, SERVER, Engine
    engine = Engine(rank, addresses, "semi2k", timeout=60, connect_timeout=60)
    x = engine.put(X.shape, CLIENT, X if rank == CLIENT else None)
    w = engine.put(W.shape, SERVER, W if rank == SERVER else None)
    seen = {}

    def reveal(secret):
        value = engine.reveal(secret)
        return None if value is None else value.tolist()

    seen["product"] = reveal(engine.op("matmul", linear, x, w))
    square = engine.op("entries", times_itself, x, x)
    seen["the same secret twice"] = reveal(square)
    seen["programs"] = len(engine.compiled)
    seen["fourth power"] = reveal(engine.op("entries", times_itself, square, square))
    seen["programs after the same shapes again"] = len(engine.compiled)
    seen["cube"] = reveal(engine.op("entries", power, x, exponent=3))
    seen["square"] = reveal(engine.op("entries", power, x, exponent=2, times=5))
    seen["programs after two keywords"] = len(engine.compiled)
    seen["costs"] = [(kind, times, cost.tolist()) for kind, times, cost in engine.costs]

    name = square.name
    seen["held"] = len(engine.runtime.get_var(name).share_chunks)
    del square
    try:
        engine.runtime.get_var(name)
        seen["forgotten"] = False
    except RuntimeError:
        seen["forgotten"] = True
    tell(engine, seen)


@pytest.fixture(scope="module")
def seen():
    """What the client and the server saw."""
    return told_by_two_parties(__file__)


def near(got, wanted):
    return np.abs(np.array(got) - wanted).max() < 1e-3


def test_the_client_alone_learns_what_is_revealed(seen):
    client, server = seen
    assert near(client["product"], X @ W)
    assert server["product"] is None


def test_a_secret_may_be_an_input_twice(seen):
    assert near(seen[0]["the same secret twice"], X**2)


def test_a_function_is_compiled_once_for_its_shapes_and_keywords(seen):
    client, _ = seen
    assert client["programs"] == client["programs after the same shapes again"] == 2
    assert near(client["fourth power"], X**4)
    assert client["programs after two keywords"] == 4
    assert near(client["cube"], X**3)
    assert near(client["square"], X**2)


def test_each_op_has_its_cost(seen):
    for party_saw in seen:
        kinds = [kind for kind, _, _ in party_saw["costs"]]
        assert kinds == ["matmul", "entries", "entries", "entries", "entries"]
        assert [times for _, times, _ in party_saw["costs"]] == [1, 1, 1, 1, 5]
        _, _, (traffic, messages, seconds, truncation) = party_saw["costs"][0]
        assert traffic > truncation >= 0
        assert messages > 0
        assert seconds > 0


def test_a_value_is_forgotten_with_its_last_handle(seen):
    for party_saw in seen:
        assert party_saw["held"]
        assert party_saw["forgotten"]


def test_a_softmax_only_model_whose_ffn_stays(tmp_path):
    """
    Its FFN takes a direction of the stream away, so no basis hides it. It is then run, and its
    input is the stream that it is added to: one secret twice among the inputs of an op.
    """
    torch.manual_seed(0)
    c = GPTConfig(block_size=16, vocab_size=300, n_layer=2, n_head=2, n_embd=32,
                  use_layernorm=False, use_gelu=False, fuse_ffn=True, learnable_ffn_scale=True)
    model = GPT(c).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
        away = torch.zeros(c.n_embd, c.n_embd)
        away[0, 0] = 1
        block = model.blocks[1]
        block.ffn.w_ffn.weight[:] = -block.alpha * block.beta * away
    bytes_ = {base64.b64encode(bytes([i])).decode(): i for i in range(256)}
    tokenizer = {"pattern": r"\S+|\s+", "special": {"<|endoftext|>": 256}, "ranks": bytes_}
    save_checkpoint(str(tmp_path / "ckpt.pt"), model, tokenizer=tokenizer)
    run("bench_spu.py", f"--ckpt={tmp_path / 'ckpt.pt'}", "--protocol=semi2k", "--prompt=def f(x):",
        f"--json={tmp_path / 'r.json'}")
    r = json.loads((tmp_path / "r.json").read_text())[0]
    logits = model(torch.tensor([list(b"def f(x):")]))[0][0, -1]
    assert r["token"] == r["plain_token"] == logits.argmax()
    assert r["max_abs_err"] < 0.01 * logits.abs().max()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    party(int(sys.argv[1]), sys.argv[2:])
