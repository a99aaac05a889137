"""
One party's run: load what is its own, meet the others, compute with them, tell.

A namespace `s` holds bench_spu.py's settings by their names. Whatever a user can cause is raised as
ValueError, OSError or RuntimeError with a sentence, and run_party() makes that one line.
"""
import hashlib
import json
import os
import re
import resource
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(HERE)
    from configurator import end_on_signals
    end_on_signals()

import numpy as np  # noqa: E402
import torch  # noqa: E402

from configurator import on_signals  # noqa: E402
from model import GPT, load_checkpoint  # noqa: E402
from pi_export import held_out  # noqa: E402
from private.engine import Engine  # noqa: E402
from private.files import load_embedding, load_public, load_server, write_whole  # noqa: E402
from private.infer import infer, set_up  # noqa: E402
from private.meet import (ROLES, end_now, greet, host_port, listen_at, quit_now,  # noqa: E402
                          warn_of_readers)
from private.reply import Run, questions, tokenizer_of  # noqa: E402

AGREED = ("protocol", "measure_layers", "reveal", "windows", "plain", "max_new_tokens",
          "prompt_tokens", "guesses", "ahead")  # besides model and code
PROMPT_IDS = "[0-9]{1,9}([,;][0-9]{1,9})*"  # of several prompts, one after each semicolon
DAY = 24 * 3600
STEP = 10  # times --timeout that a step may take while the other party shows signs of life


# ------------------------------------------------------------------------------ what a party holds
def read_prompts(s, public):
    """The client's prompts, arrays of token ids. ValueError if the model can't take one."""
    vocabulary, context = public["config"]["vocab_size"], public["config"]["block_size"]
    if s.prompt_ids:
        if not re.fullmatch(PROMPT_IDS, s.prompt_ids):
            raise ValueError(f"--prompt_ids must be like 1,2,3, and is {s.prompt_ids!r}")
        prompts = [[int(i) for i in ids.split(",")] for ids in s.prompt_ids.split(";")]
    elif public["tokenizer"]:
        texts = lines_of(s.prompts) if s.prompts else [s.prompt]
        prompts = [tokenizer_of(public).encode_ordinary(text) for text in texts]
    elif s.archs:  # random weights take a random prompt
        room = s.max_new_tokens + s.guesses
        length = min(s.prompt_tokens or context, max(1, context + 1 - room))
        prompts = [np.random.default_rng(s.seed).integers(0, vocabulary, length)]
    else:
        raise ValueError("this model has no tokenizer for --prompt: give --prompt_ids=1,2,3")
    for ids in prompts:
        check_length(s, len(ids), context)
    return [in_vocabulary(np.array(ids), vocabulary, "the prompt") for ids in prompts]


def lines_of(path):
    """The lines of a text file that have any content. ValueError if there are none."""
    try:
        with open(path, encoding="utf-8") as f:
            lines = [line for line in f.read().splitlines() if line.strip()]
    except (OSError, UnicodeError) as e:
        raise ValueError(f"can't read --prompts={path}: {e}") from e
    if not lines:
        raise ValueError(f"--prompts={path} has no prompt: a line for each")
    return lines


def check_length(s, n, context):
    """ValueError unless a prompt of n tokens and the reply that is asked for fit the context."""
    if not n:
        raise ValueError("the prompt is empty: give --prompt")
    if n > context:
        raise ValueError(f"the prompt has {n} tokens and the model's context is {context}: "
                         "shorten it")
    if n > (s.prompt_tokens or context):
        raise ValueError(f"the prompt has {n} tokens and --prompt_tokens is {s.prompt_tokens}: "
                         "shorten it, or have both sides set more")
    fits = context + 1 - n - s.guesses
    if s.max_new_tokens > fits:
        beside = f", --guesses {s.guesses}" if s.guesses else ""
        cure = f"{fits} would fit" if fits > 1 or not s.guesses else "guess fewer"
        raise ValueError(f"the prompt has {n} tokens, --max_new_tokens is {s.max_new_tokens}"
                         f"{beside} and the model's context {context}: {cure}")


