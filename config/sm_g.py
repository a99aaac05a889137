# SM+G: GELU kept, no LayerNorm
use_layernorm = False
use_gelu = True
