from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast, final

import torch
from torch import Tensor

from funcparam.transforms._parts import Parts, checked_parts, merged, own_tensors
from funcparam.transforms.contract.arguments import INTEGER, expect_argument, keep_integers
from funcparam.transforms.contract.base import AnyTransform, State, expect_dim


class _Pieces(Parts):
    """What `Cat` and `Stack` share: a transform for each piece of a value."""

    @abstractmethod
    def _split(self, value: Tensor) -> Sequence[Tensor]:
        """Take a value apart, one piece for each part."""

    @abstractmethod
    def _join(self, pieces: list[Tensor]) -> Tensor:
        """Put a value together again."""

    def forward(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        return self._join([part.forward(X, own) for part, X, own in self.each(raw, state)])

    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Mapping[str, Tensor], State]:
        pairs = [
            part.right_inverse(piece.contiguous(), generator=generator)
            for part, piece in zip(self.parts, self._split(value), strict=True)
        ]
        return merged([raw for raw, _ in pairs]), merged([state for _, state in pairs])

    def project(self, value: Tensor, state: State) -> Tensor:
        pieces = enumerate(zip(self.parts, self._split(value), strict=True))
        return self._join([part.project(X, own_tensors(state, i)) for i, (part, X) in pieces])

    def tangent(self, value: Tensor, vector: Tensor, state: State) -> Tensor:
        pieces = enumerate(zip(self.parts, self._split(value), self._split(vector), strict=True))
        return self._join(
            [part.tangent(X, along, own_tensors(state, i)) for i, (part, X, along) in pieces]
        )

    def violation(self, value: Tensor, state: State) -> Tensor:
        """The largest violation of a part."""
        pieces = zip(self.parts, self._split(value), strict=True)
        each = [
            part.violation(piece, own_tensors(state, i)) for i, (part, piece) in enumerate(pieces)
        ]
        return torch.stack(each).amax()

    def log_abs_det_jacobian(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        each = [part.log_abs_det_jacobian(X, own) for part, X, own in self.each(raw, state)]
        return torch.stack(each).sum()

    def free_in_value(self, value: Tensor, state: State) -> Tensor | None:
        pieces = self._split(value)
        masks = [
            part.free_in_value(piece, own_tensors(state, i))
            for i, (part, piece) in enumerate(zip(self.parts, pieces, strict=True))
        ]
        if all(mask is None for mask in masks):
            return None
        pairs = zip(masks, pieces, strict=True)
        return self._join(
            [torch.ones_like(x, dtype=torch.bool) if m is None else m for m, x in pairs]
        )

    def _check_pieces(self, value: Tensor) -> None:
        for part, piece in zip(self.parts, self._split(value), strict=True):
            part.check(piece)


@final
@dataclass(frozen=True, init=False)
class Cat(_Pieces):
    """Pieces of a value along a dimension, each with a transform of its own.

    For weights that hold several matrices (the gates of an LSTM), or bounded and unbounded
    numbers side by side. Raw and state hold those of the parts under their position: `"0"` is
    the raw of the first part if that is one tensor, `"0.magnitude"` a named tensor of it. What
    each part says of its right inverse holds here. Log-determinants add up.

    Args:
        parts: at least one transform, in the order of the pieces.
        lengths: the size of each piece along `dim`; None: all are equal.
        dim: the dimension that is cut.

    Raises:
        ValueError: there are no parts, or not as many lengths as parts; at `fp.parametrize`, if
            the value cannot be cut so, or a part cannot serve its piece.

    Example:
        >>> import torch
        >>> from funcparam.transforms import Cat, Orthogonal
        >>> gates = Cat([Orthogonal()] * 4)
        >>> raw, state = gates.right_inverse(torch.eye(3).repeat(4, 1))
        >>> list(raw)
        ['0', '1', '2', '3']
        >>> gates.forward(raw, state).shape
        torch.Size([12, 3])

    Source: `torch.distributions.constraints.cat`.
    """

    parts: tuple[AnyTransform, ...]
    lengths: tuple[int, ...] | None
    dim: int

    def __init__(
        self,
        parts: Iterable[AnyTransform],
        lengths: Iterable[int] | None = None,
        dim: int = 0,
    ) -> None:
        object.__setattr__(self, "parts", _checked("Cat", parts))
        object.__setattr__(self, "lengths", lengths)
        object.__setattr__(self, "dim", dim)
        expect_argument(self, "dim", INTEGER)
        if lengths is None:
            return
        keep_integers(self, "lengths")
        found = cast("tuple[int, ...]", self.lengths)
        if len(found) != len(self.parts) or min(found) < 0:
            raise ValueError(
                f"Cat expects lengths to be one for each of {len(self.parts)} parts, at least 0;"
                f" got {found}"
            )

    def check(self, value: Tensor) -> None:
        super().check(value)
        expect_dim(self, value, self.dim)
        size, count = value.shape[self.dim], len(self.parts)
        if self.lengths is None and size % count:
            raise ValueError(
                f"{self!r} expects dimension {self.dim} to be divisible by {count};"
                f" got shape {tuple(value.shape)}"
            )
        if self.lengths is not None and size != sum(self.lengths):
            raise ValueError(
                f"{self!r} expects dimension {self.dim} to be of size {sum(self.lengths)};"
                f" got shape {tuple(value.shape)}"
            )
        self._check_pieces(value)

    def _split(self, value: Tensor) -> Sequence[Tensor]:
        count = len(self.parts)
        lengths = self.lengths or (value.shape[self.dim] // count,) * count
        starts = [sum(lengths[:i]) for i in range(count)]
        pairs = zip(starts, lengths, strict=True)
        return [value.narrow(self.dim, start, length) for start, length in pairs]

    def _join(self, pieces: list[Tensor]) -> Tensor:
        return torch.cat(pieces, self.dim)


@final
@dataclass(frozen=True, init=False)
class Stack(_Pieces):
    """Slices of a value along a dimension, each with a transform of its own.

    As [`Cat`][funcparam.transforms.Cat], but what a part sees has one dimension less.

    Args:
        parts: one transform for each index of `dim`.
        dim: the dimension that is taken apart.

    Raises:
        ValueError: there are no parts; at `fp.parametrize`, if the value does not have one slice
            for each, or a part cannot serve its slice.

    Example:
        >>> import torch
        >>> from funcparam.transforms import Identity, Positive, Stack
        >>> transform = Stack([Identity(), Positive()])
        >>> raw, state = transform.right_inverse(torch.tensor([-1.0, 2.0]))
        >>> transform.forward(raw, state)
        tensor([-1.,  2.])

    Source: `torch.distributions.constraints.stack`.
    """

    parts: tuple[AnyTransform, ...]
    dim: int

    def __init__(self, parts: Iterable[AnyTransform], dim: int = 0) -> None:
        object.__setattr__(self, "parts", _checked("Stack", parts))
        object.__setattr__(self, "dim", dim)
        expect_argument(self, "dim", INTEGER)

    def check(self, value: Tensor) -> None:
        super().check(value)
        expect_dim(self, value, self.dim)
        if value.shape[self.dim] != len(self.parts):
            raise ValueError(
                f"{self!r} expects dimension {self.dim} to be of size {len(self.parts)};"
                f" got shape {tuple(value.shape)}"
            )
        self._check_pieces(value)

    def _split(self, value: Tensor) -> Sequence[Tensor]:
        return value.unbind(self.dim)

    def _join(self, pieces: list[Tensor]) -> Tensor:
        return torch.stack(pieces, self.dim)


def _checked(kind: str, parts: Iterable[AnyTransform]) -> tuple[AnyTransform, ...]:
    if not isinstance(parts, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{kind} expects a list of transforms, {kind}([a, b]); got {parts!r}")
    return checked_parts(kind, parts)
