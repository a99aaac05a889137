"""
Train a GPT of "Entropy-Guided Attention for Private LLMs" on CUDA, MPS or CPU.

    python train.py                                        # the baseline SM+LN+G, minutes on a CPU
    python train.py config/sm_scfuffn.py                   # softmax only: no LayerNorm, no GELU
    python train.py config/ereg_sm_t_scfuffn.py config/on_codeparrot.py --out_dir=out/ereg
    python train.py --init_from=resume                     # go on from out/ckpt.pt, as it was
    python train.py --init_from=gpt2 --use_gelu=False --dataset=mine --block_size=128  # fine-tuned
    torchrun --nproc_per_node=2 train.py --grad_accum=2    # 2 processes, 1 of the 2 passes each;
                                                           # --fsdp=yes: half of the model each

Config files apply in order, then flags. Writes ckpt.pt and log.jsonl to out_dir. Exit status: 0
done, 1 an error named in one line, 2 a bad setting, 3 the loss diverged, 128 + n stopped after
saving by signal n: Ctrl-C, SIGTERM, SIGHUP, or SIGPIPE where nobody reads the output any more.
"""
from configurator import configure, die, end_on_signals, one_of, setting_names
from configurator import typed, within

end_on_signals()  # until there is something to save

import math
import os
import platform
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import fields
from functools import lru_cache

import numpy as np
import torch

from data.dataset import open_dataset
from distributed import add_up, clip, gathered, join_processes, share_gradients, spread
from distributed import wait_for_all
from draw import draw
from entropy import EntropyRegularizer, max_causal_entropy
from machine import check_memory, choose_machine
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint
from plot import describe, diagnosis, learned, read_log
from pretrained import check_tokenizer, read_pretrained, restore, start_from
from run import Run
from sample import sample

# ---------------------------------------------------------------------------------------- settings
# The defaults are the small scale that runs anywhere; config/on_*.py are the paper's.
out_dir = "out"  # checkpoint and log
init_from = "scratch"  # scratch | resume (out_dir's) | a checkpoint | gpt2, ..., or its folder
eval_interval = 250  # steps between evaluations; each also writes a checkpoint
keep_best = False  # keep the checkpoint of the lowest validation loss too, as best.pt
eval_windows = 256  # validation windows of block_size tokens, the same ones every time
log_interval = 50  # steps between log lines
log_to = ""  # also to "tensorboard" or "wandb" (installed by you)
sample_prompt = "def"  # a sample is generated from this at the end
sample_tokens = 100  # its length in tokens, 0 for none
plot = True  # draw the entropies at the end, entropy.png in out_dir
# data
dataset = "pycode"  # folder under data_dir, made by data/prepare.py
data_dir = "data"  # where datasets lie
batch_size = 8  # sequences a forward pass
grad_accum = 1  # forward passes a step, shared out among the processes of torchrun
# model: the fields of GPTConfig in model.py, which explains them
globals().update({field.name: field.default for field in fields(GPTConfig)})
vocab_size = 0  # V, 0: the tokenizer's
# entropy regularization (Algorithm 1, entropy.py)
entropy_reg = False  # EReg
lambda_entropy = 0.164  # weight of the term: the paper's 1e-5 on a sum over 128 x 128 positions
gamma = 0.2  # tolerance margin, a fraction of E_max
threshold_init = 0.5  # where the learnable thresholds start, a fraction of E_max
reduction = "mean"  # mean | sum | head, see entropy.py
# AdamW and its schedule
max_iters = 1000  # steps
learning_rate = 1e-3  # the highest
min_lr = 0.0  # where the decay ends
lr_decay = "linear"  # linear | cosine
lr_decay_iters = 0  # steps until min_lr, 0: max_iters
warmup = 0.3  # share of lr_decay_iters spent warming up; the paper's 0.05 is of 32,000 steps
weight_decay = 0.1  # on matrices and embeddings alone
beta1 = 0.9  # of AdamW
beta2 = 0.999  # of AdamW
grad_clip = 1.0  # largest gradient norm, 0: no clipping
# system
seed = 1337  # of initialisation and data order
device = "auto"  # auto | cpu | cuda | cuda:1 | mps
dtype = "auto"  # auto | float32 | bfloat16 | float16, the loss scaled: of the matrix products
compile = "auto"  # auto (on CUDA) | yes | no: torch.compile
fsdp = "no"  # yes | no: each process of torchrun holds a shard of the model, and not all of it

