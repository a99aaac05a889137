# SM(t)+ScFuFFN: SM+ScFuFFN with learnable softmax temperatures (eq. 9)
use_layernorm = False
use_gelu = False
fuse_ffn = True
learnable_ffn_scale = True
learnable_temperature = True
