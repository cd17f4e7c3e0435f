"""Counts the operations that torch runs, and the host's reads and the copies among them."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

READS = {"aten._local_scalar_dense.default", "aten.item.default"}
COPIES = {"aten._to_copy.default", "aten.copy_.default", "aten.clone.default"}


class CountOperations(TorchDispatchMode):
    """Counts what runs inside; a read of a value is a host sync where the tensor is on a GPU.

    >>> with CountOperations() as counted:
    ...     float(torch.ones(2).sum())
    2.0
    >>> counted.operations, counted.reads
    (3, 1)
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.reads = self.copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        self.reads += str(func) in READS
        self.copies += str(func) in COPIES
        return func(*args, **(kwargs or {}))
