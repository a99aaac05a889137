"""bench_spu.py with the real engine: two processes, TCP between them, tiny models."""
import base64
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run

pytest.importorskip("spu", reason="spu needs Python 3.10 or 3.11")

from model import GPT, GPTConfig, save_checkpoint  # noqa: E402
from private.meet import free_addresses  # noqa: E402

PLACES = ["--listen=127.0.0.1:{port}", "--peer=127.0.0.1:{port2}"]
TINY = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=16", "--vocab_size=100"]
TOKENIZER = {"pattern": r"\S+|\s+", "special": {"<|endoftext|>": 256}, "ranks": {base64.b64encode(bytes([i])).decode(): i for i in range(256)}}


STARTED = []


@pytest.fixture(autouse=True)
def nothing_survives():
    """A failed test leaves no party behind."""
    yield
    while STARTED:
        STARTED.pop().kill()


def popen(*args, cwd=ROOT, script=ROOT / "bench_spu.py"):
    STARTED.append(subprocess.Popen([sys.executable, str(script), *map(str, args)], cwd=cwd, text=True, stdout=subprocess.PIPE,
                                    stderr=subprocess.STDOUT, env={**os.environ, "PYTHONUNBUFFERED": "1"}))
    return STARTED[-1]


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


def test_each_party_holds_only_its_own(exported, certificates, tmp_path):
    """
    The roles by hand, over TLS: the client in a folder with public.json alone, the server never told the prompt; the client
    gets the logits that the model gives in the clear.
    """
    folder, model = exported
    c, s = free_addresses(2)
    server = popen("--role=server", "--private=.", f"--listen={s}", f"--peer={c}", f"--tls={certificates / 'server'}", cwd=folder / "server")
    client = popen("--role=client", "--public=public.json", f"--listen={c}", f"--peer={s}", "--prompt=def f(x):", f"--json={tmp_path / 'r.json'}",
                   f"--logits_file={tmp_path / 'logits.npz'}", f"--tls={certificates / 'client'}", cwd=folder / "client")
    out, server_out = client.communicate(timeout=200)[0], server.communicate(timeout=30)[0]
    assert (client.returncode, server.returncode) == (0, 0), out + server_out
    assert "next token:" in out and "token" not in server_out
    assert os.listdir(folder / "client") == ["public.json"]
    result = json.loads((tmp_path / "r.json").read_text())
    plain = model(torch.tensor([list(b"def f(x):")]))[0][0, -1].detach().numpy()
    assert np.abs(np.load(tmp_path / "logits.npz")["next"] - plain).max() < 0.02 * np.abs(plain).max() and result["token"] == plain.argmax()
    kinds = ("set-up", "embedding", "matmul", "temperature", "softmax", "head")
    assert tuple(sorted(result["bytes_by_kind"])) == tuple(sorted(kinds)) and all(result["bytes_by_kind"][kind] > 0 for kind in kinds)
    for total, parts in (("bytes_total", "bytes_by_kind"), ("rounds", "rounds_by_kind"), ("seconds", "seconds_by_kind")):
        assert sum(result[parts].values()) == pytest.approx(result[total], abs=10)
    assert set(result["peak_memory_bytes"]) == {"client", "server"}


@pytest.mark.parametrize("protocol, archs", [("cheetah", "sm_ln_g,sm_scfuffn"), ("semi2k", "sm_ln_r,sm_ln,sm_g,sm_t_scfuffn"), ("aby3", "ereg_sm_t_scfuffn")])
def test_architectures(protocol, archs, tmp_path):
    """Every shape that a block takes; what else is in config/ folds into one of these, exactly (test_pi_export.py)."""
    network = "lan" if protocol == "cheetah" else "none"
    out = run("bench_spu.py", f"--archs={archs}", f"--protocol={protocol}", f"--network={network}", f"--json={tmp_path / 'r.json'}",
              f"--chart={tmp_path / 'r.png'}", *TINY, f"--n_layer={2 if protocol == 'cheetah' else 1}", timeout=400)
    results = json.loads((tmp_path / "r.json").read_text())
    assert len(results) == len(archs.split(",")) and all(r["arch"] in out for r in results) and f"seconds, link {network}" in out
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    for r in results:
        assert {"arch", "n_layer", "block_size", "bytes_total", "bytes_by_kind", "rounds", "seconds", "network", "max_abs_err", "measured_layers",
                "settings", "versions", "machine"} <= set(r)
        assert r["max_abs_err"] < 0.02 and r["bytes_total"] > 1e5 and r["seconds"] > 0 and r["rounds"] > 0 and r["network"] == network, r
        for kind, flag in (("LayerNorm", "LN"), ("GELU", "+G"), ("ReLU", "+R"), ("temperature", "(t)")):
            assert (r["bytes_by_kind"].get(kind, 0) > 0) == (flag in r["arch"]), (r["arch"], kind)
    if protocol == "cheetah":
        assert results[0]["bytes_total"] > results[1]["bytes_total"]  # what the paper is about
        for r in results:  # SPU's count and the wire's, which adds headers, the greeting and the revealed logits
            assert 1 < r["bytes_tcp"] / r["bytes_total"] < 1.1


