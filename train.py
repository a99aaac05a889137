"""
Train a GPT of "Entropy-Guided Attention for Private LLMs" on one device: CUDA, MPS or CPU.

    python train.py                                        # the baseline SM+LN+G, small, minutes on a CPU
    python train.py config/sm_scfuffn.py                   # softmax only: no LayerNorm, no GELU
    python train.py config/ereg_sm_t_scfuffn.py config/on_codeparrot.py --out_dir=out/ereg   # the paper's scale
    python train.py --init_from=resume                     # go on from out/ckpt.pt, settings as they were

Config files apply in order, then flags. Writes ckpt.pt and log.jsonl to out_dir. Exit status: 0 done, 1 an error
named in one line, 2 a bad setting, 3 the loss diverged, 130 / 143 stopped by Ctrl-C / SIGTERM after saving.
"""
import ctypes
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import fields
from functools import lru_cache
from itertools import count

import numpy as np
import torch

from configurator import configure, die, one_of, setting_names
from data.prepare import open_dataset
from entropy import EntropyRegularizer, max_causal_entropy
from model import GPT, GPTConfig, cpu_bf16_unit, load_checkpoint, save_checkpoint
from plot import describe, diagnosis, draw, read_log

# ------------------------------------------------------------------------------------------------ settings
# The defaults are the small scale that runs anywhere; config/on_*.py are the paper's.
out_dir = "out"             # checkpoint and log
init_from = "scratch"       # scratch | resume (from out_dir)
eval_interval = 250         # steps between evaluations; each also writes a checkpoint
eval_windows = 256          # validation windows of block_size tokens, the same ones every time
log_interval = 10           # steps between log lines
log_to = ""                 # also to "tensorboard" or "wandb" (installed by you)
sample_prompt = "def"       # a sample is generated from this at the end
sample_tokens = 100         # its length in tokens, 0 for none
plot = True                 # draw the entropies at the end, entropy.png in out_dir
# data
dataset = "pycode"          # folder under data_dir, made by data/prepare.py
data_dir = "data"
batch_size = 8              # sequences a forward pass
grad_accum = 1              # forward passes a step
# model: the keys of GPTConfig in model.py, which explains them
block_size = 128
vocab_size = 0              # 0: the tokenizer's
n_layer = 6
n_head = 6
n_embd = 192
use_layernorm = True
final_layernorm = True
use_gelu = True
use_relu = False
fuse_ffn = False
learnable_ffn_scale = False
learnable_temperature = False
temperature_per_head = False
temperature_init = 1e-2
weight_norm = "none"
spectral_norm = "none"
bias = False
gelu_tanh = False
# entropy regularization (Algorithm 1, entropy.py)
entropy_reg = False
lambda_entropy = 0.164      # weight of the term: the paper's 1e-5 on a sum over 128 x 128 positions
gamma = 0.2                 # tolerance margin, a fraction of E_max
threshold_init = 0.5        # where the learnable thresholds start, a fraction of E_max
reduction = "mean"          # mean | sum | head, see entropy.py
# AdamW and its schedule
max_iters = 1000            # steps
learning_rate = 1e-3
min_lr = 0.0                # where the decay ends
lr_decay = "linear"         # linear | cosine
lr_decay_iters = 0          # steps until min_lr, 0: max_iters
warmup = 0.05               # share of lr_decay_iters spent warming up
weight_decay = 0.1          # on matrices and embeddings alone
beta1 = 0.9
beta2 = 0.999
grad_clip = 1.0             # largest gradient norm, 0: no clipping
# system
seed = 1337                 # of initialisation and data order
device = "auto"             # auto | cpu | cuda | cuda:1 | mps
dtype = "auto"              # auto | float32 | bfloat16: type of the matrix products
compile = "auto"            # auto (on CUDA) | yes | no: torch.compile

SETTINGS = setting_names(globals())
given = configure(globals())
signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # until there is something to save


def unhandled(kind, error, trace):
    """Out of memory, on the CPU as on a GPU, is a line; any other exception as Python shows it."""
    if not (kind in (MemoryError, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)):
        return sys.__excepthook__(kind, error, trace)
    print("error: out of memory: a smaller batch_size with a larger grad_accum trains the same in less; checkpoints already written are whole", file=sys.stderr)


