# SM+ScFuFFN: softmax only, the FFN one d x d matrix, learnable scales alpha and beta (eq. 8)
use_layernorm = False
use_gelu = False
fuse_ffn = True
learnable_ffn_scale = True
