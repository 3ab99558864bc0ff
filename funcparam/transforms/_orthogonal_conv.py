from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast, final

import torch
from torch import Tensor

from funcparam.transforms._orthogonal import Orthogonal
from funcparam.transforms.contract.arguments import POSITIVE_INTEGER, expect_argument, expect_choice
from funcparam.transforms.contract.base import (
    State,
    Transform,
    expect_inexact,
    expect_real,
    largest,
)
from funcparam.transforms.contract.precision import full_precision
from funcparam.transforms.contract.roles import Role
from funcparam.transforms.numerics.kernels import expect_groups, grouped
from funcparam.transforms.numerics.linalg import linalg
from funcparam.transforms.numerics.orthogonal_maps import FRAMES, identity_like
from funcparam.transforms.numerics.polar import nearest_orthogonal

# Inside, a kernel is (*taps, groups, out, in), so that a product is one of channels, and one with
# more outputs than inputs is transposed.


@final
@dataclass(frozen=True)
class OrthogonalConv(Transform[Mapping[str, Tensor]]):
    r"""Kernels of orthogonal convolutions, with stride 1 and circular padding.

    $$\sum_t W_t z^t = Q \prod_{a} \prod_{j=1}^{k_a - 1} \left(P_{aj} + (I - P_{aj}) z_a\right)$$

    A value is the weight of a `Conv1d`, `Conv2d` or `Conv3d`, `(out, in / groups, *k)`; `z_a` is
    a shift by one tap along its axis `a`, `Q` a matrix with orthonormal rows and every `P` an
    orthogonal projector, of the inputs. With more outputs than inputs the factors stand on the
    other side, and the columns of `Q` are orthonormal. For inputs of every size and any dilation
    the convolution has orthonormal rows or columns, both if there are as many outputs as inputs,
    and so has the transposed convolution. Circular padding is that of `dilation * (k - 1)` entries
    in all along each axis, as `padding="same"` takes; a kernel of 2 or 4 taps with
    `padding=1` or `2` gets one more, which repeats outputs, and has a norm above 1. With zero
    padding the spectral norm is at most 1.

    In one dimension these are all orthogonal kernels. In two or three they are those whose axes
    come one after the other. BCOP takes turns between the axes, which makes other kernels, with
    as many free parameters.

    Raw is `{"matrix", "axis0", ...}`: a matrix `X` for `Q`, `(groups, out / groups,
    in / groups)`, and for each axis a stack of square ones for the projectors, `(k - 1, groups, c,
    c)` with the larger number of channels `c`. They turn what state holds under the same names,
    `Q = B f(X)` and `P = f(X) B f(X)^H`, with the maps `f` of
    [`Orthogonal`][funcparam.transforms.Orthogonal]. Init starts them at 0, `rebase` moves to 0.

    Init takes one factor after the other off the last axis' end: the projector onto the space on
    which `|first| - |last|` is positive, with `|A| = (A^H A)^(1/2)` of the first and the last tap.
    What it keeps of the last and drops of the first is lost, which is nothing if the value is of
    this kind: it is kept. Of any other value one tap is left, and becomes its Q factor. Where the
    difference is 0 the projector is brought to half of the channels. Its rank, and the sign of the
    determinant of a square `Q`, do not change in training: a kernel with the identity at its middle
    tap (`torch.nn.init.dirac_`) can go anywhere near, while one with its only tap at an end has no
    projectors but 0 or `I` and can only be turned.

    The convolution is orthogonal to rounding, for entries of raw as large as
    [`Orthogonal`][funcparam.transforms.Orthogonal] allows, and with up to three taps along each
    axis the value is kept to rounding. A longer kernel may have so little at its ends that rounding
    hides its factors. Of random kernels of 16 channels and 5, 9 and 17 taps the worst of 20 moved
    by 3e-14, 1e-5 and 1e-2 in float64 (the median by 2e-15, 2e-13 and 5e-5), and by 2e-6, 4e-3 and
    6e-2 in float32. Save raw and state of such a kernel, not the value; `rebase` keeps it to
    rounding.

    Args:
        map: `"matrix_exp"`, `"cayley"` or `"householder"` (real dtypes only).
        groups: the convolution's `groups`.

    Raises:
        TypeError: `groups` is not an integer.
        ValueError: `map` is none of the three, or `groups` is not positive; at `fp.parametrize`, if
            the value has fewer than three dimensions or no taps, if `groups` does not divide the
            outputs, or if it is complex with `"householder"`.

    Example:
        >>> import torch
        >>> from funcparam.transforms import OrthogonalConv
        >>> conv = torch.nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", bias=False)
        >>> raw, state = OrthogonalConv().right_inverse(conv.weight.detach())
        >>> raw = {name: X + torch.randn_like(X) for name, X in raw.items()}
        >>> W = OrthogonalConv().forward(raw, state)
        >>> x = torch.randn(1, 4, 8, 8)
        >>> y = torch.func.functional_call(conv, {"weight": W}, (x,))
        >>> torch.allclose(y.norm(), x.norm())
        True

    Source: Li et al., Preventing gradient attenuation in Lipschitz constrained convolutional
    networks, arXiv 1911.00937 (BCOP); Vaidyanathan, Multirate Systems and Filter Banks (1993),
    chapter 14 (one dimension).
    """

    map: Literal["matrix_exp", "cayley", "householder"] = "matrix_exp"
    groups: int = 1

    def __post_init__(self) -> None:
        expect_choice(self, "map", ("matrix_exp", "cayley", "householder"))
        expect_argument(self, "groups", POSITIVE_INTEGER)

    @full_precision
    def forward(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        Q = self._matrix().forward(raw["matrix"], {"base": state["matrix"]})
        tall = Q.shape[-2] > Q.shape[-1]
        axes = range(len(raw) - 1)
        kernel = (Q.mT if tall else Q)[(None,) * len(axes)]
        for axis in axes:
            for P in self._projectors(raw, state, axis):
                kernel = _lengthened(kernel, P, axis)
        return _unpacked(kernel.mT if tall else kernel)

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Mapping[str, Tensor], State]:
        kernel = _packed(value, self.groups)
        tall = kernel.shape[-2] > kernel.shape[-1]
        kernel = kernel.mT if tall else kernel
        axes = range(value.ndim - 2)
        projectors: dict[str, Tensor] = {}
        for axis in reversed(axes):
            kernel, projectors[f"axis{axis}"] = _shortened(kernel, axis)
        Q = kernel[(0,) * len(axes)]
        matrix, state = self._matrix().right_inverse(Q.mT if tall else Q)
        projectors = {f"axis{axis}": projectors[f"axis{axis}"] for axis in axes}
        zeros = {name: torch.zeros_like(P) for name, P in projectors.items()}
        return {"matrix": matrix, **zeros}, {"matrix": state["base"], **projectors}

    def role(self, key: str) -> Role:
        return "relative"

    @full_precision
    def refresh(self, raw: Mapping[str, Tensor], state: State) -> State:
        matrix = nearest_orthogonal(state["matrix"])
        return {key: _nearest_projector(P) for key, P in state.items()} | {"matrix": matrix}

    @full_precision
    def rebase(self, raw: Mapping[str, Tensor], state: State) -> tuple[Mapping[str, Tensor], State]:
        matrix, base = self._matrix().rebase(raw["matrix"], {"base": state["matrix"]})
        projectors = {
            f"axis{axis}": _projector_again(self._projectors(raw, state, axis))
            for axis in range(len(raw) - 1)
        }
        zeros = {name: torch.zeros_like(P) for name, P in projectors.items()}
        return {"matrix": matrix, **zeros}, {"matrix": base["base"], **projectors}

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest entry of the operator's Gram matrix minus I, or of what the axes share.

        It holds for inputs of every size. Along each axis, outputs at the taps of the axes before
        it counted as outputs, a kernel of this kind has no correlation with its shifts.
        """
        kernel = _packed(value, self.groups)
        kernel = kernel.mT if kernel.shape[-2] > kernel.shape[-1] else kernel
        gram = _correlation(_along(kernel, 0), 0)
        worst = largest(gram - identity_like(gram))
        for axis in range(value.ndim - 2):
            taps = _along(kernel, axis)
            for lag in range(1, len(taps)):
                worst = torch.maximum(worst, largest(_correlation(taps, lag)))
        return worst

    def log_abs_det_jacobian(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        raise NotImplementedError(
            f"{self!r} has no log_abs_det_jacobian: orthogonal kernels are a manifold, on which"
            " only a volume element exists"
        )

    def check(self, value: Tensor) -> None:
        if value.ndim < 3:
            raise ValueError(
                f"{self!r} expects a convolution kernel (out, in / groups, *taps); got shape"
                f" {tuple(value.shape)}. Use Orthogonal for a matrix"
            )
        if 0 in value.shape[2:]:
            raise ValueError(
                f"{self!r} expects taps along every axis; got shape {tuple(value.shape)}"
            )
        expect_groups(self, value, self.groups)
        if self.map == "householder":
            expect_real(self, value)
        expect_inexact(self, value)

    def _matrix(self) -> Orthogonal:
        return Orthogonal(self.map)

    def _projectors(self, raw: Mapping[str, Tensor], state: State, axis: int) -> Tensor:
        turn = FRAMES[self.map](raw[f"axis{axis}"])
        return turn @ state[f"axis{axis}"] @ turn.mH


def _packed(value: Tensor, groups: int) -> Tensor:
    return grouped(value, groups).movedim((0, 1, 2), (-3, -2, -1))


def _unpacked(kernel: Tensor) -> Tensor:
    return kernel.movedim((-3, -2, -1), (0, 1, 2)).flatten(0, 1).contiguous()


def _lengthened(kernel: Tensor, P: Tensor, axis: int) -> Tensor:
    """K(z) (P + (I - P) z) of a kernel K, with z a shift along the axis."""
    kept = kernel @ P
    nothing = torch.zeros_like(kernel.narrow(axis, 0, 1))
    return torch.cat([kept, nothing], axis) + torch.cat([nothing, kernel - kept], axis)


def _shortened(kernel: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Undo `_lengthened` until one tap is left; what the factors do not hold is dropped."""
    found = kernel.new_empty(0, kernel.shape[-3], kernel.shape[-1], kernel.shape[-1])
    while (size := kernel.shape[axis] - 1) > 0:
        P = _separating_projector(kernel, axis)
        early, late = kernel.narrow(axis, 0, size), kernel.narrow(axis, 1, size)
        kernel = late + (early - late) @ P
        found = torch.cat([P.unsqueeze(0), found])
    return kernel, found