sys.excepthook = unhandled
out_dir, data_dir = os.path.expanduser(out_dir), os.path.expanduser(data_dir)
MODEL_KEYS = [f.name for f in fields(GPTConfig)]
HERE = {"out_dir", "init_from", "data_dir", "device", "dtype", "compile", "log_to"}  # not carried over by resume
FIXED = {*MODEL_KEYS, "dataset", "batch_size", "grad_accum", "seed", "entropy_reg"}  # resume can't change these
ckpt_path, log_path = os.path.join(out_dir, "ckpt.pt"), os.path.join(out_dir, "log.jsonl")
plot_path = os.path.join(out_dir, "entropy.png")

checkpoint, resumed = None, init_from == "resume"
if resumed:
    try:
        checkpoint = load_checkpoint(ckpt_path)
        for key, value in checkpoint["settings"].items():
            if key in given and key in FIXED and given[key] != value:
                die(f"{ckpt_path} was trained with {key}={value!r}: resume can't change it to {given[key]!r}", 2)
            if key not in given and key not in HERE:
                globals()[key] = value
    except (OSError, ValueError) as e:
        die(e)
    except KeyError as e:
        die(f"{ckpt_path} has no {e}, which resuming needs: it was not written by this train.py")
    if checkpoint["step"] and not lr_decay_iters and max_iters != checkpoint["settings"]["max_iters"]:
        print(f"note: max_iters was {checkpoint['settings']['max_iters']} and is {max_iters}, which stretches the learning rate's decay; "
              f"--lr_decay_iters={checkpoint['settings']['max_iters']} would keep it")
elif init_from != "scratch":
    die(f"init_from must be scratch or resume, and is {init_from!r}", 2)
one_of(globals(), repr, lr_decay=("linear", "cosine"), dtype=("auto", "float32", "bfloat16"), compile=("auto", "yes", "no"),
       log_to=("", "tensorboard", "wandb"), reduction=("mean", "sum", "head"))
for key in SETTINGS:  # no number of these means anything below 0, and none that counts what there must be, at 0
    value, least = globals()[key], int(key in ("batch_size", "grad_accum", "eval_interval", "eval_windows", "log_interval"))
    if not isinstance(value, str) and (not least <= value < math.inf or key.startswith("beta") and value >= 1):
        die(f"{key} must be at least {least}{' and below 1' if key.startswith('beta') else ''}, and is {value}", 2)
try:  # before anything is prepared: a vocabulary of 0 is filled in once the data is there
    GPTConfig(**{key: globals()[key] for key in MODEL_KEYS} | {"vocab_size": vocab_size or 1})
except ValueError as e:
    die(e, 2)


# ------------------------------------------------------------------------------------------------ machine
def choose_machine():
    """(device, matmul dtype, whether to compile, a sentence that says so and why)."""
    name = device if device != "auto" else "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except Exception as e:  # torch raises AssertionError, RuntimeError or NotImplementedError
        die(f"device {name!r} can't be used: {str(e).splitlines()[0]}")
    kind = torch.device(name).type
    if kind == "cuda":
        fast, why = torch.cuda.get_device_capability(name) >= (8, 0), torch.cuda.get_device_name(name)
        if dtype != "float32":
            torch.set_float32_matmul_precision("high")  # TF32 where fp32 is left
    elif kind == "cpu":
        unit = cpu_bf16_unit()
        fast, why = bool(unit), f"{torch.get_num_threads()} threads, " + (f"{unit} makes bf16 fast" if unit else "no AMX or AVX512-BF16: bf16 would be slower")
    else:
        fast, why = False, "bf16 untested there"
    bf16 = dtype == "bfloat16" or (dtype == "auto" and fast)
    compiled = compile == "yes" or (compile == "auto" and kind == "cuda")
    return name, torch.bfloat16 if bf16 else torch.float32, compiled, f"device {name} ({why}), {'bfloat16' if bf16 else 'float32'} matmuls, {'torch.compile' if compiled else 'eager'}"


