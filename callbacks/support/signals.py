"""SIGTERM under a Trainer: its handlers run on every rank at the same place."""

from __future__ import annotations

import signal

from lightning.pytorch import Trainer


def terminate_together(trainer: Trainer) -> None:
    """Run the SIGTERM handlers on every rank once, and ignore SIGTERM afterwards.

    The broadcasts in Lightning's handlers pair up only if all ranks run them together.
    """
    connector = getattr(trainer, "_signal_connector", None)
    if connector is not None:
        # otherwise rank 0 would send the signal again to processes that already have it
        connector.received_sigterm = True
    signal.raise_signal(signal.SIGTERM)
    # ignore further signals until fit ends, at the next batch
    signal.signal(signal.SIGTERM, lambda *_: None)
