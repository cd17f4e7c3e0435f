"""Settings that all tests share; exact answers live in oracles.py."""

import gc
import os

import torch
from hypothesis import settings

# The tensors are tiny: more threads only wait for each other, four times as long where the cores
# are busy. OMP_NUM_THREADS says another number, here and in the processes that tests start, where
# Lightning would take all cores for the only process of a node.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))

# the same examples on every machine and every day, and no database of them in the checkout
settings.register_profile(
    "alphabar", derandomize=True, database=None, deadline=None, max_examples=40
)
settings.load_profile("alphabar")


def pytest_collection_finish() -> None:
    """Leave the modules and the collected tests out of the garbage collector's rounds."""
    gc.collect()
    gc.freeze()