def keep_memory():
    """Have glibc reuse freed memory rather than give it back: saved 7% of a CPU run's processor time (see README)."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)          # M_MMAP_MAX: no block gets a mapping of its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep up to 2 GB
        mallopt(-2, 2**28)      # M_TOP_PAD: grow by 256 MB at once
    except (OSError, AttributeError):
        pass  # not glibc


device, dtype_matmul, compiled, machine = choose_machine()
device_type = torch.device(device).type
if device_type == "cpu":
    keep_memory()
autocast = torch.autocast(device_type, dtype_matmul) if dtype_matmul == torch.bfloat16 else nullcontext()


# ------------------------------------------------------------------------------------------------ data
if dataset == "pycode" and not os.path.exists(os.path.join(data_dir, dataset, "meta.json")):
    print("preparing pycode: the Python files of this interpreter's library and packages, once", flush=True)
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "prepare.py")
    if subprocess.run([sys.executable, script, f"--data_dir={data_dir}"]).returncode:
        die("data/prepare.py failed, see above")
train_tokens, val_tokens, meta, tokenizer_spec, tokenizer = open_dataset(data_dir, dataset, block_size)


def windows_of(tokens):
    """How many windows of block_size tokens there are, side by side."""
    return len(tokens) // block_size if meta["piece"] else (len(tokens) - 1) // block_size


def get_batch(tokens, windows):
    """x, y (B, T) of those windows, y one token ahead of x, on the device. In pieces the last token has nothing ahead: -1."""
    span = block_size + (0 if meta["piece"] else 1)
    rows = np.stack([tokens[w * block_size:w * block_size + span] for w in windows]).astype(np.int64)
    if meta["piece"]:
        rows = np.pad(rows, ((0, 0), (0, 1)), constant_values=-1)
    rows = torch.from_numpy(rows)
    rows = rows.pin_memory().to(device, non_blocking=True) if device_type == "cuda" else rows.to(device)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


@lru_cache(maxsize=2)
def epoch_order(epoch):
    """The order of the training windows in one pass over the data: of the seed alone, so a step number is a data position."""
    return np.random.default_rng((seed, epoch)).permutation(windows_of(train_tokens))


def training_batch(number):
    """Batch `number` (counted in forward passes from the start of the run)."""
    n = windows_of(train_tokens)
    return get_batch(train_tokens, [epoch_order(w // n)[w % n] for w in range(number * batch_size, (number + 1) * batch_size)])


def unigram_perplexity():
    """Validation perplexity of the best model that ignores context: token frequencies, each count plus one."""
    counts = np.bincount(train_tokens[:50_000_000], minlength=vocab_size) + 1
    log_p = torch.from_numpy(np.log(counts / counts.sum())).to(torch.float32).to(device)
    y = torch.cat([get_batch(val_tokens, [w])[1] for w in val_windows])
    return math.exp(-log_p[y[y >= 0]].mean().item())


vocab_size = vocab_size or meta["vocab_size"]
largest = max(int(part[i:i + 2**26].max()) for part in (train_tokens, val_tokens) for i in range(0, len(part), 2**26))
if largest >= vocab_size:
    die(f"the dataset has token {largest}, and vocab_size={vocab_size} ends at {vocab_size - 1}: "
        f"leave vocab_size=0, or set it to {meta['vocab_size']} at least")
prompt = tokenizer.encode_ordinary(sample_prompt)
if sample_tokens and not prompt:
    die("sample_prompt is empty: give a word, or --sample_tokens=0", 2)
if checkpoint and checkpoint["data_sha256"] != meta["sha256"]:
    die(f"{ckpt_path} was trained on other data than {data_dir}/{dataset} holds now (sha256 {checkpoint['data_sha256'][:16]}, "
        f"here {meta['sha256'][:16]}): resuming needs the same bins")
n_val = min(eval_windows, windows_of(val_tokens))
val_windows = np.linspace(0, windows_of(val_tokens) - 1, n_val).round().astype(int)

# ------------------------------------------------------------------------------------------------ model
torch.manual_seed(seed)
config = GPTConfig(**{key: globals()[key] for key in MODEL_KEYS})
arch = f"EReg({config.name})" if entropy_reg else config.name
settings = {key: globals()[key] for key in SETTINGS}
model = GPT(config).to(device)
regularizer = EntropyRegularizer(n_layer, n_head, gamma, threshold_init, reduction).to(device) if entropy_reg else None
groups = model.param_groups(weight_decay)
if regularizer:
    groups.append({"params": list(regularizer.parameters()), "weight_decay": 0.0})
parameters = [p for group in groups for p in group["params"]]
fused = device_type != "mps"
optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), fused=fused)
step = 0  # steps done
if checkpoint:
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    for group, fresh in zip(optimizer.param_groups, groups):  # settings may have been changed on the command line
        group |= {"betas": (beta1, beta2), "weight_decay": fresh["weight_decay"], "fused": fused}
    if regularizer:
        regularizer.load_state_dict(checkpoint["regularizer"])
    torch.set_rng_state(checkpoint["rng"])
    step, checkpoint = checkpoint["step"], None  # the copies on the CPU are not needed any more
forward = torch.compile(model) if compiled else model


def lr_at(step):
    """Learning rate of a step: linear warmup, then linear or cosine decay to min_lr."""
    total = lr_decay_iters or max_iters
    warm = math.ceil(warmup * total)
    if step < warm:
        return learning_rate * (step + 1) / warm
    left = max(0.0, 1 - (step - warm) / max(1, total - warm))  # 1 -> 0
    return min_lr + (learning_rate - min_lr) * (left if lr_decay == "linear" else 0.5 * (1 - math.cos(math.pi * left)))


def training_loss(x, y):
    """(what is minimised, cross-entropy, entropy term): Algorithm 1's L_CE + lambda_entropy * L_entropy, nats."""
    with autocast:
        _, ce, entropy = forward(x, y, return_entropy=entropy_reg)
        term = lambda_entropy * regularizer(entropy) if entropy_reg else torch.zeros_like(ce)
    return ce + term, ce.detach(), term.detach()