def test_one_layer_stands_for_the_rest(tmp_path):
    """Layers cost the same, so that one may be measured and multiplied; semi2k counts no one-off extensions that would blur it."""
    totals = []
    for layers in (0, 1):
        run("bench_spu.py", "--archs=sm_ln_g", "--protocol=semi2k", *TINY, "--n_layer=3", f"--measure_layers={layers}", f"--json={tmp_path / 'r.json'}")
        r = json.loads((tmp_path / "r.json").read_text())[0]
        totals.append(r["bytes_total"])
        assert r["measured_layers"] == (layers or 3) and ("token" in r) == (not layers)
    assert totals[0] == totals[1]


def test_an_embedding_by_buckets(tmp_path):
    """From 16,384 tokens of vocabulary on: whole, under Cheetah; and two groups of its buckets multiplied."""
    for arguments in (["--protocol=cheetah", "--block_size=32", "--n_layer=1"], ["--protocol=semi2k", "--block_size=64", "--measure_layers=1"]):
        run("bench_spu.py", "--archs=sm_ln_r", *TINY, "--vocab_size=16384", *arguments, f"--json={tmp_path / 'r.json'}", timeout=300)
        r = json.loads((tmp_path / "r.json").read_text())[0]
        assert r["bytes_by_kind"]["embedding"] > 1e5
        assert r["max_abs_err"] is None if r["measured_layers"] < r["n_layer"] else r["max_abs_err"] < 0.02


def test_a_public_embedding_is_the_clients_own_doing(exported, tmp_path):
    """It costs nothing and comes out the same; another model's is refused before anything is sent."""
    folder, model = exported
    run("pi_export.py", f"--ckpt={folder / 'ckpt.pt'}", f"--out={tmp_path}", "--embedding=public")
    client = tmp_path / "client"
    client.mkdir()
    for name in ("public.json", "embedding.npz"):
        shutil.copy(tmp_path / name, client / name)
    c, s = free_addresses(2)
    server = popen("--role=server", f"--private={tmp_path}", f"--listen={s}", f"--peer={c}", "--protocol=semi2k")
    asking = ["--role=client", f"--public={client / 'public.json'}", f"--listen={c}", f"--peer={s}", f"--json={tmp_path / 'r.json'}",
              f"--logits_file={tmp_path / 'logits.npz'}", "--protocol=semi2k", "--prompt=def"]
    out, server_out = popen(*asking).communicate(timeout=100)[0], server.communicate(timeout=30)[0]
    assert server.returncode == 0, out + server_out
    plain = model(torch.tensor([list(b"def")]))[0][0, -1].detach().numpy()
    assert np.abs(np.load(tmp_path / "logits.npz")["next"] - plain).max() < 0.02 * np.abs(plain).max()
    assert "embedding" not in json.loads((tmp_path / "r.json").read_text())["bytes_by_kind"]
    np.savez(client / "embedding.npz", wte=np.zeros((300, 32), np.float32), wpe=np.zeros((16, 32), np.float32))
    refused = popen(*asking)
    out = refused.communicate(timeout=30)[0]
    assert refused.returncode == 1 and len(out.splitlines()) == 1 and "embedding.npz" in out and "--embedding=public" in out


