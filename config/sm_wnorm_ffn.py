# SM+WNorm(FFN): softmax alone, weight normalization on the FFN's linears (Tables 4 and 5)
use_layernorm = False
use_gelu = False
weight_norm = "ffn"  # the other columns of Table 4: qk, qk+ffn, qkv+ffn, qkvo+ffn