@torch.no_grad()
def evaluate():
    """Mean cross-entropy (nats) and mean entropy per head (L, H) over the validation windows."""
    model.eval()
    ce, entropy = 0.0, torch.zeros(n_layer, n_head, device=device)
    for i in range(0, n_val, batch_size):
        x, y = get_batch(val_tokens, val_windows[i:i + batch_size])
        with autocast:
            _, loss, e = model(x, y, return_entropy=True)
        ce += loss.item() * len(x) / n_val
        entropy += e.float().mean(-1).sum(1) / n_val
    model.train()
    return ce, entropy.cpu()


# ------------------------------------------------------------------------------------------------ log and checkpoint
def nats(values):
    return " ".join(f"{v:.2f}" for v in values)


def perplexity(ce):
    """exp of a cross-entropy in nats; infinity where that is no number any more."""
    return math.exp(ce) if ce < 700 else math.inf


def log(record):
    """Append a record to log.jsonl, and its numbers to TensorBoard or Weights & Biases if asked for."""
    try:
        print(json.dumps(record), file=log_file, flush=True)
    except OSError as e:
        die(f"can't write {log_path}: {e}. The last checkpoint is whole: free some space, then --init_from=resume")
    numbers = {k: v for k, v in record.items() if type(v) in (int, float)}
    if log_to == "tensorboard":
        for k, v in numbers.items():
            writer.add_scalar(k, v, record["step"])
    elif log_to == "wandb":
        writer.log(numbers, step=record["step"])


def save():
    try:
        os.makedirs(out_dir, exist_ok=True)  # it may have been moved away since the start
        save_checkpoint(ckpt_path, model, optimizer=optimizer.state_dict(), step=step, settings=settings, rng=torch.get_rng_state(),
                        regularizer=regularizer.state_dict() if regularizer else {}, data_sha256=meta["sha256"], tokenizer=tokenizer_spec)
    except OSError as e:
        die(f"{e} (step {step}). An earlier checkpoint there is untouched: free some space, then --init_from=resume")


