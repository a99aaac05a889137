"""
Multiple-choice questions in HellaSwag's form, asked of a trained model by lm_eval, the field's own.

    pip install lm_eval
    python experiments/choices.py --file=hellaswag_val.jsonl --ckpt=out/ckpt.pt

A line of the file is one: {"ctx": a text, "endings": [texts], "label": the right one's place}.
Lines of HellaSwag itself, with "activity_label", "ctx_a" and "ctx_b", are worded as by lm_eval.
The answer is the likeliest ending after the text and a blank; for acc_norm, likeliest a character.
A text that is too long for the model's context loses its beginning, as in lm_eval's own models.
"""
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
from configurator import configure, die, end_on_signals, within  # noqa: E402

end_on_signals()

import hashlib  # noqa: E402
import json  # noqa: E402
import logging  # noqa: E402

import torch  # noqa: E402

from data.tokenizer import EOT, encode_batch  # noqa: E402
from draw import write_whole  # noqa: E402
from machine import choose_device, machine_and_commit  # noqa: E402
from pretrained import open_pretrained  # noqa: E402

try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
except ImportError:
    lm_eval, TemplateLM = None, object

file = ""  # the questions, a line of JSON each
ckpt = "out/ckpt.pt"  # a checkpoint of train.py, or GPT-2: its hub id, folder or .safetensors file
tokenizer = ""  # of GPT-2: a tokenizer.json; if empty the one beside its weights, else tiktoken's
into = ""  # a JSON file for what was found; none if empty
batch = 8  # endings at a time
device = "auto"  # auto | cpu | cuda | mps


def worded(told):
    """A line's question as the task has it. KeyError, TypeError or ValueError if it is none."""
    query, choices, gold = told["ctx"], told["endings"], int(told["label"])
    if "activity_label" in told:
        from lm_eval.tasks.hellaswag.utils import preprocess
        both = f"{told['ctx_a']} {told['ctx_b'].capitalize()}"
        query = preprocess(f"{told['activity_label']}: {both}")
        choices = [preprocess(ending) for ending in choices]
    if not all(choices) or gold not in range(len(choices)):
        raise ValueError(f"label {gold} of the endings {choices}")
    return {"query": query, "choices": choices, "gold": gold}


def read(path):
    """A file's questions. Raises OSError if it can't be read, ValueError if a line is none."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file of questions {path!r}: name one by --file=FILE")
    found = []
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            try:
                found.append(worded(json.loads(line)))
            except (ValueError, KeyError, TypeError) as e:
                raise ValueError(f"{path}, line {len(found) + 1}: no question with ctx, endings "
                                 f"and label ({type(e).__name__}: {e})") from e
    if len(found) < 2:
        raise ValueError(f"{path}: a standard error needs two questions at least")
    return found


class Model(TemplateLM):
    """A GPT with its tokenizer, as lm_eval asks one. It is lm_eval that tells text from ending."""

    def __init__(self, model, encoding):
        super().__init__()
        self.model, self.encoding, self.cut = model, encoding, 0

    @property
    def eot_token_id(self):
        return self.encoding.encode_single_token(EOT)

    def tok_encode(self, string, *args, **kwargs):
        return encode_batch(self.encoding, [string], 1)[0]

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests, **kwargs):
        """log p(ending | text) of each request (_, text, ending), and if that is the likeliest."""
        longest, found = self.model.config.block_size, []
        for i in range(0, len(requests), batch):
            some = [(torch.tensor(text + ending), len(ending))
                    for _, text, ending in requests[i:i + batch]]
            if not all(0 < n <= longest for _, n in some):
                raise ValueError(f"an ending has no token, or more than a context's {longest}")
            self.cut += sum(len(tokens) > longest + 1 for tokens, _ in some)
            some = [(tokens[-longest - 1:], n) for tokens, n in some]
            x = torch.nn.utils.rnn.pad_sequence([tokens[:-1] for tokens, _ in some], True)  # (B, T)
            logits = self.model(x.to(self.model.wte.weight.device))[0]                   # (B, T, V)
            for mine, (tokens, n) in zip(logits, some):
                log_p = mine[len(tokens) - 1 - n:len(tokens) - 1].float().log_softmax(-1).cpu()
                wanted = tokens[-n:]                                                     # (n)
                likeliest = (log_p.argmax(-1) == wanted).all().item()
                found.append((log_p.gather(1, wanted[:, None]).sum().item(), likeliest))
        return found

    loglikelihood_rolling = generate_until = None  # evaluate.py and sample.py do what these would


def ask(lm, questions):
    """acc and acc_norm of a Model with their standard errors, as lm_eval tells them."""
    from datasets import Dataset
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True}
               for name in ("acc", "acc_norm")]
    task = {"task": "choices", "custom_dataset": lambda **_: {"all": Dataset.from_list(questions)},
            "test_split": "all", "output_type": "multiple_choice", "metric_list": metrics,
            "doc_to_text": "query", "doc_to_choice": "choices", "doc_to_target": "gold"}
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    found = lm_eval.simple_evaluate(lm, tasks=[task], log_samples=False)["results"]["choices"]
    return {key: found[f"{key},none"] for key in ("acc", "acc_stderr", "acc_norm",
                                                  "acc_norm_stderr")}


def main():
    configure(globals())
    within(globals(), batch=(1, 2**20))
    if not lm_eval:
        die("questions are asked by lm_eval, which isn't here: pip install lm_eval")
    try:
        questions = read(file)
        model, encoding = open_pretrained(ckpt, tokenizer)
        lm = Model(model.to(choose_device(device)), encoding)
        found = ask(lm, questions)
        told = {"command": " ".join(["python", *sys.argv]), "model": model.config.name,
                "questions": len(questions), "cut": lm.cut, **found,
                "file_sha256": hashlib.sha256(Path(file).read_bytes()).hexdigest(),
                "lm_eval": lm_eval.__version__, **machine_and_commit()}
        if into:
            write_whole(into, (json.dumps(told) + "\n").encode())
    except (OSError, ValueError) as e:
        die(e)
    print(f"{file}: {len(questions)} questions; {model.config.name}: acc {found['acc']:.4f} +- "
          f"{found['acc_stderr']:.4f}, acc_norm {found['acc_norm']:.4f} +- "
          f"{found['acc_norm_stderr']:.4f}; {lm.cut} of the texts with an ending were cut")


if __name__ == "__main__":
    main()
