# SM: softmax alone, nothing to hold it together. At the paper's size it diverges (NaN): that is its finding;
# see README.md for a size and schedule at which it does so in a minute.
use_layernorm = False
use_gelu = False
