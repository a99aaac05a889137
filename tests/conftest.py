"""Shared by all tests: the repository on sys.path, a way to run its scripts, and one small corpus of real Python."""
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def run(script, *args, status=0, timeout=240):
    """Run `python script args` from the repository and return stdout + stderr, having checked the exit status."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}  # no test waits for a network
    done = subprocess.run([sys.executable, script, *map(str, args)], cwd=ROOT, env=env, timeout=timeout,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == status, f"exit {done.returncode}, wanted {status}:\n{done.stdout}"
    if status:
        assert "Traceback" not in done.stdout, done.stdout
    return done.stdout


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
    run("data/prepare.py", f"--data_dir={folder}", f"--train_source={source}", "--name=mine", "--vocab_size=512")
    return folder


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """Folders for --tls: "client" and "server" signed by one authority, "stranger" by itself."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make certificates with")
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*args):
        subprocess.run(["openssl", *map(str, args)], cwd=folder, check=True, capture_output=True)

    openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=ca", "-keyout", "ca.key", "-out", "ca.pem")
    for name in ("client", "server", "stranger"):
        (folder / name).mkdir()
        openssl("req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}", "-keyout", f"{name}/key.pem", "-out", "request.pem")
        signer = ["-signkey", "stranger/key.pem"] if name == "stranger" else ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"]
        openssl("x509", "-req", "-in", "request.pem", *signer, "-out", f"{name}/cert.pem")
        shutil.copy(folder / "ca.pem", folder / name / "ca.pem")
    return folder


@pytest.fixture
def in_the_clear(monkeypatch):
    """nonlinear.engine_square() as it is under the engine, where exp(x) is (1 + x/2)^2."""
    monkeypatch.setattr("private.nonlinear.engine_square", lambda w: w * w)
