from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
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
from funcparam.transforms.contract.arguments import INTEGER, expect_argument
from funcparam.transforms.contract.base import AnyTransform, State, expect_dim
from funcparam.transforms.contract.precision import full_precision
from funcparam.transforms.contract.roles import Role
from funcparam.transforms.numerics.linalg import linalg
from funcparam.transforms.numerics.slices import other_dims


@final
@dataclass(frozen=True, init=False)
class Gain(Parts):
    r"""A trained factor over another transform: `Gain(part)` is `g * part(…)`.

    Raw is the part's under its position, `"0"`, or `"0.magnitude"` of a named tensor, and `{"gain":
    g}`; state is the part's, `"0.u"`. The gain is a scalar, or with `dim` one number for each
    index. For what a constraint takes away, a length above all: `Gain(SpectralNorm())` trains the
    largest singular value, and `Gain(UnitNorm(), dim=0)` is weight normalisation.

    At init the part takes the value, and the gain is what brings it nearest to the value again:
    `<P, W> / <P, P>`. So `g P` is kept where the part projects it to `P`, as norms and orthogonal
    factors do; a real number, whatever the part is. The violation is not measured, and is NaN.

    Args:
        part: the transform.
        dim: the dimension that has a gain for each index. Negative ones count from the end. None:
            one for the whole tensor.

    Raises:
        ValueError: at `fp.parametrize`, if the part cannot serve the value, or there is no
            dimension `dim`; at init, if the part refuses the value.

    Example:
        >>> import torch
        >>> from funcparam.transforms import Gain, SpectralNorm
        >>> raw, state = Gain(SpectralNorm()).right_inverse(torch.diag(torch.tensor([4.0, 2.0])))
        >>> raw["gain"]
        tensor(4.)

    Source: Zhai et al., Stabilizing transformer training by preventing attention entropy collapse,
    arXiv 2303.06296 (with `SpectralNorm`).
    """

    parts: tuple[AnyTransform]
    dim: int | None

    def __init__(self, part: AnyTransform, dim: int | None = None) -> None:
        object.__setattr__(self, "parts", checked_parts("Gain", (part,)))
        object.__setattr__(self, "dim", dim)
        expect_argument(self, "dim", INTEGER, optional=True)

    def __repr__(self) -> str:
        return f"Gain(part={self.part!r}, dim={self.dim})"

    @property
    def part(self) -> AnyTransform:
        """The transform that is scaled."""
        return self.parts[0]

    def role(self, key: str) -> Role:
        return "magnitude" if key == "gain" else super().role(key)

    def adapts(self, key: str) -> bool:
        """A gain over a frozen weight, or over an adapter, is trained as an adapter is."""
        if key == "gain":
            return self.part.is_adapter or isinstance(self.part, Frozen)
        return super().adapts(key)

    def kept_weight(self, state: State) -> Tensor | None:
        return kept_by(self.parts, state)

    @full_precision
    def forward(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        ((part, X, own),) = self.each(raw, state)
        return self._scaled(part.forward(X, own), raw["gain"])

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Mapping[str, Tensor], State]:
        raw: Any
        raw, state = self.part.right_inverse(value, generator=generator)
        P = self.part.forward(raw, state)
        dims = other_dims(value, self.dim)
        unit, size = _scaled(value, dims)
        direction, own = _scaled(P, dims)
        along = (direction.conj() * unit).real.sum(dims)
        square = (direction.conj() * direction).real.sum(dims)
        gain = along / torch.where(square == 0, 1, square) * (size / own).reshape(along.shape)
        # the first tensor has the dtype of the value
        return {**merged([raw]), "gain": gain}, merged([state])

    def rebase(self, raw: Mapping[str, Tensor], state: State) -> tuple[Mapping[str, Tensor], State]:
        moved, state = super().rebase(raw, state)
        return {**moved, "gain": raw["gain"]}, state

    def violation(self, value: Tensor, state: State) -> Tensor:
        """NaN: it is not measured."""
        return value.real.new_full((), torch.nan)

    def log_abs_det_jacobian(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        raise NotImplementedError(
            f"{self!r} has no log_abs_det_jacobian: its part has coordinates besides the gain, and"
            " they may overlap"
        )

    def check(self, value: Tensor) -> None:
        self.part.check(value)
        if self.dim is not None:
            expect_dim(self, value, self.dim)

    def _scaled(self, direction: Tensor, gain: Tensor) -> Tensor:
        if self.dim is None:
            return gain * direction
        return (direction.movedim(self.dim, -1) * gain).movedim(-1, self.dim)


def _scaled(X: Tensor, dims: list[int]) -> tuple[Tensor, Tensor]:
    """X with largest entries of 1 in size, whose products are no extremes, and what that was."""
    ones = torch.ones_like(X.real.sum(dims, keepdim=True))
    if X.numel() == 0:  # has no largest entry
        return X, ones
    size: Tensor = linalg.vector_norm(X.detach(), inf, dim=dims, keepdim=True)
    size = torch.where(size == 0, ones, size)
    return X / size, size
