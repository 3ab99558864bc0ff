from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar, final

import torch
from torch import Tensor

from funcparam.transforms.contract.arguments import (
    INTEGER,
    NUMBER,
    Kind,
    expect_argument,
    is_finite,
    keep_integers,
)
from funcparam.transforms.contract.base import State, Transform, expect_dim, expect_numbers
from funcparam.transforms.contract.precision import full_precision

_FACTOR = Kind("a finite number that is not 0", (int, float), lambda x: x != 0 and is_finite(x))


@final
@dataclass(frozen=True)
class Affine(Transform[Tensor]):
    r"""A value that is scaled and shifted: `W = shift + scale X`.

    Raw has the shape of the value. State `{"scale", "shift"}` holds the two as scalars, so that
    they can be changed or swept with `vmap`; `scale` and `shift` here are what init writes
    there. Real and complex. The right inverse is exact. Log-determinant: `log |scale|` for each
    entry, twice that for each complex one.

    Args:
        scale: the factor, finite and not 0.
        shift: the offset, finite.

    Raises:
        ValueError: `scale` or `shift` is not finite, or `scale` is 0; at `fp.parametrize`, if the
            dtype of the value has no such number.

    Example:
        >>> import torch
        >>> from funcparam.transforms import Affine
        >>> raw, state = Affine(scale=2.0, shift=1.0).right_inverse(torch.tensor([1.0, 5.0]))
        >>> raw
        tensor([0., 2.])

    Source: `torch.distributions.transforms.AffineTransform`.
    """

    is_entrywise: ClassVar[bool] = True

    scale: float = 1.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        expect_argument(self, "scale", _FACTOR)
        expect_argument(self, "shift", NUMBER)

    @full_precision
    def forward(self, raw: Tensor, state: State) -> Tensor:
        return state["shift"] + state["scale"] * raw

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        state = {
            "scale": value.real.new_full((), self.scale),
            "shift": value.real.new_full((), self.shift),
        }
        return (value - state["shift"]) / state["scale"], state

    def violation(self, value: Tensor, state: State) -> Tensor:
        """Zero: every tensor is a scaled and shifted one."""
        return value.real.new_zeros(())

    def undo(self, value: Tensor, state: State) -> Tensor | None:
        """(value - shift) / scale; the ones in state count if they are given."""
        shift, scale = state.get("shift", self.shift), state.get("scale", self.scale)
        return (value - shift) / scale

    @full_precision
    def log_derivative(self, raw: Tensor, state: State) -> Tensor:
        coordinates = 2 if raw.is_complex() else 1
        return (coordinates * state["scale"].abs().log()).expand(raw.shape)

    def check(self, value: Tensor) -> None:
        super().check(value)
        expect_numbers(self, value.dtype, scale=self.scale)
        expect_numbers(self, value.dtype, or_zero=True, shift=self.shift)


@final
@dataclass(frozen=True)
class Reshape(Transform[Tensor]):
    """Raw of another shape with the same entries: `W = X.reshape(out_shape)`.

    For a transform behind which the shape is not the weight's, as an orthogonal matrix for the
    kernel of a convolution: `Chain(Orthogonal(), Reshape((8, 27), (8, 3, 3, 3)))`. Raw has
    `in_shape` and the value `out_shape`, both behind equal batch dimensions if there are any.
    One side of each may be -1, which is what the others leave: `Reshape((-1,), (-1, 3, 3))` makes
    kernels of 3 by 3 taps of the rows of a matrix. Real and complex. Every value is kept exactly;
    the log-determinant is 0.

    Args:
        in_shape: the shape of raw.
        out_shape: the shape of the value.

    Raises:
        ValueError: the shapes have different numbers of entries, or -1 not once in each or in
            none; at `fp.parametrize`, if the value's shape does not end in `out_shape`, or its
            entries do not fill `in_shape`.

    Example:
        >>> import torch
        >>> from funcparam.transforms import Reshape
        >>> Reshape((4,), (2, 2)).forward(torch.tensor([1.0, 2.0, 3.0, 4.0]), {})
        tensor([[1., 2.],
                [3., 4.]])

    Source: `torch.distributions.transforms.ReshapeTransform`.
    """

    moves_entries: ClassVar[bool] = True

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        keep_integers(self, "in_shape")
        keep_integers(self, "out_shape")
        shapes = (self.in_shape, self.out_shape)
        known = [prod(side for side in shape if side != -1) for shape in shapes]
        unknown = [shape.count(-1) for shape in shapes]
        if min((*self.in_shape, *self.out_shape), default=0) < -1 or not (
            unknown == [1, 1] or (unknown == [0, 0] and known[0] == known[1])
        ):
            raise ValueError(
                "Reshape expects two shapes with equally many entries, or with one -1 in each;"
                f" got in_shape={self.in_shape}, out_shape={self.out_shape}"
            )

    def forward(self, raw: Tensor, state: State) -> Tensor:
        return _reshaped(raw, self.in_shape, self.out_shape)

    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        return _reshaped(value, self.out_shape, self.in_shape), {}

    def violation(self, value: Tensor, state: State) -> Tensor:
        """Zero: entries are kept as they are."""
        return value.real.new_zeros(())

    def log_abs_det_jacobian(self, raw: Tensor, state: State) -> Tensor:
        """Zero: entries are kept as they are."""
        return raw.real.new_zeros(())

    def check(self, value: Tensor) -> None:
        super().check(value)
        start = value.ndim - len(self.out_shape)
        ends = list(value.shape[start:]) if start >= 0 else []
        if len(ends) != len(self.out_shape) or any(
            side not in (-1, end) for side, end in zip(self.out_shape, ends, strict=True)
        ):
            raise ValueError(
                f"{self!r} expects a shape that ends in {self.out_shape};"
                f" got shape {tuple(value.shape)}"
            )
        known = prod(side for side in self.in_shape if side != -1)
        if known == 0 or prod(ends) % known:
            raise ValueError(
                f"{self!r} expects a number of entries that {known} divides;"
                f" got shape {tuple(value.shape)}"
            )


