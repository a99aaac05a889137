"""
Replies to the client's prompts, token by token, and what they cost.

The client chooses each token from what is revealed, alone, and tells the others one bit: whether it
wants another pass. They learn the number of passes by that, and nothing of the tokens.
"""
import codecs
import time

import numpy as np
import torch

from model import choose
from private.embed import silent
from private.engine import CLIENT
from private.further import Seats
from private.infer import Cache, infer, infer_next, make_ahead


FEW = 4  # passes that rows are made ahead for, where guesses were wrong


def tokenizer_of(public):
    from data.tokenizer import load_tokenizer
    return load_tokenizer(public["tokenizer"])


def goes_on(engine, wanted=None):
    """Whether the client wants to go on, which it says, and all others hear."""
    if engine.rank != CLIENT:
        return int(engine.link.recv(CLIENT)) == 1
    for rank in range(1, engine.size):
        engine.link.send(rank, str(int(wanted)))
    return wanted


def questions(engine, prompts):
    """
    The client's prompts, one after the other; on the others, who hear only that there is one, None
    for each.
    """
    if engine.rank != CLIENT:
        while goes_on(engine):
            yield None
        return
    for ids in prompts:
        goes_on(engine, True)
        yield ids
    goes_on(engine, False)


def padding(s, public):
    """How many tokens a prompt is padded to."""
    return s.prompt_tokens or public["config"]["block_size"]


