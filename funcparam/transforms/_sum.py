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
class Sum(Parts):
    """The sum of what its parts make: `Sum(a, b)` is `a(raw of a) + b(raw of b)`.

    With [`Frozen`][funcparam.transforms.Frozen] it is the algebra of adapters:
    `Sum(Frozen(), Kronecker((2, 3)))` is a frozen weight plus a trained Kronecker product. Raw and
    state hold those of the parts under their position, as in [`Cat`][funcparam.transforms.Cat].

    The right inverse goes from the first part to the last: each takes what it can of what the
    parts before it leave. So the order says who starts with what. `Sum(Frozen(), LowRank(8))`
    keeps the weight and starts the product at 0; `Sum(LowRank(8), Frozen())` trains the weight's
    eight largest singular values and keeps the rest. A value is kept exactly where a part takes
    all that is left, as `Frozen` and `Identity` do; elsewhere it goes to what the parts take in
    turn, which is not the nearest sum. Real and complex, as far as the parts are.

    The violation is that of the one part that is not `Frozen`; of several it is not measured, and
    is NaN, since a value is a sum in many ways. For the same reason only a sum with one such part
    has a log-determinant, which is that part's.

    Args:
        *parts: at least one transform.

    Raises:
        ValueError: there are no parts; at `fp.parametrize`, if a part cannot serve the value; at
            init, if a part refuses what is left for it.

    Example:
        >>> import torch
        >>> from funcparam.transforms import Diagonal, Frozen, Sum
        >>> transform = Sum(Frozen(), Diagonal())
        >>> raw, state = transform.right_inverse(torch.ones(2, 2))
        >>> raw
        {'1': tensor([0., 0.])}
        >>> transform.forward({"1": torch.tensor([1.0, 2.0])}, state)
        tensor([[2., 1.],
                [1., 3.]])
    """

    parts: tuple[AnyTransform, ...]

    def __init__(self, *parts: AnyTransform) -> None:
        object.__setattr__(self, "parts", checked_parts("Sum", parts))

    def __repr__(self) -> str:
        return f"Sum({', '.join(map(repr, self.parts))})"

    def role(self, key: str) -> Role:
        role = super().role(key)
        beside_a_base = any(isinstance(part, Frozen) for part in self.parts)
        return "relative" if role == "weight" and beside_a_base else role

    def adapts(self, key: str) -> bool:
        """Beside a frozen part the others are what is added to it, and are trained."""
        return super().adapts(key) or any(isinstance(part, Frozen) for part in self.parts)

    def kept_weight(self, state: State) -> Tensor | None:
        return kept_by(self.parts, state)

    @full_precision
    def forward(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        return reduce(torch.add, [part.forward(X, own) for part, X, own in self.each(raw, state)])

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Mapping[str, Tensor], State]:
        pairs: list[tuple[Any, State]] = []
        left = value
        for part in self.parts:
            raw, own = part.right_inverse(left, generator=generator)
            left = left - part.forward(raw, own)
            pairs.append((raw, own))
        return merged([raw for raw, _ in pairs]), merged([own for _, own in pairs])

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """That of the one part that is not frozen, of what the others leave; else NaN."""
        trained, frozen = self._split({}, state)
        if len(trained) != 1:
            return value.real.new_full((), torch.nan)
        part, _, own = trained[0]
        return part.violation(value - sum(f.forward(X, o) for f, X, o in frozen), own)

    def log_abs_det_jacobian(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        trained, _ = self._split(raw, state)
        if len(trained) != 1:
            raise NotImplementedError(
                f"{self!r} has no log_abs_det_jacobian: its parts together have more free"
                " coordinates than their sum"
            )
        part, X, own = trained[0]
        return part.log_abs_det_jacobian(X, own)

    def free_in_value(self, value: Tensor, state: State) -> Tensor | None:
        trained, _ = self._split({}, state)
        part, _, own = trained[0]
        return part.free_in_value(value, own)

    def check(self, value: Tensor) -> None:
        for part in self.parts:
            part.check(value)

    def _split(self, raw: Mapping[str, Tensor], state: State) -> Any:
        """The parts that are trained and those that are frozen, with their raw and state."""
        each = list(self.each(raw, state))
        trained = [item for item in each if not isinstance(item[0], Frozen)]
        return trained, [item for item in each if isinstance(item[0], Frozen)]
