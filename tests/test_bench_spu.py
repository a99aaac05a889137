"""bench_spu.py with the real engine: two processes, TCP between them, tiny models."""
import base64
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, refusals, run

pytest.importorskip("spu", reason="spu needs Python 3.10 or 3.11")

from model import GPT, GPTConfig, save_checkpoint  # noqa: E402
from pi_export import write  # noqa: E402
from private import launch  # noqa: E402
from private.infer import BEYOND  # noqa: E402
from private.meet import GONE, free_addresses  # noqa: E402
from private.party import read_prompts  # noqa: E402

TINY = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=16", "--vocab_size=100"]
TOKENIZER = {
    "pattern": r"\S+|\s+",
    "special": {"<|endoftext|>": 256},
    "ranks": {base64.b64encode(bytes([i])).decode(): i for i in range(256)},
}
PROMPT = "def f(x):"  # nine tokens, a byte each
STARTED = []


@pytest.fixture(autouse=True)
def nothing_survives():
    """A failed test leaves no party behind."""
    yield
    while STARTED:
        STARTED.pop().kill()


def popen(*args, cwd=ROOT, script=ROOT / "bench_spu.py", env=()):
    STARTED.append(subprocess.Popen(
        [sys.executable, str(script), *map(str, args)], cwd=cwd, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **dict(env)}))
    return STARTED[-1]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """
    A model of random weights large enough to have opinions, exported: a folder with the checkpoint,
    the server's folder and the client's; and the model.
    """
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=300, n_layer=2, n_head=2, n_embd=32,
                          use_layernorm=False, use_gelu=False, fuse_ffn=True,
                          learnable_ffn_scale=True, learnable_temperature=True,
                          temperature_init=0.1)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    save_checkpoint(str(folder / "ckpt.pt"), model, tokenizer=TOKENIZER)
    run("pi_export.py", f"--ckpt={folder / 'ckpt.pt'}", f"--out={folder / 'server'}")
    (folder / "client").mkdir()
    shutil.copy(folder / "server" / "public.json", folder / "client" / "public.json")
    return folder, model


def pair(folder, *both, server=(), client=(), **client_kwargs):
    """The two roles by hand: (server, client), with the arguments of `both` and their own."""
    c, s = free_addresses(2)
    first = popen("--role=server", f"--private={folder / 'server'}", f"--listen={s}",
                  f"--peer={c}", *both, *server)
    second = popen("--role=client", f"--public={folder / 'client' / 'public.json'}",
                   f"--listen={c}", f"--peer={s}", *both, *client, **client_kwargs)
    return first, second


def next_logits(model, text):
    return model(torch.tensor([list(text.encode())]))[0][0, -1].detach().numpy()


def results_of(tmp_path, *args, timeout=240):
    """(what --json has, what was printed) of a run."""
    path = tmp_path / "r.json"
    out = run("bench_spu.py", *args, f"--json={path}", timeout=timeout)
    return json.loads(path.read_text()), out


# ------------------------------------------------------------------------------ what comes out
def test_each_party_holds_only_its_own(exported, certificates, tmp_path):
    """
    The roles by hand, over TLS: the client in a folder with public.json alone, the server never
    told the prompt. The client gets the logits that the model gives in the clear.
    """
    folder, model = exported
    server, client = pair(
        folder, server=[f"--tls={certificates / 'server'}"],
        client=["--public=public.json", f"--tls={certificates / 'client'}", f"--prompt={PROMPT}",
                f"--json={tmp_path / 'r.json'}", f"--logits_file={tmp_path / 'logits.npz'}"],
        cwd=folder / "client")
    out = client.communicate(timeout=200)[0]
    server_out = server.communicate(timeout=30)[0]
    assert (client.returncode, server.returncode) == (0, 0), out + server_out
    assert "next token:" in out
    assert "token" not in server_out
    assert os.listdir(folder / "client") == ["public.json"]
    plain = next_logits(model, PROMPT)
    revealed = np.load(tmp_path / "logits.npz")["next"]
    assert np.abs(revealed - plain).max() < 0.02 * np.abs(plain).max()
    for file in ("r.json", "logits.npz"):
        assert (tmp_path / file).stat().st_mode & 0o77 == 0  # the client's own
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["token"] == plain.argmax()
    kinds = {"set-up", "watch", "embedding", "matmul", "temperature", "softmax", "head"}
    assert set(result["bytes_by_kind"]) == kinds
    assert all(size > 0 for size in result["bytes_by_kind"].values())
    for total, parts in (("bytes_total", "bytes_by_kind"), ("rounds", "rounds_by_kind"),
                         ("seconds", "seconds_by_kind")):
        assert sum(result[parts].values()) == pytest.approx(result[total], abs=10)
    assert set(result["peak_memory_bytes"]) == {"client", "server"}


