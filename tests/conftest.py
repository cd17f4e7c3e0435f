"""Settings that all tests share; exact answers live in oracles.py."""

import os

import torch
from hypothesis import settings

# the tensors are tiny: more threads only wait for each other, four times as long where the cores are busy
torch.set_num_threads(1)
# in the processes that tests start too, where Lightning would take all cores for the only process of a node; how two threads
# share a sum depends on how busy the cores are, and with it the last bit
os.environ["OMP_NUM_THREADS"] = "1"

# the same examples on every machine and every day, and no database of them in the checkout
settings.register_profile("alphabar", derandomize=True, database=None, deadline=None, max_examples=40)
settings.load_profile("alphabar")
