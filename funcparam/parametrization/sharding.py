"""Tensors that `fully_shard` has spread over processes: whole, and back in parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor


def whole(tree: Any) -> Any:
    """The tree with sharded tensors gathered; any other tensor is its own whole."""
    if isinstance(tree, Tensor):
        return cast("Any", tree).full_tensor() if hasattr(tree, "full_tensor") else tree
    if isinstance(tree, tuple):
        return tuple(map(whole, cast("tuple[Any, ...]", tree)))
    items = cast("Mapping[str, Any]", tree).items()
    return {name: whole(tensor) for name, tensor in items}


def sharded_like(own: Tensor, given: Tensor) -> Tensor:
    """A whole tensor, which every process has, in the parts of another one."""
    if not hasattr(own, "full_tensor") or hasattr(given, "full_tensor"):
        return given
    from torch.distributed.tensor import distribute_tensor  # a second to import

    there = cast("Any", own)
    local = given.detach().to(there.device)
    return distribute_tensor(local, there.device_mesh, there.placements, src_data_rank=None)