@pytest.mark.parametrize("protocol, archs, network, layers", [
    ("cheetah", "sm_ln_g,sm_scfuffn", "lan", 2),
    ("semi2k", "sm_ln_r,sm_t_scfuffn", "none", 1),
    ("aby3", "ereg_sm_t_scfuffn", "none", 1),
])
def test_architectures(protocol, archs, network, layers, tmp_path):
    """Every shape of a block; the rest of config/ folds into one of these (test_pi_export.py)."""
    results, out = results_of(
        tmp_path, f"--archs={archs}", f"--protocol={protocol}", f"--network={network}",
        f"--chart={tmp_path / 'r.png'}", *TINY, f"--n_layer={layers}", timeout=400)
    assert len(results) == len(archs.split(","))
    assert f"seconds, link {network}" in out
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    for r in results:
        assert r["arch"] in out
        assert {"n_layer", "block_size", "settings", "versions", "machine"} <= set(r)
        assert r["measured_layers"] == layers
        assert r["network"] == network
        assert r["max_abs_err"] < 0.02
        assert r["bytes_total"] > 1e5
        assert r["seconds"] > 0
        assert r["rounds"] > 0
        for kind, flag in (("LayerNorm", "LN"), ("GELU", "+G"), ("ReLU", "+R"),
                           ("temperature", "(t)")):
            assert (r["bytes_by_kind"].get(kind, 0) > 0) == (flag in r["arch"]), (r["arch"], kind)
    if protocol == "cheetah":
        assert results[0]["bytes_total"] > results[1]["bytes_total"]  # what the paper is about
    for r in results:
        if "bytes_tcp" in r:  # the wire's count adds headers, the greeting and the revealed logits
            assert 1 < r["bytes_tcp"] / r["bytes_total"] < 1.1
    assert all(("bytes_tcp" in r) == (network != "none") for r in results)


def test_heads_that_average_or_attend_by_position_need_no_softmax(tmp_path):
    """Three of four layers: the logits of the clear by one softmax in four, for a prompt of 5."""
    (r,), _ = results_of(tmp_path, "--archs=sm_t_scfuffn", "--protocol=semi2k", *TINY,
                         "--n_layer=4", "--uniform_layers=2", "--positional_layers=1",
                         "--prompt_ids=7,3,99,42,7")
    assert r["arch"] == "SM(t)+ScFuFFN, 2 uniform layers, 1 positional layer"
    assert r["nonlinear_ops"] == {"SM": "2 x 16x16"}
    assert r["token"] == r["plain_token"]
    assert r["max_abs_err"] < 2e-3
    assert r["bytes_by_kind"]["average"] > 0 and r["bytes_by_kind"]["pattern"] > 0


def test_one_layer_of_a_kind_stands_for_the_rest(tmp_path):
    """
    Layers of a kind cost the same: one uniform, one with softmax and the last stand for five.
    semi2k has no one-off extensions, which would blur that.
    """
    totals = []
    for layers in (0, 1):
        (r,), _ = results_of(tmp_path, "--archs=sm_ln", "--protocol=semi2k", *TINY,
                             "--n_layer=5", "--uniform_layers=2", f"--measure_layers={layers}")
        totals.append(r["bytes_total"])
        assert r["measured_layers"] == (layers or 5)
        assert ("token" in r) == (layers == 0)
    assert totals[0] == totals[1]


@pytest.mark.parametrize("args, whole", [
    (["--protocol=cheetah", "--block_size=32", "--n_layer=1"], True),
    (["--protocol=semi2k", "--block_size=64", "--measure_layers=1"], False),
])
def test_an_embedding_by_buckets(args, whole, tmp_path):
    """From 16,384 tokens of vocabulary on: whole, and two groups of its buckets multiplied."""
    (r,), _ = results_of(tmp_path, "--archs=sm_ln_r", *TINY, "--vocab_size=16384", *args)
    assert r["bytes_by_kind"]["embedding"] > 1e5
    assert (r["measured_layers"] == r["n_layer"]) == whole
    if whole:
        assert r["max_abs_err"] < 0.02
    else:
        assert r["max_abs_err"] is None