SETTINGS = setting_names(globals())
MODEL_KEYS = [field.name for field in fields(GPTConfig)]
HERE = {"out_dir", "init_from", "data_dir", "device", "compile", "fsdp", "log_to"}  # not resumed
FIXED = {*MODEL_KEYS, "dataset", "batch_size", "grad_accum", "seed", "entropy_reg"}  # by resuming
MANY = 2**31 - 1

given = configure(globals(), fields_of=GPTConfig)
out_dir, data_dir = os.path.expanduser(out_dir), os.path.expanduser(data_dir)
rank, ranks, device = join_processes(device)
run, checkpoint, trained = Run(out_dir, rank, ranks), None, None
if init_from == "resume":
    try:
        checkpoint = load_checkpoint(run.ckpt, "settings", "optimizer", "regularizer", "rng",
                                     "step", "data_sha256")
        saved = {**checkpoint["settings"], **checkpoint["model_config"]}
    except (OSError, ValueError, TypeError) as e:
        die(e)
    saved = typed({key: saved[key] for key in SETTINGS if key in saved}, globals(), run.ckpt)
    for key in given.keys() & FIXED & saved.keys():
        if given[key] != saved[key]:
            die(f"{run.ckpt} was trained with {key}={saved[key]!r}: resume can't change it to "
                f"{given[key]!r}", 2)
    globals().update({key: saved[key] for key in saved.keys() - given.keys() - HERE})
elif init_from != "scratch":
    try:
        trained = read_pretrained(init_from)
    except (OSError, ValueError) as e:
        die(f"init_from={init_from}: {e}")
    was = trained["model_config"]
    globals().update({key: was[key] for key in was.keys() - given.keys()})
one_of(globals(), repr, log_to=("", "tensorboard", "wandb"), reduction=("mean", "sum", "head"),
       lr_decay=("linear", "cosine"), dtype=("auto", "float32", "bfloat16", "float16"),
       compile=("auto", "yes", "no"), fsdp=("yes", "no"))
within(globals(), eval_interval=(1, MANY), eval_windows=(1, MANY), log_interval=(1, MANY),
       sample_tokens=(0, MANY), batch_size=(1, 2**20), grad_accum=(1, 2**20), max_iters=(0, MANY),
       lr_decay_iters=(0, MANY), learning_rate=(0, MANY), min_lr=(0, MANY), warmup=(0, 1),
       weight_decay=(0, MANY), beta1=(0, 1 - 1e-9), beta2=(0, 1 - 1e-9), grad_clip=(0, MANY),
       lambda_entropy=(0, MANY), gamma=(0, 1), threshold_init=(0, 1), seed=(0, 2**63 - 1))
flags = {key: globals()[key] for key in MODEL_KEYS}
try:
    config = GPTConfig(**flags | {"vocab_size": vocab_size or 1})
except ValueError as e:
    die(e, 2)
if entropy_reg and config.softmax_layers == 0:
    die("entropy_reg has nothing to regularize where no layer has a softmax: leave it one, "
        f"--uniform_layers and --positional_layers of {n_layer - 1} together at most", 2)
if grad_accum % ranks:
    die(f"grad_accum={grad_accum} passes a step can't be shared out among {ranks} processes: "
        f"--grad_accum={ranks} or a multiple", 2)
if fsdp == "yes" and ranks == 1:
    die("fsdp=yes shards the model among several processes: start them by torchrun "
        "--nproc_per_node=2 train.py --fsdp=yes --grad_accum=2", 2)

# ---------------------------------------------------------------------------------------- data
there = os.path.exists(os.path.join(data_dir, dataset, "meta.json"))
if dataset == "pycode" and not there and rank == 0:
    run.say("preparing pycode: the Python files of this interpreter's library and packages, once")
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "prepare.py")
    if subprocess.run([sys.executable, script, f"--data_dir={data_dir}"]).returncode:
        die("data/prepare.py failed, see above")
