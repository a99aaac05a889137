# SM+LN+G: GPT-2 with all its nonlinearities, the baseline (what train.py does without a config)
use_layernorm = True
use_gelu = True
