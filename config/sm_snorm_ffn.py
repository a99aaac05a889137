# SM+SNorm(FFN): softmax alone, spectral normalization on the FFN's linears (Tables 4 and 5)
use_layernorm = False
use_gelu = False
spectral_norm = "ffn"  # the other columns of Table 4: qk, qk+ffn, qkv+ffn, qkvo+ffn