def diverged(what, x, y):
    """Say at which step and where the training broke, keep the last good checkpoint, and exit with status 3."""
    model.eval()
    with torch.no_grad(), autocast:
        layers = model(x, y, return_entropy=True)[2].float().mean((1, 2, 3)).tolist()  # before the update that would have spoiled it
    finite = [l for l in range(n_layer) if math.isfinite(layers[l])]
    low = f"lowest in layer {min(finite, key=lambda l: layers[l])}, {min(layers[l] for l in finite):.2f}" if finite else "none is a number"
    log({"event": "diverged", "step": step, "what": what, "entropy_by_layer": [layers[l] if l in finite else None for l in range(n_layer)],
         "arch": arch})
    bare = not (use_layernorm or use_gelu or use_relu or learnable_ffn_scale or weight_norm != "none" or spectral_norm != "none")
    print(f"diverged: {what} at step {step}. Entropy by layer {nats(layers)} nats (at most {max_causal_entropy(block_size):.2f}): {low}. " +
          ("This is what the paper expects of softmax alone: entropy collapse in deep layers (its table says NaN). " if bare else
           "Try a lower learning_rate, a longer warmup or --grad_clip=1. ") +
          (f"The last good checkpoint stays in {ckpt_path}." if os.path.exists(ckpt_path) else "No checkpoint was written yet."), file=sys.stderr)
    sys.exit(3)


try:
    os.makedirs(out_dir, exist_ok=True)
    if log_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(out_dir, flush_secs=10)
    elif log_to == "wandb":
        import wandb
        writer = wandb.init(project="entropy-guided-attention", name=arch, config=settings)
    for path in (ckpt_path, log_path, plot_path):  # an earlier run's work is moved aside, not overwritten
        if not resumed and os.path.exists(path):
            aside = next(f"{path}.old{n}" for n in count(1) if not os.path.exists(f"{path}.old{n}"))
            os.replace(path, aside)
            print(f"{path} was there: moved to {aside}")
    if os.path.exists(log_path):  # a resumed run's log may have run on after its checkpoint was written, or end in half a line
        with open(log_path) as old, open(log_path + ".tmp", "w") as new:
            for line in old:
                at = re.match(r'\{"event": "(\w+)", "step": (\d+), .*\}$', line)
                if at and (int(at[2]) < step or int(at[2]) == step and at[1] == "step"):
                    new.write(line)
        os.replace(log_path + ".tmp", log_path)
    log_file = open(log_path, "a")
except OSError as e:
    die(f"can't write to {out_dir}: {e}")
except Exception as e:  # TensorBoard or wandb: not installed, no login, no network
    die(f"log_to={log_to}: {e}" + (f"; pip install {log_to}, or leave log_to empty" if isinstance(e, ImportError) else ""))

signals = []
def on_signal(number, frame):
    if signals:
        sys.exit(128 + number)  # asked twice: stop at once
    signals.append(number)
    print("\nstopping after this step (again to stop at once)", file=sys.stderr)


for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, on_signal)

# ------------------------------------------------------------------------------------------------ the loop
unigram = unigram_perplexity()
n_parameters = sum(p.numel() for p in model.parameters())
print(f"{arch}: {n_parameters / 1e6:.2f}M parameters, {n_layer} layers, {n_head} heads, width {n_embd}, context {block_size}")
print("nonlinear ops: " + ", ".join(f"{kind} {n} x {a}x{b}" for kind, (n, (a, b)) in model.nonlinear_ops().items()) +
      "; FLOPs a forward pass: " + ", ".join(f"{k} {v / 1e9:.2f}B" for k, v in model.flops().items()))
print(f"data {dataset}: {len(train_tokens):,} training tokens, vocabulary {vocab_size}, sha256 {meta['sha256'][:16]}; "
      f"validation perplexity of a unigram model {unigram:.1f}")
print(machine)
print(f"{f'resuming at step {step} of' if resumed else 'training'} {max_iters} steps of "
      f"{grad_accum * batch_size} x {block_size} tokens", flush=True)

