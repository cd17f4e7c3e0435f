"""Settings that all tests share; exact answers live in oracles.py."""

import torch
from hypothesis import settings

# the tensors are tiny: more threads only wait for each other, four times as long where the cores are busy
torch.set_num_threads(1)

# the same examples on every machine and every day, and no database of them in the checkout
settings.register_profile("alphabar", derandomize=True, database=None, deadline=None, max_examples=40)
settings.load_profile("alphabar")