def load_draft(s, public):
    """
    The client's GPT that guesses, or None. ValueError if it doesn't guess for this model, or the
    file isn't a checkpoint.
    """
    if not s.draft:
        return None
    checkpoint = load_checkpoint(s.draft)
    draft, mine = GPT.from_checkpoint(checkpoint), public["config"]
    if draft.config.vocab_size != mine["vocab_size"]:
        raise ValueError(f"--draft={s.draft} has a vocabulary of {draft.config.vocab_size}, and "
                         f"the model one of {mine['vocab_size']}")
    if public["tokenizer"] and checkpoint.get("tokenizer") != public["tokenizer"]:
        raise ValueError(f"--draft={s.draft} has another tokenizer than the model")
    return draft


def in_vocabulary(ids, size, what):
    if ids.max() >= size:
        raise ValueError(f"{what} has token {ids.max()}, outside the model's vocabulary of {size}")
    return ids


def held_out_windows(s, public):
    """(windows, T + 1) token ids, spread over a .bin of uint16 tokens: inputs and targets."""
    path, context = s.windows_file, public["config"]["block_size"]
    if not path:
        raise ValueError("--windows takes held-out text, and the checkpoint's own isn't where its "
                         "training had it: give --windows_file")
    tokens = held_out(path)
    if len(tokens) < context + 1:
        raise ValueError(f"{path} has {len(tokens)} tokens, and a window takes {context + 1}")
    starts = np.linspace(0, len(tokens) - context - 1, s.windows).astype(int)
    texts = np.stack([tokens[start:start + context + 1] for start in starts])
    return in_vocabulary(texts, public["config"]["vocab_size"], path)


def check_settings(s, public):
    """ValueError if the settings don't go with the model."""
    context = public["config"]["block_size"]
    if s.prompt_tokens > context:
        raise ValueError(f"--prompt_tokens must be at most the model's context, {context}, and is "
                         f"{s.prompt_tokens}")
    if s.measure_layers == 1 and public["embedding"] != "private":
        raise ValueError("--measure_layers must be 0 or at least 2 with a public embedding: the "
                         "first layer, its input the client's own, is cheaper than the rest")


def load_own(s):
    """(public, weights, prompts, texts, draft) of a party, None for what isn't its own to hold."""
    weights = prompts = texts = draft = None
    if s.role == "server":
        public, weights = load_server(s.private)
        warn_of_readers(os.path.join(s.private, "server.npz"))
    else:
        public = load_public(s.public)
    check_settings(s, public)
    if s.role == "client":
        prompts = read_prompts(s, public)
        draft = load_draft(s, public)
        texts = held_out_windows(s, public) if s.windows else None
        if public["embedding"] != "private":
            weights = load_embedding(os.path.dirname(s.public), public)
    return public, weights, prompts, texts, draft


def agreement(s, public):
    """What the parties compare when they meet: any difference would make garbage of the result."""
    import jax
    import spu

    def digest(content):
        return hashlib.sha256(content).hexdigest()[:16]

    code = [HERE / "model.py", HERE / "pi_export.py", *sorted((HERE / "private").glob("*.py"))]
    same = {
        "model": digest(json.dumps(public, sort_keys=True).encode()),
        "code": digest(b"".join(path.read_bytes() for path in code)),
        "SPU version": spu.__version__,
        "jax version": jax.__version__,
    }
    return same | {name: getattr(s, name) for name in AGREED}


# ------------------------------------------------------------------------------ what it tells
def perplexity(logits, targets):
    """exp of the mean cross-entropy: logits (N, T, V), targets (N, T)."""
    logits = torch.from_numpy(logits).double().flatten(0, 1)
    targets = torch.from_numpy(targets).flatten()
    return torch.nn.functional.cross_entropy(logits, targets).exp().item()


def write_json(path, value, secret=False):
    write_whole(path, lambda f: f.write(json.dumps(value, indent=1).encode()), secret)


