from __future__ import annotations

from math import prod

from torch import Tensor

from funcparam.transforms.contract.base import AnyTransform, expect_dim, expect_real


def other_dims(tensor: Tensor, dim: int | None) -> list[int]:
    """All dimensions but `dim`, which may be negative."""
    kept = None if dim is None else dim % tensor.ndim
    return [d for d in range(tensor.ndim) if d != kept]


def expect_slices(transform: AnyTransform, value: Tensor, dim: int | None) -> None:
    """Raise ValueError unless `value` is real with more than one entry at each index of `dim`."""
    expect_real(transform, value)
    if dim is None:
        return
    expect_dim(transform, value, dim)
    if prod(value.shape[d] for d in other_dims(value, dim)) < 2:
        raise ValueError(
            f"{transform!r} expects more than one entry at each index of dimension {dim};"
            f" got shape {tuple(value.shape)}"
        )
