# SM: softmax alone, nothing to hold it together. The paper finds that it diverges (NaN);
# docs/training.md has a size and schedule at which it does so in a minute.
use_layernorm = False
use_gelu = False
