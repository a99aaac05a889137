# SM(th)+ScFuFFN: one temperature per head; the paper has one per head and position, as in
# sm_t_scfuffn.py
from config.sm_t_scfuffn import *

temperature_per_head = True
