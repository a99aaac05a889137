# SM+ScFFN: softmax alone, learnable scales alpha and beta around the FFN (eq. 8)
use_layernorm = False
use_gelu = False
learnable_ffn_scale = True
