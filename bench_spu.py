"""
Run a model privately between two parties with SecretFlow SPU (two-party Cheetah): the client holds
a prompt, the server the weights, and the client alone learns the logits of the next token, or of
as many as its reply shall have. Then say what it cost, as the paper's tables do. Both parties on
this machine, a process each:

    python bench_spu.py --ckpt=out/ckpt.pt --prompt="def add(a, b):"
    python bench_spu.py --ckpt=out/ckpt.pt --prompt="def add(a, b):" --max_new_tokens=20
    python bench_spu.py --archs=sm_ln_g,sm_ln_r,sm_scfuffn     # the paper's Table 2, random weights
    python bench_spu.py --archs=sm_ln_g,sm_scfuffn --n_layer=2 --n_embd=64 --n_head=2 \\
                        --vocab_size=512 --network=wan         # a toy, on a slow link
    python bench_spu.py --ckpt=out/ckpt.pt --windows=2         # and how far it is from plain
    python bench_spu.py --from_json=results/private_table2.json --chart=table2.png

On two machines, after `python pi_export.py` on the server's, with its public.json on the client's:

    python bench_spu.py --role=server --private=out/private --listen=0.0.0.0:9000 --peer=CLIENT:9000
    python bench_spu.py --role=client --public=public.json --prompt="def add(a, b):" \\
                        --listen=0.0.0.0:9000 --peer=SERVER:9000

Each side listens on PORT for SPU's link. The server also listens on PORT + 1, where they greet,
agree on model and code and notice each other's end. With --protocol=aby3 a third party runs
--role=helper, and --peer names the two others in the order client, server, helper. Semi-honest
security: all follow the protocol. The server learns nothing of the prompt but that it fits the
context, and of the reply its number of passes. The client learns the result, and what public.json
says: the architecture, the tokenizer; and the embeddings, if the server exported with
--embedding=public.

Exit status 0; 1 with a line on each side that says what went wrong; 2 for a bad setting; 130, 143
or 129 after Ctrl-C, SIGTERM or SIGHUP.
"""
from configurator import configure, die, end_on_signals, one_of, setting_names, within

end_on_signals()

import os  # noqa: E402
import platform  # noqa: E402
from glob import glob  # noqa: E402
from importlib.util import find_spec  # noqa: E402
from json import load  # noqa: E402
from types import SimpleNamespace  # noqa: E402

from private.meet import host_port, quit_now, tls_context, warn_of_readers  # noqa: E402
from private.relay import NETWORKS  # noqa: E402

