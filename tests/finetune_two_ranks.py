"""One rank of the fine-tuning example; started twice by test_finetune_options."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from test_examples import load

if __name__ == "__main__":
    rank = os.environ["LOCAL_RANK"]
    os.environ |= {"RANK": rank, "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    root, *flags = sys.argv[1:]
    load("finetune_text_to_image").main([*flags, "--output_dir", str(Path(root) / "two")])
