"""
A reply to a prompt, token by token: which token it is, whether another follows, the text so far.

The client chooses each token from what is revealed, alone, and tells the others one bit: whether it
wants another. They learn the number of tokens by that, and nothing of what they are.
"""
import codecs

import torch

from model import choose
from private.engine import CLIENT
from private.infer import Cache, infer, infer_next


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


def reply(engine, public, weights, ids, chooser, s, told):
    """
    The tokens behind the prompt ids, at most s.max_new_tokens, as they come: yields (token,
    revealed, costs) of each pass, on the client; None for the first two on the others. s has
    bench_spu.py's settings; told: see infer(); all else as of infer().
    """
    client = engine.rank == CLIENT
    most, padded_to = s.max_new_tokens, s.prompt_tokens or public["config"]["block_size"]
    cache = None
    if most > 1:
        cache = Cache(padded_to, len(ids) if client else None, room=most - 1)
    revealed, costs = infer(engine, public, weights, ids, told, s.measure_layers, s.reveal,
                            padded_to=padded_to, cache=cache)
    for left in range(most - 1, -1, -1):
        token = chooser.choose(revealed) if client else None
        yield token, revealed, costs
        if not left or not goes_on(engine, client and token not in chooser.ends):
            return
        revealed, costs = infer_next(engine, public, weights, token, cache, s.measure_layers,
                                     s.reveal)


class Chooser:
    """The client's choice of tokens, and which of them end a text. tokenizer: public.json's."""

    def __init__(self, s, tokenizer):
        self.s = s
        self.ends = set(tokenizer["special"].values()) if tokenizer else set()
        self.generator = torch.Generator().manual_seed(s.seed)

    def choose(self, revealed):
        """The next token. revealed: logits (V,), or the token itself."""
        if self.s.reveal == "token":
            return int(revealed)
        logits = torch.from_numpy(revealed).float()[None]
        return int(choose(logits, self.s.temperature, self.s.top_k, self.generator))


class Text:
    """Tokens as text, as they come: a character of several may be whole only with the last."""

    def __init__(self, encoding):
        self.encoding = encoding
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.whole = ""

    def add(self, tokens):
        """What these tokens add. Those that the encoding lacks, padding of V, have no text."""
        if self.encoding is None:
            more = "".join(f"{token} " for token in tokens)
        else:
            known = [token for token in tokens if token < self.encoding.n_vocab]
            more = self.decoder.decode(self.encoding.decode_bytes(known))
        self.whole += more
        return more
