"""bench_spu.py with the real engine: two processes, TCP between them, tiny models."""
import base64
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, run

pytest.importorskip("spu", reason="spu needs Python 3.10 or 3.11")

from model import GPT, GPTConfig, save_checkpoint  # noqa: E402

TINY = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=16", "--vocab_size=100"]
TOKENIZER = {"pattern": r"\S+|\s+", "special": {"<|endoftext|>": 256}, "ranks": {base64.b64encode(bytes([i])).decode(): i for i in range(256)}}


def popen(*args, cwd=ROOT):
    return subprocess.Popen([sys.executable, str(ROOT / "bench_spu.py"), *map(str, args)], cwd=cwd, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, env={**os.environ, "PYTHONUNBUFFERED": "1"})


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model of random weights large enough to have opinions, exported: the server's folder, the client's, and the model."""
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=300, n_layer=2, n_head=2, n_embd=32, use_layernorm=False, use_gelu=False, fuse_ffn=True,
                          learnable_ffn_scale=True, learnable_temperature=True, temperature_init=0.1)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    save_checkpoint(str(folder / "ckpt.pt"), model, tokenizer=TOKENIZER)
    run("pi_export.py", f"--ckpt={folder / 'ckpt.pt'}", f"--out={folder / 'server'}")
    (folder / "client").mkdir()
    os.replace(folder / "server" / "public.json", folder / "client" / "public.json")
    (folder / "server" / "public.json").write_bytes((folder / "client" / "public.json").read_bytes())
    return folder, model


def ports(i):
    """Two addresses, four ports with the next ones, their own for each test."""
    base = 20000 + (os.getpid() * 40 + 4 * i) % 30000
    return f"127.0.0.1:{base}", f"127.0.0.1:{base + 2}"


def test_each_party_holds_only_its_own(exported, tmp_path):
    """The roles by hand: the client in a folder with public.json alone, the server never told the prompt; the client gets the plain logits."""
    folder, model = exported
    c, s = ports(0)
    server = popen("--role=server", "--private=.", f"--listen={s}", f"--peer={c}", cwd=folder / "server")
    client = popen("--role=client", "--public=public.json", f"--listen={c}", f"--peer={s}", "--prompt=def f(x):", f"--json_path={tmp_path / 'r.json'}",
                   cwd=folder / "client")
    out, server_out = client.communicate(timeout=200)[0], server.communicate(timeout=30)[0]
    assert (client.returncode, server.returncode) == (0, 0), out + server_out
    assert "next token:" in out and server_out == ""  # the server is told nothing
    assert os.listdir(folder / "client") == ["public.json"]
    result = json.loads((tmp_path / "r.json").read_text())
    plain = model(torch.tensor([list(b"def f(x):")]))[0][0, -1].detach().numpy()
    assert np.abs(np.array(result["logits"]) - plain).max() < 0.02 * np.abs(plain).max() and result["token"] == plain.argmax()
    assert set(result["bytes_by_kind"]) == {"set-up", "embedding", "matmul", "temperature", "softmax", "head"}
    assert sum(result["bytes_by_kind"].values()) == pytest.approx(result["bytes_total"], abs=10)
    assert all(result["bytes_by_kind"][kind] > 0 for kind in ("embedding", "matmul", "temperature", "softmax", "head"))


@pytest.mark.parametrize("protocol, archs", [("cheetah", "sm_ln_g,sm_scfuffn"), ("semi2k", "sm_ln_r,sm_ln,sm_g,sm_r,sm,sm_wnorm_ffn,sm_t_scfuffn")])
def test_architectures(protocol, archs, tmp_path):
    out = run("bench_spu.py", f"--archs={archs}", f"--protocol={protocol}", f"--json_path={tmp_path / 'r.json'}", *TINY, timeout=400)
    results = json.loads((tmp_path / "r.json").read_text())
    assert len(results) == len(archs.split(",")) and all(r["arch"] in out for r in results)
    for r in results:
        assert r["max_abs_err"] < 0.02 and r["bytes_total"] > 1e5 and r["seconds"] > 0 and r["messages"] > 0, r
        for kind, flag in (("LayerNorm", "LN"), ("GELU", "+G"), ("ReLU", "+R"), ("temperature", "(t)")):
            assert (r["bytes_by_kind"].get(kind, 0) > 0) == (flag in r["arch"]), (r["arch"], kind)
    if protocol == "cheetah":  # what the paper is about
        assert results[0]["bytes_total"] > results[1]["bytes_total"]


def test_a_dead_party_is_noticed(exported):
    folder, _ = exported
    c, s = ports(1)
    server = popen("--role=server", f"--private={folder / 'server'}", f"--listen={s}", f"--peer={c}")
    client = popen("--role=client", f"--public={folder / 'client' / 'public.json'}", f"--listen={c}", f"--peer={s}")
    client.stdout.readline()  # the set-up is done: both are at work
    server.send_signal(signal.SIGKILL)
    out = client.communicate(timeout=30)[0]
    assert client.returncode == 1 and out.strip().splitlines()[-1] == "error: the other party is gone (its process ended or the connection broke)"
    server.communicate()


def test_another_model_is_refused(exported, tmp_path):
    folder, _ = exported
    c, s = ports(2)
    other = json.loads((folder / "client" / "public.json").read_text())
    other["config"]["n_head"] = 4
    (tmp_path / "public.json").write_text(json.dumps(other))
    parties = [popen("--role=server", f"--private={folder / 'server'}", f"--listen={s}", f"--peer={c}"),
               popen("--role=client", f"--public={tmp_path / 'public.json'}", f"--listen={c}", f"--peer={s}")]
    for p in parties:
        out = p.communicate(timeout=60)[0]
        assert p.returncode == 1 and "the other party has another model" in out and out.count("\n") == 1


@pytest.mark.parametrize("args, status, line", [
    (["--role=client", "--public={public}", "--listen=127.0.0.1:{port}", "--peer=127.0.0.1:{port2}", "--connect_timeout=1"], 1, "did not come to"),
    (["--role=client", "--public={public}", "--prompt=one two three four five six"], 1, "tokens and the model's context is 16"),
    (["--role=client", "--public={public}", "--prompt="], 1, "the prompt is empty"),
    (["--role=client", "--public=nowhere.json"], 1, "can't read nowhere.json"),
    (["--role=server", "--private={folder}/client"], 1, "not a whole server.npz"),
    (["--role=server", "--private={folder}/server", "--listen=here", "--peer=127.0.0.1:1"], 2, "--listen must be HOST:PORT"),
    (["--archs=sm_lng"], 2, "no architecture 'sm_lng'"),
    (["--archs=sm_ln_g", "--n_head=5"], 2, "cannot be split"),
    (["--ckpt=nowhere.pt"], 1, "no checkpoint at nowhere.pt"),
    (["--protocol=spdz"], 2, "protocol must be one of cheetah, semi2k"),
])
def test_one_line_says_what_is_wrong(args, status, line, exported):
    folder, _ = exported
    c, s = ports(3)
    out = run("bench_spu.py", *(a.format(folder=folder, public=folder / "client" / "public.json", port=c.split(":")[1], port2=s.split(":")[1]) for a in args),
              status=status)
    last = out.strip().splitlines()[-1]
    assert last.startswith("error: ") and line in last