def test_a_public_embedding_with_layer_norm(tmp_path):
    """Whose first rows are then the client's own: the second layer is what stands for the rest."""
    layer_norm = []
    for layers in (0, 2):
        run("bench_spu.py", "--archs=sm_ln_r", "--embedding=public", *TINY, "--n_layer=4", f"--measure_layers={layers}", "--protocol=semi2k",
            f"--json={tmp_path / 'r.json'}", timeout=200)
        r = json.loads((tmp_path / "r.json").read_text())[0]
        assert (r["max_abs_err"] or 0) < 0.02 and "embedding" not in r["bytes_by_kind"]
        layer_norm.append(r["bytes_by_kind"]["LayerNorm"])
    assert layer_norm[0] == layer_norm[1]


def test_the_baseline_costs_more(tmp_path):
    """--baseline adds the same model as one would write it first: it gives the same token, for more bytes and more rounds."""
    out = run("bench_spu.py", "--archs=sm_ln_g", "--baseline=True", "--protocol=semi2k", *TINY, f"--json={tmp_path / 'r.json'}")
    first, ours = json.loads((tmp_path / "r.json").read_text())
    assert (first["arch"], ours["arch"]) == ("SM+LN+G plain", "SM+LN+G") and "fewer bytes than SM+LN+G plain" in out
    assert first["token"] == ours["token"] == first["plain_token"] and first["max_abs_err"] < 0.05
    assert first["bytes_total"] > 2 * ours["bytes_total"] and first["rounds"] > ours["rounds"]


def test_accuracy_over_windows_of_a_checkpoint_without_a_tokenizer(exported, tmp_path):
    _, model = exported
    text = np.frombuffer((ROOT / "model.py").read_bytes(), np.uint8).astype(np.uint16)
    text.tofile(tmp_path / "val.bin")
    save_checkpoint(str(tmp_path / "bare.pt"), model)
    out = run("bench_spu.py", f"--ckpt={tmp_path / 'bare.pt'}", "--prompt_ids=7,299,42", "--windows=2",
              f"--windows_file={tmp_path / 'val.bin'}", "--protocol=semi2k", f"--json={tmp_path / 'r.json'}")
    r = json.loads((tmp_path / "r.json").read_text())[0]
    starts = (0, len(text) - 17)
    windows = torch.from_numpy(np.stack([text[s:s + 17] for s in starts]).astype(np.int64))
    loss = model(windows[:, :-1], windows[:, 1:])[1].item()
    assert r["plain_perplexity"] == pytest.approx(np.exp(loss), rel=1e-4)
    assert r["secure_perplexity"] == pytest.approx(r["plain_perplexity"], rel=0.01) and r["top1_agreement"] >= 0.96
    assert r["max_abs_err"] > 0 and "of 32" in out
    assert r["token"] == model(torch.tensor([[7, 299, 42]]))[0][0, -1].argmax().item()


def test_only_the_token_is_revealed(exported, certificates):
    """--reveal=token: the argmax is computed under encryption, and no logits exist in the clear to compare. On a slow, encrypted link."""
    folder, model = exported
    out = run("bench_spu.py", f"--ckpt={folder / 'ckpt.pt'}", "--reveal=token", "--prompt=def f(x):", "--network=lan", f"--tls={certificates / 'client'}")
    plain = model(torch.tensor([list(b"def f(x):")]))[0][0, -1].argmax().item()
    assert f"next token: {plain} " in out and "argmax" in out and "same token as in plain" in out and "NO" not in out


def test_a_dead_party_is_noticed(exported):
    folder, _ = exported
    c, s = free_addresses(2)
    server = popen("--role=server", f"--private={folder / 'server'}", f"--listen={s}", f"--peer={c}")
    client = popen("--role=client", f"--public={folder / 'client' / 'public.json'}", f"--listen={c}", f"--peer={s}")
    client.stdout.readline()  # the set-up is done: both are at work
    server.send_signal(signal.SIGKILL)
    out = client.communicate(timeout=30)[0]
    assert client.returncode == 1 and out.strip().splitlines()[-1] == "error: the other party is gone (its process ended or the connection broke)"
    server.communicate()


def test_a_link_that_cannot_stand_is_given_up(exported):
    """They greet, but the server's --peer isn't where the client listens: SPU would wait for it as long as for a step."""
    folder, _ = exported
    c, s = free_addresses(2)
    parties = [popen("--role=server", f"--private={folder / 'server'}", f"--listen={s}", "--peer=127.0.0.1:9", "--connect_timeout=5"),
               popen("--role=client", f"--public={folder / 'client' / 'public.json'}", f"--listen={c}", f"--peer={s}", "--connect_timeout=5")]
    for p in parties:
        out = p.communicate(timeout=30)[0]
        assert p.returncode == 1 and ("no link with" in out or "the other party is gone" in out), out


