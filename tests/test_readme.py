"""README.md is true: the lines it quotes stand in the files it names, and its commands use settings that exist."""
import re

from conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_quoted_code_stands_in_the_files():
    rows = [row for row in README.split("## The equations, in the code")[1].split("\n## ")[0].splitlines() if re.search(r" in `\w+\.py`", row)]
    assert len(rows) >= 8
    for row in rows:
        file = re.search(r" in `(\w+\.py)`", row)[1]
        for code in re.findall(r"`([^`]+)`", row.split(" | ", 1)[1]):
            assert code == file or code in (ROOT / file).read_text(), (code, file)


def test_files_and_configs_exist():
    for name in re.findall(r"`((?:config/|data/|results/|tests/|private/|experiments/)?[\w./]+\.(?:py|md|json|txt))`", README):
        assert any((ROOT / folder / name).exists() for folder in ("", "config")) or name in ("public.json", "server.npz", "meta.json"), name
    for name in re.findall(r"`((?:sm|ereg)_\w+|sm)`", README.split("## Architectures and settings")[1].split("\n## ")[0]):
        assert (ROOT / "config" / f"{name}.py").exists(), name


def test_commands_use_settings_that_exist():
    commands = [c for c in re.findall(r"python ([\w/]+\.py)([^\n`#&]*)", README) if c[0] != "script.py"]  # the example in the table of files
    assert len(commands) >= 12
    for script, arguments in commands:
        text = (ROOT / script).read_text()
        if script == "train.py":  # the fields of GPTConfig are settings of its
            text += (ROOT / "model.py").read_text()
        for key in re.findall(r"--(\w+)", arguments):
            assert key == "help" or re.search(rf"^( {{4}}{key}: \w+|{key}) = ", text, re.M) or script.startswith("experiments/"), (script, key)
        for config in re.findall(r"config/\w+\.py", arguments):
            assert (ROOT / config).exists(), config