def test_a_public_embedding_is_the_clients_own_doing(exported, tmp_path):
    """It costs nothing and comes out the same; another model's is refused before they meet."""
    folder, model = exported
    client_folder = tmp_path / "client"
    client_folder.mkdir()
    run("pi_export.py", f"--ckpt={folder / 'ckpt.pt'}", f"--out={tmp_path / 'server'}",
        "--embedding=public")
    for name in ("public.json", "embedding.npz"):
        shutil.copy(tmp_path / "server" / name, client_folder / name)
    asking = ["--prompt=def", f"--json={tmp_path / 'r.json'}",
              f"--logits_file={tmp_path / 'logits.npz'}"]
    server, client = pair(tmp_path, "--protocol=semi2k", client=asking)
    out = client.communicate(timeout=100)[0]
    server_out = server.communicate(timeout=30)[0]
    assert server.returncode == 0, out + server_out
    plain = next_logits(model, "def")
    revealed = np.load(tmp_path / "logits.npz")["next"]
    assert np.abs(revealed - plain).max() < 0.02 * np.abs(plain).max()
    assert "embedding" not in json.loads((tmp_path / "r.json").read_text())["bytes_by_kind"]

    zeros = {"wte": np.zeros((300, 32), np.float32), "wpe": np.zeros((16, 32), np.float32)}
    np.savez(client_folder / "embedding.npz", **zeros)
    _, refused = pair(tmp_path, "--protocol=semi2k", client=asking)
    out = refused.communicate(timeout=30)[0]
    assert refused.returncode == 1
    assert len(out.splitlines()) == 1
    assert "embedding.npz" in out
    assert "--embedding=public" in out


def test_a_public_embedding_with_layer_norm(tmp_path):
    """The first LayerNorm is then the client's own: the second layer stands for the rest."""
    layer_norm = []
    for layers in (0, 2):
        (r,), _ = results_of(tmp_path, "--archs=sm_ln_r", "--embedding=public", *TINY,
                             "--n_layer=4", f"--measure_layers={layers}", "--protocol=semi2k")
        assert (r["max_abs_err"] or 0) < 0.02
        assert "embedding" not in r["bytes_by_kind"]
        layer_norm.append(r["bytes_by_kind"]["LayerNorm"])
    assert layer_norm[0] == layer_norm[1]


def test_the_baseline_costs_more(tmp_path):
    """--baseline adds the model as one would write it first: the same token, for more."""
    (first, ours), out = results_of(tmp_path, "--archs=sm_ln_g", "--baseline=True",
                                    "--protocol=semi2k", *TINY)
    assert (first["arch"], ours["arch"]) == ("SM+LN+G plain", "SM+LN+G")
    assert "fewer bytes than SM+LN+G plain" in out
    assert first["token"] == ours["token"] == first["plain_token"]
    assert first["max_abs_err"] < 0.05
    assert first["bytes_total"] > 2 * ours["bytes_total"]
    assert first["rounds"] > ours["rounds"]


def test_windows_and_token_ids_of_a_checkpoint_without_a_tokenizer(exported, tmp_path):
    _, model = exported
    text = np.frombuffer((ROOT / "model.py").read_bytes(), np.uint8).astype(np.uint16)
    text.tofile(tmp_path / "val.bin")
    save_checkpoint(str(tmp_path / "bare.pt"), model)
    (r,), out = results_of(
        tmp_path, f"--ckpt={tmp_path / 'bare.pt'}", "--prompt_ids=7,299,42", "--windows=2",
        f"--windows_file={tmp_path / 'val.bin'}", "--protocol=semi2k")
    assert r["token"] == model(torch.tensor([[7, 299, 42]]))[0][0, -1].argmax().item()
    starts = (0, len(text) - 17)
    windows = torch.from_numpy(np.stack([text[s:s + 17] for s in starts]).astype(np.int64))
    loss = model(windows[:, :-1], windows[:, 1:])[1].item()
    assert r["plain_perplexity"] == pytest.approx(np.exp(loss), rel=1e-4)
    assert r["secure_perplexity"] == pytest.approx(r["plain_perplexity"], rel=0.01)
    assert r["top1_agreement"] >= 0.96
    assert r["max_abs_err"] > 0
    assert "of 32" in out


def test_only_the_token_is_revealed(exported, certificates):
    """
    --reveal=token: the argmax is computed under encryption, and there are no logits in the clear to
    compare. On a slow, encrypted link.
    """
    folder, model = exported
    out = run("bench_spu.py", f"--ckpt={folder / 'ckpt.pt'}", "--reveal=token", "--protocol=semi2k",
              f"--prompt={PROMPT}", "--network=lan", f"--tls={certificates / 'client'}")
    assert f"next token: {next_logits(model, PROMPT).argmax()} " in out
    assert "argmax" in out
    assert "same token as in plain" in out
    assert "NO" not in out