tokens_per_step = grad_accum * batch_size * block_size
started, first_step, train_seconds = time.time(), step, 0.0
seconds, since = 0.0, 0  # of training alone, since the last log line
broken = torch.full((), -1, device=device)  # the first step with a gradient that isn't finite
while True:
    if step % eval_interval == 0 or step >= max_iters or step == first_step:
        ce, head_entropy = evaluate()
        if not math.isfinite(ce):
            diverged("the validation loss is not finite", *training_batch(step * grad_accum))
        last_entropy = head_entropy.mean(1).tolist()
        print(f"eval  step {step:>6}  val ce {ce:.4f}  perplexity {perplexity(ce):.2f}  entropy by layer {nats(last_entropy)} nats", flush=True)
        log({"event": "eval", "step": step, "val_ce": ce, "val_ppl": perplexity(ce),
             "head_entropy": [[round(e, 4) for e in row] for row in head_entropy.tolist()]})
        save()
    if step >= max_iters:
        break

    t0 = time.time()
    for group in optimizer.param_groups:
        group["lr"] = lr_at(step)
    ce = term = 0.0
    for micro in range(grad_accum):
        x, y = training_batch(step * grad_accum + micro)
        micro_loss, micro_ce, micro_term = training_loss(x, y)
        (micro_loss / grad_accum).backward()
        ce, term = ce + micro_ce / grad_accum, term + micro_term / grad_accum
    norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf)
    finite = norm.isfinite()
    broken = torch.where(finite | (broken >= 0), broken, step)
    if fused:  # it then skips such an update by itself: weights and checkpoint stay good, whenever we look
        optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()
    step += 1
    logged = step % log_interval == 0 or step == max_iters
    if device_type != "cuda" or logged or step % eval_interval == 0 or signals:  # a look makes the host wait for the GPU
        if broken >= 0:
            step = broken.item()
            batches = [training_batch(step * grad_accum + micro) for micro in range(grad_accum)]
            bad = [batch for batch in batches if not training_loss(*batch)[0].isfinite()]
            diverged("the loss is not finite" if bad else "the gradient is not finite", *(bad or batches)[-1])
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    seconds, since = seconds + time.time() - t0, since + 1
    if logged:
        rate = since * tokens_per_step / seconds
        left = (max_iters - step) * tokens_per_step / rate
        print(f"step {step:>6}/{max_iters}  loss {ce + term:.4f} (ce {ce:.4f}, entropy term {term:.4f})  lr {lr_at(step - 1):.2e}  "
              f"grad {norm:.2f}  {rate:,.0f} tok/s  {left // 60:.0f}m{left % 60:02.0f}s left", flush=True)
        log({"event": "step", "step": step, "loss": (ce + term).item(), "ce": ce.item(), "entropy_term": term.item(),
             "grad_norm": norm.item(), "lr": lr_at(step - 1), "tokens_per_s": rate})
        train_seconds, seconds, since = train_seconds + seconds, 0.0, 0
    if signals:
        save()
        print(f"saved step {step} to {ckpt_path}; go on with --init_from=resume --out_dir={out_dir}", file=sys.stderr)
        sys.exit(128 + signals[0])

# ------------------------------------------------------------------------------------------------ the result
rate = (step - first_step) * tokens_per_step / train_seconds if train_seconds else 0.0
print(f"{arch}: validation perplexity {perplexity(ce):.2f} (unigram {unigram:.1f}) after {step * tokens_per_step:,} tokens; "
      f"{rate:,.0f} tok/s, {time.time() - started:.0f} s; {ckpt_path}, {log_path}")
sample = ""
if sample_tokens:
    model.eval()
    tokens = model.generate(torch.tensor([prompt], device=device), sample_tokens, temperature=0.8, top_k=50,
                            generator=torch.Generator(device).manual_seed(seed))[0].tolist()
    sample = tokenizer.decode([t for t in tokens if t < tokenizer.n_vocab])  # vocab_size may be padded beyond the tokenizer's
    print(f"--- a sample\n{sample}\n---")
log({"event": "done", "step": step, "arch": arch, "val_ce": ce, "val_ppl": perplexity(ce), "unigram_ppl": unigram,
     "tokens": step * tokens_per_step, "tokens_per_s": rate, "parameters": n_parameters, "entropy_by_layer": last_entropy,
     "settings": settings, "machine": f"{platform.processor() or platform.machine()}, {machine}", "torch": torch.__version__,
     "data_sha256": meta["sha256"], "sample": sample})
if plot:
    try:
        seen = describe(arch, model, head_entropy, regularizer and regularizer.threshold, read_log(log_path))
        print("\n".join(diagnosis(seen)))
        draw([seen], plot_path)
        print(plot_path)
    except (ImportError, OSError, ValueError) as e:
        print(f"no picture of the entropies: {e}", file=sys.stderr)
