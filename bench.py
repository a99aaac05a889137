"""
How fast this machine trains: tokens/s, milliseconds a step, model FLOPs against the machine's own
matmul peak, peak memory.

    python bench.py                     # the default scale, T = 128, 512, 2048
    python bench.py --n_layer=12 --n_head=12 --n_embd=768 --vocab_size=50304 --tokens=32768

A step is train.py's: forward, backward, clipping, fused AdamW; on random tokens. The cases of one
T run in turn, so that a ratio between them is of one run. "EReg, explicit" makes attention and then
its entropy, as the textbook does; "EReg" is what model.py does. On a CPU a profile of a few steps
then tells where the time goes.
"""
from configurator import configure, die, end_on_signals, one_of, within

end_on_signals()

import os
import platform
import statistics
import time
from contextlib import nullcontext
from json import dumps

os.environ.setdefault("KINETO_LOG_LEVEL", "3")  # else the profiler reports each start and stop
import torch

from draw import write_whole
from entropy import EntropyRegularizer, explicit_attention_with_entropy
from machine import check_memory, choose_machine
from model import GPT, GPTConfig

block_sizes = "128,512,2048"  # context lengths
tokens = 2048  # a step; at least one sequence
rounds = 30  # timed steps of every case, in turn
n_layer = 6  # L
n_head = 6  # H
n_embd = 192  # d, the width
vocab_size = 4096  # V
device = "auto"  # auto | cpu | cuda
dtype = "auto"  # auto | float32 | bfloat16: type of the matrix products
compile = "auto"  # auto (on CUDA) | yes | no
json = ""  # write the rows here as well

SCALED = dict(use_layernorm=False, use_gelu=False, fuse_ffn=True, learnable_ffn_scale=True)
WARM = SCALED | {"learnable_temperature": True}
CASES = {"SM+LN+G": {}, "SM+ScFuFFN": SCALED, "SM(t)+ScFuFFN": WARM, "EReg, explicit": WARM,
         "EReg": WARM}
WITHOUT_ENTROPY = "SM(t)+ScFuFFN"  # what EReg's step is compared with
WARM_UP = 3  # steps of every case that are not timed
LAMBDA_ENTROPY = 0.164  # train.py's
PROFILED = 5  # steps
PARTS = {  # what the names of PyTorch's operations have in them; the first that fits counts
    "cross-entropy": ("log_softmax", "nll_loss"), "attention": ("attention", "bmm", "softmax"),
    "products by weights": ("mm",), "GELU": ("gelu",), "LayerNorm": ("layer_norm",),
    "AdamW": ("adamw",)}


def textbook(q, k, v):
    """attention_with_entropy() the explicit way, in float32."""
    return explicit_attention_with_entropy(q.float(), k.float(), v.float())


def timed(function):
    """Seconds of a call, the GPU's work included."""
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def reset_peak_memory():
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")


