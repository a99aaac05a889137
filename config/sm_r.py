# SM+R: ReLU kept, no LayerNorm
use_layernorm = False
use_gelu = False
use_relu = True
