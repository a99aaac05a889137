"""Shared by all tests: the repository on sys.path, its scripts run, one small corpus of Python."""
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

# Scripts leave SIGHUP ignored where nohup has it so; tests send it, also under nohup.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Two tests run at a time: threads that wait for each other busily would take turns on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


# No test waits for a network
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "https_proxy": "http://127.0.0.1:9"}


LONG = ("test_bench_spu", "test_train", "test_torchrun", "test_priced")  # minutes each


@pytest.hookimpl(tryfirst=True)  # before xdist looks for groups
def pytest_collection_modifyitems(items):
    """A file's tests run one after the other, on what it sets up once; so do all that ask `saw`."""
    items.sort(key=lambda item: item.path.stem not in LONG)
    for item in items:
        shared = "saw" if "saw" in item.fixturenames else item.path.stem
        item.add_marker(pytest.mark.xdist_group(shared))


def run(script, *args, status=0, timeout=240):
    """The stdout and stderr of `python script args` from the repository, which must end so."""
    env = os.environ | OFFLINE | {"PYTHONUNBUFFERED": "1"}
    done = subprocess.run([sys.executable, script, *map(str, args)], cwd=ROOT, env=env, text=True,
                          timeout=timeout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == status, f"exit {done.returncode}, wanted {status}:\n{done.stdout}"
    if status:
        assert "Traceback" not in done.stdout, done.stdout
    return done.stdout


REFUSALS = """
import contextlib, io, json, runpy, sys
script, tries = sys.argv[1], json.loads(sys.argv[2])
for sys.argv in tries:
    out, err = io.TextIOWrapper(io.BytesIO()), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(script, run_name="__main__")
            status = 0
        except SystemExit as e:
            status = e.code
    print(json.dumps([status, err.getvalue()]))
"""


def refusals(script, tries):
    """
    [(exit status, stderr)] of `script` with each of `tries`, lists of arguments: in one process,
    as most of a second is imports. A traceback in one of them fails here.
    """
    tries = [[script, *map(str, arguments)] for arguments in tries]
    done = subprocess.run([sys.executable, "-c", REFUSALS, script, json.dumps(tries)], cwd=ROOT,
                          env=os.environ | OFFLINE, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(told) == len(tries)
    return told


def told_by_two_parties(script, *arguments):
    """
    What `python script RANK ADDRESS ADDRESS arguments` says of the client and of the server, a line
    of JSON each; each is killed when both have said theirs.
    """
    from private.meet import free_addresses
    addresses = free_addresses(2)
    parties = [subprocess.Popen([sys.executable, script, str(rank), *addresses, *arguments],
                                cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
               for rank in (0, 1)]
    try:
        return [json.loads(p.stdout.readline()) for p in parties]
    finally:
        for p in parties:
            p.kill()


def tell(engine, seen):
    """A party's end: it says what it saw, and lives on while the other may wait for it."""
    print(json.dumps(seen), file=engine.terminal, flush=True)
    sys.stdin.read()
    os._exit(0)


@pytest.fixture(scope="session")
def saw(request):
    """
    {test module: what its party(engine) returned to the client and to the server}, of all modules
    whose tests are run and ask for this: on one engine, whose set-up takes seconds.
    """
    names = sorted({item.module.__name__ for item in request.session.items
                    if "saw" in item.fixturenames})
    client, server = told_by_two_parties(ROOT / "tests" / "parties.py", *names)
    return {name: (client[name], server[name]) for name in names}


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A folder of real Python files: three packages of the standard library."""
    folder = tmp_path_factory.mktemp("source")
    for package in ("asyncio", "email", "unittest"):
        for path in sorted((Path(sysconfig.get_path("stdlib")) / package).glob("*.py")):
            (folder / f"{package}_{path.name}").write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="session")
def data_dir(source, tmp_path_factory):
    """A data_dir with the dataset "mine", prepared from `source` with a vocabulary of 512."""
    folder = tmp_path_factory.mktemp("data")
    run("data/prepare.py", f"--data_dir={folder}", f"--train_source={source}", "--name=mine",
        "--vocab_size=512")
    return folder


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """Folders for --tls: "client" and "server" signed by one authority, "stranger" by itself."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make certificates with")
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*args):
        subprocess.run(["openssl", *map(str, args)], cwd=folder, check=True, capture_output=True)

    new_key = ("-newkey", "rsa:2048", "-nodes")
    openssl("req", "-x509", *new_key, "-subj", "/CN=ca", "-keyout", "ca.key", "-out", "ca.pem")
    for name in ("client", "server", "stranger"):
        (folder / name).mkdir()
        openssl("req", *new_key, "-subj", f"/CN={name}", "-keyout", f"{name}/key.pem",
                "-out", "request.pem")
        signer = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"]
        if name == "stranger":
            signer = ["-signkey", "stranger/key.pem"]
        openssl("x509", "-req", "-in", "request.pem", *signer, "-out", f"{name}/cert.pem")
        shutil.copy(folder / "ca.pem", folder / name / "ca.pem")
    return folder


@pytest.fixture
def in_the_clear(monkeypatch):
    """nonlinear.engine_square() as it is under the engine, where exp(x) is (1 + x/2)^2."""
    monkeypatch.setattr("private.nonlinear.engine_square", lambda w: w * w)