role = "both"            # both (all parties, on this machine) | client | server | helper (of aby3)
ckpt = ""                # role both: a checkpoint; the newest one under out/ if empty and no archs
archs = ""               # role both: config files of config/, comma-separated, with random weights
prompt = "def add(a, b):"  # the client's secret
prompt_ids = ""          # or its token ids, such as 1,2,3, for a model without a tokenizer
prompts = ""             # or a text file, a prompt on each line: one after the other
max_new_tokens = 1       # how many tokens the reply may have: the parties know
prompt_tokens = 0        # how many the prompt is padded to: the parties know; 0: the context
guesses = 0              # tokens behind the known one that a pass scores as well: the parties know
draft = ""               # client: a checkpoint that guesses them, of the same tokenizer
ahead = False            # make the prompt's products by weights before asking: sooner answered
temperature = 0.0        # of the client's choice among revealed logits; 0: the most likely token
top_k = 0                # and that among so many of the likeliest; 0: all
embedding = "private"    # role both: private | public (the client has them, see pi_export.py)
pairs = True             # role both: multiply two numbers in one, see pi_export.py
reveal = "logits"        # what the client learns: logits, or only the most likely token
windows = 0              # also compare secure with plain on so many windows of held-out text
windows_file = ""        # client: the .bin of uint16 tokens they are cut from; both: else val.bin
private = "out/private"  # server: folder of server.npz and public.json
public = ""              # client, helper: public.json
serve = False            # server: one client after the other, until Ctrl-C
listen = ""              # one role: HOST:PORT where this party listens
peer = ""                # one role: HOST:PORT where the other listens
tls = ""                 # folder with ca.pem, cert.pem and key.pem: encrypt, and know the peer
protocol = "cheetah"     # cheetah | semi2k (no secrecy from the client) | aby3 (three parties)
network = "none"         # role both: none | lan | wan, the line between the processes, see relay.py
measure_layers = 0       # > 0: run so many of a kind and the last, and multiply; means nothing
plain = False            # as one would write it first: jax.nn, SPU's defaults, shared weights
baseline = False         # role both: each model with --plain first, and the ratio
json = ""                # write the results: a list of objects, or the client's own result
logits_file = ""         # write all revealed logits as .npz; of several models, the last one's
chart = ""               # role both: draw the bytes by kind of operation as a PNG
from_json = ""           # run nothing: the table, and the chart, of an earlier run's --json
timeout = 600            # seconds without a sign of life from another party before giving up
connect_timeout = 20     # seconds to wait for the other party, and half of that for the link
# with --archs, the model: any key of GPTConfig; the paper's GPT-2 small
block_size = 128
vocab_size = 50257
n_layer = 12
n_head = 12
n_embd = 768
final_layernorm = True   # LN before the vocabulary, one row
temperature_init = 1.0   # of the architectures with learnable temperatures
bias = False             # biases in every linear layer
gelu_tanh = False        # GPT-2's tanh GELU
uniform_layers = 0       # first layers whose heads average, without softmax
positional_layers = 0    # the next ones, which attend by position alone
seed = 1337

DAY = 24 * 3600
BOUNDS = {  # least and most
    "timeout": (5, DAY), "connect_timeout": (1, DAY), "measure_layers": (0, 1000),
    "max_new_tokens": (1, 2**16), "prompt_tokens": (0, 2**16), "guesses": (0, 2**10),
    "temperature": (0, 1e6), "top_k": (0, 2**24), "windows": (0, 10000), "seed": (0, 2**63 - 1),
    "n_layer": (1, 1000), "n_head": (1, 1000),
    "n_embd": (1, 2**16), "block_size": (1, 2**16), "vocab_size": (1, 2**20),
}
MODEL = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "final_layernorm",
         "temperature_init", "bias", "gelu_tanh", "uniform_layers", "positional_layers")
ROLE_BOTH = ("ckpt", "archs", "pairs", "network", "baseline", "chart", "from_json")
PATHS = ("private", "public", "draft", "prompts", "windows_file", "tls", "json", "logits_file",
         "chart", "from_json")
RESULT = {"arch", "n_layer", "protocol", "bytes_total", "bytes_by_kind", "measured_layers"}
HERE = os.path.dirname(os.path.abspath(__file__))


# --------------------------------------------------------------------------------- what is run
def settings():
    return SimpleNamespace(**{key: globals()[key] for key in setting_names(globals())})


def from_checkpoint():
    """(model, tokenizer or None, held-out text) of the checkpoint asked for or the newest one."""
    from model import GPT, load_checkpoint
    from pi_export import held_out_file
    everywhere = sorted(glob("out/**/ckpt.pt", recursive=True), key=os.path.getmtime)
    found = [ckpt] if ckpt else everywhere[-1:]
    if not found:
        die("no checkpoint under out/: train one with python train.py, or give --ckpt or --archs")
    checkpoint = load_checkpoint(found[0])
    text = windows_file or held_out_file(checkpoint)
    return GPT.from_checkpoint(checkpoint), checkpoint.get("tokenizer"), text


def read_config(name, given):
    """The GPTConfig of the settings here, a file of config/, and `given` ones, in this order."""
    from model import GPTConfig
    flags = {}
    with open(os.path.join(HERE, "config", name + ".py")) as f:
        exec(f.read(), {}, flags)
    keys = GPTConfig.__dataclass_fields__
    try:
        values = globals() | flags | given
        return GPTConfig(**{key: values[key] for key in keys if key in values})
    except ValueError as e:
        die(e, 2)


