# The paper's T = 256 (Table 6).
# First: python data/prepare.py --corpus=codeparrot --piece=256 --name=codeparrot_t256
from config.on_codeparrot import *

dataset = "codeparrot_t256"
block_size = 256
batch_size = 64           # of twice the length: as many tokens a step (the paper doesn't say)
eval_windows = 1024