@pytest.mark.parametrize("what", ["model", "code"])
def test_another_model_and_other_code_are_refused(what, exported, tmp_path):
    folder, _ = exported
    c, s = free_addresses(2)
    shutil.copytree(ROOT, tmp_path / "repo", ignore=shutil.ignore_patterns(".*", "out", "results", "tests", "*.bin", "__pycache__"))
    public = json.loads((folder / "client" / "public.json").read_text())
    if what == "model":
        public["config"]["bias"] = True
    else:
        nonlinear = tmp_path / "repo" / "private" / "nonlinear.py"
        nonlinear.write_text(nonlinear.read_text() + "# another line\n")
    (tmp_path / "public.json").write_text(json.dumps(public))
    parties = [popen("--role=server", f"--private={folder / 'server'}", f"--listen={s}", f"--peer={c}"),
               popen("--role=client", f"--public={tmp_path / 'public.json'}", f"--listen={c}", f"--peer={s}", script=tmp_path / "repo" / "bench_spu.py")]
    for p in parties:
        out = p.communicate(timeout=60)[0]
        assert p.returncode == 1 and f"the other party has another {what}: " in out and out.count("\n") == 1


# ------------------------------------------------------------------------------ ends from outside
FUZZ = int(os.environ.get("PI_FUZZ", "0"))  # so many kills and freezes at random moments, in place of a few
QUICK = ["--archs=sm_scfuffn", *TINY, "--n_layer=1"]
TIMEOUT = 6  # seconds without a sign of life


