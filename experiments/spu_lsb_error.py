"""
Why engine.py leaves SPU's cheetah_2pc_config.enable_mul_lsb_error off, though its squares and products take a quarter fewer
bytes: some ciphertexts then come back undecryptable, and all 8192 products in one are wrong beyond use, silently.

    python experiments/spu_lsb_error.py --seconds=900 --lsb_error=True    # two processes; writes spu_lsb_error_True.json here

The server answers with one modulus q of 60 bits, of which SPU drops low bits: 2^(log2 q - log2 t - 2) are lost beside
noise of standard deviation 339 (the re-randomisation) and flooding (2^9 or 2^11), where decryption stands q / 2t. For plain
moduli t of 47 bits (setting on) that leaves 4096 - 2048 - 512 = 4.5 standard deviations in the worst case: 6.5e-9 a
coefficient, 1.6e-4 for the three ciphertexts of 8192 products. For t of 45 bits (off) it is 18, and never.
(src/libspu/mpc/cheetah: arith/simd_mul_prot.cc, rlwe/utils.cc, arith/cheetah_mul.cc)
"""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from configurator import configure  # noqa: E402
from private.engine import Engine, free_addresses  # noqa: E402
from private.nonlinear import square  # noqa: E402

lsb_error = True   # the setting
seconds = 900      # how long to go on
n = 2**20          # squares a call
rank = -1          # -1: start both
addresses = ""

configure(globals())
if rank < 0:
    both = ",".join(free_addresses(2))
    parties = [subprocess.Popen([sys.executable, __file__, *sys.argv[1:], f"--rank={r}", f"--addresses={both}"]) for r in (0, 1)]
    sys.exit(int(any([p.wait() for p in parties])))
party, rng = Engine(rank, addresses.split(","), "cheetah", 60, 20), np.random.default_rng(0)
party.config.cheetah_2pc_config.enable_mul_lsb_error = lsb_error
party.runtime, started, squares, wrong = party.spu.Runtime(party.link, party.config), time.time(), 0, []
cost, stop = 0, False
while not stop:
    x, mask = rng.uniform(-4, 4, n).astype(np.float32), rng.normal(size=n).astype(np.float32)
    party.put("a", (n,), 0, mask)
    party.put("b", (n,), 1, x - mask)
    _, one = party.run("square", lambda a, b: square(a + b), {k: ((n,), np.float32) for k in "ab"}, "y")
    y, squares, cost = party.reveal("y"), squares + n, cost + one[0]
    if rank == 0:
        bad = np.flatnonzero(np.abs(y - x * x) > 0.01)
        if len(bad):  # half of a call's squares are one party's to answer, the other half the other's
            wrong.append({"call": squares // n, "wrong": len(bad), "blocks of 8192": sorted({int(i) for i in bad // 8192}), "largest": float(np.abs(y).max())})
        result = {"lsb_error": lsb_error, "squares": squares, "blocks of 8192": squares // 8192, "bytes_per_square": cost / squares,
                  "wrong": wrong, "seconds": time.time() - started}
        print(json.dumps(result), file=party.terminal, flush=True)
        (HERE.parent / "results" / f"spu_lsb_error_{lsb_error}.json").write_text(json.dumps(result, indent=1) + "\n")
    stop = party.link.all_gather(str(time.time() - started > seconds))[0] == "True"  # the client's clock
os._exit(0)