def keep(s, result, revealed, of_windows):
    """
    Write the client's result, and the revealed logits of a whole model, where asked for: "next"
    (n, V) of all tokens of all replies, "windows" (N, T, V).
    """
    if s.json:
        write_json(s.json, result, secret=True)
    if s.logits_file and "token" in result and s.reveal == "logits":
        windows = np.array(of_windows, np.float32)
        all_next = np.array(revealed, np.float32)
        write_whole(s.logits_file, lambda f: np.savez(f, next=all_next, windows=windows),
                    secret=True)


# ------------------------------------------------------------------------------ the run
def one_party(s):
    """Meet, compute, tell. The client prints the reply and writes its result."""
    rank = ROLES.index(s.role)
    public, weights, prompts, texts, draft = load_own(s)
    addresses = s.peer.split(",")
    addresses.insert(rank, s.listen)
    listen_at(*host_port(s.listen, "--listen")).close()  # SPU has no words for a port that is taken
    patience = DAY if s.serve else s.connect_timeout
    session, farewell = greet(rank, addresses, agreement(s, public), patience, s.timeout, s.tls)
    engine = Engine(rank, addresses, s.protocol, STEP * s.timeout, s.connect_timeout / 2, s.tls,
                    s.plain, session)
    engine.terminal.reconfigure(errors="backslashreplace")
    run = Run(s, engine, public, weights, draft)
    set_up(engine)
    run.spent(engine.costs, "set-up")
    of_windows = []
    for ids in questions(engine, prompts):
        run.answer(ids)
        if s.role == "client":
            result = run.result()
            keep(s, result, run.revealed, of_windows)  # what follows may fail yet
    for i in range(s.windows):
        def told_of_window(stage, costs, name=f"window {i + 1}/{s.windows}, "):
            run.told(name + stage, costs)

        text = None if texts is None else texts[i, :-1]
        logits, _ = infer(engine, public, weights, text, told_of_window, every_row=True)
        of_windows.append(logits)
    if s.serve:
        run.say(run.summary())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # The client names no memory of its own to the others: it could tell of its text.
    others = farewell({s.role: peak} if s.role == "server" else {})
    if s.role == "client":
        peaks = {name: value for word in others for name, value in word.items()}
        result["peak_memory_bytes"] = {"client": peak} | peaks
        if s.windows:
            result["windows"] = s.windows
            result["secure_perplexity"] = perplexity(np.array(of_windows), texts[:, 1:])
            run.say(f"perplexity of {s.windows} windows: {result['secure_perplexity']:.2f}")
        keep(s, result, run.revealed, of_windows)


def end_at_once_on_signals(mid_line):
    """
    Ctrl-C, SIGTERM and SIGHUP end this process with a line even while C++ is at work in the main
    thread, where Python's own handlers would wait for the end of the step. mid_line: see end_now().
    """
    came, wakeup = socket.socketpair()
    wakeup.setblocking(False)
    signal.set_wakeup_fd(wakeup.detach())
    on_signals(lambda number, frame: None)

    def wait():
        number = came.recv(1)[0]
        end_now(f"stopped by {signal.Signals(number).name}", 128 + number, mid_line)

    threading.Thread(target=wait, daemon=True).start()


def run_party(s):
    """one_party() as all that is left of this process, which ends here: with status 0 or a line."""
    end_at_once_on_signals(s.role == "client" and s.max_new_tokens > 1)
    try:
        one_party(s)
    except (OSError, ValueError) as e:
        quit_now(e)
    except RuntimeError as e:  # SPU's
        time.sleep(1)  # if another party has died, the thread that watches it says so better
        words = [line.strip() for line in str(e).replace("what:", "").splitlines() if line.strip()]
        cure = f" (a step may take {STEP} times --timeout)" if "timeout" in str(e) else ""
        quit_now(f"SPU stopped: {words[0] if words else type(e).__name__}{cure}")
    sys.stderr.flush()
    # SPU's threads outlive main(), and freeing what they use has ended runs by SIGSEGV.
    os._exit(0)


def end_with_parent():
    sys.stdin.read()
    quit_now("the run that started this party has ended")


if __name__ == "__main__":  # a party of role both: its settings are the first line of its stdin
    settings = SimpleNamespace(**json.loads(sys.stdin.readline() or end_with_parent()))
    threading.Thread(target=end_with_parent, daemon=True).start()
    run_party(settings)