def from_configs(given):
    """(model, None, "") of each architecture asked for, its weights random and seeded."""
    import torch
    from model import GPT
    configs = [read_config(name, given) for name in archs.split(",")]  # before the first is run
    for config in configs:
        torch.manual_seed(seed)
        yield GPT(config).eval(), None, ""


def run_all(given):
    """Run every model that is asked for, and yield its result as --json has it."""
    from private.launch import private_run
    s = settings()
    models = from_configs(given) if archs else [from_checkpoint()]
    for model, tokenizer, s.windows_file in models:
        for s.plain in (True, False) if baseline else (plain,):
            name = model.config.name + (" plain" if s.plain else "")
            print(f"--- {name}", flush=True)
            yield describe(model, name, s) | private_run(s, model, tokenizer)


def describe(model, name, s):
    """What is run, and on what."""
    import numpy
    import spu
    import torch
    from machine import machine_and_commit
    sizes = ("n_layer", "uniform_layers", "positional_layers", "block_size", "n_embd", "n_head",
             "vocab_size")
    ops = model.nonlinear_ops().items()
    return {
        "arch": name,
        **{key: getattr(model.config, key) for key in sizes},
        "network": network,
        "protocol": protocol,
        "max_abs_err": None,
        "nonlinear_ops": {kind: f"{n} x {rows}x{columns}" for kind, (n, (rows, columns)) in ops},
        "flops": model.flops(),
        "settings": {"reveal": reveal, "embedding": embedding, "pairs": pairs, "tls": bool(tls),
                     "seed": seed, "max_new_tokens": max_new_tokens,
                     "prompt_tokens": prompt_tokens, "ahead": ahead, "guesses": guesses,
                     "temperature": temperature, "top_k": top_k, "plain": s.plain,
                     "weights": "random" if archs else "trained"},
        "versions": {"spu": spu.__version__, "torch": torch.__version__,
                     "numpy": numpy.__version__, "python": platform.python_version()},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores for all parties",
        **machine_and_commit(),
        "load_before": os.getloadavg()[0],
    }


def read_results(path):
    """The results that an earlier run wrote to its --json. ValueError if that isn't such a file."""
    try:
        with open(path) as f:
            results = load(f)
        if all(RESULT <= set(r) for r in results) and results:
            return results
    except (ValueError, TypeError):
        pass
    raise ValueError(f"{path} holds no results of bench_spu.py --json")


