"""What an optimizer remembers of a tensor, carried from one chart of a weight to another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import jvp, vjp
from torch.optim import Optimizer

Chart = Callable[[dict[str, Tensor]], Tensor]
"""A map from the raw tensors of one weight, by key, to its value."""

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
    pull = cast("Any", vjp(old, x)[1])
    pull_new = cast("Any", vjp(new, y)[1])

    def normal(w: Tensor) -> Tensor:
        return jvp(old, (x,), (pull(w)[0],))[1]

    value = jvp(old, (x,), (moment,))[1]
    return pull_new(_solved(normal, value))[0]


def _solved(matrix: Callable[[Tensor], Tensor], b: Tensor, steps: int = 50) -> Tensor:
    """Solve for a positive semidefinite matrix by conjugate gradients, to single precision."""
    x, r = torch.zeros_like(b), b
    p, rr = r, (r * r.conj()).sum().real
    enough = 1e-12 * rr
    for _ in range(steps):
        if rr <= enough:
            break
        image = matrix(p)
        alpha = rr / (p.conj() * image).sum().real
        x, r = x + alpha * p, r - alpha * image
        rr, before = (r * r.conj()).sum().real, rr
        p = r + (rr / before) * p
    return x
