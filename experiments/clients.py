"""
One server and a line of clients, of which some die and some are strangers: does it go on, and grow?

    python experiments/clients.py --json=results/private_clients.json      # 20 clients, minutes

A toy model of random weights, served by `bench_spu.py --role=server --serve=True`. Clients come one
after another, each with a prompt of its own, and want a reply of some tokens. Some are killed at a
random moment; before some, strangers knock: one that sends what isn't ours, one that says nothing
and stays. The replies that come are compared with the model in the clear; after every client the
memory of the server's waiting process is noted, and how many processes it has.
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
from configurator import configure, die, end_on_signals, on_signals, within  # noqa: E402

end_on_signals()

import random  # noqa: E402
import signal  # noqa: E402
import socket  # noqa: E402
import subprocess  # noqa: E402
import time  # noqa: E402
from json import dumps, loads  # noqa: E402
from tempfile import TemporaryDirectory  # noqa: E402

import torch  # noqa: E402

from draw import write_whole  # noqa: E402
from machine import machine_and_commit  # noqa: E402
from model import GPT, GPTConfig, save_checkpoint  # noqa: E402
from private.meet import free_addresses  # noqa: E402

json = ""  # write what was seen here as well
clients = 20  # how many come
killed = 3  # so many of these die at a random moment
strangers = 2  # who knock, each before another client
tokens = 2  # of a reply
seed = 0  # of prompts, weights and moments

PROMPT = 5  # tokens
TIE = 0.02   # nats, an error of a private logit
MODEL = GPTConfig(block_size=16, vocab_size=300, n_layer=2, n_head=2, n_embd=32,
                  use_layernorm=False, use_gelu=False, fuse_ffn=True, learnable_ffn_scale=True)
FASTEST = 8.0  # seconds that a client takes, until one has told


def toy(folder):
    """A model of random weights large enough to have opinions, exported for the server."""
    torch.manual_seed(seed)
    model = GPT(MODEL).eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    save_checkpoint(str(folder / "ckpt.pt"), model)
    subprocess.run([sys.executable, "pi_export.py", f"--ckpt={folder / 'ckpt.pt'}",
                    f"--out={folder / 'server'}"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return model


def bench_spu(*flags, **files):
    return subprocess.Popen([sys.executable, "bench_spu.py", *flags], cwd=ROOT, **files)


def knock(address, number):
    """A stranger at the port where parties greet: the first sends rubbish, the others nothing."""
    host, port = address.split(":")
    for _ in range(60):  # the server's next process may still be starting
        try:
            connection = socket.create_connection((host, int(port) + 1), timeout=10)
            break
        except ConnectionRefusedError:
            time.sleep(0.5)
    else:
        die(f"nobody listens on {host}:{int(port) + 1}")
    if number == 0:
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
    return connection


def memory_and_children(pid):
    """Bytes that a process holds, and how many processes it has started that are alive."""
    with open(f"/proc/{pid}/status") as f:
        told = dict(line.split(":", 1) for line in f)
    with open(f"/proc/{pid}/task/{pid}/children") as f:
        return int(told["VmRSS"].split()[0]) * 1024, len(f.read().split())


def is_greedy(model, prompt, reply):
    """Whether each token of the reply is the likeliest in the clear, or within TIE nats of it."""
    logits = model(torch.tensor([prompt + reply[:-1]]))[0][0, PROMPT - 1:]     # (tokens, V)
    chosen = logits.gather(1, torch.tensor(reply)[:, None])[:, 0]              # (tokens,)
    return bool((chosen >= logits.amax(1) - TIE).all())


def one_client(folder, listens, model, chance, dies):
    """
    Start a client, and wait for its reply, or kill it after `dies` seconds where that isn't 0: what
    there is to say of it.
    """
    prompt = [chance.randrange(MODEL.vocab_size) for _ in range(PROMPT)]
    started, told = time.time(), folder / "client.json"
    told.unlink(missing_ok=True)
    client = bench_spu("--role=client", f"--public={folder / 'server' / 'public.json'}",
                       f"--listen={listens[0]}", f"--peer={listens[1]}", f"--json={told}",
                       f"--prompt_ids={','.join(map(str, prompt))}", f"--max_new_tokens={tokens}",
                       "--connect_timeout=60", stdout=subprocess.DEVNULL)
    try:
        if dies:
            time.sleep(dies)
        else:
            client.wait()
    finally:
        client.kill()  # which does nothing to one that has ended
    status = client.wait()
    row = {"killed": bool(dies), "status": status, "seconds": time.time() - started}
    if not dies and status == 0:
        reply = loads(told.read_text())
        found = reply["replies"][0]["tokens"] if "replies" in reply else [reply["token"]]
        row |= {"bytes": reply["bytes_total"], "right": is_greedy(model, prompt, found)}
    return row


def serve_all(folder, model):
    """(rows, one for each client; what the server said; its status after Ctrl-C)."""
    chance = random.Random(seed)
    doomed = set(chance.sample(range(clients), killed))
    visited = chance.sample(range(clients), strangers)
    listens, rows, guests = free_addresses(2), [], []
    with open(folder / "server.log", "w") as f:
        server = bench_spu("--role=server", f"--private={folder / 'server'}", "--serve=True",
                           f"--listen={listens[1]}", f"--peer={listens[0]}", "--timeout=20",
                           f"--max_new_tokens={tokens}", stdout=f, stderr=subprocess.STDOUT)
    try:
        time.sleep(10)  # until it listens
        for i in range(clients):
            if i in visited:
                guests.append(knock(listens[1], visited.index(i)))
            fastest = min([row["seconds"] for row in rows if not row["killed"]], default=FASTEST)
            dies = chance.uniform(0, fastest) if i in doomed else 0
            row = one_client(folder, listens, model, chance, dies)
            if server.poll() is not None:
                said = (folder / "server.log").read_text().strip().splitlines()[-1:]
                die(f"the server ended with status {server.poll()}: {''.join(said)}")
            row["stranger"] = i in visited
            row["memory_bytes"], row["processes"] = memory_and_children(server.pid)
            rows.append(row)
            print(f"client {i + 1:>2}: {row}", flush=True)
    finally:
        server.send_signal(signal.SIGINT)
        status = server.wait()
    return rows, (folder / "server.log").read_text(), status


def main():
    configure(globals())
    within(globals(), clients=(1, 10**4), tokens=(1, MODEL.block_size - PROMPT),
           killed=(0, clients), strangers=(0, clients))
    on_signals(lambda number, frame: sys.exit(128 + number))  # so that server and client end, too
    with TemporaryDirectory() as name:
        folder = Path(name)
        rows, said, status = serve_all(folder, toy(folder))
    served = [row for row in rows if not row["killed"]]
    right = sum(row.get("right", False) for row in served)
    memory = [row["memory_bytes"] / 1e6 for row in rows]
    print(f"{right} of {len(served)} replies right; {killed} killed, {strangers} strangers; the "
          f"server's waiting process held {memory[0]:.0f} MB after the first client and "
          f"{memory[-1]:.0f} after the last; its status after Ctrl-C: {status}")
    made = {"made": machine_and_commit(), "rows": rows, "server_said": said.splitlines(),
            "server_status": status}
    if json:
        try:
            write_whole(json, dumps(made, indent=1).encode())
        except OSError as e:
            die(e)
    if right < len(served):
        die(f"{len(served) - right} of {len(served)} clients got no reply, or a wrong one")


if __name__ == "__main__":
    main()
