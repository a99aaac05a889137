# SM+LN: LayerNorm kept, no activation in the FFN
use_layernorm = True
use_gelu = False
