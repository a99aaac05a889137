"""experiments/choices.py: scores are those of sums of log-probabilities, also through lm_eval."""
import json
import math
import runpy
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "experiments"))
import choices  # noqa: E402
from data.tokenizer import load_tokenizer  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

QUESTIONS = [
    {"ctx": "import", "endings": ["numpy as np", "False", "] } ) ("], "label": 0},
    {"ctx": "for i in", "endings": ["class self:", "range(10):", "x"], "label": "1"},
    {"ctx": "def __init__(self,", "endings": ["]]]", "while"], "label": 1},
    {"ctx": "x = 1\n" * 40 + "y =", "endings": ["None", "import os", "2\n", "3"], "label": 2}]
HELLASWAG = {"activity_label": "Roof [header]", "ctx_a": "A man [step] sits.", "ctx_b": "he",
             "ctx": "A man [step] sits. he", "endings": ["is  up.", "is down."], "label": 1}


@pytest.fixture(scope="module")
def lm(data_dir):
    """A tiny model of random weights, large enough to prefer one ending to another."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=24, vocab_size=512)).eval()
    for p in model.parameters():
        p.data *= 5
    return choices.Model(model, load_tokenizer(data_dir / "mine" / "tokenizer.json"))


@torch.no_grad()
def sums(lm, question):
    """The log-probability of each ending after the text and a blank: token after token, alone."""
    found = []
    for ending in question["endings"]:
        text = lm.encoding.encode_ordinary(question["ctx"])
        whole = lm.encoding.encode_ordinary(f"{question['ctx']} {ending}")
        nats = 0.0
        for i in range(len(text), len(whole)):
            start = max(0, len(whole) - 1 - lm.model.config.block_size)
            log_p = lm.model(torch.tensor([whole[start:i]]))[0][0, -1].log_softmax(-1)
            nats += log_p[whole[i]].item()
        found.append(nats)
    return found


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_an_ending_has_the_sum_of_its_tokens(lm, batch, monkeypatch):
    monkeypatch.setattr(choices, "batch", batch)
    requests, wanted = [], []
    for question in QUESTIONS:
        text = lm.tok_encode(question["ctx"])
        for ending in question["endings"]:
            requests.append((None, text, lm.tok_encode(f"{question['ctx']} {ending}")[len(text):]))
        wanted += sums(lm, question)
    lm.cut = 0
    found = lm._loglikelihood_tokens(requests)
    assert [nats for nats, _ in found] == pytest.approx(wanted, rel=1e-5)
    assert lm.cut == 4  # those of the last question, which all are longer than the context


@torch.no_grad()
def test_the_likeliest_ending_is_known_as_such(lm):
    text, ending = lm.tok_encode("for i in"), []
    for _ in range(3):
        ending.append(lm.model(torch.tensor([text + ending]))[0][0, -1].argmax().item())
    other = [*ending[:2], (ending[2] + 1) % 512]
    found = lm._loglikelihood_tokens([(None, text, ending), (None, text, other)])
    assert [likeliest for _, likeliest in found] == [True, False]
    for n in (0, 25):
        with pytest.raises(ValueError, match="no token, or more than a context's 24"):
            lm._loglikelihood_tokens([(None, text, [1] * n)])


def test_lm_eval_finds_the_accuracy_of_the_sums(lm, tmp_path):
    pytest.importorskip("lm_eval")
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    told = choices.ask(lm, choices.read(path))
    for key, of in (("acc", lambda ending: 1), ("acc_norm", len)):
        right = []
        for question in QUESTIONS:
            scores = [nats / of(ending) for nats, ending in
                      zip(sums(lm, question), question["endings"])]
            right.append(scores.index(max(scores)) == int(question["label"]))
        p, n = sum(right) / len(right), len(right)
        assert told[key] == pytest.approx(p)
        assert told[f"{key}_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)))


def test_lines_of_hellaswag_are_worded_as_by_lm_eval():
    pytest.importorskip("lm_eval")
    from datasets import Dataset
    from lm_eval.tasks.hellaswag.utils import process_docs
    [theirs] = process_docs(Dataset.from_list([HELLASWAG]))
    mine = choices.worded(HELLASWAG)
    assert mine == {key: theirs[key] for key in mine}


@pytest.mark.parametrize("line", [
    "no JSON", "[]", '{"ctx": "a", "endings": ["b", "c"]}',
    '{"ctx": "a", "endings": ["b", "c"], "label": 2}',
    '{"ctx": "a", "endings": ["b", ""], "label": 0}',
    '{"ctx": "a", "endings": ["b", "c"], "label": ""}'])
def test_a_line_that_is_no_question_is_named(line, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(QUESTIONS[0]) + f"\n{line}\n")
    with pytest.raises(ValueError, match="questions.jsonl, line 2: no question"):
        choices.read(path)


def test_a_file_without_two_questions_is_named(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(QUESTIONS[0]) + "\n")
    with pytest.raises(ValueError, match="two questions"):
        choices.read(path)
    with pytest.raises(FileNotFoundError, match="--file=FILE"):
        choices.read("")


def test_without_lm_eval_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    monkeypatch.setattr(sys, "argv", ["choices.py"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "experiments" / "choices.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and error.count("\n") == 1
    assert error.startswith("error: ") and "pip install lm_eval" in error
