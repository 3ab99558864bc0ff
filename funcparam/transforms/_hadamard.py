from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, final

import torch
from torch import Tensor

from funcparam.transforms._frozen import Frozen
from funcparam.transforms._parts import (
    Parts,
    checked_parts,
    kept_by,
    merged,
)
from funcparam.transforms.contract.base import AnyTransform, State
from funcparam.transforms.contract.precision import full_precision
from funcparam.transforms.contract.roles import Role


@final
@dataclass(frozen=True, init=False)
class Hadamard(Parts):
    """The entrywise product of what its parts make: `Hadamard(a, b)` is `a(…) * b(…)`.

    Raw and state hold those of the parts under their position, as in
    [`Cat`][funcparam.transforms.Cat]. The right inverse goes from the first part to the last: each
    takes what it can of the value over the product of those before it, and 1 where that is 0. So
    behind [`Frozen`][funcparam.transforms.Frozen] a part starts with ones. A value is kept where
    the parts before the last are zero only where it is, and the last takes what is left. Real and
    complex, as far as the parts are.

    The violation is not measured, and is NaN: a value is a product in many ways.

    Args:
        *parts: at least one transform.

    Raises:
        ValueError: there are no parts; at `fp.parametrize`, if a part cannot serve the value; at
            init, if a part refuses what is left for it.

    Example:
        >>> import torch
        >>> from funcparam.transforms import Frozen, Hadamard, Positive
        >>> transform = Hadamard(Frozen(), Positive("exp"))
        >>> raw, state = transform.right_inverse(torch.tensor([-3.0, 0.0, 5.0]))
        >>> raw
        {'1': tensor([0., 0., 0.])}
        >>> transform.forward(raw, state)
        tensor([-3.,  0.,  5.])
    """

    parts: tuple[AnyTransform, ...]

    def __init__(self, *parts: AnyTransform) -> None:
        object.__setattr__(self, "parts", checked_parts("Hadamard", parts))

    def __repr__(self) -> str:
        return f"Hadamard({', '.join(map(repr, self.parts))})"

    def role(self, key: str) -> Role:
        role = super().role(key)
        return "factor" if role == "weight" else role

    def adapts(self, key: str) -> bool:
        """Beside a frozen part the others are what is added to it, and are trained."""
        return super().adapts(key) or any(isinstance(part, Frozen) for part in self.parts)

    def kept_weight(self, state: State) -> Tensor | None:
        return kept_by(self.parts, state)

    @full_precision
    def forward(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        return reduce(torch.mul, [part.forward(X, own) for part, X, own in self.each(raw, state)])

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Mapping[str, Tensor], State]:
        pairs: list[tuple[Any, State]] = []
        left = value
        for part in self.parts:
            raw, own = part.right_inverse(left, generator=generator)
            left = _ratio(left, part.forward(raw, own))
            pairs.append((raw, own))
        return merged([raw for raw, _ in pairs]), merged([own for _, own in pairs])

    def violation(self, value: Tensor, state: State) -> Tensor:
        """NaN: it is not measured."""
        return value.real.new_full((), torch.nan)

    def log_abs_det_jacobian(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        raise NotImplementedError(
            f"{self!r} has no log_abs_det_jacobian: its parts together have more free coordinates"
            " than their product, or are zero where it is"
        )

    def check(self, value: Tensor) -> None:
        for part in self.parts:
            part.check(value)


def _ratio(value: Tensor, divisor: Tensor) -> Tensor:
    """`value / divisor`, and 1 where the divisor is 0."""
    return torch.where(divisor == 0, 1, value / torch.where(divisor == 0, 1, divisor))