def rows_for(s, passes=0):
    """
    How many further rows to make ahead for a reply of so many passes yet: at first those of all
    passes if every guess is right, and then of FEW more.
    """
    k = 1 + s.guesses
    if passes:
        return k * min(FEW, s.max_new_tokens - passes)
    return k * -(-(s.max_new_tokens - 1) // k)


def reply(engine, public, weights, ids, s, chooser, told, ahead, more):
    """
    The tokens behind the prompt ids, at most s.max_new_tokens, as they come: yields (tokens,
    revealed, costs) of each pass, on the client, a row revealed for each token; None for the first
    two on the others. s has bench_spu.py's settings; told: see infer(); ahead: of make_ahead(), or
    None, and more(rows) makes more of it; all else as of infer().

    A pass behind the first takes the last token, and guesses of those after it. A row's token, as
    the client chooses it, is the model's own, whether it was guessed or not; where it wasn't, the
    rows behind are of a text that isn't, and are dropped.
    """
    client = engine.rank == CLIENT
    most, padded_to, k = s.max_new_tokens, padding(s, public), 1 + s.guesses
    cache, layers = None, s.measure_layers
    if most > 1:
        room = (most - 1) * k
        seats = Seats(len(ids), padded_to, room, public["config"]["block_size"]) if client else None
        cache = Cache(seats, padded_to, room)
    revealed, costs = infer(engine, public, weights, ids, told, layers, s.reveal,
                            padded_to=padded_to, cache=cache, ahead=ahead if s.ahead else None)
    tokens = [chooser.choose(revealed)] if client else None
    text = [*ids, *tokens] if client else None
    yield tokens, [revealed], costs
    passes = 1
    while passes < most:
        wanted = client and len(ids) + most - len(text)
        if not goes_on(engine, client and wanted > 0 and text[-1] not in chooser.ends):
            return
        if ahead and ahead["head"].left() < k:
            more(rows_for(s, passes))
        guessed = chooser.guess(text, s.guesses) if client else None
        fed = np.array([text[-1], *guessed]) if client else None
        revealed, costs = infer_next(engine, public, weights, k, fed, cache, layers, s.reveal,
                                     ahead)
        if client:
            tokens = chooser.follow(revealed[:wanted], guessed)
            cache.seats.drop(k - len(tokens))
            text += tokens
        yield tokens, None if revealed is None else revealed[:len(tokens)], costs
        passes += 1


class Chooser:
    """
    The client's choice of tokens, and which of them end a text. draft: a GPT of the client's that
    guesses, or None.
    """

    def __init__(self, s, tokenizer, draft=None):
        self.s = s
        self.draft = draft
        self.ends = set(tokenizer["special"].values()) if tokenizer else set()
        self.generator = torch.Generator().manual_seed(s.seed)

    def choose(self, revealed):
        """The next token. revealed: logits (V,), or the token itself."""
        if self.s.reveal == "token":
            return int(revealed)
        logits = torch.from_numpy(revealed).float()[None]
        return int(choose(logits, self.s.temperature, self.s.top_k, self.generator))

    def follow(self, revealed, guessed):
        """The tokens of a pass: of its rows up to the first that another was guessed to follow."""
        tokens = []
        for row, guess in zip(revealed, [*guessed, None]):
            tokens.append(self.choose(row))
            if tokens[-1] != guess or guess in self.ends:
                break
        return tokens

    def guess(self, text, n):
        """n tokens that the draft finds likeliest behind a text."""
        if not n:
            return []
        return self.draft.generate(torch.tensor([text]), n, temperature=0)[0, len(text):].tolist()


class Text:
    """Tokens as text, as they come: a character of several may be whole only with the last."""

    def __init__(self, encoding):
        self.encoding = encoding
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def more(self, tokens):
        """What these tokens add. Those that the encoding lacks, padding of V, have no text."""
        if self.encoding is None:
            return "".join(f" {token}" for token in tokens)
        known = [token for token in tokens if token < self.encoding.n_vocab]
        return self.decoder.decode(self.encoding.decode_bytes(known))


# ------------------------------------------------------------------------------------ what it costs
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


class Run:
    """
    What has come of a party's run so far, and how its user hears of it. On the client .replies has
    a JSON object for each prompt, and .revealed what was revealed, of all tokens of all replies.
    """

    def __init__(self, s, engine, public, weights, draft=None):
        self.s, self.engine, self.public, self.weights = s, engine, public, weights
        self.started = self.before = time.time()
        self.costs = []
        self.replies = []
        self.revealed = []
        self.layers = public["config"]["n_layer"]
        self.whole = not 0 < s.measure_layers < self.layers
        self.encoding = tokenizer_of(public) if public["tokenizer"] else None
        self.chooser = Chooser(s, public["tokenizer"], draft)
        self.ahead = {} if engine.forms else None  # as the other protocols have other shares

    def say(self, line, end="\n"):
        print(line, end=end, file=self.engine.terminal, flush=True)

    def told(self, stage, costs):
        """Say how far a pass with these costs has come. A server of many says a line for each."""
        if not self.s.serve:
            megabytes = sum(cost[0] for _, _, cost in self.costs + costs) / 1e6
            self.say(f"{stage:<24} {megabytes:10.1f} MB {time.time() - self.started:8.1f} s")

    def spent(self, costs, stage=""):
        """
        Enter a pass's costs, and say so. Returns them in short: "seconds" are those of its
        operations, "seconds_wall" by the clock, with programs compiled and weights prepared.
        """
        self.costs += costs
        began, self.before = self.before, time.time()
        if stage:
            self.told(stage, [])
        total = totals(costs)
        return {"bytes": total["bytes_total"], "rounds": total["rounds"],
                "seconds": total["seconds"], "seconds_wall": self.before - began,
                "bytes_by_kind": total["bytes_by_kind"],
                "seconds_by_kind": total["seconds_by_kind"]}

    def make(self, further, prompt=0, told=silent):
        """make_ahead(), and enter what it cost beside the passes of the reply."""
        costs = make_ahead(self.engine, self.public, self.weights, self.ahead, prompt, further,
                           told, self.s.measure_layers)
        made = self.replies[-1].setdefault("prompt_ahead" if prompt else "ahead", [])
        made.append(self.spent(costs))

    def answer(self, ids):
        """Run one reply to its end. ids: the client's prompt, who sees the text as it comes."""
        most, ends = self.s.max_new_tokens, self.chooser.ends
        shown = ids is not None and self.whole
        text = Text(self.encoding)
        mine = {"tokens": [], "text": "", "passes": []}
        self.replies.append(mine)
        self.before = time.time()
        if self.ahead is not None and most > 1:
            self.make(rows_for(self.s), told=self.told)
        if self.s.ahead:
            self.make(rows_for(self.s), padding(self.s, self.public), self.told)
        for tokens, revealed, costs in reply(self.engine, self.public, self.weights, ids, self.s,
                                             self.chooser, self.told, self.ahead, self.make):
            n = len(mine["passes"]) + 1
            mine["passes"].append(self.spent(costs, "" if shown or n == 1 else f"pass {n}"))
            if ids is not None:
                mine["passes"][-1]["tokens"] = len(tokens)
            if shown:
                prompt = text.more(ids) if n == 1 else ""
                more = text.more([token for token in tokens if token not in ends])
                mine["tokens"] += tokens
                mine["text"] += more
                self.revealed += list(revealed)
                self.say(prompt + more if most > 1 else self.next_token(tokens[0]), end="")
        if shown:
            self.say("")

    def next_token(self, token):
        """A line, but for its end, about the only token of a reply."""
        known = self.encoding and token < self.encoding.n_vocab  # else it is padding of V
        return f"next token: {token} {repr(self.encoding.decode([token])) if known else ''}"

    def result(self):
        """The client's: what the run has cost and, if all layers were run, the replies."""
        result = totals(self.costs) | {"seconds_wall": time.time() - self.started}
        result["measured_layers"] = self.layers if self.whole else self.s.measure_layers
        if self.whole:
            result["token"] = self.replies[0]["tokens"][0]
        if self.s.max_new_tokens > 1 or len(self.replies) > 1 or self.s.ahead:
            result["replies"] = self.replies
        return result

    def summary(self):
        """A line of a server's about one client."""
        passes = sum(len(reply["passes"]) for reply in self.replies)
        return (f"served {len(self.replies)} prompts, {passes} passes: "
                f"{totals(self.costs)['bytes_total'] / 1e6:.1f} MB, "
                f"{time.time() - self.started:.1f} s")
