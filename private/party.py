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
from private.engine import Engine  # noqa: E402
from private.files import load_embedding, load_public, load_server, write_whole  # noqa: E402
from private.infer import infer, set_up  # noqa: E402
from private.meet import (ROLES, end_now, greet, host_port, listen_at, quit_now,  # noqa: E402
                          warn_of_readers)
from private.reply import Chooser, Text, questions, reply  # noqa: E402

AGREED = ("protocol", "measure_layers", "reveal", "windows", "plain", "max_new_tokens",
          "prompt_tokens")  # besides model and code
STEP = 10  # times --timeout that a step may take while the other party shows signs of life


# ------------------------------------------------------------------------------ what a party holds
def tokenizer_of(public):
    from data.prepare import load_tokenizer
    return load_tokenizer(public["tokenizer"])


def read_prompt(s, public):
    """The client's token ids (n,). ValueError if there are none or the model can't take them."""
    vocabulary, context = public["config"]["vocab_size"], public["config"]["block_size"]
    if s.prompt_ids:
        if not re.fullmatch("[0-9]{1,9}(,[0-9]{1,9})*", s.prompt_ids):
            raise ValueError(f"--prompt_ids must be like 1,2,3, and is {s.prompt_ids!r}")
        ids = [int(i) for i in s.prompt_ids.split(",")]
    elif public["tokenizer"]:
        ids = tokenizer_of(public).encode_ordinary(s.prompt)
    elif s.archs:  # random weights take a random prompt
        length = min(s.prompt_tokens or context, max(1, context + 1 - s.max_new_tokens))
        ids = np.random.default_rng(s.seed).integers(0, vocabulary, length)
    else:
        raise ValueError("this model has no tokenizer for --prompt: give --prompt_ids=1,2,3")
    if not len(ids):
        raise ValueError("the prompt is empty: give --prompt")
    check_length(s, len(ids), context)
    return in_vocabulary(np.array(ids), vocabulary, "the prompt")


def check_length(s, n, context):
    """ValueError unless a prompt of n tokens and the reply that is asked for fit the context."""
    if n > context:
        raise ValueError(f"the prompt has {n} tokens and the model's context is {context}: "
                         "shorten it")
    if n > (s.prompt_tokens or context):
        raise ValueError(f"the prompt has {n} tokens and --prompt_tokens is {s.prompt_tokens}: "
                         "shorten it, or have both sides set more")
    if n + s.max_new_tokens - 1 > context:
        raise ValueError(f"the prompt has {n} tokens, --max_new_tokens is {s.max_new_tokens} and "
                         f"the model's context {context}: {context + 1 - n} would fit")


def in_vocabulary(ids, size, what):
    if ids.max() >= size:
        raise ValueError(f"{what} has token {ids.max()}, outside the model's vocabulary of {size}")
    return ids


def held_out(s, public):
    """(windows, T + 1) token ids, spread over a .bin of uint16 tokens: inputs and targets."""
    path, context = s.windows_file, public["config"]["block_size"]
    try:
        tokens = np.fromfile(path, np.uint16).astype(np.int64)
    except OSError as e:
        raise OSError(f"can't read held-out text for --windows: {e}; give --windows_file") from e
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
    """(public, weights, ids, texts) of a party, None for what isn't its own to hold."""
    weights = ids = texts = None
    if s.role == "server":
        public, weights = load_server(s.private)
        warn_of_readers(os.path.join(s.private, "server.npz"))
    else:
        public = load_public(s.public)
    check_settings(s, public)
    if s.role == "client":
        ids = read_prompt(s, public)
        texts = held_out(s, public) if s.windows else None
        if public["embedding"] != "private":
            weights = load_embedding(os.path.dirname(s.public), public)
    return public, weights, ids, texts


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
def totals(costs):
    """The costs of infer() added up: in all, and by kind of operation."""
    by_kind = {}
    for kind, times, cost in costs:
        by_kind[kind] = by_kind.get(kind, 0) + times * cost
    total = sum(by_kind.values())
    return {
        "bytes_total": int(total[0]),
        "bytes_by_kind": {kind: int(cost[0]) for kind, cost in by_kind.items()},
        "bytes_of_truncations": int(total[3]),
        "rounds": int(total[1]),
        "rounds_by_kind": {kind: int(cost[1]) for kind, cost in by_kind.items()},
        "seconds": float(total[2]),
        "seconds_by_kind": {kind: float(cost[2]) for kind, cost in by_kind.items()},
    }


def all_layers(s, public):
    """Whether the result means something."""
    return not 0 < s.measure_layers < public["config"]["n_layer"]


def in_short(costs, seconds):
    """What one pass cost; its seconds by the clock, programs and weights prepared among them."""
    total = totals(costs)
    return {"bytes": total["bytes_total"], "rounds": total["rounds"], "seconds": total["seconds"],
            "seconds_wall": seconds}


def perplexity(logits, targets):
    """exp of the mean cross-entropy: logits (N, T, V), targets (N, T)."""
    logits = torch.from_numpy(logits).double().flatten(0, 1)
    targets = torch.from_numpy(targets).flatten()
    return torch.nn.functional.cross_entropy(logits, targets).exp().item()


def write_json(path, value):
    write_whole(path, lambda f: f.write(json.dumps(value, indent=1).encode()))