# --------------------------------------------------------------------------------- the command
def check_settings(given):
    """Exit with status 2 and a line if the settings make no sense. given: those that were set."""
    one_of(globals(), role=("both", "client", "server", "helper"),
           protocol=("cheetah", "semi2k", "aby3"), network=("none", *NETWORKS),
           reveal=("logits", "token"), embedding=("private", "public"))
    within(globals(), **BOUNDS)
    if chart and not (chart.endswith(".png") and find_spec("matplotlib")):
        die(f"chart, {chart!r}, must end in .png, and needs matplotlib: pip install matplotlib", 2)
    if windows and (reveal == "token" or measure_layers or archs):
        die("--windows compares the logits of a whole trained model: not with --reveal=token, "
            "--measure_layers or --archs", 2)
    if temperature and reveal == "token":
        die("--temperature needs revealed logits to choose from: not with --reveal=token", 2)
    if (plain or baseline) and (max_new_tokens > 1 or prompt_tokens):
        die("--plain and --baseline are of one token behind a whole context: not with "
            "--max_new_tokens or --prompt_tokens", 2)
    if role in ("both", "client") and bool(draft) != (guesses > 0):
        die("--draft, which guesses, and --guesses, how many tokens, go together", 2)
    if guesses and max_new_tokens == 1:
        die("--guesses are of further tokens: give --max_new_tokens as well", 2)
    if ahead and (protocol != "cheetah" or plain or baseline):
        die("--ahead is of the protocol cheetah, and not of --plain or --baseline", 2)
    if network != "none" and protocol == "aby3":
        die("--network joins two parties, and aby3 has three", 2)
    if archs and {"prompt", "prompts"} & given.keys():
        die("--prompt needs a tokenizer, and --archs have none: give --prompt_ids=1,2,3", 2)
    if serve and (role != "server" or protocol == "aby3"):
        die("--serve is for --role=server, of two parties", 2)
    for one, other in (("archs", "ckpt"), ("prompt", "prompt_ids"), ("prompt", "prompts"),
                       ("prompts", "prompt_ids")):
        if {one, other} <= set(given):
            die(f"--{one} and --{other} are two ways to say what to run: give one", 2)
    of_archs = [key for key in given if key in MODEL]
    if of_archs and not archs:
        die(f"--{of_archs[0]} is of the models that --archs makes: a checkpoint has its own", 2)
    for name in archs.split(",") if archs else ():
        if not os.path.isfile(os.path.join(HERE, "config", name + ".py")):
            die(f"no architecture {name!r}: --archs takes names of config/, such as sm_ln_g", 2)
    if tls:
        tls_context(tls, server=True)
        warn_of_readers(os.path.join(tls, "key.pem"))
    if role != "both":
        check_role(given)
    for path in filter(None, (json, logits_file, chart)):
        check_writable(path)


def check_role(given):
    """The settings of a party that is started alone."""
    of_both = [key for key in given if key in ROLE_BOTH]
    if of_both:
        die(f"--{of_both[0]} is for --role=both", 2)
    if embedding == "public":
        die("--embedding is chosen by pi_export.py, and here for --role=both", 2)
    if plain:
        die("--plain takes other weights than pi_export.py writes: it is for --role=both", 2)
    if role != "server" and not public:
        die(f"--role={role} needs --public, the server's public.json", 2)
    host_port(listen, "--listen")
    peers = [host_port(address, "--peer") for address in peer.split(",")]
    if len(peers) != (2 if protocol == "aby3" else 1):
        die(f"--peer must name one other, or two with --protocol=aby3, and is {peer!r}", 2)


def check_writable(path):
    """Exit with a line if no file can be written at path, before hours go into its content."""
    if os.path.exists(path) and not os.path.isfile(path):
        die(f"can't write {path}: it is there, and no file", 2)
    try:
        with open(path + ".tmp", "ab"):
            os.remove(path + ".tmp")
    except OSError as e:
        die(f"can't write {path}: {e.strerror}", 2)


def main():
    given = configure(globals())
    for key in PATHS:
        globals()[key] = os.path.expanduser(globals()[key])
    try:
        check_settings(given)
    except ValueError as e:
        die(e, 2)
    if not (from_json or find_spec("spu")):
        die("spu is not installed: it needs Python 3.10 or 3.11; pip install -r requirements.txt")
    from private.party import run_party, write_json, write_whole
    from private.report import draw, table
    if serve:
        from private.launch import serve_clients
        serve_clients(settings())
    if role != "both":
        run_party(settings())
    results = []
    try:
        for result in read_results(from_json) if from_json else run_all(given):
            results.append(result)
            if json:  # after each, so that an interrupted comparison keeps what it has
                write_json(json, results)
            if "failed" in result:
                raise RuntimeError(result["failed"])
    finally:  # what has been measured is shown, whatever comes
        if results:
            print(table(results), flush=True)
    if any(r["measured_layers"] < r["n_layer"] for r in results):
        print("multiplied: equal layers that were not run, and the embedding beyond two pieces, "
              "count as the last that was", flush=True)
    if chart:
        write_whole(chart, lambda f: draw(results, f))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, RuntimeError, MemoryError) as e:
        quit_now(e)