def peak_memory():
    """Bytes since the last reset: the GPU's, or the whole process's on Linux."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))


def matmul_peak():
    """FLOP/s of one large square product, the best of many."""
    n = 8192 if device == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=matmul_dtype)
    return 2 * n**3 / min(timed(lambda: a @ a) for _ in range(100))


def make_step(case, T):
    """(one training step, its tokens, its model FLOPs: 6 N + 12 L T d a token)."""
    torch.manual_seed(0)
    config = GPTConfig(block_size=T, vocab_size=vocab_size, n_layer=n_layer, n_head=n_head,
                       n_embd=n_embd, **CASES[case])
    model = GPT(config).to(device)
    if case == "EReg, explicit":
        for block in model.blocks:
            block.attn.with_entropy = textbook
    parameters, regularizer = [*model.parameters()], None
    if case.startswith("EReg"):
        regularizer = EntropyRegularizer(n_layer, n_head).to(device)
        parameters += regularizer.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    forward = torch.compile(model) if compiled else model
    x = torch.randint(vocab_size, (max(1, tokens // T), T), device=device)
    autocast = nullcontext()
    if matmul_dtype == torch.bfloat16:
        autocast = torch.autocast(device, torch.bfloat16)

    def step():
        with autocast:
            _, loss, e = forward(x, x, return_entropy=regularizer is not None)
            if regularizer:
                loss = loss + LAMBDA_ENTROPY * regularizer(e)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    N = sum(p.numel() for p in model.parameters()) - model.wpe.weight.numel()
    return step, x.numel(), x.numel() * (6 * N + 12 * n_layer * T * n_embd)


def profile(step):
    """{part of PARTS, or "other": its share of the processor's time in a step}."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(PROFILED):
            step()
    spent = dict.fromkeys([*PARTS, "other"], 0)
    for e in profiler.key_averages():
        found = [part for part, names in PARTS.items() if any(name in e.key for name in names)]
        spent[(found or ["other"])[0]] += e.self_cpu_time_total
    return {part: time / sum(spent.values()) for part, time in spent.items()}


def measure(T):
    """Rows of the table for context length T: every case, step by step in turn."""
    cases = {case: make_step(case, T) for case in CASES}
    seconds, memory = {case: [] for case in CASES}, {}
    for _ in range(WARM_UP + rounds):
        for case, (step, _, _) in cases.items():
            reset_peak_memory()
            seconds[case].append(timed(step))
            memory[case] = peak_memory()
    for case, (_, n, flops) in cases.items():
        own, other = seconds[case][WARM_UP:], seconds[WITHOUT_ENTROPY][WARM_UP:]
        s, ratio = statistics.median(own), None
        if case.startswith("EReg"):
            ratio = statistics.median(a / b for a, b in zip(own, other))
        yield {"case": case, "T": T, "tokens_per_s": n / s, "ms_per_step": 1e3 * s,
               "share_of_peak": flops / s / peak, "peak_memory_bytes": memory[case],
               "step_against_no_entropy": ratio, "seconds": own,
               "parts": profile(cases[case][0]) if device == "cpu" else {}}


def line(r):
    ratio = f"{r['step_against_no_entropy']:.2f}x" if r["step_against_no_entropy"] else ""
    return (f"{r['case']:<16}{r['T']:>6}{r['tokens_per_s']:>12,.0f}{r['ms_per_step']:>12.1f}"
            f"{r['share_of_peak']:>10.1%}{r['peak_memory_bytes'] / 1e9:>11.2f}{ratio:>20}")


configure(globals())
one_of(globals(), device=("auto", "cpu", "cuda"), dtype=("auto", "float32", "bfloat16"),
       compile=("auto", "yes", "no"))
within(globals(), tokens=(1, 2**30), rounds=(1, 10**6))
if device == "auto" and not torch.cuda.is_available():
    device = "cpu"  # Apple's GPU has no peak memory to tell
if device == "cpu" and not os.path.exists("/proc/self/clear_refs"):
    die("peak memory is told by Linux or by a CUDA GPU: run bench.py on either", 2)
try:
    device, matmul_dtype, compiled, machine = choose_machine(device, dtype, compile, tokens,
                                                             n_embd)
    lengths = [int(T) for T in block_sizes.split(",")]
    for T in lengths:
        config = GPTConfig(T, vocab_size, n_layer, n_head, n_embd)
        check_memory(config, max(1, tokens // T), device)
except ValueError as e:
    die(e, 2)
try:
    if json:  # what can't be written is found before the measurement
        open(json, "a").close()
        if not os.path.getsize(json):
            os.remove(json)
except OSError as e:
    die(f"json must be a file in a folder that exists: can't write {json}: {e.strerror}", 2)
torch._dynamo.config.recompile_limit = 64  # beyond its default of 8 it goes on uncompiled, silently
peak = matmul_peak()
not_on_gpu = "" if device == "cuda" else ", not run on a GPU"
machine = (f"{platform.machine()}, {machine}, torch {torch.__version__}{not_on_gpu}, "
           f"peak {peak / 1e12:.2f} TFLOP/s")
print(f"{machine}; {n_layer} layers, {n_head} heads, width {n_embd}, vocabulary {vocab_size}")
print(f"{'case':<16}{'T':>6}{'tokens/s':>12}{'ms a step':>12}{'of peak':>10}{'memory GB':>11}"
      f"{'against no entropy':>20}")
rows = []
for T in lengths:
    for row in measure(T):
        rows.append(row)
        print(line(row), flush=True)
if device == "cpu":
    parts = [*PARTS, "other"]
    print(f"\n{'time, %':<16}{'T':>6}   {'   '.join(parts)}")
    for r in rows:
        shares = "   ".join(f"{100 * r['parts'][part]:>{len(part)}.0f}" for part in parts)
        print(f"{r['case']:<16}{r['T']:>6}   {shares}")
if json:
    shape = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=vocab_size,
                 tokens=tokens)
    told = {"machine": machine, "settings": shape, "rows": rows}
    try:
        write_whole(json, dumps(told, indent=1).encode())
    except OSError as e:
        die(e)
