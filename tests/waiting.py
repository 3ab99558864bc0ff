"""What would wait for a device, found on a CPU."""

from collections.abc import Mapping

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITING: Mapping[str, str] = {
    "_local_scalar_dense": "a number is read: item, int, float, bool, if",
    "is_nonzero": "a number is read",
    "equal": "a number is read",
    "nonzero": "how large the result is depends on entries",
    "masked_select": "how large the result is depends on entries",
    "_unique2": "how large the result is depends on entries",
    "unique_dim": "how large the result is depends on entries",
    "unique_consecutive": "how large the result is depends on entries",
    "repeat_interleave": "how large the result is depends on entries",
    "bincount": "how large the result is depends on entries",
    "lift_fresh": "numbers are copied to the device: torch.tensor",
    "_linalg_check_errors": "whether it went well is read: inv, solve, cholesky",
    "_linalg_svd": "PyTorch waits, and checks for errors",
    "_linalg_eigh": "PyTorch waits, and checks for errors",
    "_linalg_eigvals": "PyTorch waits, and checks for errors",
    "linalg_eig": "PyTorch waits, and checks for errors",
    "linalg_lstsq": "PyTorch waits",
    "linalg_matrix_exp": "PyTorch reads a norm",
}
"""Operators of ATen that wait for a device, and why."""


class Waits(TorchDispatchMode):
    """Notes which operators would have waited for a device."""

    def __init__(self):
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in WAITING and not (name == "repeat_interleave" and len(args) > 1):
            self.found.add(name)
        if name in ("index", "index_put", "_index_put_impl_"):
            indices = [i for i in args[1] if i is not None]
            if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
                self.found.add("nonzero")
        return function(*args, **(kwargs or {}))
