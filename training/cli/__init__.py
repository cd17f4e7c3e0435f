"""The command ``alphabar``."""

from .command import main

__all__ = ["main"]
