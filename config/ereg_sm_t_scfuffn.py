# EReg(SM(t)+ScFuFFN): the paper's proposal, SM(t)+ScFuFFN with entropy regularization (Algorithm 1)
use_layernorm = False
use_gelu = False
fuse_ffn = True
learnable_ffn_scale = True
learnable_temperature = True
entropy_reg = True
