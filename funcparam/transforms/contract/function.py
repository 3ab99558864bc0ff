from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import nan
from typing import Any, final

import torch
from torch import Tensor

from funcparam.transforms.contract.base import State, Transform, largest


@final
@dataclass(frozen=True)
class Function(Transform[Any]):
    """What [`funcparam.transform`][] returns: a transform made from two plain functions."""

    function: Callable[[Any], Tensor]
    inverse: Callable[[Tensor], Any] | None

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"transform expects forward to be callable; got {self.function!r}")
        if self.inverse is not None and not callable(self.inverse):
            raise TypeError(
                f"transform expects right_inverse to be callable or None; got {self.inverse!r}"
            )

    def __repr__(self) -> str:
        return f"transform({getattr(self.function, '__name__', self.function)})"

    def forward(self, raw: Any, state: State) -> Tensor:
        return self.function(raw)

    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Any, State]:
        if self.inverse is None:
            raise NotImplementedError(
                f"{self!r} has no right inverse. Make it with"
                " fp.transform(forward, right_inverse); where forward is a projection,"
                " right_inverse=lambda value: value is one"
            )
        return self.inverse(value), {}

    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest |forward(right_inverse(value)) - value|; NaN without a right inverse."""
        if self.inverse is None:
            return value.real.new_full((), nan)
        raw, state = self.right_inverse(value)
        return largest(self.forward(raw, state) - value)


def transform(
    forward: Callable[[Any], Tensor], right_inverse: Callable[[Tensor], Any] | None = None
) -> Transform[Any]:
    """Make a transform from two plain functions.

    Args:
        forward: maps raw, one tensor or a dict of named tensors, to the value. Pure, in torch
            operations, and able to run on meta tensors.
        right_inverse: maps a value to raw such that `forward(right_inverse(value)) == value`.
            Without it nothing can be initialised from existing weights; raw is then taken to
            have the value's shape and has to be given.

    Returns:
        A transform without state. It compares and hashes by the two functions, and pickles if
        they do.

    Example:
        >>> import torch, funcparam as fp
        >>> scaled = fp.transform(lambda raw: 10 * raw, lambda value: value / 10)
        >>> scaled.right_inverse(torch.tensor([5.0]))
        (tensor([0.5000]), {})
    """
    return Function(forward, right_inverse)
