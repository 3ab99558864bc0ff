from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from funcparam.transforms.contract.arguments import expect_choice
from funcparam.transforms.contract.base import (
    State,
    Transform,
    expect_all,
    expect_matrix,
    expect_real,
    expect_square,
    largest,
)
from funcparam.transforms.contract.precision import full_precision
from funcparam.transforms.contract.roles import Role
from funcparam.transforms.numerics.karcher import karcher_mean
from funcparam.transforms.numerics.linalg import linalg
from funcparam.transforms.numerics.orthogonal_maps import (
    FRAMES,
    complete_q_factor,
    identity_like,
    reflectors,
)
from funcparam.transforms.numerics.polar import (
    CONVERGED,
    nearest_orthogonal,
    orthogonal_tangent,
)

# These two do not need a base point to start from a value: raw itself can be the value.
_PROJECTIONS = ("qr", "newton_schulz")


@final
@dataclass(frozen=True)
class Orthogonal(Transform[Tensor]):
    r"""Matrices with orthonormal columns (tall and square) or rows (wide).

    $$W = B \, f(X), \qquad f(0) = I$$

    Raw has the shape of the value, `(..., m, n)`. Of a tall raw `X` the lower triangle counts; a
    wide one is transposed first, and the result back. With `A = tril(X) - tril(X)^H`, padded to
    a square matrix,

    * `"matrix_exp"`: `f(X)` is the first columns of `exp(A)`;
    * `"cayley"`: the first columns of `(I - A/2)^-1 (I + A/2)`; no eigenvalue -1 is reached;
    * `"householder"`: the first columns of a product of reflections, one for each column of
      `tril(X, -1) + I`. Real dtypes;
    * `"qr"`: the Q factor of `I + X`, all of `X`, with a positive diagonal of R;
    * `"newton_schulz"`: the polar factor of `I + X`, in 36 products and no factorisation;
      orthonormal to rounding where the condition number of `I + X` is below 1e4, of sides
      up to 10,000.

    With `trivialize` (the default) state `{"base"}` holds an orthogonal matrix `B` of the longer
    side: init writes the value there and starts raw at 0, so every orthogonal value is kept, and
    any other becomes its Q factor. `rebase` moves it. Without it there is no base:
    `"householder"` keeps the value by its reflectors and has state `{"signs"}`; `"qr"` and
    `"newton_schulz"` project raw, which starts at the value, in place of `I + X`; the other two
    cannot be inverted. A value that is singular to rounding is refused by these two, since there is
    no derivative, and so is one on which `"newton_schulz"` does not converge.

    The columns are orthonormal to rounding after any number of steps, weight decay included:
    nothing is accumulated. In float32 that holds for entries of raw up to about 1e3;
    `"matrix_exp"` goes on to 1e7 on a CPU (on a device, compiled or exported it becomes NaN where
    the norm of `A` is beyond about 1e4), `"householder"` and `"qr"` to 1e10. `"cayley"` of a square
    with an even side goes on to `-B`; elsewhere `I - A/2` may be singular to rounding from about
    1e7 on (1e15 in float64).

    Args:
        map: `"matrix_exp"`, `"cayley"`, `"householder"`, `"qr"` or `"newton_schulz"`.
        trivialize: whether to multiply by a base point.

    Raises:
        ValueError: `map` is none of the five; at `fp.parametrize`, if the value has fewer than
            two dimensions, or is complex with `"householder"`; at init, with `"qr"` or
            `"newton_schulz"` and no base point, if the value is singular or close to it.
        NotImplementedError: at init, with `"matrix_exp"` or `"cayley"` and no base point.
        torch.linalg.LinAlgError: in `forward`, with `"cayley"`, where `I - A/2` is singular; on a
            device, compiled or exported the value is not finite instead.

    Example:
        >>> import torch
        >>> from funcparam.transforms import Orthogonal
        >>> raw, state = Orthogonal().right_inverse(torch.eye(3, 2))
        >>> W = Orthogonal().forward(raw + torch.ones(3, 2), state)
        >>> torch.allclose(W.mT @ W, torch.eye(2), atol=1e-6)
        True

    Source: Lezcano-Casado and Martínez-Rubio, arXiv 1901.08428; Lezcano-Casado, Trivializations,
    arXiv 1909.09501 (base points); Helfrich et al., arXiv 1707.09520 (Cayley); Mhammedi et al.,
    arXiv 1612.00188 (Householder); Amsel et al., The Polar Express, arXiv 2505.16932, and Björck
    and Bowie, SIAM J. Numer. Anal. 8 (1971) (Newton-Schulz).
    """

    map: Literal["matrix_exp", "cayley", "householder", "qr", "newton_schulz"] = "matrix_exp"
    trivialize: bool = True

    def __post_init__(self) -> None:
        expect_choice(self, "map", FRAMES)
        expect_choice(self, "trivialize", (True, False))

    @full_precision
    def forward(self, raw: Tensor, state: State) -> Tensor:
        wide = raw.shape[-2] < raw.shape[-1]
        tall = raw.mT if wide else raw
        frame = FRAMES[self.map](tall, state.get("base"))
        if self.map == "householder" and not self.trivialize:
            frame = frame * state["signs"].unsqueeze(-2)
        return frame.mT if wide else frame

    def forward_stacked(self, raw: Tensor, state: State) -> Tensor:
        return self.forward(raw, state)

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        wide = value.shape[-2] < value.shape[-1]
        tall = value.mT if wide else value
        if self.trivialize:
            return torch.zeros_like(value), {"base": complete_q_factor(tall)}
        if self.map in _PROJECTIONS:
            self._expect_regular(tall.detach())
            return value, {}
        if self.map != "householder":
            raise NotImplementedError(
                f"{self!r} has no right inverse: use trivialize=True, which keeps a base point,"
                " or another map"
            )
        raw, signs = reflectors(tall)
        return raw.mT if wide else raw, {"signs": signs}

    def role(self, key: str) -> Role:
        if self.trivialize:
            return "relative"
        return "direction" if self.map in _PROJECTIONS else "coordinates"

    @full_precision
    def refresh(self, raw: Tensor, state: State) -> State:
        return {"base": nearest_orthogonal(state["base"])} if self.trivialize else state

    @full_precision
    def rebase(self, raw: Tensor, state: State) -> tuple[Tensor, State]:
        if not self.trivialize:
            return raw, state
        return self.right_inverse(self.forward(raw, state))

    @full_precision
    def project(self, value: Tensor, state: State) -> Tensor:
        """The nearest such matrix, the polar factor; of a singular one, on a CPU, one of them."""
        return nearest_orthogonal(value)

    def tangent(self, value: Tensor, vector: Tensor, state: State) -> Tensor:
        return orthogonal_tangent(value, vector)

    def karcher_mean(self, values: Tensor, weights: Tensor) -> Tensor:
        return karcher_mean(values, weights)

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest |W^H W - I| of the shorter side."""
        tall = value.mT if value.shape[-2] < value.shape[-1] else value
        gram = tall.mH @ tall
        return largest(gram - identity_like(gram))

    def log_abs_det_jacobian(self, raw: Tensor, state: State) -> Tensor:
        raise NotImplementedError(
            f"{self!r} has no log_abs_det_jacobian: orthogonal matrices are a manifold, on which"
            " only a volume element exists"
        )

    def check(self, value: Tensor) -> None:
        super().check(value)
        expect_matrix(self, value)
        if value.is_complex() and self.map == "householder":
            raise ValueError(
                f"{self!r} expects a real tensor; got {value.dtype}. Use map='matrix_exp' or"
                " 'cayley'"
            )

    def _expect_regular(self, tall: Tensor) -> None:
        """Raise ValueError where the projection has no derivative, or does not converge."""
        if self.map == "newton_schulz":
            regular = self.violation(self.forward(tall, {}), {}) < CONVERGED
        else:  # Householder's Q is orthonormal whatever it is made from
            spectrum: Tensor = linalg.svdvals(tall)
            rounding = tall.shape[-2] * torch.finfo(spectrum.dtype).eps
            regular = spectrum[..., -1:] > rounding * spectrum[..., :1]
        expect_all(
            self,
            regular,
            "expects a matrix that is not singular nor close to it, which has no orthogonal"
            " factor: use trivialize=True, or add noise to the value first",
        )


@final
@dataclass(frozen=True)
class SpecialOrthogonal(Transform[Tensor]):
    r"""Rotations: square orthogonal matrices of determinant 1.

    [`Orthogonal`][funcparam.transforms.Orthogonal] with a base point, and one sign turned at
    init where the value is a reflection: a value with orthonormal columns and determinant -1
    goes to the rotation with its last column negated, and any other first to its Q factor. Raw
    has the shape of the value, `(..., n, n)`; state is `{"base"}`. Real dtypes.

    Args:
        map: `"matrix_exp"`, `"cayley"` or `"householder"`, whose determinant is 1 everywhere.

    Raises:
        ValueError: `map` is none of the three; at `fp.parametrize`, if the value is not square or
            not real.

    Example:
        >>> import torch
        >>> from funcparam.transforms import SpecialOrthogonal
        >>> raw, state = SpecialOrthogonal().right_inverse(torch.diag(torch.tensor([1.0, -1.0])))
        >>> SpecialOrthogonal().forward(raw, state)
        tensor([[1., 0.],
                [0., 1.]])

    Source: as `Orthogonal`.
    """

    roles: ClassVar[Mapping[str, Role]] = {"": "relative"}

    map: Literal["matrix_exp", "cayley", "householder"] = "matrix_exp"

    def __post_init__(self) -> None:
        expect_choice(self, "map", ("matrix_exp", "cayley", "householder"))

    def forward(self, raw: Tensor, state: State) -> Tensor:
        return Orthogonal(self.map).forward(raw, state)

    def forward_stacked(self, raw: Tensor, state: State) -> Tensor:
        return self.forward(raw, state)

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        raw, state = Orthogonal(self.map).right_inverse(value)
        base = state["base"]
        sign: Tensor = linalg.det(base).sign()[..., None, None]
        return raw, {"base": torch.cat([base[..., :-1], base[..., -1:] * sign], dim=-1)}

    @full_precision
    def refresh(self, raw: Tensor, state: State) -> State:
        return self.right_inverse(nearest_orthogonal(state["base"]))[1]

    @full_precision
    def rebase(self, raw: Tensor, state: State) -> tuple[Tensor, State]:
        return self.right_inverse(self.forward(raw, state))

    def tangent(self, value: Tensor, vector: Tensor, state: State) -> Tensor:
        return Orthogonal().tangent(value, vector, state)

    def karcher_mean(self, values: Tensor, weights: Tensor) -> Tensor:
        return karcher_mean(values, weights)

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest |W^T W - I| or |det W - 1|."""
        determinant: Tensor = linalg.det(value)
        return torch.maximum(Orthogonal().violation(value, state), largest(determinant - 1))

    def log_abs_det_jacobian(self, raw: Tensor, state: State) -> Tensor:
        return Orthogonal(self.map).log_abs_det_jacobian(raw, state)

    def check(self, value: Tensor) -> None:
        expect_real(self, value)
        expect_square(self, value)


