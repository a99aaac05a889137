# The paper's main scale: GPT-2 small on CodeParrot, T = 128. First: python data/prepare.py --corpus=codeparrot
dataset = "codeparrot"
block_size = 128
n_layer = 12
n_head = 12
n_embd = 768
batch_size = 128          # 128 x 4 = 512 sequences a step
grad_accum = 4
max_iters = 32_000        # x 512 x 128 = 2.1B tokens, one pass over the data
learning_rate = 1e-3
lr_decay = "linear"       # to 0
min_lr = 0.0
warmup = 0.05
beta1, beta2 = 0.9, 0.999
weight_decay = 0.1
grad_clip = 1.0
temperature_init = 1e-2   # only used where the architecture has learnable temperatures
lambda_entropy = 0.164    # only used with entropy_reg: 1e-5 on the sum over 128 x 128 positions, on their mean
gamma = 0.2
eval_interval = 1000
eval_windows = 2048
