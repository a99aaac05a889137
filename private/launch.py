"""
Role both of bench_spu.py: every party as a process of its own on this machine, with only its own
secret; then the result beside the model's in the clear.
"""
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import numpy as np
import torch

from configurator import on_signals
from pi_export import export, held_out, write
from private.files import load_public, load_server
from private.meet import ROLES, end_now, free_addresses, host_port, listen_at
from private.party import (HERE, check_settings, held_out_windows, load_draft, perplexity,
                           read_prompts)
from private.plain import plain_export
from private.relay import relay

PAUSE = 1  # seconds after a run that failed, which the next may do as well
GRACE = 5  # seconds that the other parties have to say that one failed
PARTIES = []


@contextmanager
def secret_folder():
    """
    A temporary folder that ends with this process, even by kill -9: a shell in a session of its own
    waits for the end of its stdin, and then removes the folder.
    """
    folder = tempfile.mkdtemp(prefix="private-")
    script = 'trap "" HUP INT TERM; cat > /dev/null; rm -rf "$0"'
    remover = subprocess.Popen(["sh", "-c", script, folder], stdin=subprocess.PIPE,
                               start_new_session=True)
    try:
        yield folder
    finally:
        remover.communicate()


def start_party(s, role, **own):
    """
    Start a party with the settings `s` and its own. They come by its stdin, a pipe whose other end
    ends with this process, and the party with it. A session of its own leaves Ctrl-C to us.
    """
    party = subprocess.Popen([sys.executable, HERE / "private" / "party.py", role], text=True,
                             stdin=subprocess.PIPE, start_new_session=True,
                             stdout=None if role == "client" or s.serve else subprocess.DEVNULL)
    PARTIES.append(party)
    with suppress(BrokenPipeError):  # it has died already, which why_failed() notices
        party.stdin.write(json.dumps(vars(s) | own | {"role": role}) + "\n")
        party.stdin.flush()


def end_parties():
    while PARTIES:
        party = PARTIES.pop()
        party.kill()
        party.wait()


def end_all(number, frame, mid_line=False):
    """A signal's handler: the parties end first, so that ours is the only line."""
    for party in PARTIES:
        party.kill()
    end_now(f"stopped by {signal.Signals(number).name}", 128 + number, mid_line)


def serve_clients(s):
    """
    Role server with --serve: one client after the other, until a signal ends it. Each has a process
    of its own here, which ends with it, so that nothing of a client is left for the next. Raises
    what load_server(), check_settings() and listen_at() raise; what goes wrong later is a line, and
    the next is served.
    """
    on_signals(end_all)
    public, _ = load_server(s.private)
    check_settings(s, public)
    listen_at(*host_port(s.listen, "--listen")).close()
    while True:
        start_party(s, "server")
        failed = PARTIES[0].wait()
        PARTIES.clear()
        if failed:
            time.sleep(PAUSE)


def why_failed(roles):
    """Wait for the parties. "" if all ended well, else a sentence about one that didn't."""
    while any(p.poll() is None for p in PARTIES) and not any(p.poll() for p in PARTIES):
        time.sleep(0.1)
    failed = [(party.poll(), role) for role, party in zip(roles, PARTIES) if party.poll()]
    deadline = time.monotonic() + GRACE
    for party in PARTIES:  # the others notice by themselves, and say so
        with suppress(subprocess.TimeoutExpired):
            party.wait(timeout=max(0, deadline - time.monotonic()))
    if not failed:
        return ""
    status, role = min(failed)  # a signal's status, which is negative, is the better reason
    if status < 0:
        return f"the private run failed: the {role} was killed by {signal.Signals(-status).name}"
    return f"the private run failed, see above: the {role} ended with status {status}"


def run_parties(s, own):
    """
    Run a party of each role with the settings `s` and what is in `own`. Returns (why it failed or
    "", bytes that passed the relay or None).
    """
    roles = ROLES[:3 if s.protocol == "aby3" else 2]
    addresses = free_addresses(2 * len(roles))
    listens, fronts = addresses[:len(roles)], addresses[len(roles):]
    with ExitStack() as stack:
        seen, pipes = listens, []
        if s.network != "none":
            ends = [host_port(address, "an address") for address in addresses]
            seen, pipes = fronts, stack.enter_context(relay(s.network, *ends))
        stack.callback(end_parties)
        for rank, role in enumerate(roles):
            peer = ",".join(seen[:rank] + seen[rank + 1:])
            start_party(s, role, listen=listens[rank], peer=peer, **own[role])
        return why_failed(roles), sum(pipe.bytes for pipe in pipes) if pipes else None


def private_run(s, model, tokenizer):
    """
    Export the model, run every party, and compare with the model in the clear. Returns the client's
    result; if a window failed when the next token was there, with a sentence as "failed".
    """
    on_signals(partial(end_all, mid_line=s.max_new_tokens > 1))
    with secret_folder() as folder:
        server, result_file = os.path.join(folder, "server"), os.path.join(folder, "result.json")
        public_file = os.path.join(server, "public.json")
        logits_file = s.logits_file or os.path.join(folder, "logits.npz")
        write(model, tokenizer, server, plain_export if s.plain else export, s.embedding,
              text=held_out(s.windows_file), pairs=s.pairs)
        public = load_public(public_file)
        check_settings(s, public)
        prompts = read_prompts(s, public)
        load_draft(s, public)  # which the client uses: what is wrong with it is said here
        texts = held_out_windows(s, public) if s.windows else None
        prompt_ids = ";".join(",".join(map(str, ids)) for ids in prompts)
        failed, bytes_tcp = run_parties(s, {
            "client": {"public": public_file, "prompt_ids": prompt_ids,
                       "json": result_file, "logits_file": logits_file},
            "server": {"private": server},
            "helper": {"public": public_file},
        })
        if failed and not os.path.exists(result_file):
            raise RuntimeError(failed)
        with open(result_file) as f:
            result = json.load(f)
        if failed:
            return result | {"failed": failed}
        if bytes_tcp:
            result["bytes_tcp"] = bytes_tcp
        if "token" in result:
            secure = np.load(logits_file) if s.reveal == "logits" else None
            replies = result.get("replies", [{"tokens": [result["token"]]}])
            result |= beside_plain(model, prompts, replies, texts, secure)
        return result


@torch.no_grad()
def beside_plain(model, prompts, replies, texts, secure):
    """
    How far the revealed logits, "next" (n, V) of all tokens of the replies and "windows" (N, T, V),
    are from the model's; and the tokens that are likeliest in the clear, each after those before.
    """
    clear = []
    for ids, reply in zip(prompts, replies):
        fed = torch.tensor([*ids, *reply["tokens"][:-1]])
        clear.append(model(fed[None])[0][0, len(ids) - 1:].numpy())
    clear = np.concatenate(clear)                                              # (n, V)
    result = {"plain_token": int(clear[0].argmax()), "plain_tokens": clear.argmax(-1).tolist()}
    if secure is None:
        return result
    errors = [np.abs(secure["next"] - clear).max()]
    if texts is not None:
        clear, windows = model(torch.from_numpy(texts[:, :-1]))[0].numpy(), secure["windows"]
        errors.append(np.abs(windows - clear).max())
        result["plain_perplexity"] = perplexity(clear, texts[:, 1:])
        result["top1_agreement"] = float((clear.argmax(-1) == windows.argmax(-1)).mean())
    return result | {"max_abs_err": float(max(errors))}
