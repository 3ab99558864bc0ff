from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from funcparam.transforms.contract.arguments import (
    INTEGER,
    POSITIVE_INTEGER,
    POSITIVE_NUMBER,
    expect_argument,
)
from funcparam.transforms.contract.base import State, Transform, expect_dim, largest
from funcparam.transforms.contract.precision import full_precision
from funcparam.transforms.contract.roles import Role
from funcparam.transforms.numerics.linalg import linalg
from funcparam.transforms.numerics.norms import norms
from funcparam.transforms.numerics.power_iteration import direction, power_iteration
from funcparam.transforms.numerics.top_singular_value import top_singular_value

_SMALL = 64 * 64


@final
@dataclass(frozen=True)
class SpectralNorm(Transform[Tensor]):
    r"""A weight divided by its largest singular value, which power iteration tracks.

    $$W = \frac{X}{\sigma}, \qquad \sigma = \operatorname{Re}(u^H X v)$$

    where `X` is flattened to a matrix with `dim` as its rows. State `{"u", "v"}` holds the left
    and right singular vectors. They are exact at init and follow `X` by `update`, once a
    training step, not once a read:

    $$u \leftarrow X v / \lVert X v \rVert, \qquad v \leftarrow X^H u / \lVert X^H u \rVert$$

    They are constants to `grad`, as in PyTorch. With `n_power_iterations=None` sigma is the exact
    largest singular value at every evaluation, and there is no state. Its derivatives are right up
    to the third, wherever the largest singular value is simple.

    Of a convolution this is not the layer's norm. The layer maps images, and its spectral norm is
    up to the root of the number of taps times that of the matrix: 3 for a 3x3 kernel of ones,
    1.7 for a random one with 16 channels. [`AOL`][funcparam.transforms.AOL] and
    [`OrthogonalConv`][funcparam.transforms.OrthogonalConv] bound the layer.

    Raw has the shape of the value. A vector is divided by its norm and has no state. Real and
    complex. A value of spectral norm 1 is kept; any other goes to `value / sigma`, and zero
    stays zero.

    Args:
        dim: the dimension of outputs: 0 for Linear and Conv, 1 for ConvTranspose.
        n_power_iterations: steps that one `update` takes; None for the exact value.
        eps: norms and sigma below it count as zero, by which nothing is divided; a vector of such
            a norm is divided by `eps`, as in PyTorch.

    Raises:
        ValueError: `n_power_iterations` or `eps` is not positive; at `fp.parametrize`, if the
            value has no dimension `dim`.

    Example:
        >>> import torch
        >>> from funcparam.transforms import SpectralNorm
        >>> raw, state = SpectralNorm().right_inverse(torch.diag(torch.tensor([4.0, 2.0])))
        >>> SpectralNorm().forward(raw, state)
        tensor([[1.0000, 0.0000],
                [0.0000, 0.5000]])

    Source: Miyato et al., Spectral Normalization for GANs, arXiv 1802.05957, algorithm 1.
    """

    roles: ClassVar[Mapping[str, Role]] = {"": "direction"}

    dim: int = 0
    n_power_iterations: int | None = 1
    eps: float = 1e-12

    def __post_init__(self) -> None:
        expect_argument(self, "dim", INTEGER)
        expect_argument(self, "n_power_iterations", POSITIVE_INTEGER, optional=True)
        expect_argument(self, "eps", POSITIVE_NUMBER)

    @full_precision
    def forward(self, raw: Tensor, state: State) -> Tensor:
        if raw.ndim == 1:
            return raw / norms(raw, (0,)).clamp_min(self.eps)
        X = self._matrix(raw)
        if self.n_power_iterations is None:
            sigma = top_singular_value(X)
        else:
            sigma = _inner(state["u"], torch.mv(X, state["v"]))
        sigma = self._divisor(sigma)
        # The derivative of a division passes over raw more often; small weights are too short for
        # that to count, and one operation less does.
        return raw / sigma if raw.numel() <= _SMALL else raw * sigma.reciprocal()

    @full_precision
    def forward_stacked(self, raw: Tensor, state: State) -> Tensor:
        if not self._sums_do(raw):
            return super().forward_stacked(raw, state)
        outer = state["u"].unsqueeze(-1) * state["v"].unsqueeze(-2)
        sigma = (self._matrices(raw) * outer).sum((-2, -1))
        return raw * self._divisor(sigma).reciprocal().reshape(-1, *[1] * (raw.ndim - 1))

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        if value.ndim == 1 or self.n_power_iterations is None:
            return value, {}
        u, v = _top_singular_vectors(self._matrix(value.detach()))
        return value, {"u": u, "v": v}

    @full_precision
    def update(self, raw: Tensor, state: State) -> State:
        if raw.ndim == 1 or self.n_power_iterations is None:
            return state
        X, iterations = self._matrix(raw.detach()), self.n_power_iterations
        u, v = power_iteration(X, state["u"], state["v"], iterations, self.eps)
        return {"u": u, "v": v}

    @full_precision
    def update_stacked(self, raw: Tensor, state: State) -> State:
        if not self._sums_do(raw):
            return super().update_stacked(raw, state)
        X = self._matrices(raw.detach())
        u, v = state["u"], state["v"]
        for _ in range(self.n_power_iterations or 0):
            u = direction((X * v.unsqueeze(-2)).sum(-1), u, self.eps)
            v = direction((X * u.unsqueeze(-1)).sum(-2), v, self.eps)
        return {"u": u, "v": v}

    @full_precision
    def refresh(self, raw: Tensor, state: State) -> State:
        return self.right_inverse(raw)[1]

    @full_precision
    def rebase(self, raw: Tensor, state: State) -> tuple[Tensor, State]:
        value = self.forward(raw, state)
        if raw.ndim == 1:  # what counts as zero is not of length 1, and would be divided again
            value = torch.where(norms(raw, (0,)) < self.eps, raw, value)
        return value, state

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """|largest singular value - 1|."""
        if value.ndim == 1:
            norm = norms(value, (0,)).squeeze()
        else:
            norm: Tensor = linalg.matrix_norm(self._matrix(value), 2)
        return (norm - 1).abs()

    def log_abs_det_jacobian(self, raw: Tensor, state: State) -> Tensor:
        raise NotImplementedError(
            f"{self!r} has no log_abs_det_jacobian: the scale of raw is lost, so its Jacobian"
            " is singular"
        )

    def check(self, value: Tensor) -> None:
        super().check(value)
        expect_dim(self, value, self.dim)
        if value.numel() == 0:
            raise ValueError(
                f"{self!r} expects a tensor with entries; got shape {tuple(value.shape)}"
            )

    def _divisor(self, sigma: Tensor) -> Tensor:
        """Sigma, and 1 more where it counts as zero."""
        return sigma + (sigma.detach().abs() < self.eps)

    def _sums_do(self, stack: Tensor) -> bool:
        """Whether a stack is served by products of entries and sums; they beat small matmuls."""
        return self.n_power_iterations is not None and stack.ndim > 2 and not stack.is_complex()

    def _matrices(self, stack: Tensor) -> Tensor:
        return stack.movedim(self.dim % (stack.ndim - 1) + 1, 1).flatten(2)

    def _matrix(self, tensor: Tensor) -> Tensor:
        if self.dim == 0 and tensor.ndim == 2:
            return tensor
        return tensor.movedim(self.dim, 0).flatten(1)


def _inner(u: Tensor, x: Tensor) -> Tensor:
    """Re(u^H x)."""
    return torch.vdot(u, x).real if x.is_complex() else torch.dot(u, x)


def _top_singular_vectors(X: Tensor) -> tuple[Tensor, Tensor]:
    """Exact, because a few power iterations from a random start miss sigma by the gap.

    The Gram matrix of the short side is the cheap way, and accurate for the largest value.
    """
    if X.shape[0] > X.shape[1]:
        v, u = _top_singular_vectors(X.mH)
        return u, v
    scaled = X / largest(X).clamp_min(torch.finfo(X.dtype).tiny)  # no square overflows or vanishes
    u: Tensor = linalg.eigh(scaled @ scaled.mH).eigenvectors[:, -1]
    v = scaled.mH @ u
    norm: Tensor = linalg.vector_norm(v)
    unit = torch.eye(1, len(v), dtype=v.dtype, device=v.device)[0]
    return u, torch.where(norm == 0, unit, v / torch.where(norm == 0, 1, norm))
