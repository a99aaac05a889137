"""configurator.py: what it accepts, and the one line it says otherwise."""
import pytest
from conftest import ROOT, run

from configurator import configure

DEFAULTS = dict(steps=10, rate=0.1, name="a", fast=False)


def settings():
    return dict(DEFAULTS, __doc__="Usage.", helper=len, _hidden=3, UNIT=5.0)


def test_files_in_order_then_flags(tmp_path):
    (tmp_path / "a.py").write_text("steps = 20\nrate = 1\n")
    (tmp_path / "b.py").write_text("steps = 2 * steps\nname = 'b'\n")
    s = settings()
    given = configure(s, ["--fast=True", str(tmp_path / "a.py"), str(tmp_path / "b.py"), "--name=c=d"])
    assert (s["steps"], s["rate"], s["name"], s["fast"]) == (40, 1.0, "c=d", True)
    assert type(s["rate"]) is float and given == dict(steps=40, rate=1.0, name="c=d", fast=True)


def test_numbers_as_people_write_them():
    s = settings()
    configure(s, ["--steps=1e3", "--rate=3"])
    assert s["steps"] == 1000 and type(s["steps"]) is int and s["rate"] == 3.0


@pytest.mark.parametrize("argv, line", [
    (["--stpes=3"], "error: command line: unknown key 'stpes', did you mean 'steps'?"),
    (["--_hidden=3"], "unknown key '_hidden'"),
    (["--helper=3"], "unknown key 'helper'"),
    (["--UNIT=2.0"], "unknown key 'UNIT'"),
    (["--steps=many"], "error: command line: steps must be int, like 10, and is 'many'"),
    (["--steps=1.5"], "steps must be int"),
    (["--fast=1"], "fast must be bool"),
    (["--rate=True"], "rate must be float"),
    (["--steps", "3"], "'--steps': settings are written --key=value"),
    (["-steps=3"], "'-steps=3': settings are written --key=value"),
    (["config/sm_scfufn.py"], "error: no config file 'config/sm_scfufn.py', did you mean 'config/sm_scfuffn.py'?"),
    (["nowhere/x.py"], "no config file 'nowhere/x.py'"),
])
def test_one_line_and_status_2(argv, line, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    s = settings()
    with pytest.raises(SystemExit) as stop:
        configure(s, argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and line in err and err.count("\n") == 1
    assert {k: s[k] for k in DEFAULTS} == DEFAULTS  # nothing was half applied


@pytest.mark.parametrize("text, line", [("steps = \n", "SyntaxError"), ("steps = nothing\n", "NameError"), ("step = 3\n", "did you mean 'steps'?"),
                                        ("steps = [3]\n", "steps must be int")])
def test_broken_file(tmp_path, text, line, capsys):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(SystemExit) as stop:
        configure(settings(), [str(tmp_path / "c.py")])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and line in err and "c.py" in err and err.count("\n") == 1


def test_help_lists_the_settings(capsys):
    with pytest.raises(SystemExit) as stop:
        configure(settings(), ["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "Usage." in out and "--steps=10" in out and "_hidden" not in out and "UNIT" not in out


@pytest.mark.parametrize("scale", sorted(p.name for p in (ROOT / "config").glob("on_*.py")))
def test_scale_files_ask_for_their_data(scale, tmp_path):
    """Each of the paper's scales is accepted with an architecture, and then names the command that makes its data."""
    out = run("train.py", "config/ereg_sm_t_scfuffn.py", f"config/{scale}", f"--out_dir={tmp_path}", f"--data_dir={tmp_path}", status=1)
    assert out.count("\n") == 1 and "python data/prepare.py --corpus=" in out