@final
@dataclass(frozen=True)
class Unitary(Transform[Tensor]):
    r"""Unitary matrices: square and complex, with `W^H W = I`.

    [`Orthogonal`][funcparam.transforms.Orthogonal] with a base point, for complex weights alone.
    Raw has the shape of the value, `(..., n, n)`; state is `{"base"}`. A unitary value is kept,
    any other goes to its Q factor. The group is connected: training from any start can reach
    every unitary matrix, as it cannot from a real one of the other determinant.

    Args:
        map: `"matrix_exp"` or `"cayley"`.

    Raises:
        ValueError: `map` is neither; at `fp.parametrize`, if the value is not square or not
            complex.

    Example:
        >>> import torch
        >>> from funcparam.transforms import Unitary
        >>> raw, state = Unitary().right_inverse(torch.eye(2, dtype=torch.complex64))
        >>> W = Unitary().forward(raw + 1j * torch.eye(2), state)
        >>> torch.allclose(W, torch.exp(torch.tensor(2j)) * torch.eye(2))
        True

    Source: as `Orthogonal`.
    """

    roles: ClassVar[Mapping[str, Role]] = {"": "relative"}

    map: Literal["matrix_exp", "cayley"] = "matrix_exp"

    def __post_init__(self) -> None:
        expect_choice(self, "map", ("matrix_exp", "cayley"))

    def forward(self, raw: Tensor, state: State) -> Tensor:
        return Orthogonal(self.map).forward(raw, state)

    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        return Orthogonal(self.map).right_inverse(value)

    def refresh(self, raw: Tensor, state: State) -> State:
        return Orthogonal(self.map).refresh(raw, state)

    @full_precision
    def rebase(self, raw: Tensor, state: State) -> tuple[Tensor, State]:
        return self.right_inverse(self.forward(raw, state))

    def project(self, value: Tensor, state: State) -> Tensor:
        """The nearest unitary matrix, the polar factor."""
        return Orthogonal().project(value, state)

    def tangent(self, value: Tensor, vector: Tensor, state: State) -> Tensor:
        return Orthogonal().tangent(value, vector, state)

    def karcher_mean(self, values: Tensor, weights: Tensor) -> Tensor:
        return karcher_mean(values, weights)

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest |W^H W - I|."""
        return Orthogonal().violation(value, state)

    def log_abs_det_jacobian(self, raw: Tensor, state: State) -> Tensor:
        return Orthogonal(self.map).log_abs_det_jacobian(raw, state)

    def check(self, value: Tensor) -> None:
        super().check(value)
        if not value.is_complex():
            raise ValueError(
                f"{self!r} expects a complex tensor; got {value.dtype}. A real unitary matrix is"
                " orthogonal: use Orthogonal()"
            )
        expect_square(self, value)