wait_for_all()
try:
    train_tokens, val_tokens, meta, spec, tokenizer = open_dataset(data_dir, dataset, block_size)
    if trained:
        check_tokenizer(init_from, trained, spec, meta["vocab_size"])
    device, matmul_dtype, compiled, machine = choose_machine(device, dtype, compile,
                                                             batch_size * block_size, n_embd)
    dtype = str(matmul_dtype).removeprefix("torch.")  # so that a resumed run keeps it
except (OSError, ValueError) as e:
    die(e)
vocab_size = config.vocab_size = vocab_size or meta["vocab_size"]
largest = max(train_tokens.max(), val_tokens.max())
if largest >= vocab_size:
    die(f"the dataset has token {largest}, and vocab_size={vocab_size} ends at {vocab_size - 1}: "
        f"leave vocab_size=0, or set it to {meta['vocab_size']} at least")
prompt_ids = tokenizer.encode_ordinary(sample_prompt)
if sample_tokens and (not prompt_ids or max(prompt_ids) >= vocab_size):
    die(f"sample_prompt must be a word of tokens below vocab_size={vocab_size}, and is "
        f"{sample_prompt!r}: give another, or --sample_tokens=0", 2)
try:
    check_memory(config, batch_size, device, ranks if fsdp == "yes" else 1)
except ValueError as e:
    die(e, 2)


def windows_of(tokens):
    """How many windows of block_size tokens there are, side by side."""
    return (len(tokens) if meta["piece"] else len(tokens) - 1) // block_size


def get_batch(tokens, windows):
    """
    x, y (B, T) of those windows, y one token ahead of x, on the device. In pieces, the last token
    has nothing ahead: -1.
    """
    span = block_size if meta["piece"] else block_size + 1
    rows = np.stack([tokens[w * block_size:w * block_size + span] for w in windows])
    if meta["piece"]:
        rows = np.pad(rows.astype(np.int64), ((0, 0), (0, 1)), constant_values=-1)
    rows = torch.from_numpy(rows.astype(np.int64))  # (B, T + 1)
    if device.startswith("cuda"):
        rows = rows.pin_memory().to(device, non_blocking=True)
    rows = rows.to(device)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


@lru_cache(maxsize=2)
def epoch_order(epoch):
    """The order of the training windows in one pass: of the seed alone, so a step is a position."""
    return np.random.default_rng((seed, epoch)).permutation(windows_of(train_tokens))