def test_a_prompt_beyond_its_range_gets_no_answer(exported, tmp_path, monkeypatch):
    """Of a model whose queries, keys and values were given too many bits: they wrap."""
    _, model = exported
    monkeypatch.setattr("pi_export.check_range", lambda *given: (units, {"blocks.0.qkv": (18, 18)}))
    units = [1.0] * (2 * model.config.n_layer + 1)
    write(model, TOKENIZER, str(tmp_path / "server"))
    (tmp_path / "client").mkdir()
    shutil.copy(tmp_path / "server" / "public.json", tmp_path / "client")
    server, client = pair(tmp_path, client=[f"--prompt={PROMPT}", f"--json={tmp_path / 'r.json'}"])
    out = client.communicate(timeout=100)[0]
    assert client.returncode == 1
    assert out.splitlines()[-1] == f"error: {BEYOND}"
    assert "next token" not in out
    assert not (tmp_path / "r.json").exists()
    assert server.communicate(timeout=30)[0].splitlines()[-1] == f"error: {GONE}"


# ------------------------------------------------------------------------------ replies
LOUD = {  # models of random weights large enough to have opinions
    "SM+ScFuFFN of all kinds": {"n_layer": 4, "uniform_layers": 2, "positional_layers": 1},
    "SM+LN+G, uniform": {"use_layernorm": True, "use_gelu": True, "fuse_ffn": False,
                         "learnable_ffn_scale": False, "uniform_layers": 1, "bias": True},
}


