"""What the machine is and can do: device, type of the matrix products, torch.compile, memory."""
import ctypes
import math
import os
import shutil
import subprocess
import time

import torch
import torch.distributed as dist


def choose_device(name="auto"):
    """`name`, or the fastest device there is for "auto". Raises ValueError if it can't be used."""
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        if torch.cuda.is_available():
            name = "cuda"
    try:
        torch.zeros(1, device=name)
    except Exception as e:  # torch raises AssertionError, RuntimeError or NotImplementedError
        raise ValueError(f"device {name!r} can't be used: {str(e).splitlines()[0]}") from e
    return name


def matmul_seconds(dtype, rows, d):
    """Seconds of one product (rows, d) x (d, 4 d), an FFN's, on the CPU."""
    a = torch.ones(rows, d, dtype=dtype)
    b = torch.ones(d, 4 * d, dtype=dtype)
    start = time.perf_counter()
    a @ b
    return time.perf_counter() - start


def bf16_is_faster(rows, d):
    """
    (whether products of these shapes are faster in bfloat16 on this CPU, a sentence with both
    speeds). It is measured, as on some processors bf16 instructions are slower than float32's: in
    turn, and the best of each, as others use the machine too. On a CPU without such instructions a
    product may take seconds, so that two turns are enough; the first has oneDNN's set-up in it.
    Processes that train together take the first one's answer.
    """
    rows, d = min(rows, 512), min(d, 512)  # larger ones are as fast, and take long
    best = {torch.float32: math.inf, torch.bfloat16: math.inf}
    for turn in range(10):
        for dtype in best:
            best[dtype] = min(best[dtype], matmul_seconds(dtype, rows, d))
        if turn and best[torch.bfloat16] > 10 * best[torch.float32]:
            break
    wide, narrow = (2 * rows * d * 4 * d / seconds / 1e12 for seconds in best.values())
    answer = [narrow > wide, f"{wide:.2f} TFLOP/s in float32, {narrow:.2f} in bf16"]
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    return answer


def choose_machine(device, dtype, compile, rows, d):
    """
    (device, type of the matrix products, whether to compile, a sentence that says so) for the
    settings of train.py that have these names, and products of (rows, d) by (d, 4 d). Raises
    ValueError if the device can't be used.
    """
    device = choose_device(device)
    kind = torch.device(device).type
    narrow, why = dtype == "bfloat16", "bf16 untested there"
    if kind == "cuda":
        if dtype == "auto":
            narrow = torch.cuda.get_device_capability(device) >= (8, 0)
        why = torch.cuda.get_device_name(device)
        if dtype != "float32":
            torch.set_float32_matmul_precision("high")  # TF32 where float32 is left
    elif kind == "cpu":
        keep_memory()
        why = f"{torch.get_num_threads()} threads"
        if dtype == "auto":
            narrow, speeds = bf16_is_faster(rows, d)
            why += f", {speeds}"
    matmul_dtype = torch.bfloat16 if narrow else torch.float32
    if dtype == "float16":
        matmul_dtype = torch.float16
    compiled = compile == "yes" or compile == "auto" and kind == "cuda"
    how = "torch.compile" if compiled else "eager"
    told = f"device {device} ({why}), {str(matmul_dtype).removeprefix('torch.')} matmuls, {how}"
    return device, matmul_dtype, compiled, told


def keep_memory():
    """Have glibc reuse freed memory rather than give it back, which saves a CPU run some time."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # not glibc
    mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep up to 2 GB
    mallopt(-2, 2**28)  # M_TOP_PAD: grow by 256 MB at once


def check_memory(config, batch_size, device, shards=1):
    """
    Raise ValueError if not even the weights with their gradients and AdamW's two moments, or one of
    so many shards of these, and the logits of one batch fit into the device's memory.
    """
    c = config
    weights = c.n_layer * c.n_embd**2 * (5 if c.fuse_ffn else 12)  # Q, K, V, O and the FFN
    weights -= (c.n_layer - c.softmax_layers) * 2 * c.n_embd**2  # which have no Q and K
    weights += (c.vocab_size + c.block_size) * c.n_embd
    logits = batch_size * c.block_size * c.vocab_size
    least = 4 * (4 * weights / shards + logits)  # of 4 bytes each
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if torch.device(device).type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    if least > memory:
        raise ValueError(f"n_layer={c.n_layer}, n_embd={c.n_embd} and batch_size={batch_size} take "
                         f"{least / 1e9:,.0f} GB at least, and {device} has {memory / 1e9:,.0f}")


def machine_and_commit():
    """What numbers are made by: the processor's name, and git's commit if there is one."""
    names = [""]
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            names = [line.partition(":")[2].strip() for line in f if line.startswith("model name")]
    commit = ""
    if shutil.which("git"):
        here = os.path.dirname(os.path.abspath(__file__))
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True,
                                text=True).stdout.strip()
    return {"processor": names[0] if names else "", "cores": os.cpu_count(), "commit": commit}