def training_batch(number):
    """Batch `number`, counted in forward passes from the start of the run."""
    n = windows_of(train_tokens)
    places = range(number * batch_size, (number + 1) * batch_size)
    return get_batch(train_tokens, [epoch_order(place // n)[place % n] for place in places])


n_val = min(eval_windows, windows_of(val_tokens))
val_windows = np.linspace(0, windows_of(val_tokens) - 1, n_val).round().astype(int)


def unigram_perplexity():
    """Validation perplexity of token frequencies, each count plus one: the best without context."""
    counts = np.bincount(train_tokens[:50_000_000], minlength=vocab_size) + 1
    log_p = torch.from_numpy(np.log(counts / counts.sum())).float()
    y = torch.cat([get_batch(val_tokens, [w])[1] for w in val_windows]).cpu()
    return math.exp(-log_p[y[y >= 0]].mean().item())


# ---------------------------------------------------------------------------------------- model
torch.manual_seed(seed)
arch = f"EReg({config.name})" if entropy_reg else config.name
settings = {key: globals()[key] for key in SETTINGS}
model = GPT(config)
origin = ""
regularizer = None
if entropy_reg:
    regularizer = EntropyRegularizer(config.softmax_layers, n_head, gamma, threshold_init,
                                     reduction)
forward, regularize = spread(model, regularizer, device, compiled, fsdp == "yes")
groups = model.param_groups(weight_decay)
if entropy_reg:
    groups.append({"params": list(regularizer.parameters()), "weight_decay": 0.0})
parameters = [p for group in groups for p in group["params"]]
fused = not device.startswith("mps")
optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), fused=fused)
autocast = nullcontext()
if matmul_dtype != torch.float32:
    autocast = torch.autocast(torch.device(device).type, matmul_dtype)
# In float16 small gradients would be 0: the loss is scaled, by less after a step that overflows.
scaler = torch.amp.GradScaler(torch.device(device).type, enabled=matmul_dtype == torch.float16)
step = 0  # steps done

if checkpoint:
    if checkpoint["data_sha256"] != meta["sha256"]:
        die(f"{run.ckpt} was trained on other data than {data_dir}/{dataset} holds now: resuming "
            "needs the same bins")
    try:
        step = restore(checkpoint, model, optimizer, regularizer, scaler)
    except Exception as e:  # torch raises whatever a damaged or hostile file makes it raise
        die(f"{run.ckpt} can't be resumed from ({type(e).__name__}: {e})")
    was = saved.get("max_iters", max_iters)
    if step and max_iters != was and not lr_decay_iters:
        run.say(f"note: max_iters was {was} and is {max_iters}, which stretches the learning "
                f"rate's decay; --lr_decay_iters={was} would keep it")
    checkpoint = None  # the copies on the CPU are not needed any more
if trained:
    try:
        origin = f"starting from {init_from}: {start_from(trained, model, regularizer)}\n"
    except Exception as e:  # as above
        die(f"can't start from {init_from}: {e}")
    trained = None


def lr_at(step):
    """Learning rate of a step: linear warmup, then linear or cosine decay to min_lr."""
    total = lr_decay_iters or max_iters
    warm = math.ceil(warmup * total)
    if step < warm:
        return learning_rate * (step + 1) / warm
    left = max(0.0, 1 - (step - warm) / max(1, total - warm))  # 1 -> 0
    if lr_decay == "cosine":
        left = 0.5 * (1 - math.cos(math.pi * left))
    return min_lr + (learning_rate - min_lr) * left


def training_loss(x, y):
    """(what is minimised, cross-entropy, lambda_entropy * L_entropy) of Algorithm 1, in nats."""
    with autocast:
        _, ce, entropy = forward(x, y, return_entropy=entropy_reg)
        term = torch.zeros_like(ce)
        if entropy_reg:  # of the heads that can choose their entropy
            term = lambda_entropy * regularize(entropy[-config.softmax_layers:])
    return ce + term, ce.detach(), term.detach()


def gradients(step):
    """
    Add up the gradients of a step, from this process's share of its batches and, in the last of
    these, the others'. Returns cross-entropy, entropy term, whether another had a signal to stop.
    """
    numbers = torch.zeros(3, device=device)
    for micro in range(rank, grad_accum, ranks):
        share_gradients((forward, regularize), micro + ranks >= grad_accum)
        loss, ce, term = training_loss(*training_batch(step * grad_accum + micro))
        scaler.scale(loss * ranks / grad_accum).backward()
        numbers[:2] += torch.stack((ce, term)) / grad_accum
    numbers[2] = len(run.signals)
    return *add_up(numbers)[:2], ranks > 1 and numbers[2].item() > 0


@torch.no_grad()
def evaluate():
    """Mean cross-entropy (nats) and mean entropy per head (L, H) over the validation windows."""
    model.eval()
    ce, entropy = 0.0, torch.zeros(n_layer, n_head, device=device)
    for i in range(0, n_val, ranks * batch_size):
        mine = val_windows[i:i + ranks * batch_size][rank::ranks]
        # FSDP needs every process in every pass: one that has no window left takes the first again.
        x, y = get_batch(val_tokens, mine if len(mine) else val_windows[:1])
        with autocast:
            _, loss, e = model(x, y, return_entropy=True)
        ce += loss.item() * len(mine) / n_val
        run.still(f"evaluating, window {i} of {n_val}")
        entropy += e.float().mean((1, 3)) * len(mine) / n_val
        if run.signals and ranks == 1:
            stop()
    model.train()
    sums = add_up(torch.cat((entropy.flatten(), entropy.new_tensor([ce])))).cpu()
    return sums[-1].item(), sums[:-1].view(n_layer, n_head)


def save():
    """Write ckpt.pt, whole or not at all."""
    state = gathered(dict(model=model.state_dict(), optimizer=optimizer.state_dict(),
                          regularizer=regularizer.state_dict() if regularizer else {}))
    if rank == 0:
        os.makedirs(out_dir, exist_ok=True)  # it may have been moved away since the start
        save_checkpoint(run.ckpt, model, **state, step=step, settings=settings,
                        rng=torch.get_rng_state(), scaler=scaler.state_dict(),
                        data_sha256=meta["sha256"], tokenizer=spec)
    wait_for_all()


def stop():
    """Save, say how to go on, and exit with the status that stands for the signal."""
    save()
    run.say(f"saved step {step} to {run.ckpt}; go on with --init_from=resume --out_dir={out_dir}",
            sys.stderr)
    sys.exit(128 + (*run.signals, signal.SIGTERM)[0])


def provenance():
    """What the last record of a run tells of how it came about, whichever way it ended."""
    return dict(arch=arch, tokens=step * tokens_per_step, parameters=n_parameters,
                settings=settings, torch=torch.__version__, data_sha256=meta["sha256"],
                machine=f"{platform.processor() or platform.machine()}, {machine}")


def diverged(what, x, y):
    """Log and say that `what` is not finite, with each layer's entropy; exit with status 3."""
    model.eval()
    with torch.no_grad(), autocast:
        layers = model(x, y, return_entropy=True)[2].float().mean((1, 2, 3)).tolist()
    finite = [l for l in range(n_layer) if math.isfinite(layers[l])]
    lowest = min(finite, key=lambda l: layers[l], default=0)
    run.log("diverged", step, what=f"the {what} is not finite", **provenance(),
            entropy_by_layer=[layers[l] if l in finite else None for l in range(n_layer)])
    advice = "Try a lower learning_rate, a longer warmup or --grad_clip=1"
    if config.name.split(",")[0] == "SM":
        advice = ("This is what the paper expects of softmax alone: entropy collapse in deep "
                  "layers (its table says NaN)")
    run.say(f"diverged: the {what} is not finite at step {step}. Entropy by layer {nats(layers)} "
            f"nats (at most {max_causal_entropy(block_size):.2f}): lowest in layer {lowest}, "
            f"{layers[lowest]:.2f}. {advice}. {run.what_is_left()}.", sys.stderr)
    wait_for_all()
    sys.exit(3)


def nats(values):
    return " ".join(f"{v:.2f}" for v in values)


def perplexity(ce):
    """(exp of a cross-entropy in nats, infinity where that is no number any more; as text)."""
    value = math.exp(ce) if ce < 700 else math.inf
    return value, f"{value:.2f}" if value < 1e6 else f"{value:.1e}"


# ---------------------------------------------------------------------------------------- the loop
try:
    run.open(resumed_at=step if init_from == "resume" else None)
except OSError as e:
    die(f"can't write to {out_dir}: {e}")
try:
    run.track_with(log_to if rank == 0 else "", arch, settings)
except Exception as e:  # not installed, no login, no network
    die(f"log_to={log_to}: {e}; pip install {log_to}, or leave log_to empty")
unigram = unigram_perplexity()
n_parameters = sum(p.numel() for p in model.parameters())
ops = ", ".join(f"{kind} {n} x {a}x{b}" for kind, (n, (a, b)) in model.nonlinear_ops().items())
flops = ", ".join(f"{part} {n / 1e9:.2f}B" for part, n in model.flops().items())
run.say(f"{origin}{arch}: {n_parameters / 1e6:.2f}M parameters, {n_layer} layers, {n_head} heads, "
        f"width {n_embd}, context {block_size}\n"
        f"nonlinear ops: {ops}; FLOPs a forward pass: {flops}\n"
        f"data {dataset}: {len(train_tokens):,} training tokens, vocabulary {vocab_size}, sha256 "
        f"{meta['sha256'][:16]}; validation perplexity of a unigram model {unigram:.1f}\n"
        f"{machine}{f', {ranks} processes' if ranks > 1 else ''}\n"
        f"{f'resuming at step {step} of' if init_from == 'resume' else 'training'} {max_iters} "
        f"steps of {grad_accum * batch_size} x {block_size} tokens")

tokens_per_step = grad_accum * batch_size * block_size
started, first_step = time.time(), step
seconds, logged = 0.0, (0.0, step)  # of training alone; the same and the step at the last log line
while True:
    if step % eval_interval == 0 or step >= max_iters or step == first_step:
        val_ce, head_entropy = evaluate()
        if not math.isfinite(val_ce):
            diverged("validation loss", *training_batch(step * grad_accum))
        val_ppl, readable = perplexity(val_ce)
        layers = head_entropy.mean(1).tolist()
        run.say(f"eval  step {step:>6}  val ce {val_ce:.4f}  perplexity {readable}  "
                f"entropy by layer {nats(layers)} nats")
        run.log("eval", step, val_ce=val_ce, val_ppl=val_ppl,
                head_entropy=[[round(e, 4) for e in heads] for heads in head_entropy.tolist()])
        save()
        if keep_best and rank == 0:
            losses = [r["val_ce"] for r in read_log(run.path) if r["event"] == "eval"]
            if val_ce == min(losses):
                run.keep_best()
    if step >= max_iters:
        break

    t0 = time.time()
    for group in optimizer.param_groups:
        group["lr"] = lr_at(step)
    ce, term, stopping = gradients(step)
    scaler.unscale_(optimizer)
    norm = clip(parameters, grad_clip or math.inf)
    # This is the one look a step for which the host waits for a GPU.
    if not norm.isfinite() and scaler.get_scale() <= 1:
        what = "gradient" if (ce + term).isfinite() else "loss"
        diverged(what, *training_batch(step * grad_accum))
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    step += 1
    seconds += time.time() - t0

    if step % log_interval == 0 or step == max_iters:
        loss = (ce + term).item()
        parts = f" (ce {ce:.4f}, entropy term {term:.4f})" if entropy_reg else ""
        rate = (step - logged[1]) * tokens_per_step / (seconds - logged[0])
        left = (max_iters - step) * tokens_per_step / rate
        logged = seconds, step
        run.say(f"step {step:>6}/{max_iters}  loss {loss:.4f}{parts}  lr {lr_at(step - 1):.2e}  "
                f"grad {norm:.2f}  {rate:,.0f} tok/s  {left // 60:.0f}m{left % 60:02.0f}s left")
        run.log("step", step, loss=loss, ce=ce.item(), entropy_term=term.item(),
                grad_norm=norm.item(), lr=lr_at(step - 1), tokens_per_s=rate)
    run.still(f"step {step:>6}/{max_iters}")
    if stopping or ranks == 1 and run.signals:
        stop()

# ------------------------------------------------------------------------------------- the result
rate = (step - first_step) * tokens_per_step / seconds if seconds else 0.0
run.say(f"{arch}: validation perplexity {readable} (unigram {unigram:.1f}) after "
        f"{step * tokens_per_step:,} tokens; {rate:,.0f} tok/s, {time.time() - started:.0f} s; "
        f"{run.ckpt}, {run.path}")
text = ""
if sample_tokens:
    generator = torch.Generator(device).manual_seed(seed)
    text = sample(model.eval(), tokenizer, sample_prompt, sample_tokens, 0.8, 50, generator)
    run.say(f"--- a sample\n{text}\n---")
if rank:
    sys.exit()
run.log("done", step, val_ce=val_ce, val_ppl=val_ppl, unigram_ppl=unigram, tokens_per_s=rate,
        entropy_by_layer=layers, sample=text, **provenance())
if plot:
    try:
        kept = load_checkpoint(run.ckpt)  # whole, also where this process has a shard
        seen = describe(arch, block_size, head_entropy, read_log(run.path))
        seen |= learned(GPT.from_checkpoint(kept), kept["regularizer"].get("threshold"))
        run.say("\n".join(diagnosis(seen)))
        draw([seen], run.picture)
        run.say(run.picture)
    except (ImportError, OSError, ValueError) as e:
        run.say(f"no picture of the entropies: {e}", sys.stderr)