def _separating_projector(kernel: Tensor, axis: int) -> Tensor:
    """The projector that keeps the most of the first tap and the least of the last.

    Where there is nothing to keep or drop, rounding apart, it comes as near as it can to half of
    the channels: there projectors have most room to move.
    """
    taps = _along(kernel, axis)
    balance = _modulus(taps[0]) - _modulus(taps[-1])
    values, vectors = cast("tuple[Tensor, Tensor]", linalg.eigh(balance))
    channels = kernel.shape[-1]
    noise = 4 * channels * torch.finfo(kernel.dtype).eps * largest(kernel)
    least, most = (values > noise).sum(-1), (values >= -noise).sum(-1)
    rank = least.clamp_min(channels // 2).minimum(most)
    kept = torch.arange(channels, device=kernel.device) >= channels - rank.unsqueeze(-1)
    return (vectors * kept.unsqueeze(-2)) @ vectors.mH


def _modulus(X: Tensor) -> Tensor:
    """(X^H X)^(1/2), to the rounding of X: the square would lose half of the digits."""
    _, s, Vh = cast("tuple[Tensor, ...]", linalg.svd(X, full_matrices=False))
    return (Vh.mH * s.unsqueeze(-2)) @ Vh


def _projector_again(P: Tensor) -> Tensor:
    """P, with the rounding of its eigenvalues squared, so that many moves do not add up."""
    hermitian = (P + P.mH) / 2
    square = hermitian @ hermitian
    return 3 * square - 2 * hermitian @ square


def _nearest_projector(P: Tensor) -> Tensor:
    """The projector on what P keeps more than half of."""
    values, vectors = cast("tuple[Tensor, Tensor]", linalg.eigh((P + P.mH) / 2))
    return (vectors * (values > 0.5).unsqueeze(-2)) @ vectors.mH


def _along(kernel: Tensor, axis: int) -> Tensor:
    """The taps along one axis, (taps, groups, rows, columns).

    The taps of axes before it make more rows, those of axes after it more columns.
    """
    groups, out, inputs = range(kernel.ndim - 3, kernel.ndim)
    before, after = range(axis), range(axis + 1, kernel.ndim - 3)
    kernel = kernel.permute(axis, groups, *before, out, *after, inputs)
    return kernel.flatten(3 + axis, -1).flatten(2, 2 + axis)


def _correlation(taps: Tensor, lag: int) -> Tensor:
    """sum_t X_t X_(t + lag)^H."""
    return (taps[: len(taps) - lag] @ taps[lag:].mH).sum(0)