def _reshaped(tensor: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """`tensor` with its last dimensions, of shape `old`, in the shape `new`."""
    start = tensor.ndim - len(old)
    known = torch.Size([side for side in new if side != -1]).numel()
    entries = tensor.shape[start:].numel()  # torch infers no side of an empty tensor
    filled = [entries // known if side == -1 else side for side in new]
    return tensor.reshape((*tensor.shape[:start], *filled))


@final
@dataclass(frozen=True)
class Permute(Transform[Tensor]):
    """Raw with its dimensions in another order: `W = X.permute(dims)`.

    Real and complex. Every value is kept exactly; the log-determinant is 0.

    Args:
        dims: a permutation of the dimensions. Negative ones count from the end.

    Raises:
        ValueError: `dims` is not a permutation; at `fp.parametrize`, if the value has another
            number of dimensions.

    Example:
        >>> import torch
        >>> from funcparam.transforms import Permute
        >>> raw, state = Permute((1, 2, 0)).right_inverse(torch.ones(3, 4, 5))
        >>> raw.shape
        torch.Size([5, 3, 4])

    Source: `torch.permute`.
    """

    moves_entries: ClassVar[bool] = True

    dims: tuple[int, ...]

    def __post_init__(self) -> None:
        keep_integers(self, "dims")
        n = len(self.dims)
        if sorted(d % n if -n <= d < n else n for d in self.dims) != list(range(n)):
            raise ValueError(
                f"Permute expects dims to be a permutation, each dimension once; got {self.dims}"
            )

    def forward(self, raw: Tensor, state: State) -> Tensor:
        return raw.permute(self.dims)

    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        order = [d % len(self.dims) for d in self.dims]
        inverse = [order.index(d) for d in range(len(order))]
        return value.permute(inverse).contiguous(), {}

    def violation(self, value: Tensor, state: State) -> Tensor:
        """Zero: entries are kept as they are."""
        return value.real.new_zeros(())

    def log_abs_det_jacobian(self, raw: Tensor, state: State) -> Tensor:
        """Zero: entries are kept as they are."""
        return raw.real.new_zeros(())

    def check(self, value: Tensor) -> None:
        super().check(value)
        if value.ndim != len(self.dims):
            raise ValueError(
                f"{self!r} expects {len(self.dims)} dimensions; got shape {tuple(value.shape)}"
            )


@final
@dataclass(frozen=True)
class Transpose(Transform[Tensor]):
    """Raw with two dimensions exchanged: `W = X.transpose(dim0, dim1)`.

    For transforms that take one side of a matrix for the other, as in
    `Chain(Simplex(), Transpose())`, whose columns sum to 1. Real and complex. Every value is
    kept exactly; the log-determinant is 0.

    Args:
        dim0: a dimension. Negative ones count from the end.
        dim1: the one to exchange it with.

    Raises:
        ValueError: at `fp.parametrize`, if the value lacks one of the dimensions.

    Example:
        >>> import torch
        >>> from funcparam.transforms import Transpose
        >>> Transpose().forward(torch.tensor([[1.0, 2.0]]), {})
        tensor([[1.],
                [2.]])

    Source: `torch.transpose`.
    """

    moves_entries: ClassVar[bool] = True

    dim0: int = -2
    dim1: int = -1

    def __post_init__(self) -> None:
        expect_argument(self, "dim0", INTEGER)
        expect_argument(self, "dim1", INTEGER)

    def forward(self, raw: Tensor, state: State) -> Tensor:
        return raw.transpose(self.dim0, self.dim1)

    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        return value.transpose(self.dim0, self.dim1).contiguous(), {}

    def violation(self, value: Tensor, state: State) -> Tensor:
        """Zero: entries are kept as they are."""
        return value.real.new_zeros(())

    def log_abs_det_jacobian(self, raw: Tensor, state: State) -> Tensor:
        """Zero: entries are kept as they are."""
        return raw.real.new_zeros(())

    def check(self, value: Tensor) -> None:
        super().check(value)
        expect_dim(self, value, self.dim0)
        expect_dim(self, value, self.dim1)
