"""What quantizers share: entries that share a scale, and derivatives straight through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funcparam.transforms.contract.arguments import POSITIVE_INTEGER, expect_argument
from funcparam.transforms.numerics.inside import step
from funcparam.transforms.numerics.slices import other_dims


def straight_through(value: Tensor, like: Tensor) -> Tensor:
    """`value` to the last bit, with the derivative of `like`."""
    return value.detach() + (like - like.detach())


def held(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A scale in a dtype that may be narrower: no less than it, so that nothing is clipped, nor 0.

    In float16 scales of ordinary weights may be so small that they lose digits.
    """
    narrow = scale.to(dtype)
    more = narrow.to(scale.dtype) + step(narrow.to(scale.dtype), torch.finfo(dtype))
    return torch.where(narrow.to(scale.dtype) < scale, more, scale).to(dtype)


def grouped(X: Tensor, group_size: int | None) -> Tensor:
    """The tensor with groups of its last dimension along a new one, if there are any."""
    if group_size is None:
        return X
    return X.reshape(*X.shape[:-1], X.shape[-1] // group_size, group_size)


def shared_dims(transform: Any, value: Tensor) -> list[int]:
    """The dimensions of the grouped value whose entries share a scale."""
    if transform.group_size is not None:
        return [value.ndim]
    return other_dims(value, transform.dim)


def aligned(transform: Any, X: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Give tensors with one entry for each scale the shape to go with the grouped X."""
    if transform.group_size is not None:
        return tuple(tensor.unsqueeze(-1) for tensor in tensors)
    if transform.dim is None:
        return tensors
    behind = X.ndim - 1 - transform.dim % X.ndim
    return tuple(tensor.reshape(-1, *[1] * behind) for tensor in tensors)


def expect_groups(transform: Any) -> None:
    """Raise unless `group_size` is a positive integer or None, beside no `dim`."""
    expect_argument(transform, "group_size", POSITIVE_INTEGER, optional=True)
    if transform.group_size is not None and transform.dim is not None:
        raise ValueError(
            f"{type(transform).__name__} expects dim or group_size; got dim={transform.dim},"
            f" group_size={transform.group_size}"
        )


def expect_whole_groups(transform: Any, value: Tensor) -> None:
    """Raise ValueError unless groups fill the last dimension."""
    size = transform.group_size
    if size is not None and (value.ndim == 0 or value.shape[-1] % size):
        raise ValueError(
            f"{transform!r} expects a last dimension that {size} divides;"
            f" got shape {tuple(value.shape)}"
        )
