"""What an optimizer remembers of a tensor, carried from one chart of a weight to another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from funcparam.transforms.numerics.linalg import linalg

_ORDERS: tuple[tuple[str, int], ...] = (
    ("exp_avg", 1),
    ("momentum_buffer", 1),
    ("exp_avg_sq", 2),
    ("max_exp_avg_sq", 2),
)


def moments(optimizer: Optimizer, name: str, tensor: Tensor) -> dict[str, list[Tensor]]:
    """The moments that an optimizer keeps of a tensor, by key: of several views one each.

    Raises:
        ValueError: it keeps tensors of which nobody here knows what they are.
    """
    own: Mapping[str, Any] = optimizer.state.get(tensor, {})
    views = [*own.values()] if own and all(isinstance(v, Mapping) for v in own.values()) else [own]
    found: dict[str, list[Tensor]] = {}
    for view in views:
        for key, item in view.items():
            if not isinstance(item, Tensor) or item.ndim == 0 or key == "step":
                continue
            if key not in dict(_ORDERS):
                raise ValueError(
                    f"{name!r}: expected moments {', '.join(k for k, _ in _ORDERS)}; got {key!r}"
                    f" of {type(optimizer).__qualname__}, which nobody can carry over. Move without"
                    " the optimizer, and make it anew"
                )
            found.setdefault(key, []).append(item)
    return found


def order(key: str) -> int:
    """1 of a mean of gradients, 2 of a mean of their squares."""
    return dict(_ORDERS)[key]


def carried_squares(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], moment: str
) -> Tensor:
    """Carry a mean of squares along with the means of gradients, which `after` has carried.

    It is scaled as the squared length of the mean is, which is exact where the move scales. Where
    the move mixes entries, one with hardly any squares may get the mean of another, and would take
    a step without bound: squares are raised so that no `mean^2 / squares` exceeds the largest
    before.
    """
    squares = before[moment]
    if "exp_avg" not in before:
        return squares
    mean, new = _entries(before["exp_avg"]), _entries(after["exp_avg"])
    seen = _entries(squares)
    largest = torch.where(seen > 0, mean.square() / seen, 0).amax()
    if largest == 0:
        return squares
    growth: Tensor = linalg.vector_norm(new) / linalg.vector_norm(mean)
    scaled = seen * growth.square()
    raised = torch.maximum(scaled, new.square() / largest)
    return torch.view_as_complex(raised) if squares.is_complex() else raised


def _entries(tensor: Tensor) -> Tensor:
    """Real numbers, of which optimizers take the two of a complex one for entries."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
