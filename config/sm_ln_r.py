# SM+LN+R: GPT-2 with ReLU for GELU, the other baseline
use_layernorm = True
use_gelu = False
use_relu = True