def keep(s, result, revealed, of_windows):
    """Write the client's result, and the revealed logits of a whole model, where asked for."""
    if s.json:
        write_json(s.json, result)
    if s.logits_file and "token" in result and s.reveal == "logits":
        windows = np.array(of_windows, np.float32)
        all_next = np.array(revealed, np.float32)
        write_whole(s.logits_file, lambda f: np.savez(f, next=all_next, windows=windows))


# ------------------------------------------------------------------------------ the run
class Run:
    """
    What has come of a party's run so far, and how its user hears of it. .costs: of all passes; on
    the client also .replies, a JSON object for each prompt, and .revealed, a list for each.
    """

    def __init__(self, s, engine, public):
        self.s, self.engine, self.public = s, engine, public
        self.started = time.time()
        self.costs = []
        self.replies = []
        self.revealed = []
        self.whole = all_layers(s, public)
        self.encoding = tokenizer_of(public) if public["tokenizer"] else None

    def say(self, line, end="\n"):
        print(line, end=end, file=self.engine.terminal, flush=True)

    def told(self, stage, costs):
        megabytes = sum(cost[0] for _, _, cost in self.costs + costs) / 1e6
        self.say(f"{stage:<24} {megabytes:10.1f} MB {time.time() - self.started:8.1f} s")

    def answer(self, weights, ids, chooser):
        """Run one reply to its end, and show it as it comes. ids: the client's, see reply()."""
        s, shown = self.s, ids is not None and self.whole
        mine = {"tokens": [], "text": "", "further": []}
        if ids is not None:
            self.replies.append(mine)
            self.revealed.append([])
        text = Text(self.encoding)
        text.add([] if ids is None else ids)
        began = time.time()
        for token, revealed, costs in reply(self.engine, self.public, weights, ids, chooser, s,
                                            self.told):
            self.costs += costs
            spent = in_short(costs, time.time() - began)
            began = time.time()
            if "prefill" in mine:
                mine["further"].append(spent)
            else:
                mine["prefill"] = spent
            if shown:
                self.show(mine, text, token)
                self.revealed[-1].append(revealed)
            elif mine["further"]:
                self.told(f"token {1 + len(mine['further'])}/{s.max_new_tokens}", [])
        if shown and s.max_new_tokens > 1:
            self.say("")

    def show(self, mine, text, token):
        """A token more of the client's reply: the first ends a line that shows the prompt."""
        before = text.whole
        if self.s.max_new_tokens == 1:
            self.say(f"next token: {token} {self.piece(token)}")
        elif not mine["tokens"]:
            self.say(before, end="")
        mine["tokens"].append(token)
        more = text.add([token])
        mine["text"] += more
        if self.s.max_new_tokens > 1:
            self.say(more, end="")

    def piece(self, token):
        """A token's text as Python writes it, or "" if it is padding of V."""
        if self.encoding is None or token >= self.encoding.n_vocab:
            return ""
        return repr(self.encoding.decode([token]))

    def result(self):
        """What the run has cost and, if all layers were run, the replies."""
        layers = self.public["config"]["n_layer"]
        result = totals(self.costs) | {"seconds_wall": time.time() - self.started}
        result["measured_layers"] = layers if self.whole else self.s.measure_layers
        if self.whole:
            result["token"] = self.replies[0]["tokens"][0]
        if self.s.max_new_tokens > 1 or len(self.replies) > 1:
            result["replies"] = self.replies
        return result


def one_party(s):
    """Meet, compute, tell. The client prints the reply and writes its result."""
    rank = ROLES.index(s.role)
    public, weights, ids, texts = load_own(s)
    addresses = s.peer.split(",")
    addresses.insert(rank, s.listen)
    listen_at(*host_port(s.listen, "--listen")).close()  # SPU has no words for a port that is taken
    session, farewell = greet(rank, addresses, agreement(s, public), s.connect_timeout, s.timeout,
                              s.tls)
    engine = Engine(rank, addresses, s.protocol, STEP * s.timeout, s.connect_timeout / 2, s.tls,
                    s.plain, session)
    engine.terminal.reconfigure(errors="backslashreplace")
    run = Run(s, engine, public)
    set_up(engine)
    run.costs += engine.costs
    run.told("set-up", [])
    chooser = Chooser(s, public["tokenizer"])
    of_windows = []
    for prompt in questions(engine, [ids]):
        run.answer(weights, prompt, chooser)
        if s.role == "client":
            result = run.result()
            keep(s, result, run.revealed[0], of_windows)  # a window may fail yet
    for i in range(s.windows):
        def told_of_window(stage, costs, name=f"window {i + 1}/{s.windows}, "):
            run.told(name + stage, costs)

        text = None if texts is None else texts[i, :-1]
        logits, _ = infer(engine, public, weights, text, told_of_window, every_row=True)
        of_windows.append(logits)
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
        keep(s, result, run.revealed[0], of_windows)


def end_at_once_on_signals():
    """
    Ctrl-C, SIGTERM and SIGHUP end this process with a line even while C++ is at work in the main
    thread, where Python's own handlers would wait for the end of the step.
    """
    came, wakeup = socket.socketpair()
    wakeup.setblocking(False)
    signal.set_wakeup_fd(wakeup.detach())
    on_signals(lambda number, frame: None)

    def wait():
        number = came.recv(1)[0]
        end_now(f"stopped by {signal.Signals(number).name}", 128 + number)

    threading.Thread(target=wait, daemon=True).start()


def run_party(s):
    """one_party() as all that is left of this process, which ends here: with status 0 or a line."""
    end_at_once_on_signals()
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