@pytest.fixture
def private_run(tmp_path):
    """Starts a run of role both whose temporary files go to an empty folder, by which its processes are known."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TMPDIR": str(folder)}

    def pids():
        """Of the run's processes: {what its command line ends in: pid}, such as "client" and "server"."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if f"TMPDIR={folder}\0".encode() in (path / "environ").read_bytes() + b"\0":
                    found[(path / "cmdline").read_text().split("\0")[-2]] = int(path.name)
            except (OSError, IndexError):  # it has just ended
                pass
        return found

    def start(*args):
        STARTED.append(subprocess.Popen([sys.executable, "bench_spu.py", *args], cwd=ROOT, text=True, env=environment,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
        return STARTED[-1], pids

    yield start

    for _ in range(100):
        left = pids()
        if not left:
            break
        time.sleep(0.1)
    for pid in left.values():
        os.kill(pid, signal.SIGKILL)
    assert not left
    assert os.listdir(folder) == []


@pytest.mark.parametrize("name, moment", [("SIGINT", ""), ("SIGTERM", "--- "), ("SIGHUP", "set-up")])
def test_a_signal_ends_the_whole_run_with_one_line(name, moment, private_run):
    """In the imports, while the parties start, and while the engine is at work. Nothing of it is left, as the fixture sees."""
    number = signal.Signals[name]
    parent, _ = private_run(*QUICK)
    if moment:
        assert any(moment in line for line in parent.stdout)
    else:
        time.sleep(0.5)
    parent.send_signal(number)
    out = parent.communicate(timeout=30)[0]
    assert parent.returncode == 128 + number
    assert [line for line in out.splitlines() if " MB " not in line] == [f"stopped by {name}"]


def test_ctrl_c_ends_a_single_party_at_once_and_the_other_says_so(exported):
    """Even while C++ is at work, where Python's own handlers wait."""
    folder, _ = exported
    c, s = free_addresses(2)
    server = popen("--role=server", f"--private={folder / 'server'}", f"--listen={s}", f"--peer={c}")
    client = popen("--role=client", f"--public={folder / 'client' / 'public.json'}", f"--listen={c}", f"--peer={s}")
    client.stdout.readline()
    server.send_signal(signal.SIGINT)
    assert server.communicate(timeout=5)[0].splitlines()[-1] == "stopped by SIGINT"
    assert server.returncode == 130
    assert client.communicate(timeout=5)[0].splitlines()[-1].startswith("error: the other party is gone")


@pytest.mark.parametrize("number", range(FUZZ or 2))
def test_a_party_or_the_parent_that_is_killed_ends_all(number, private_run):
    rng = random.Random(os.urandom(8) if FUZZ else number)
    victim, moment = rng.choice(["parent", "client", "server"]), rng.uniform(0, 12)
    parent, pids = private_run(*QUICK, f"--timeout={TIMEOUT}")
    time.sleep(moment)
    victims = pids() | {"parent": parent.pid}
    finished = parent.poll() == 0
    if victim in victims and not finished:
        os.kill(victims[victim], signal.SIGKILL)
    out = parent.communicate(timeout=TIMEOUT + 30)[0]
    print(f"{victim} killed after {moment:.1f} s, exit {parent.returncode}:\n{out}")
    assert "Traceback" not in out
    if parent.returncode == 0:
        assert "next token" in out
    elif victim != "parent" or "client" in victims:
        assert "error: " in out.splitlines()[-1]


@pytest.mark.parametrize("number", range(FUZZ or 1))
def test_a_frozen_party_ends_all_with_a_line(number, private_run):
    rng = random.Random(os.urandom(8) if FUZZ else number)
    victim, moment = ("client", "server")[number % 2], rng.uniform(3, 12)
    parent, pids = private_run(*QUICK, f"--timeout={TIMEOUT}")
    time.sleep(moment)
    while victim not in pids() and parent.poll() is None:
        time.sleep(0.1)
    if victim in (found := pids()):
        os.kill(found[victim], signal.SIGSTOP)
    started = time.time()
    out = parent.communicate(timeout=TIMEOUT + 30)[0]
    print(f"{victim} frozen after {moment:.1f} s, {time.time() - started:.1f} s, exit {parent.returncode}:\n{out}")
    if parent.returncode == 0:
        assert "next token" in out
        return
    survivor = "server" if victim == "client" else "client"
    lines = [line for line in out.splitlines() if line.startswith("error: ")]
    assert len(lines) == 2, out
    assert any(words in lines[0] for words in ("no sign of life", "did not come", "no link with"))
    assert lines[1] == f"error: the private run failed, see above: the {survivor} ended with status 1"


@pytest.mark.parametrize("args, status, line", [
    (["--role=client", "--public={public}", "--listen=127.0.0.1:{port}", "--peer=127.0.0.1:{port2}", "--connect_timeout=1"], 1, "did not come to"),
    (["--role=client", "--public={public}", *PLACES, "--prompt=one two three four five six"], 1, "tokens and the model's context is 16"),
    (["--role=client", "--public={public}", *PLACES, "--prompt="], 1, "the prompt is empty"),
    (["--role=client", "--public={public}", *PLACES, "--prompt_ids=1,300"], 1, "the prompt has token 300, outside the model's vocabulary of 300"),
    (["--role=client", "--public={public}", *PLACES, "--prompt_ids=one"], 1, "--prompt_ids must be like 1,2,3, and is 'one'"),
    (["--role=client", "--public=nowhere.json", *PLACES], 1, "nowhere.json"),
    (["--role=client", "--public={public}", "--plain=True"], 2, "it is for --role=both"),
    (["--ckpt={folder}/ckpt.pt", "--json={folder}"], 2, "it is there, and no file"),
    (["--ckpt={folder}/ckpt.pt", "--json=/dev/null"], 2, "can't write /dev/null"),
    (["--role=server", "--private={folder}/client", *PLACES], 1, "server.npz"),
    (["--role=server", "--private={folder}/server", "--listen=here", "--peer=127.0.0.1:1"], 2, "--listen must be HOST:PORT"),
    (["--role=server", "--private={folder}/server", "--listen=here:٣٣", "--peer=127.0.0.1:1"], 2, "--listen must be HOST:PORT"),
    (["--archs=sm_lng"], 2, "no architecture 'sm_lng'"),
    (["--archs=sm_ln_g", "--n_head=5"], 2, "cannot be split"),
    (["--archs=sm_ln_g", "--prompt=def"], 2, "--prompt needs a tokenizer"),
    (["--archs=sm_ln_g", *TINY, "--prompt_ids=100"], 1, "the prompt has token 100, outside the model's vocabulary of 100"),
    (["--ckpt={bare}"], 1, "this model has no tokenizer for --prompt: give --prompt_ids=1,2,3"),
    (["--ckpt={bare}", "--prompt=def"], 1, "this model has no tokenizer for --prompt: give --prompt_ids=1,2,3"),
    (["--ckpt=nowhere.pt"], 1, "no checkpoint at nowhere.pt"),
    (["--timeout=1e12"], 2, "timeout must be at least 5 and at most 86400"),
    (["--seed=1e30"], 2, "seed must be at least 0"),
    (["--n_layer=1e9"], 2, "n_layer must be at least 1 and at most 1000"),
    (["--from_json={public}"], 1, "holds no results"),
    (["--from_json=nowhere.json"], 1, "nowhere.json"),
    (["--protocol=spdz"], 2, "protocol must be one of cheetah, semi2k, aby3"),
    (["--ckpt={folder}/ckpt.pt", "--prompt=one two three four five six"], 1, "tokens and the model's context is 16"),
    (["--ckpt={folder}/ckpt.pt", "--windows=1", "--windows_file=nowhere.bin"], 1, "can't read held-out text"),
    (["--ckpt={folder}/ckpt.pt", "--windows=1", "--reveal=token"], 2, "--windows compares the logits"),
    (["--network=wan", "--protocol=aby3"], 2, "aby3 has three"),
    (["--measure_layers=-1"], 2, "measure_layers must be at least 0"),
    (["--archs=sm_ln_g", *TINY, "--measure_layers=1", "--embedding=public"], 1, "or at least 2 with a public embedding"),
    (["--role=server", "--embedding=public"], 2, "--embedding is chosen by pi_export.py"),
    (["--role=client", "--public={public_embedding}", *PLACES, "--measure_layers=1", "--prompt_ids=1"], 1, "or at least 2 with a public embedding"),
    (["--ckpt={folder}/ckpt.pt", "--json=nowhere/r.json"], 2, "can't write nowhere/r.json: No such file"),
    (["--role=client", "--listen=127.0.0.1:{port}", "--peer=127.0.0.1:{port2}"], 2, "--role=client needs --public"),
    (["--role=client", "--public={public}", "--listen=127.0.0.1:{port}", "--peer=127.0.0.1:{port2}", "--tls={folder}"], 2, "ca.pem: --tls is a folder"),
    (["--role=client", "--public={public}", "--protocol=aby3", "--listen=127.0.0.1:{port}", "--peer=127.0.0.1:{port2}"], 2, "--peer must name one other, or two with --protocol=aby3"),
])
def test_one_line_says_what_is_wrong(args, status, line, exported, tmp_path):
    folder, _ = exported
    c, s = free_addresses(2)
    save_checkpoint(str(tmp_path / "bare.pt"), exported[1])
    public_embedding = tmp_path / "public.json"
    public_embedding.write_text(json.dumps(json.loads((folder / "client" / "public.json").read_text()) | {"embedding": "0" * 64}))
    out = run("bench_spu.py", *(a.format(folder=folder, public=folder / "client" / "public.json", public_embedding=public_embedding, bare=tmp_path / "bare.pt", port=c.split(":")[1], port2=s.split(":")[1]) for a in args),
              status=status)
    last = out.strip().splitlines()[-1]
    assert last.startswith("error: ") and line in last


# ------------------------------------------------------------------------------ an earlier run's results
TABLE_2 = ROOT / "results" / "private_table2.json"


def test_an_earlier_runs_table_and_chart(tmp_path):
    out = run("bench_spu.py", f"--from_json={TABLE_2}", f"--chart={tmp_path / 'r.png'}")
    assert "published by the paper: GB" in out and "25.32" in out
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["json", "chart"])
def test_a_full_disk_costs_no_table_and_leaves_no_piece(name, tmp_path):
    """A limit on the size of a file fails a write half-way, as a full disk does."""
    path = tmp_path / f"r.{'png' if name == 'chart' else 'json'}"
    done = subprocess.run([sys.executable, "bench_spu.py", f"--from_json={TABLE_2}", f"--{name}={path}"], cwd=ROOT, text=True, capture_output=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)))
    assert done.returncode == 1 and "published by the paper: GB" in done.stdout
    assert done.stderr.splitlines()[-1].startswith(f"error: can't write {path}: ")
    assert os.listdir(tmp_path) == []
