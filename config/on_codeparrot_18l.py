# The paper's 18 layers (Table 7), on the same data as on_codeparrot.py
from config.on_codeparrot import *

n_layer = 18
