# The paper's main scale: GPT-2 small on CodeParrot, T = 128.
# First: python data/prepare.py --corpus=codeparrot
dataset = "codeparrot"
block_size = 128          # T; the data is cut into whole pieces of it
n_layer = 12              # GPT-2 small
n_head = 12
n_embd = 768
batch_size = 128          # 128 x 4 = 512 sequences a step, the authors' micro-batch
grad_accum = 4
max_iters = 32_000        # x 512 x 128 = 2.1B tokens, one pass over the data
learning_rate = 1e-3      # He & Hofmann's
lr_decay = "linear"       # to 0
min_lr = 0.0
warmup = 0.05             # of the steps
beta1, beta2 = 0.9, 0.999  # AdamW's own
weight_decay = 0.1        # on matrices and embeddings
grad_clip = 1.0           # Hugging Face Trainer's default
temperature_init = 1e-2   # only used where the architecture has learnable temperatures
lambda_entropy = 0.164    # only with entropy_reg: 1e-5 on the sum over 128 x 128 positions
gamma = 0.2               # the paper's choice among 0 .. 0.3 (Figure 6)
eval_interval = 1000      # ours; the paper gives none
eval_windows = 2048       # ours; 262K tokens
