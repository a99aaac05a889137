# SM+ScFuFFN whose first half attends by position alone (not the paper's): half of the softmaxes
from config.sm_scfuffn import *

positional_layers = 3  # of 6; --positional_layers=6 with --n_layer=12
