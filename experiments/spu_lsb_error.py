"""
Why engine.py leaves SPU's cheetah_2pc_config.enable_mul_lsb_error off, though its squares and
products take a quarter fewer bytes: some ciphertexts then come back undecryptable, and all 8192
products in one are wrong beyond use, silently.

    python experiments/spu_lsb_error.py --seconds=900 --lsb_error=True

starts two processes and writes results/spu_lsb_error_True.json.

The server answers with one modulus q of 60 bits, of which SPU drops low bits:
2^(log2 q - log2 t - 2) are lost beside noise of standard deviation 339 (the re-randomisation) and
flooding (2^9 or 2^11), where decryption stands q / 2t. For plain moduli t of 47 bits (setting on)
that leaves 4096 - 2048 - 512 = 4.5 standard deviations in the worst case: 6.5e-9 a coefficient,
1.6e-4 for the three ciphertexts of 8192 products. For t of 45 bits (off) it is 18, and never.
(src/libspu/mpc/cheetah: arith/simd_mul_prot.cc, rlwe/utils.cc, arith/cheetah_mul.cc)
"""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from configurator import configure, end_on_signals  # noqa: E402

end_on_signals()
import numpy as np  # noqa: E402

lsb_error = True  # the setting
seconds = 900     # how long to go on
n = 2**20         # squares a call
rank = -1         # -1: start both parties
addresses = ""    # of the parties, comma-separated

WRONG = 0.01  # an error that rounding never makes


def both():
    """A process for either party. Returns the client's exit status."""
    from private.meet import free_addresses
    ends = f"--addresses={','.join(free_addresses(2))}"
    command = [sys.executable, __file__, *sys.argv[1:], ends]
    client, server = (subprocess.Popen([*command, f"--rank={r}"]) for r in (0, 1))
    status = client.wait()
    server.kill()
    return status


def party():
    """One party: square shared random numbers, call after call; the client counts those wrong."""
    import spu

    from private.engine import CLIENT, SERVER, Engine
    from private.nonlinear import CIPHERTEXT
    engine = Engine(rank, addresses.split(","), "cheetah", timeout=60, connect_timeout=20)
    ring = engine.rings[64]
    ring.config.cheetah_2pc_config.enable_mul_lsb_error = lsb_error
    ring.runtime = spu.Runtime(engine.link, ring.config)
    rng = np.random.default_rng(0)
    started = time.time()
    wrong = []
    stop = False
    while not stop:
        x = rng.uniform(-4, 4, n).astype(np.float32)
        mask = rng.normal(size=n).astype(np.float32)
        a = engine.put((n,), CLIENT, mask)
        b = engine.put((n,), SERVER, x - mask)
        y = engine.reveal(engine.op("square", square_of_sum, a, b))
        if rank == CLIENT:
            calls = len(engine.costs)
            bad = np.flatnonzero(np.abs(y - x * x) > WRONG)
            if len(bad):  # half of a call's squares are one party's to answer, half the other's
                blocks = sorted({int(i) for i in bad // CIPHERTEXT})
                wrong.append({"call": calls, "wrong": len(bad), "blocks of 8192": blocks,
                              "largest": float(np.abs(y).max())})
            traffic = sum(cost[0] for _, _, cost in engine.costs)
            result = {"lsb_error": lsb_error, "squares": calls * n,
                      "blocks of 8192": calls * n // CIPHERTEXT,
                      "bytes_per_square": traffic / (calls * n), "wrong": wrong,
                      "seconds": time.time() - started}
            print(json.dumps(result), file=engine.terminal, flush=True)
            path = HERE.parent / "results" / f"spu_lsb_error_{lsb_error}.json"
            path.write_text(json.dumps(result, indent=1) + "\n")
        clock = engine.link.all_gather(str(time.time() - started))[0]  # the client's
        stop = float(clock) > seconds
    if rank == SERVER:  # what it sent last may be on its way: both() ends it
        time.sleep(60)
    os._exit(0)


def square_of_sum(a, b):
    from private.nonlinear import square
    return square(a + b)


configure(globals())
if rank < 0:
    sys.exit(both())
party()