def loud(name, seed):
    torch.manual_seed(seed)
    flags = dict(block_size=16, vocab_size=300, n_layer=2, n_head=2, n_embd=32, use_layernorm=False,
                 use_gelu=False, fuse_ffn=True, learnable_ffn_scale=True) | LOUD[name]
    model = GPT(GPTConfig(**flags)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def greedy(model, text, n):
    """The n tokens that the model continues a text with in the clear."""
    return model.generate(torch.tensor([list(text.encode())]), n, temperature=0)[0, -n:].tolist()


@pytest.mark.parametrize("name, seed, tokens, args", [
    ("SM+ScFuFFN of all kinds", 33, 6, ["--prompt_tokens=11", "--embedding=public"]),
    ("SM+LN+G, uniform", 0, 8, []),
])
def test_a_reply_is_the_text_of_the_clear(name, seed, tokens, args, tmp_path):
    """Token by token up to an end token, here 257, or the end of the context."""
    model = loud(name, seed)
    tokenizer = TOKENIZER | {"special": {"<|endoftext|>": 257}}
    save_checkpoint(str(tmp_path / "ckpt.pt"), model, tokenizer=tokenizer)
    (r,), out = results_of(tmp_path, f"--ckpt={tmp_path / 'ckpt.pt'}", "--protocol=semi2k",
                           f"--prompt={PROMPT}", "--max_new_tokens=8", *args)
    (answer,) = r["replies"]
    assert answer["tokens"] == r["plain_tokens"] == greedy(model, PROMPT, 8)[:tokens]
    assert (answer["tokens"][-1] == 257) == (tokens < 8)
    assert "endoftext" not in answer["text"]
    assert f"\n{PROMPT}" in out
    assert len(answer["passes"]) == tokens
    first, *further = (one["bytes"] for one in answer["passes"])
    assert {*further} == {further[0]}
    spent = first + sum(further)
    assert spent == pytest.approx(r["bytes_total"], rel=0.01)
    assert "a further one" in out
    assert r["max_abs_err"] < 0.02 * 10


def test_guesses_change_no_token(tmp_path):
    """
    A pass scores two guesses beside the last token. The draft is the model a little worse, and
    guesses right and wrong; products are made ahead, of the prompt as well.
    """
    model, draft = (loud("SM+ScFuFFN of all kinds", 33) for _ in range(2))
    torch.manual_seed(0)
    with torch.no_grad():
        draft.wte.weight += 0.05 * torch.randn_like(draft.wte.weight)
    for name, one in (("ckpt", model), ("draft", draft)):
        save_checkpoint(str(tmp_path / f"{name}.pt"), one, tokenizer=TOKENIZER)
    (r,), out = results_of(tmp_path, f"--ckpt={tmp_path / 'ckpt.pt'}", f"--prompt={PROMPT}",
                           f"--draft={tmp_path / 'draft.pt'}", "--guesses=2", "--ahead=True",
                           "--max_new_tokens=6")
    (answer,) = r["replies"]
    assert answer["tokens"] == r["plain_tokens"] == greedy(model, PROMPT, 6)
    assert 3 < len(answer["passes"]) < 6
    assert sum(p["tokens"] for p in answer["passes"]) == 6
    assert "tokens to a further pass" in out
    assert all(answer[key][0]["bytes"] > 0 for key in ("prompt_ahead", "ahead"))


def test_a_reply_of_two_roles_by_tokens_alone(exported, tmp_path):
    """The server hears the number of tokens. Not the client's prompt, nor what it gets."""
    folder, model = exported
    server, client = pair(folder, "--reveal=token", "--max_new_tokens=4", "--prompt_tokens=10",
                          client=[f"--prompt={PROMPT}", f"--json={tmp_path / 'r.json'}"])
    out = client.communicate(timeout=200)[0]
    server_out = server.communicate(timeout=30)[0]
    assert (client.returncode, server.returncode) == (0, 0), out + server_out
    (answer,) = json.loads((tmp_path / "r.json").read_text())["replies"]
    assert answer["tokens"] == greedy(model, PROMPT, 4)
    assert "\npass 4 " in server_out
    assert PROMPT not in server_out


def test_a_server_serves_one_client_after_the_other(exported, tmp_path):
    """
    One that asks two questions of one set-up, one that is killed in the middle, one that has other
    settings; and the next is served. Its text is drawn with the seed as the model's in the clear.
    """
    folder, model = exported
    c, s = free_addresses(2)
    both = ["--protocol=semi2k", "--max_new_tokens=3", f"--prompt_tokens={len(PROMPT)}"]
    server = popen("--role=server", "--serve=True", f"--private={folder / 'server'}",
                   f"--listen={s}", f"--peer={c}", *both)

    def client(*args):
        return popen("--role=client", f"--public={folder / 'client' / 'public.json'}",
                     f"--listen={c}", f"--peer={s}", f"--json={tmp_path / 'r.json'}",
                     "--connect_timeout=60", *both, *args)

    (tmp_path / "questions.txt").write_text(f"{PROMPT}\n\ndef\n")
    assert client(f"--prompts={tmp_path / 'questions.txt'}").wait(timeout=100) == 0
    replies = json.loads((tmp_path / "r.json").read_text())["replies"]
    assert [reply["tokens"] for reply in replies] == [greedy(model, PROMPT, 3),
                                                      greedy(model, "def", 3)]
    killed = client(f"--prompt={PROMPT}")
    killed.stdout.readline()  # the set-up is done
    killed.kill()
    stranger = client(f"--prompt={PROMPT}", "--reveal=token")
    assert "another reveal" in stranger.communicate(timeout=60)[0]
    last = client(f"--prompt={PROMPT}", "--temperature=1.5", "--top_k=20", "--seed=4")
    assert last.wait(timeout=100) == 0
    drawn = model.generate(torch.tensor([list(PROMPT.encode())]), 3, 1.5, 20,
                           torch.Generator().manual_seed(4))[0, -3:].tolist()
    assert json.loads((tmp_path / "r.json").read_text())["replies"][0]["tokens"] == drawn
    server.send_signal(signal.SIGINT)
    lines = server.communicate(timeout=10)[0].splitlines()
    said = [line.split(":")[0] for line in lines]
    assert said == ["served 2 prompts, 6 passes", "error", "error", "served 1 prompts, 3 passes",
                    "stopped by SIGINT"]


# ------------------------------------------------------------------------------ two that don't fit
def test_a_link_that_cannot_stand_is_given_up(exported):
    """They greet, but the server's --peer isn't where the client listens. SPU would wait on."""
    parties = pair(exported[0], "--connect_timeout=5", server=["--peer=127.0.0.1:9"])
    for party in parties:
        out = party.communicate(timeout=30)[0]
        assert party.returncode == 1
        assert "no link with" in out or GONE in out, out


@pytest.mark.parametrize("what", ["model", "code"])
def test_another_model_and_other_code_are_refused(what, exported, tmp_path):
    folder, _ = exported
    ignored = shutil.ignore_patterns(".*", "out", "results", "tests", "*.bin", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "repo", ignore=ignored)
    public = json.loads((folder / "client" / "public.json").read_text())
    if what == "model":
        public["config"]["bias"] = True
    else:
        nonlinear = tmp_path / "repo" / "private" / "nonlinear.py"
        nonlinear.write_text(nonlinear.read_text() + "# another line\n")
    (tmp_path / "public.json").write_text(json.dumps(public))
    parties = pair(folder, client=[f"--public={tmp_path / 'public.json'}"],
                   script=tmp_path / "repo" / "bench_spu.py")
    for party in parties:
        out = party.communicate(timeout=60)[0]
        assert party.returncode == 1
        assert f"the other party has another {what}: " in out
        assert out.count("\n") == 1


# ------------------------------------------------------------------------------ ends from outside
FUZZ = int(os.environ.get("PI_FUZZ", "0"))  # so many kills and freezes at random moments
QUICK = ["--archs=sm_scfuffn", *TINY, "--n_layer=1"]
SILENCE = 6  # --timeout, in seconds


def test_a_dead_party_is_noticed_and_ctrl_c_waits_for_no_step(exported):
    """Python's own handlers would wait for the end of what C++ is at."""
    server, client = pair(exported[0])
    client.stdout.readline()  # the set-up is done: both are at work
    server.send_signal(signal.SIGINT)
    assert server.communicate(timeout=5)[0].splitlines()[-1] == "stopped by SIGINT"
    assert server.returncode == 130
    assert client.communicate(timeout=5)[0].splitlines()[-1] == f"error: {GONE}"
    assert client.returncode == 1


@pytest.fixture
def private_run(tmp_path):
    """
    Starts a run of role both, whose temporary files go to an empty folder, by which its processes
    are known: (parent, pids), pids() being {last word of the command line, e.g. "client": pid}.
    Afterwards no process and no file of it may be left.
    """
    folder = tmp_path / "temporary"
    folder.mkdir()
    mark = f"TMPDIR={folder}"

    def pids():
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (process / "environ").read_text().split("\0"):
                    words = (process / "cmdline").read_text().split("\0")
                    found[words[-2]] = int(process.name)
            except (OSError, UnicodeError, IndexError):  # it has just ended, or isn't ours
                continue
        return found

    def start(*args):
        return popen(*args, env={"TMPDIR": str(folder)}), pids

    yield start

    deadline = time.time() + 10
    while pids() and time.time() < deadline:
        time.sleep(0.1)
    left = pids()
    for pid in left.values():
        os.kill(pid, signal.SIGKILL)
    assert not left
    assert os.listdir(folder) == []


@pytest.mark.parametrize("name, moment", [
    ("SIGINT", ""),         # while it imports
    ("SIGTERM", "--- "),    # while the parties start
    ("SIGHUP", "set-up"),   # while the engine is at work
])
def test_a_signal_ends_the_whole_run_with_one_line(name, moment, private_run):
    parent, _ = private_run(*QUICK)
    if moment:
        assert any(moment in line for line in parent.stdout)
    else:
        time.sleep(0.5)
    parent.send_signal(signal.Signals[name])
    out = parent.communicate(timeout=30)[0]
    assert parent.returncode == 128 + signal.Signals[name]
    assert [line for line in out.splitlines() if " MB " not in line] == [f"stopped by {name}"]


def test_ctrl_c_leaves_the_text_so_far(private_run):
    parent, _ = private_run(*QUICK, "--protocol=semi2k", "--prompt_ids=7", "--max_new_tokens=16")
    assert any(line.startswith("done ") for line in parent.stdout)
    parent.stdout.read(len(" 7 42 "))
    parent.send_signal(signal.SIGINT)
    text, last = parent.communicate(timeout=30)[0].splitlines()
    assert parent.returncode == 130
    assert all(word.isdigit() for word in text.split())
    assert last == "stopped by SIGINT"


@pytest.mark.parametrize("number", range(FUZZ or 2))
def test_a_party_or_the_parent_that_is_killed_ends_all(number, private_run):
    rng = random.Random(time.time() if FUZZ else number)
    victim = rng.choice(["parent", "client", "server"])
    moment = rng.uniform(0, 12)
    parent, pids = private_run(*QUICK, f"--timeout={SILENCE}")
    time.sleep(moment)
    while victim not in (victims := pids() | {"parent": parent.pid}) and parent.poll() is None:
        time.sleep(0.1)
    if victim in victims and parent.poll() is None:
        os.kill(victims[victim], signal.SIGKILL)
    out = parent.communicate(timeout=SILENCE + 30)[0]
    print(f"{victim} killed after {moment:.1f} s, exit {parent.returncode}:\n{out}")
    assert "Traceback" not in out
    if parent.returncode == 0:  # it was done before
        assert "next token" in out
    elif victim != "parent" or "client" in victims:
        assert out.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("number", range(FUZZ or 1))
def test_a_frozen_party_ends_all_with_a_line(number, private_run):
    rng = random.Random(time.time() if FUZZ else number)
    victim, survivor = rng.sample(["client", "server"], 2)
    moment = rng.uniform(3, 12)
    parent, pids = private_run(*QUICK, f"--timeout={SILENCE}")
    time.sleep(moment)
    while victim not in pids() and parent.poll() is None:
        time.sleep(0.1)
    if victim in pids():
        os.kill(pids()[victim], signal.SIGSTOP)
    frozen = time.time()
    out = parent.communicate(timeout=SILENCE + 30)[0]
    print(f"{victim} frozen after {moment:.1f} s, exit {parent.returncode} "
          f"{time.time() - frozen:.1f} s later:\n{out}")
    if parent.returncode == 0:  # it was done before
        assert "next token" in out
        return
    errors = [line for line in out.splitlines() if line.startswith("error: ")]
    reasons = (f"no sign of life from the {victim}", "did not come to", "no link with")
    assert len(errors) == 2, out
    assert any(reason in errors[0] for reason in reasons)
    assert errors[1].endswith(f", see above: the {survivor} ended with status 1")


@pytest.mark.parametrize("script, words", [
    ("exit 0", ""),
    ("exit 1", "the private run failed, see above: the helper ended with status 1"),
    ("kill -ABRT $$", "the private run failed: the helper was killed by SIGABRT"),
])
def test_the_parent_says_which_party_failed_and_how(script, words):
    """"see above" stands only where the party itself could say something."""
    for last in ("exit 0", "exit 0", script):
        launch.PARTIES.append(subprocess.Popen(["sh", "-c", last], stderr=subprocess.DEVNULL))
    try:
        assert launch.why_failed(("client", "server", "helper")) == words
    finally:
        launch.end_parties()


# ------------------------------------------------------------------------------ what is refused
CLIENT = ["--role=client", "--public={client}/public.json"]
SERVER = ["--role=server", "--private={server}"]
PLACES = ["--listen=127.0.0.1:{port}", "--peer=127.0.0.1:{port2}"]
CKPT = ["--ckpt={folder}/ckpt.pt"]
SECOND_LAYER = "or at least 2 with a public embedding"
TOO_LONG = "tokens and the model's context is 16"


SETTINGS = [
    ([*CLIENT, *PLACES, "--prompt_ids=1", "--prompt=def"], "give one"),
    ([*CLIENT, *PLACES, "--tls={folder}"], "ca.pem: --tls is a folder"),
    ([*CLIENT, *PLACES, "--protocol=aby3"], "--peer must name one other, or two with"),
    ([*CLIENT, "--plain=True"], "it is for --role=both"),
    (["--role=client", *PLACES], "--role=client needs --public"),
    ([*SERVER, "--listen=here", "--peer=127.0.0.1:1"], "--listen must be HOST:PORT"),
    ([*SERVER, "--listen=here:٣٣", "--peer=127.0.0.1:1"], "--listen must be HOST:PORT"),
    ([*SERVER, "--embedding=public"], "--embedding is chosen by pi_export.py"),
    ([*CKPT, "--windows=1", "--reveal=token"], "--windows compares the logits"),
    ([*CKPT, "--archs=sm_ln_g"], "give one"),
    ([*CKPT, "--json={folder}"], "it is there, and no file"),
    ([*CKPT, "--json=/dev/null"], "can't write /dev/null"),
    ([*CKPT, "--json=nowhere/r.json"], "can't write nowhere/r.json: No such file"),
    ([*CLIENT, *PLACES, "--temperature=1", "--reveal=token"], "not with --reveal=token"),
    ([*SERVER, *PLACES, "--network=wan"], "--network is for --role=both"),
    ([*CKPT, "--n_layer=3"], "--n_layer is of the models that --archs makes"),
    (["--archs=sm_scfuffn_positional", "--n_layer=4", "--positional_layers=5"], "and is 5"),
    ([*CKPT, "--serve=True"], "--serve is for --role=server"),
    ([*CKPT, "--plain=True", "--max_new_tokens=2"], "--plain and --baseline"),
    ([*CKPT, "--guesses=2", "--max_new_tokens=2"], "go together"),
    ([*CKPT, "--guesses=2", "--draft={folder}/ckpt.pt"], "give --max_new_tokens as well"),
    ([*CKPT, "--ahead=True", "--protocol=semi2k"], "--ahead is of the protocol cheetah"),
    (["--archs=sm_lng"], "no architecture 'sm_lng'"),
    (["--archs=sm_ln_g", "--n_head=5"], "cannot be split"),
    (["--archs=sm_ln_g", "--uniform_layers=13"], "at most n_layer=12, and is 13"),
    (["--archs=sm_ln_g", "--prompt=def"], "--prompt needs a tokenizer"),
    (["--measure_layers=-1"], "measure_layers must be at least 0"),
    (["--timeout=1e12"], "timeout must be at least 5 and at most 86400"),
    (["--seed=1e30"], "seed must be at least 0"),
    (["--n_layer=1e9"], "n_layer must be at least 1 and at most 1000"),
    (["--protocol=spdz"], "protocol must be one of cheetah, semi2k, aby3"),
    (["--network=wan", "--protocol=aby3"], "aby3 has three"),
]


def placed(args, exported, tmp_path):
    """The arguments with what stands for folders and ports filled in."""
    folder, model = exported
    public = json.loads((folder / "client" / "public.json").read_text())
    (tmp_path / "public.json").write_text(json.dumps(public | {"embedding": "0" * 64}))
    ports = [address.split(":")[1] for address in free_addresses(2)]
    places = {"folder": folder, "client": folder / "client", "server": folder / "server",
              "embedding": tmp_path / "public.json", "port": ports[0], "port2": ports[1]}
    return [arg.format(**places) for arg in args]


def test_one_line_says_what_setting_is_wrong(exported, tmp_path):
    tries = [placed(args, exported, tmp_path) for args, _ in SETTINGS]
    for (args, words), (status, said) in zip(SETTINGS, refusals("bench_spu.py", tries)):
        assert status == 2, args
        assert said.startswith("error: ") and said.count("\n") == 1, (args, said)
        assert words in said, (args, said)


@pytest.mark.parametrize("args, words", [
    ([*CLIENT, *PLACES, "--connect_timeout=1"], "did not come to"),
    ([*CLIENT, *PLACES, "--prompt=one two three four five six"], TOO_LONG),
    (["--role=client", "--public=nowhere.json", *PLACES], "nowhere.json"),
    ([*CLIENT, "--public={embedding}", *PLACES, "--measure_layers=1"], SECOND_LAYER),
    (["--role=server", "--private={client}", *PLACES], "server.npz"),
    ([*CKPT, "--prompt=one two three four five six"], TOO_LONG),
    ([*CKPT, "--windows=1", "--windows_file=nowhere.bin"], "can't read held-out text"),
    (["--ckpt=nowhere.pt"], "no checkpoint at nowhere.pt"),
    ([*CLIENT, *PLACES, "--prompt=def", "--prompt_tokens=17"], "at most the model's context"),
    ([*SERVER, *PLACES, "--serve=True", "--private={client}"], "server.npz"),
    ([*SERVER, *PLACES, "--serve=True", "--prompt_tokens=17"], "at most the model's context"),
    ([*CKPT, "--windows=1"], "give --windows_file"),
    ([*CLIENT, *PLACES, "--prompt=def", "--max_new_tokens=2", "--guesses=1",
      "--draft={folder}/none.pt"], "no checkpoint at"),
    (["--archs=sm_ln_g", *TINY, "--measure_layers=1", "--embedding=public"], SECOND_LAYER),
    (["--from_json={client}/public.json"], "holds no results"),
    (["--from_json=nowhere.json"], "nowhere.json"),
])
def test_one_line_says_what_is_wrong(args, words, exported, tmp_path):
    out = run("bench_spu.py", *placed(args, exported, tmp_path), status=1)
    last = out.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert words in last


@pytest.mark.parametrize("given, words", [
    ({"prompt": ""}, "the prompt is empty"),
    ({"prompt_ids": "1,300"}, "outside the model's vocabulary of 300"),
    ({"prompt_ids": "one"}, "--prompt_ids must be like 1,2,3, and is 'one'"),
    ({"max_new_tokens": 9}, "16: 8 would fit"),
    ({"max_new_tokens": 8, "guesses": 3}, "--guesses 3 and the model's context 16: 5 would fit"),
    ({"prompt_tokens": 2}, "--prompt_tokens is 2"),
    ({"prompts": "nowhere.txt"}, "can't read --prompts=nowhere.txt"),
    ({"prompts": "/dev/null"}, "--prompts=/dev/null has no prompt"),
    ({"tokenizer": None}, "this model has no tokenizer for --prompt: give --prompt_ids=1,2,3"),
])
def test_a_prompt_that_the_model_cannot_take_is_refused(given, words):
    s = SimpleNamespace(prompt=PROMPT, prompt_ids="", prompts="", max_new_tokens=1,
                        prompt_tokens=0, archs="", seed=0, guesses=0)
    public = {"config": {"vocab_size": 300, "block_size": 16}, "tokenizer": TOKENIZER}
    for key, value in given.items():
        if key in public:
            public[key] = value
        setattr(s, key, value)
    with pytest.raises(ValueError, match=re.escape(words)):
        read_prompts(s, public)


# ------------------------------------------------------------------------------ an earlier run
TABLE_2 = ROOT / "results" / "private_table2.json"


def test_an_earlier_runs_table_and_chart(tmp_path):
    out = run("bench_spu.py", f"--from_json={TABLE_2}", f"--chart={tmp_path / 'r.png'}")
    assert "published by the paper: GB" in out
    assert "25.32" in out
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("setting", ["json", "chart"])
def test_a_full_disk_costs_no_table_and_leaves_no_piece(setting, tmp_path):
    """A limit on the size of a file fails a write half-way, as a full disk does."""
    path = tmp_path / "r.png"
    done = subprocess.run(
        [sys.executable, "bench_spu.py", f"--from_json={TABLE_2}", f"--{setting}={path}"],
        cwd=ROOT, text=True, capture_output=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)))
    assert done.returncode == 1
    assert "published by the paper: GB" in done.stdout
    assert done.stderr.splitlines()[-1].startswith(f"error: can't write {path}: ")
    assert os.listdir(tmp_path) == []
