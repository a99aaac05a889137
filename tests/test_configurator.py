"""configurator.py: what it accepts, and the one line it says otherwise."""
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, run

from configurator import configure, within

DEFAULTS = dict(steps=10, rate=0.1, name="a", fast=False)


def settings():
    return dict(DEFAULTS, __doc__="Usage.", helper=len, _hidden=3, UNIT=5.0)


def refused(capsys, argv):
    """The one line that configure() refuses `argv` with; nothing of it is applied."""
    s = settings()
    with pytest.raises(SystemExit) as stop:
        configure(s, argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.startswith("error: ") and err.count("\n") == 1
    assert {k: s[k] for k in DEFAULTS} == DEFAULTS
    return err


def test_files_in_order_then_flags(tmp_path):
    (tmp_path / "a.py").write_text("steps = 20\nrate = 1\n")
    (tmp_path / "b.py").write_text("steps = 2 * steps\nname = 'b'\n")
    s = settings()
    files = [str(tmp_path / "a.py"), str(tmp_path / "b.py")]
    given = configure(s, ["--fast=True", *files, "--name=c=d"])
    assert given == dict(steps=40, rate=1.0, name="c=d", fast=True)
    assert {k: s[k] for k in DEFAULTS} == given
    assert type(s["rate"]) is float


def test_numbers_as_people_write_them():
    s = settings()
    configure(s, ["--steps=1e3", "--rate=3"])
    assert s["steps"] == 1000 and type(s["steps"]) is int
    assert s["rate"] == 3.0


@pytest.mark.parametrize("argv, line", [
    (["--stpes=3"], "error: command line: unknown key 'stpes', did you mean 'steps'?"),
    (["--_hidden=3"], "unknown key '_hidden'"),
    (["--helper=3"], "unknown key 'helper'"),
    (["--UNIT=2.0"], "unknown key 'UNIT'"),
    (["--steps=many"], "error: command line: steps must be int, like 10, and is 'many'"),
    (["--steps=1.5"], "steps must be int"),
    (["--steps=1e999"], "steps must be int"),
    (["--steps=" + "9" * 5000], "steps must be int"),
    (["--rate=1" + "0" * 400], "rate must be float"),
    (["--fast=1"], "fast must be bool"),
    (["--rate=True"], "rate must be float"),
    (["--steps", "3"], "'--steps': settings are written --key=value"),
    (["-steps=3"], "'-steps=3': settings are written --key=value"),
    (["config/sm_scfufn.py"], "'config/sm_scfufn.py', did you mean 'config/sm_scfuffn.py'?"),
    (["sm_scfuffn"], "no config file 'sm_scfuffn', did you mean 'config/sm_scfuffn.py'?"),
    (["sm"], "no config file 'sm', did you mean 'config/sm.py'?"),
    (["sm_scfuffn.py"], "no config file 'sm_scfuffn.py', did you mean 'config/sm_scfuffn.py'?"),
    (["config/"], "'config/' is a folder: name one of its files"),
    (["nowhere/x.py"], "no config file 'nowhere/x.py'"),
])
def test_one_line_and_status_2(argv, line, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert line in refused(capsys, argv)


@pytest.mark.parametrize("text, line", [
    ("steps = \n", "SyntaxError"),
    ("steps = nothing\n", "NameError"),
    ("step = 3\n", "did you mean 'steps'?"),
    ("steps = [3]\n", "steps must be int"),
    ("raise SystemExit(0)\n", "SystemExit: 0"),
])
def test_broken_file(tmp_path, text, line, capsys):
    (tmp_path / "c.py").write_text(text)
    err = refused(capsys, [str(tmp_path / "c.py")])
    assert line in err and "c.py" in err


@pytest.mark.parametrize("value", [0, 101, float("nan"), float("inf")])
def test_a_value_out_of_bounds_is_one_line(value, capsys):
    within({"steps": 1, "rate": 1.5}, steps=(1, 100), rate=(0, 2))
    with pytest.raises(SystemExit) as stop:
        within({"steps": value}, steps=(1, 100))
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err == f"error: steps must be at least 1 and at most 100, and is {value}\n"


def test_help_lists_the_settings(capsys):
    with pytest.raises(SystemExit) as stop:
        configure(settings(), ["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert "Usage." in out and "--steps=10" in out
    assert "_hidden" not in out and "UNIT" not in out


def test_help_shows_each_comment():
    """Of train.py's own settings, and of GPTConfig's fields that are settings of its, too."""
    lines = run("train.py", "--help").split("settings and their defaults:\n")[1].splitlines()
    shown = {line.split("=")[0].strip(): line.split(maxsplit=1)[1:] for line in lines}
    assert shown["--max_iters"] == ["steps"]
    assert shown["--n_layer"] == ["L"]
    assert shown["--use_layernorm"] == ["LN: before attention and before the FFN of every block"]
    assert shown["--vocab_size"] == ["V, 0: the tokenizer's"]  # train.py's comment, not model.py's
    assert all(shown.values()), shown


@pytest.mark.parametrize("script", ["train.py", "sample.py", "plot.py", "bench.py", "fade.py",
                                    "data/prepare.py", "experiments/reproduce.py"])
def test_ctrl_c_in_an_import_is_one_line(script, tmp_path):
    for heavy in ("numpy", "torch"):
        (tmp_path / f"{heavy}.py").write_text(
            "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    done = subprocess.run([sys.executable, script], cwd=ROOT, env={"PYTHONPATH": str(tmp_path)},
                          capture_output=True, text=True, timeout=30)
    assert done.returncode == 128 + signal.SIGINT
    assert done.stderr == "stopped by SIGINT\n"


def test_nohup_keeps_a_script_from_ending_with_its_terminal():
    code = ("import os, signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); import configurator; "
            "configurator.end_on_signals(); os.kill(os.getpid(), signal.SIGHUP); print('alive')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "alive\n"


@pytest.mark.parametrize("scale", sorted(p.name for p in (ROOT / "config").glob("on_*.py")))
def test_scale_files_ask_for_their_data(scale, tmp_path):
    """Each of the paper's scales is accepted, and then names the command that makes its data."""
    out = run("train.py", "config/ereg_sm_t_scfuffn.py", f"config/{scale}", f"--out_dir={tmp_path}",
              f"--data_dir={tmp_path}", status=1)
    assert out.count("\n") == 1 and "python data/prepare.py --corpus=" in out
