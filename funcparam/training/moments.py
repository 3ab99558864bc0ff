"""What an optimizer remembers of a tensor, carried from one chart of a weight to another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from funcparam.transforms.contract.solve import Chart, lifted, pull

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


def carried(
    old: Chart, x: dict[str, Tensor], new: Chart, y: dict[str, Tensor], moment: dict[str, Tensor]
) -> dict[str, Tensor]:
    r"""Carry a mean of gradients in `x` over to `y`, where `old(x) == new(y)`.

    A gradient is `m_x = J_old^T m` for a gradient `m` of the value. This finds the shortest `m`
    that comes closest, `m = J_old (J_old^T J_old)^+ m_x`, and returns `J_new^T m`. What of `m_x` no
    gradient at `x` can be is dropped.
    """
    return pull(new, y, lifted(old, x, moment))
