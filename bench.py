"""
How fast this machine trains: tokens/s, milliseconds a step, model FLOPs against the machine's own matmul peak, peak memory.

    python bench.py                                            # the default scale, T = 128, 512, 2048
    python bench.py --n_layer=12 --n_head=12 --n_embd=768 --vocab_size=50304 --tokens=32768 --json=results/speed_gpu.json   # GPT-2 small

A step is train.py's: forward, backward, clipping, fused AdamW; on random tokens. The cases of one T run in turn, so that a ratio
between them is of one run. "explicit" is attention and then its entropy, by the textbook; without it, what model.py does.
"""
import os
import platform
import statistics
import time
from contextlib import nullcontext
from json import dump

import torch

import entropy
import model as gpt
from configurator import configure, die, one_of

block_sizes = "128,512,2048"  # context lengths
tokens = 2048        # a step; at least one sequence
rounds = 30          # timed steps of every case, in turn
n_layer = 6
n_head = 6
n_embd = 192
vocab_size = 4096
device = "auto"      # auto | cpu | cuda
dtype = "auto"       # auto (bfloat16 on CUDA, and on a CPU with AMX or AVX512-BF16) | float32 | bfloat16
compile = "auto"     # auto (on CUDA) | yes | no
json = ""            # write the rows here as well

SCALED = dict(use_layernorm=False, use_gelu=False, fuse_ffn=True, learnable_ffn_scale=True)
WARM = dict(SCALED, learnable_temperature=True)
CASES = {"SM+LN+G": {}, "SM+ScFuFFN": SCALED, "SM(t)+ScFuFFN": WARM, "EReg, explicit": WARM, "EReg": WARM}


def timed(function):
    """Seconds of a call, the GPU's work included."""
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(reset=False):
    """Bytes: the GPU's most since the last reset, or the process's on Linux, the models of all cases included."""
    if device == "cuda":
        return torch.cuda.reset_peak_memory_stats() if reset else torch.cuda.max_memory_allocated()
    with open("/proc/self/clear_refs" if reset else "/proc/self/status", "w" if reset else "r") as f:
        return f.write("5") if reset else 1024 * next(int(line.split()[1]) for line in f if line.startswith("VmHWM"))


def make_step(case, T):
    """(one training step, its tokens, its model FLOPs: 6 N + 12 L T d a token)."""
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig(block_size=T, vocab_size=vocab_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd, **CASES[case])).to(device)
    regularizer = entropy.EntropyRegularizer(n_layer, n_head).to(device) if case.startswith("EReg") else None
    parameters = [*model.parameters(), *(regularizer.parameters() if regularizer else ())]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    forward = torch.compile(model) if compile == "yes" else model
    attention = (lambda q, k, v, _: entropy.explicit_attention_with_entropy(q.float(), k.float(), v.float())) if "explicit" in case else entropy.attention_with_entropy
    x = torch.randint(vocab_size, (max(1, tokens // T), T), device=device)

    def step():
        gpt.attention_with_entropy = attention
        with torch.autocast(device, torch.bfloat16) if matmul_dtype == torch.bfloat16 else nullcontext():
            _, loss, e = forward(x, x, return_entropy=bool(regularizer))
            loss = loss + 0.164 * regularizer(e) if regularizer else loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    N = sum(p.numel() for p in model.parameters()) - model.wpe.weight.numel()
    return step, x.numel(), x.numel() * (6 * N + 12 * n_layer * T * n_embd)


configure(globals())
device = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
if device not in ("cpu", "cuda") or device == "cuda" and not torch.cuda.is_available():
    die(f"device {device!r} can't be used here: cpu or, with an NVIDIA GPU, cuda", 2)
one_of(globals(), dtype=("auto", "float32", "bfloat16"), compile=("auto", "yes", "no"))
try:
    lengths = [int(T) for T in block_sizes.split(",")]
    gpt.GPTConfig(min(lengths), vocab_size, n_layer, n_head, n_embd)
except ValueError as e:
    die(f"--block_sizes={block_sizes} or the model's shape can't be: {e}", 2)
if rounds < 1 or json and (os.path.isdir(json) or not os.path.isdir(os.path.dirname(json) or ".")):
    die("rounds must be at least 1, and json a file in a folder that exists", 2)
matmul_dtype = torch.bfloat16 if dtype == "bfloat16" or dtype == "auto" and (device == "cuda" or gpt.cpu_bf16_unit()) else torch.float32
compile = "yes" if compile == "yes" or compile == "auto" and device == "cuda" else "no"
torch.set_float32_matmul_precision("high")
torch._dynamo.config.recompile_limit = 64  # beyond its default of 8 it goes on uncompiled, and says nothing
a = torch.randn((n := 8192 if device == "cuda" else 1024), n, device=device, dtype=matmul_dtype)
peak = 2 * n**3 / min(timed(lambda: a @ a) for _ in range(100))
name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads, not run on a GPU"
machine = f"{name}, torch {torch.__version__}, {str(matmul_dtype)[6:]} matmuls, {'compiled' if compile == 'yes' else 'eager'}, peak {peak / 1e12:.2f} TFLOP/s"
print(f"{machine}; {n_layer} layers, {n_head} heads, width {n_embd}, vocabulary {vocab_size}\n"
      f"{'case':<16}{'T':>6}{'tokens/s':>12}{'ms a step':>12}{'of peak':>10}{'memory GB':>11}{'against no entropy':>20}")
rows = []
for T in lengths:
    cases, memory, seconds = {case: make_step(case, T) for case in CASES}, {}, {case: [] for case in CASES}
    for _ in range(rounds + 3):  # the first three warm up
        for case, (step, *_) in cases.items():
            peak_memory(reset=True)
            seconds[case].append(timed(step))
            memory[case] = peak_memory()
    for case, (_, n, flops) in cases.items():
        s = statistics.median(seconds[case][3:])
        ratio = statistics.median(a / b for a, b in zip(seconds[case][3:], seconds["SM(t)+ScFuFFN"][3:])) if case.startswith("EReg") else None
        rows.append({"case": case, "T": T, "tokens_per_s": n / s, "ms_per_step": 1e3 * s, "share_of_peak": flops / s / peak,
                     "peak_memory_bytes": memory[case], "step_against_no_entropy": ratio, "seconds": seconds[case][3:]})
        print(f"{case:<16}{T:>6}{n / s:>12,.0f}{1e3 * s:>12.1f}{flops / s / peak:>10.1%}{memory[case] / 1e9:>11.2f}"
              f"{f'{ratio:.2f}x' if ratio else '':>20}", flush=True)
if json:
    with open(json, "w") as f:
        dump({"machine": machine, "settings": {k: globals()[k] for k in ("n_layer", "n_head", "n_embd", "vocab_size", "tokens")}, "rows": rows}, f, indent=1)
