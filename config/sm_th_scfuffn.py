# SM(th)+ScFuFFN: one temperature per head for all positions; not the paper's, which has one per head and position (sm_t_scfuffn.py)
from config.sm_t_scfuffn import *

temperature_per_head = True
