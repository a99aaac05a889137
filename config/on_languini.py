# The paper's books, T = 512 (Table 3). First: python data/prepare.py --corpus=languini
# Languini's books3 is no longer distributed: PG-19 stands in, or your own --train_source=FOLDER.
dataset = "languini"
block_size = 512          # T
n_layer = 12              # GPT-2 small
n_head = 12
n_embd = 768
batch_size = 32           # 32 x 4 = 128 sequences a step
grad_accum = 4
max_iters = 18_265        # 1.2B tokens; 36_530 and 73_060 for the paper's 2.4B and 4.8B
learning_rate = 6e-4      # Languini's GPT settings, as cosine, min_lr and no clipping
lr_decay = "cosine"       # to min_lr
min_lr = 6e-6
warmup = 0.0              # Languini's settings name none
beta1, beta2 = 0.9, 0.999  # the paper names none: AdamW's own
weight_decay = 0.1        # on matrices and embeddings
grad_clip = 0.0           # Languini doesn't clip
temperature_init = 1e-1   # only used where the architecture has learnable temperatures
lambda_entropy = 0.82     # only with entropy_reg: 5e-5 on the sum over 32 x 512, our guess
gamma = 0.2               # as on CodeParrot
eval_interval = 1000      # ours
eval_windows = 512        # ours; 262K tokens
