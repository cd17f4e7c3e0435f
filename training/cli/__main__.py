"""``python -m alphabar.training.cli``, the same as ``alphabar``."""

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main())
