"""THE table of transforms: a transform is a row here before it is code.

Every file in `laws/` crosses all rows with one law.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from torch import Tensor

from funcparam.transforms import (
    AOL,
    BOFT,
    HRA,
    IA3,
    LSQ,
    OFT,
    Affine,
    AlmostOrthogonal,
    Ball,
    BlockCirculant,
    BlockDiagonal,
    Cat,
    Chain,
    CholeskyFactor,
    Circulant,
    CorrelationCholesky,
    DeLoRA,
    Diagonal,
    DoRA,
    DoublyStochastic,
    FakeQuantize,
    FakeQuantizeFloat,
    FixedRank,
    Frozen,
    Gain,
    Grassmann,
    Hadamard,
    Hermitian,
    Identity,
    Interval,
    Invertible,
    Isospectral,
    Kronecker,
    LeftHalfPlane,
    LInfLipschitz,
    LoHa,
    LoRA,
    LowerBound,
    LowRank,
    Mask,
    Monarch,
    NMSparse,
    OperatorNorm,
    Ordered,
    Orthogonal,
    OrthogonalConv,
    Permute,
    Positive,
    PositiveDefinite,
    Product,
    PSDLowRank,
    RandLoRA,
    Reshape,
    RotateIn,
    RotateOut,
    Simplex,
    Skew,
    SkewHermitian,
    Sparse,
    SpecialLinear,
    SpecialOrthogonal,
    SpectralCap,
    SpectralNorm,
    StableDiagonal,
    Stack,
    Stiefel,
    Sum,
    Symmetric,
    Ternary,
    Toeplitz,
    TopK,
    Transform,
    Transpose,
    Triangular,
    Unitary,
    UnitNorm,
    UpperBound,
    VeRA,
    WeightNorm,
    WeightStandardization,
    transform,
)
from tests.transforms.convolutions import (
    almost_orthogonal_kernel,
    orthogonal_kernel,
    peeled,
    perron_kernel,
)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """A transform, the shapes to try it on, and what is true of it."""

    transform: Transform
    shapes: tuple[Shape, ...]
    feasible: Callable[[Tensor], Tensor] = lambda x: x
    """Maps any tensor to a value that satisfies the constraint, without the library's code."""
    projection: Callable[[Tensor], Tensor] | None = None
    """The documented projection of other values; None where there is none or none is needed."""
    complex: bool = False
    log_det: Callable[[Tensor], Tensor] | None = None
    """Picks the free coordinates of raw and of a value; None where there is no determinant."""
    free_of_value: Callable[[Tensor], Tensor] | None = None
    """Picks the free coordinates of a value where they are not those of raw."""
    straight_through: Callable[[Tensor, Mapping[str, Tensor]], Tensor] | None = None
    """A map with the documented derivative, where that is not forward's own."""
    measured: bool = True
    """Whether there is a violation; where it is not measured it is NaN."""
    name: str = field(default="")

    def __str__(self) -> str:
        return self.name or repr(self.transform)


def _numpy(function: Callable[[Any], Any]) -> Callable[[Tensor], Tensor]:
    """Apply a numpy function to each matrix of a batch."""

    def apply(x: Tensor) -> Tensor:
        flat = x.reshape(-1, *x.shape[-2:])
        out = [torch.from_numpy(function(m.numpy().copy())) for m in flat]
        return torch.stack(out).reshape(x.shape).to(x.dtype)

    return apply


def _q_factor(m):
    """Q of the QR decomposition with a positive diagonal, by scipy; of the transpose if wide."""
    if m.shape[0] < m.shape[1]:
        return _q_factor(m.T).T
    q, r = scipy.linalg.qr(m, mode="economic")
    d = r.diagonal()
    return q * (d / abs(d))


def _rotation(m):
    """The Q factor, with the last column negated where its determinant is -1."""
    q = _q_factor(m)
    q[:, -1] *= np.linalg.det(q)
    return q


def _complex(x: Tensor) -> Tensor:
    return x if x.is_complex() else torch.complex(x, x.flip(-1))


def _unit_determinant(m):
    """The last column over the determinant's sign, and all by the root of its size."""
    sign, size = np.linalg.slogdet(m)
    m[:, -1] /= sign
    return m * np.exp(-size / len(m))


def _singular_values(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def apply(m):
        u, s, vh = scipy.linalg.svd(m, full_matrices=False)
        return (u * function(s)) @ vh

    return apply


def _well_inside(radius: float) -> Callable[[Any], Any]:
    """Of singular values, those further than `radius` from 1, to 0.99 of it."""

    def apply(s):
        return np.where(abs(s - 1) > radius, 1 + 0.99 * radius * np.sign(s - 1), s)

    return apply


def _unit_spectral_norm(m):
    return m / scipy.linalg.svdvals(m)[0]


def _unit_operator(groups: int) -> Callable[[Tensor], Tensor]:
    """Over the largest singular value of the dense matrices of the circular convolutions."""

    def norm(kernel: Tensor) -> Tensor:
        sides = [4 * size if size > 1 else 1 for size in kernel.shape[2:]]
        dims = tuple(range(1, 1 + len(sides)))
        response = torch.fft.fftn(kernel, sides, tuple(range(2, kernel.ndim)))

        def convolve(image: Tensor) -> Tensor:
            product = torch.einsum("oi...,i...->o...", response, torch.fft.fftn(image, dim=dims))
            return torch.fft.ifftn(product, dim=dims).real

        image = torch.zeros(kernel.shape[1], *sides, dtype=kernel.dtype)
        dense = torch.func.jacrev(convolve)(image).reshape(-1, image.numel())
        return torch.linalg.matrix_norm(dense, 2)

    return lambda x: x / max(map(norm, x.chunk(groups)))


def _flat_spectral(dim: int) -> Callable[[Tensor], Tensor]:
    def apply(x: Tensor) -> Tensor:
        s = scipy.linalg.svdvals(x.movedim(dim, 0).flatten(1).numpy())[0]
        return x / s.item()

    return apply


def _some_zeros(x: Tensor) -> Tensor:
    return torch.where(torch.arange(x.numel()).reshape(x.shape) % 3 == 0, 0, x)


def _unit_vector(x: Tensor) -> Tensor:
    return x / x.norm()


def _lower_factor(x: Tensor) -> Tensor:
    return x.tril(-1) + torch.diag_embed(x.diagonal(dim1=-2, dim2=-1).abs() + 0.5).to(x.dtype)


def _unit_rows(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def _low_rank_psd(rank: int) -> Callable[[Tensor], Tensor]:
    def apply(x: Tensor) -> Tensor:
        factor = 0.4 * x[..., :rank]
        return (factor @ factor.mH).to(x.dtype)

    return apply


def _top_eigenpairs(rank: int) -> Callable[[Any], Any]:
    def apply(m):
        n = len(m)
        spectrum, vectors = scipy.linalg.eigh((m + m.T) / 2, subset_by_index=(n - rank, n - 1))
        return (vectors * spectrum.clip(0)) @ vectors.T

    return apply


def _complex_of_pairs(x: Tensor) -> Tensor:
    """Numbers of modulus 0.2 to 0.9, and of angle at least 0.1 away from the negative axis."""
    modulus, angle = 0.2 + 0.7 * x.real.sigmoid(), 3 * torch.tanh(x.imag)
    return torch.polar(modulus, angle)


def _lower_entries(x: Tensor) -> Tensor:
    return x[torch.ones_like(x).tril() == 1]


def _below_diagonal(x: Tensor) -> Tensor:
    return x[torch.ones_like(x).tril(-1) == 1]


def _low_rank(rank: int) -> Callable[[Any], Any]:
    def nearest(m):
        u, s, vh = scipy.linalg.svd(m, full_matrices=False)
        return (u[:, :rank] * s[:rank]) @ vh[:rank]

    return nearest


def _circulant(m):
    n = len(m)
    means = [sum(m[(j + k) % n, j] for j in range(n)) / n for k in range(n)]
    return scipy.linalg.circulant(means)


def _toeplitz(m):
    rows, columns = m.shape
    column = [m.diagonal(-k).mean() for k in range(rows)]
    return scipy.linalg.toeplitz(column, [m.diagonal(k).mean() for k in range(columns)])


def _block_diagonal(blocks: int) -> Callable[[Any], Any]:
    def nearest(m):
        rows = enumerate(np.split(m, blocks))
        return scipy.linalg.block_diag(*(np.split(row, blocks, axis=1)[i] for i, row in rows))

    return nearest


def _monarch(blocks: int) -> Callable[[Any], Any]:
    """The best rank 1 of every submatrix of rows j, j + b, ... and a block of columns."""

    def nearest(m):
        out = np.empty_like(m)
        width = m.shape[1] // blocks
        for j, k in np.ndindex(blocks, blocks):
            part = np.s_[j::blocks, k * width : (k + 1) * width]
            out[part] = _low_rank(1)(m[part])
        return out

    return nearest


def _kronecker(p: int, q: int, right: Callable[[Any], Any] = lambda m: m) -> Callable[[Any], Any]:
    """The nearest Kronecker product, by the best rank 1 of one row for each block."""

    def nearest(m):
        b, c = m.shape[0] // p, m.shape[1] // q
        blocks = [
            m[i * b : i * b + b, j * c : j * c + c].ravel() for i in range(p) for j in range(q)
        ]
        u, s, vh = scipy.linalg.svd(np.array(blocks), full_matrices=False)
        return np.kron(s[0] * u[:, 0].reshape(p, q), right(vh[0].reshape(b, c)))

    return nearest


def _block_circulant(size: int) -> Callable[[Any], Any]:
    def nearest(m):
        rows = [np.split(row, m.shape[1] // size, axis=1) for row in np.split(m, len(m) // size)]
        return np.block([[_circulant(block) for block in row] for row in rows])

    return nearest


def _largest_entries(count: int) -> Callable[[Tensor], Tensor]:
    def apply(x: Tensor) -> Tensor:
        least = sorted(x.abs().flatten().tolist())[-count]
        return torch.where(x.abs() >= least, x, 0)

    return apply


def _hermitian_parts(w: Tensor) -> Tensor:
    """The real parts of the upper triangle and the imaginary ones below the diagonal."""
    return torch.where(torch.ones_like(w.real).triu() == 1, w.real, w.imag)


def _negative_real(x: Tensor) -> Tensor:
    return torch.complex(-x.real.exp(), x.imag if x.is_complex() else x.flip(-1))


def _on_l1_ball(radius: float) -> Callable[[Tensor], Tensor]:
    """The nearest point: shrunk by the number that makes the norm the radius, by bisection."""

    def apply(x: Tensor) -> Tensor:
        low, high = 0.0, x.abs().max().item()
        for _ in range(200):
            shrink = (low + high) / 2
            total = (x.abs() - shrink).clamp_min(0).sum()
            low, high = (shrink, high) if total > radius else (low, shrink)
        return x.sign() * (x.abs() - high).clamp_min(0) if x.abs().sum() > radius else x

    return apply


def _on_l2_ball(radius: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x * min(1.0, radius / x.norm().item())


def _n_of_m(n: int, m: int) -> Callable[[Tensor], Tensor]:
    def apply(x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for group, kept in zip(x.flatten().split(m), out.view(-1).split(m), strict=True):
            for i in sorted(range(m), key=lambda i: -abs(group[i].item()))[:n]:
                kept[i] = group[i]
        return out

    return apply


def _ternary(x: Tensor) -> Tensor:
    above = x.abs() > 0.7 * x.abs().mean()
    return x.sign() * above * x.abs()[above].mean()


def _bitnet(x: Tensor) -> Tensor:
    """As in transformers' BitLinear, where a value of levels is divided first."""
    gamma = x.abs().mean()
    return gamma * (x / gamma).round().clamp(-1, 1)


def _each_row(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.stack([function(row) for row in x])


def _each_column(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: _each_row(function)(x.movedim(1, 0)).movedim(0, 1)


def _quantized(bits: int) -> Callable[[Tensor], Tensor]:
    def apply(x: Tensor) -> Tensor:
        top = 2 ** (bits - 1) - 1
        scale = x.abs().max().item() / top
        return scale * torch.from_numpy(np.rint(x.numpy() / scale)).clamp(-top, top)

    return apply


def _quantized_from_zero(bits: int) -> Callable[[Tensor], Tensor]:
    def apply(x: Tensor) -> Tensor:
        low, high = min(x.min().item(), 0), max(x.max().item(), 0)
        scale = (high - low) / (2**bits - 1)
        start = np.rint(low / scale)
        return scale * torch.from_numpy(np.rint(x.numpy() / scale)).clamp(
            start, start + 2**bits - 1
        )

    return apply


def _quantized_fully(bits: int) -> Callable[[Tensor], Tensor]:
    """On all integers of the width, those below 0 being one more."""

    def apply(x: Tensor) -> Tensor:
        half = 2 ** (bits - 1)
        scale = x.abs().max().item() / (half - 0.5)
        return scale * torch.from_numpy(np.rint(x.numpy() / scale)).clamp(-half, half - 1)

    return apply


def _in_groups(function: Callable[[Tensor], Tensor], size: int) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.stack([function(g) for g in x.flatten().split(size)]).reshape(x.shape)


def _clipped_groups(bits: int, size: int) -> Callable[[Tensor, Mapping[str, Tensor]], Tensor]:
    def apply(x: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        rows = {"scale": state["scale"].flatten()}
        return _clipped(bits)(x.reshape(-1, size), rows).reshape(x.shape)

    return apply


def _as_float(dtype: torch.dtype, top: float) -> Callable[[Tensor], Tensor]:
    """PyTorch's own rounding to a format, of the largest entry to its end."""

    def apply(x: Tensor) -> Tensor:
        scale = x.abs().max() / top
        return (x / scale).float().to(dtype).to(x.dtype) * scale

    return apply


def _lsq(q: int, shared: int | None) -> Callable[[Any, Mapping[str, Tensor]], Tensor]:
    """Equations 2 and 3 of the paper: the derivatives of the weight and of the step, slowed."""

    def apply(raw: Any, _: Mapping[str, Tensor]) -> Tensor:
        x, s = (
            raw["weight"].reshape(-1, shared or raw["weight"].numel()),
            raw["scale"].reshape(-1, 1),
        )
        steps = (x / s).detach()
        inside = steps.abs() < q + 0.5
        slope = torch.where(inside, steps.round() - steps, q * steps.sign())
        scale = slope * s / np.sqrt(x.shape[1] * q)
        return (torch.where(inside, x, x.detach()) + scale).reshape(raw["weight"].shape)

    return apply


def _within(end: float) -> Callable[[Tensor, Mapping[str, Tensor]], Tensor]:
    """The identity inside of the range, constant outside."""

    def apply(x: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        last = end * state["scale"].reshape(-1, *[1] * (x.ndim - 1))
        return torch.maximum(torch.minimum(x, last), -last).reshape(x.shape)

    return apply


def _mxfp4(x: Tensor) -> Tensor:
    """The nearest of all numbers of the format; a tie is what no random number is."""
    levels = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    scale = 2.0 ** (np.floor(np.log2(x.abs().max().item())) - 2)
    grid = torch.tensor(sorted({sign * level for level in levels for sign in (-1, 1)})).to(x)
    return scale * grid[(x.unsqueeze(-1) / scale - grid).abs().argmin(-1)]


def _clipped(bits: int) -> Callable[[Tensor, Mapping[str, Tensor]], Tensor]:
    """Identity inside of the range, to the middle of the step beyond it; constant outside."""

    def apply(x: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        scale = state["scale"].reshape(-1, *[1] * (x.ndim - 1))
        end = scale * (2 ** (bits - 1) - 0.5)
        return torch.maximum(torch.minimum(x, end), -end)

    return apply


def _standardized(dim: int) -> Callable[[Tensor], Tensor]:
    def apply(x: Tensor) -> Tensor:
        rows = x.movedim(dim, 0).flatten(1).numpy()
        return (
            torch.from_numpy(scipy.stats.zscore(rows, axis=1))
            .reshape(x.movedim(dim, 0).shape)
            .movedim(0, dim)
        )

    return apply


def _almost_orthogonal(m):
    return m / np.sqrt(abs(m.T @ m).sum(1))


def _perron(m):
    return m / np.sqrt(np.linalg.eigvalsh(abs(m.T @ m))[-1])


def _sinkhorn(m):
    m = np.exp(m)
    for _ in range(500):
        m = m / m.sum(1, keepdims=True)
        m = m / m.sum(0, keepdims=True)
    return m


def triple(raw: Tensor) -> Tensor:
    return 3 * raw


def third(value: Tensor) -> Tensor:
    return value / 3


MATRICES = ((4, 4), (5, 3), (3, 5), (2, 4, 3), (1, 1))
SQUARE = ((4, 4), (2, 3, 3), (1, 1))
ANY = ((3, 4), (5,), (2, 3, 2, 2), (1,))

CASES = [
    *(
        Case(Orthogonal(map), MATRICES, _numpy(_q_factor), _numpy(_q_factor), map != "householder")
        for map in ("matrix_exp", "cayley", "householder")
    ),
    Case(
        Orthogonal("householder", trivialize=False), MATRICES, _numpy(_q_factor), _numpy(_q_factor)
    ),
    Case(Orthogonal("qr"), MATRICES, _numpy(_q_factor), _numpy(_q_factor), True),
    Case(Orthogonal("qr", trivialize=False), MATRICES, _numpy(_q_factor), _numpy(_q_factor), True),
    Case(Orthogonal("newton_schulz"), MATRICES, _numpy(_q_factor), _numpy(_q_factor), True),
    Case(
        Orthogonal("newton_schulz", trivialize=False),
        MATRICES,
        _numpy(_q_factor),
        _numpy(lambda m: scipy.linalg.polar(m)[0]),
        True,
    ),
    *(
        Case(SpecialOrthogonal(map), SQUARE, _numpy(_rotation), _numpy(_rotation))
        for map in ("matrix_exp", "cayley", "householder")
    ),
    *(
        Case(
            Unitary(map),
            SQUARE,
            lambda x: _numpy(_q_factor)(_complex(x)),
            _numpy(_q_factor),
            complex=True,
        )
        for map in ("matrix_exp", "cayley")
    ),
    Case(Stiefel(), MATRICES, _numpy(_q_factor), _numpy(_q_factor), complex=True),
    Case(
        Grassmann(),
        ((5, 3), (3, 5), (2, 4, 3), (2, 1), (1, 3)),
        _numpy(_q_factor),
        _numpy(_q_factor),
        complex=True,
    ),
    Case(
        AlmostOrthogonal(0.3),
        MATRICES,
        _numpy(_singular_values(lambda s: 1 + 0.25 * np.sin(3 * s))),
        _numpy(_singular_values(_well_inside(0.3))),
        complex=True,
    ),
    Case(Invertible(), SQUARE, complex=True, log_det=lambda x: x),
    Case(
        SpecialLinear(),
        SQUARE,
        _numpy(_unit_determinant),
        _numpy(_unit_determinant),
        complex=True,
    ),
    Case(WeightNorm(), ((4, 3), (5,), (2, 3, 2, 2), (1, 1))),
    Case(WeightNorm(dim=-1), ((4, 3), (2, 3, 2))),
    Case(WeightNorm(dim=None), ANY),
    Case(
        SpectralNorm(n_power_iterations=2),
        ((4, 4), (5, 3), (3, 5), (1, 1)),
        _numpy(_unit_spectral_norm),
        _numpy(_unit_spectral_norm),
        complex=True,
    ),
    Case(
        SpectralNorm(n_power_iterations=None),
        ((4, 4), (5, 3), (1, 1)),
        _numpy(_unit_spectral_norm),
        _numpy(_unit_spectral_norm),
        complex=True,
    ),
    Case(SpectralNorm(dim=1), ((2, 3, 2, 2),), _flat_spectral(1), _flat_spectral(1), complex=True),
    Case(
        SpectralNorm(), ((5,),), _unit_vector, _unit_vector, True, name="SpectralNorm of a vector"
    ),
    Case(
        Symmetric(),
        SQUARE,
        lambda x: x + x.mT,
        lambda x: (x + x.mT) / 2,
        complex=True,
        log_det=lambda x: x[torch.ones_like(x).triu() == 1],
    ),
    Case(
        Skew(),
        SQUARE,
        lambda x: x - x.mT,
        lambda x: (x - x.mT) / 2,
        complex=True,
        log_det=lambda x: x[torch.ones_like(x).tril(-1) == 1],
    ),
    Case(Positive(), ANY, lambda x: x.exp(), log_det=lambda x: x),
    Case(Positive("exp"), ANY, lambda x: x.exp(), log_det=lambda x: x),
    Case(Positive("square"), ANY, lambda x: x.exp(), log_det=lambda x: x),
    Case(LowerBound(-2), ANY, lambda x: x.exp() - 1.9, log_det=lambda x: x),
    Case(UpperBound(0.5), ANY, lambda x: 0.4 - x.exp(), log_det=lambda x: x),
    Case(Identity(), ANY, complex=True, log_det=lambda x: x),
    Case(Simplex(), ((3, 4), (5,), (2, 3, 2), (1,)), lambda x: x.softmax(-1)),
    Case(
        Simplex("stick_breaking"),
        ((3, 4), (5,), (2, 3, 2), (1,)),
        lambda x: x.softmax(-1),
        log_det=lambda x: x,
        free_of_value=lambda w: w[..., :-1],
    ),
    Case(
        Ordered(),
        ((3, 4), (5,), (1,)),
        lambda x: x.exp().cumsum(-1) - 2,
        log_det=lambda x: x,
    ),
    Case(Triangular(), MATRICES, torch.tril, torch.tril, True, _lower_entries),
    Case(
        Triangular(upper=True),
        MATRICES,
        torch.triu,
        torch.triu,
        True,
        lambda x: x[torch.ones_like(x).triu() == 1],
    ),
    Case(CholeskyFactor(), SQUARE, _lower_factor, complex=True, log_det=_lower_entries),
    *(
        Case(
            PositiveDefinite(eps),
            SQUARE,
            lambda x: x @ x.mH / 4 + torch.eye(x.shape[-1], dtype=x.dtype),
            complex=True,
            log_det=_lower_entries,
        )
        for eps in (0.0, 0.1)
    ),
    Case(
        PSDLowRank(2),
        ((4, 4), (2, 3, 3), (2, 2)),
        _low_rank_psd(2),
        _numpy(_top_eigenpairs(2)),
        complex=True,
    ),
    Case(
        CorrelationCholesky(),
        ((4, 4), (2, 3, 3), (2, 2), (1, 1)),
        lambda x: _unit_rows(_lower_factor(x)),
        log_det=lambda x: x,
        free_of_value=_below_diagonal,
    ),
    Case(UnitNorm(), ANY, _unit_rows, _unit_rows, complex=True),
    Case(
        UnitNorm(dim=0),
        ANY,
        lambda x: x / x.norm(dim=0, keepdim=True),
        lambda x: x / x.norm(dim=0, keepdim=True),
        complex=True,
    ),
    Case(
        UnitNorm(dim=(1, -1), radius=2.0),
        ((2, 3, 2),),
        lambda x: 2 * x / x.norm(dim=(1, 2), keepdim=True),
        lambda x: 2 * x / x.norm(dim=(1, 2), keepdim=True),
        complex=True,
    ),
    Case(UnitNorm(dim=None, radius=None), ((3, 4), (2, 3, 2, 2), ()), complex=True),
    Case(
        StableDiagonal(pairs=True),
        ((4, 2), (2, 3, 2)),
        lambda x: torch.view_as_real(_complex_of_pairs(torch.view_as_complex(x))),
        log_det=lambda x: x,
        free_of_value=lambda w: w,
    ),
    Case(Interval(-2, 0.5), ANY, lambda x: x.sigmoid() * 2.4 - 1.95, log_det=lambda x: x),
    Case(
        Diagonal(),
        SQUARE,
        _numpy(lambda m: np.diag(np.diag(m))),
        _numpy(lambda m: np.diag(np.diag(m))),
        complex=True,
        log_det=lambda x: x,
        free_of_value=lambda w: w.diagonal(dim1=-2, dim2=-1),
    ),
    Case(
        Sparse(4),
        ((3, 4), (5,), (2, 3, 2, 2)),
        _largest_entries(3),
        _largest_entries(4),
        complex=True,
        log_det=lambda x: x,
        free_of_value=lambda w: w[w != 0],
    ),
    Case(Mask(), ANY, _some_zeros, complex=True, log_det=lambda x: x[_some_zeros(x) != 0]),
    Case(LoRA(rank=2, alpha=3.0), ((4, 4), (5, 3), (3, 2, 2, 2)), complex=True),
    Case(LoRA(2, init="pissa", scale="rslora"), ((4, 3),), complex=True),
    Case(LoRA(1, 2.0, init="olora"), ((3, 2, 2, 2),), complex=True),
    Case(LoRA(2, init="gaussian"), ((4, 3),), complex=True),
    *(
        Case(transform, shapes, _numpy(nearest), _numpy(nearest), complex=True)
        for transform, shapes, nearest in (
            (LowRank(2), ((4, 4), (5, 3), (3, 5), (2, 4, 3)), _low_rank(2)),
            (LowRank(1), ((1, 1), (1, 3)), _low_rank(1)),
            (FixedRank(2), ((4, 4), (5, 3), (3, 5), (2, 4, 3), (2, 2)), _low_rank(2)),
            (FixedRank(1), ((1, 1), (1, 3)), _low_rank(1)),
            (Circulant(), SQUARE, _circulant),
            (Toeplitz(), MATRICES, _toeplitz),
            (BlockDiagonal(2), ((4, 4), (6, 2), (2, 4), (3, 2, 4)), _block_diagonal(2)),
            (BlockDiagonal(1), ((1, 1), (2, 3)), _block_diagonal(1)),
            (BlockCirculant(2), ((4, 6), (2, 2), (3, 4, 2)), _block_circulant(2)),
            (Kronecker((2, 3)), ((4, 6), (2, 6), (4, 3), (2, 6, 6)), _kronecker(2, 3)),
            (Kronecker((2, 2), B=LowRank(1)), ((6, 6),), _kronecker(2, 2, _low_rank(1))),
            (Kronecker((1, 1)), ((1, 1), (2, 3)), _kronecker(1, 1)),
            (Monarch(2), ((4, 4), (6, 4), (2, 8), (3, 4, 6)), _monarch(2)),
            (Monarch(1), ((1, 1), (2, 3)), _monarch(1)),
        )
    ),
    *(
        Case(WeightStandardization(dim), shapes, _standardized(dim), _standardized(dim))
        for dim, shapes in ((0, ((4, 3), (3, 5), (2, 3, 2, 2), (1, 2))), (1, ((2, 3, 2),)))
    ),
    Case(LInfLipschitz(), ((4, 3), (3, 5), (2, 3, 2, 2), (1, 1))),
    Case(
        AOL(),
        ((4, 4), (5, 3), (3, 5), (1, 1)),
        _numpy(_almost_orthogonal),
        _numpy(_perron),
    ),
    *(
        Case(
            AOL(groups),
            shapes,
            almost_orthogonal_kernel(groups),
            perron_kernel(groups),
            name=f"{AOL(groups)} of kernels",
        )
        for groups, shapes in (
            (1, ((3, 2, 3), (2, 2, 3, 2), (1, 1, 2), (2, 2, 1, 2, 2))),
            (2, ((4, 2, 3), (2, 3, 2, 2))),
        )
    ),
    *(
        Case(
            OrthogonalConv(map),
            shapes,
            orthogonal_kernel,
            peeled,
            complex=map != "householder",
        )
        for map, shapes in (
            ("matrix_exp", ((3, 3, 3), (2, 3, 2), (3, 2, 3), (2, 2, 3, 2))),
            ("cayley", ((2, 2, 2, 2),)),
            ("householder", ((3, 3, 2),)),
        )
    ),
    *(
        Case(OperatorNorm(groups=groups), shapes, _unit_operator(groups), _unit_operator(groups))
        for groups, shapes in ((1, ((2, 3, 3), (2, 1, 2, 2), (1, 1, 1))), (2, ((2, 2, 2),)))
    ),
    Case(
        OrthogonalConv(),
        ((1, 3, 3), (2, 2, 1, 3), (1, 2, 2, 1, 2), (1, 1, 3)),
        orthogonal_kernel,
        complex=True,
        name="OrthogonalConv of kernels that leave a projector free",
    ),
    Case(
        OrthogonalConv(groups=2),
        ((4, 2, 2),),
        lambda x: torch.cat([orthogonal_kernel(part) for part in x.chunk(2)]),
        complex=True,
    ),
    Case(DoublyStochastic(), ((4, 4), (2, 3, 3), (1, 1)), _numpy(_sinkhorn)),
    Case(DoublyStochastic(temperature=0.5), ((3, 3),), _numpy(_sinkhorn)),
    *(
        Case(
            kind(),
            SQUARE,
            lambda x, f=factor: _complex(x) + f * _complex(x).mH,
            complex=True,
            log_det=lambda x: x,
            free_of_value=lambda w, f=factor: _hermitian_parts(w if f == 1 else -1j * w),
        )
        for kind, factor in ((Hermitian, 1), (SkewHermitian, -1))
    ),
    Case(
        LeftHalfPlane(),
        ((4,), (2, 3)),
        _negative_real,
        complex=True,
        log_det=lambda x: x,
        free_of_value=torch.view_as_real,
    ),
    Case(
        LeftHalfPlane(pairs=True),
        ((4, 2), (2, 3, 2)),
        lambda x: torch.view_as_real(_negative_real(torch.view_as_complex(x))),
        log_det=lambda x: x,
        free_of_value=lambda w: w,
    ),
    Case(
        SpectralCap(1.2),
        ((4, 4), (5, 3), (2, 3, 4), (1, 1)),
        _numpy(_singular_values(lambda s: s / (1 + s))),
        _numpy(_singular_values(lambda s: np.minimum(s, 1.2))),
        complex=True,
    ),
    Case(Isospectral(), MATRICES, complex=True),
    Case(Ball(), ((3, 4), (5,), ()), _on_l2_ball(0.9), _on_l2_ball(1)),
    Case(
        Ball(2, 1.5, dim=0), ((3, 4),), _each_column(_on_l2_ball(1)), _each_column(_on_l2_ball(1.5))
    ),
    Case(
        Ball(np.inf, 0.5), ((3, 4), (5,), ()), lambda x: 0.4 * x.sin(), lambda x: x.clamp(-0.5, 0.5)
    ),
    Case(Ball(1, 1.5), ((3, 4), (5,), ()), _on_l1_ball(1.4), _on_l1_ball(1.5)),
    Case(Ball(1, dim=-1), ((3, 4),), _each_row(_on_l1_ball(0.9)), _each_row(_on_l1_ball(1))),
    Case(
        TopK(0.4),
        ((3, 4), (5,)),
        lambda x: _largest_entries(max(1, round(0.4 * x.numel())))(x),
        lambda x: _largest_entries(max(1, round(0.4 * x.numel())))(x),
        straight_through=lambda x, _: x,
    ),
    Case(
        NMSparse(2, 4),
        ((3, 4), (2, 2, 8)),
        _n_of_m(2, 4),
        _n_of_m(2, 4),
        straight_through=lambda x, _: x,
    ),
    Case(
        NMSparse(1, 2, dim=0),
        ((4, 3),),
        lambda x: _n_of_m(1, 2)(x.mT.contiguous()).mT,
        lambda x: _n_of_m(1, 2)(x.mT.contiguous()).mT,
        straight_through=lambda x, _: x,
    ),
    # adapters and others from parts
    Case(Sum(Frozen(), Chain(Kronecker((2, 1)), Affine(0.5))), ((4, 4), (2, 3)), complex=True),
    Case(
        Sum(Frozen(), Symmetric()),
        SQUARE[:1],
        complex=True,
        log_det=lambda x: x[torch.ones_like(x).triu() == 1],
    ),
    Case(
        Sum(Chain(LowRank(2), Reshape((-1,), (-1, 2, 2))), Frozen()),
        ((3, 2, 2, 2),),
        complex=True,
    ),
    Case(
        Product(LowRank(1), Identity(), inner=2),
        ((4, 4), (3, 5), (2, 4, 3)),
        _numpy(_low_rank(1)),
        complex=True,
    ),
    Case(
        Product(Stiefel(), Identity(), Identity(), inner=2),
        ((4, 3),),
        _numpy(_low_rank(2)),
        _numpy(_low_rank(2)),
        complex=True,
    ),
    Case(
        Product(Frozen(), BlockDiagonal(2), inner="in"),
        ((3, 4), (2, 3, 2)),
        complex=True,
        measured=False,
    ),
    Case(Product(Orthogonal(), Frozen(), inner="out"), ((3, 4),), complex=True, measured=False),
    Case(
        Hadamard(Frozen(), Chain(LowRank(2), Affine(shift=1.0))),
        ((3, 4), (5, 3)),
        complex=True,
        measured=False,
    ),
    Case(
        Hadamard(LowRank(1), Identity()),
        ((3, 4),),
        complex=True,
        measured=False,
        name="Hadamard(LowRank(1), Identity())",
    ),
    Case(Gain(SpectralNorm()), ((4, 3),), complex=True, measured=False),
    Case(Gain(UnitNorm(), dim=0), ((3, 4), (1, 1)), complex=True, measured=False),
    Case(Gain(WeightNorm(), dim=-1), ((2, 3, 2),), measured=False),
    Case(
        Sum(PSDLowRank(2), Diagonal()),
        ((4, 4),),
        _low_rank_psd(2),
        complex=True,
        measured=False,
    ),
    Case(DoRA(rank=2, alpha=3.0), ((4, 4), (5, 3), (3, 2, 2, 2)), measured=False),
    Case(DoRA(rank=1), ((1, 1), (1, 3)), measured=False),
    Case(DeLoRA(rank=2), ((4, 3), (3, 2, 2, 2)), complex=True),
    Case(RandLoRA(rank=2, alpha=3.0), ((4, 3), (3, 2, 2, 2)), complex=True),
    Case(HRA(rank=4), ((4, 3), (3, 2, 2, 2), (1, 1)), complex=True),
    Case(BOFT(block_size=3), ((2, 3),), complex=True, measured=False),
    Case(BOFT(block_size=2, factors=3), ((2, 8), (3, 4, 2, 1)), complex=True, measured=False),
    Case(VeRA(rank=3), ((4, 4), (5, 3), (3, 2, 2, 2), (1, 1)), complex=True),
    Case(LoHa(rank=2, alpha=3.0), ((4, 4), (5, 6), (3, 2, 2, 2), (1, 1)), complex=True),
    Case(OFT(blocks=2), ((4, 4), (3, 6), (3, 2, 2, 2)), complex=True),
    Case(OFT(blocks=1), ((3, 2), (1, 1)), complex=True),
    Case(IA3(), ((4, 3), (5,), (2, 3, 2, 2), (1, 1)), complex=True),
    Case(IA3(dim=1), ((4, 3), (2, 3, 2)), complex=True),
    *(
        Case(Ternary(dim=dim), shapes, levels, levels, straight_through=lambda x, _: x)
        for dim, shapes, levels in (
            (None, ((3, 4), (5,), (2, 3, 2, 2), (1, 1), ()), _ternary),
            (0, ((3, 4), (2, 3, 2)), _each_row(_ternary)),
            (-1, ((3, 4),), _each_column(_ternary)),
        )
    ),
    *(
        Case(
            Ternary(0.5, dim, "absmean"),
            shapes,
            lambda x, f=levels: 3 * f(x),
            levels,
            straight_through=lambda x, _: x,
        )
        for dim, shapes, levels in (
            (None, ((3, 4), (5,)), _bitnet),
            (0, ((3, 4),), _each_row(_bitnet)),
        )
    ),
    Case(
        FakeQuantize(4, group_size=4),
        ((3, 4), (2, 2, 8)),
        _in_groups(_quantized(4), 4),
        _in_groups(_quantized(4), 4),
        straight_through=_clipped_groups(4, 4),
    ),
    *(
        Case(
            FakeQuantizeFloat(format), ((3, 4), (5,)), levels, levels, straight_through=_within(end)
        )
        for format, end, levels in (
            ("float8_e4m3fn", 512, _as_float(torch.float8_e4m3fn, 448)),
            ("float8_e5m2", 65536, _as_float(torch.float8_e5m2, 57344)),
        )
    ),
    Case(
        FakeQuantizeFloat("float4_e2m1fn", group_size=4, power_of_two=True),
        ((3, 4), (2, 2, 8)),
        _in_groups(_mxfp4, 4),
        _in_groups(_mxfp4, 4),
        straight_through=lambda x, s: _within(8)(x.reshape(-1, 4), s).reshape(x.shape),
    ),
    *(
        Case(
            LSQ(bits, dim, group_size),
            shapes,
            levels,
            levels,
            straight_through=_lsq(2 ** (bits - 1) - 1, shared),
            measured=False,
        )
        for bits, dim, group_size, shapes, shared, levels in (
            (4, None, None, ((3, 4), (5,)), None, _quantized(4)),
            (4, 0, None, ((3, 4),), 4, _each_row(_quantized(4))),
            (3, None, 2, ((3, 4),), 2, _in_groups(_quantized(3), 2)),
        )
    ),
    *(
        Case(FakeQuantize(bits, dim=dim), shapes, levels, levels, straight_through=_clipped(bits))
        for bits, dim, shapes, levels in (
            (8, None, ((3, 4), (5,), (2, 3, 2, 2), (1, 1)), _quantized(8)),
            (4, 0, ((3, 4), (2, 3, 2)), _each_row(_quantized(4))),
        )
    ),
    Case(
        FakeQuantize(bits=3, scheme="affine"),
        ((3, 4), (5,), (2, 3, 2, 2)),
        _quantized_from_zero(3),
        _quantized_from_zero(3),
        straight_through=lambda x, s: torch.maximum(
            torch.minimum(x, s["scale"] * (7.5 - s["zero_point"])),
            s["scale"] * (-0.5 - s["zero_point"]),
        ),
    ),
    Case(
        FakeQuantize(bits=4, scheme="full"),
        ((3, 4), (5,)),
        torch.zeros_like,
        _quantized_fully(4),
        straight_through=lambda x, s: x.clamp(-8.5 * s["scale"], 7.5 * s["scale"]),
    ),
    Case(Affine(scale=-2.0, shift=0.5), (*ANY, ()), complex=True, log_det=lambda x: x),
    Case(Reshape((6, 2), (3, 4)), ((3, 4), (2, 3, 4)), complex=True, log_det=lambda x: x),
    Case(Reshape((), (1, 1)), ((1, 1),), complex=True, log_det=lambda x: x),
    Case(Permute((2, 0, -2)), ((2, 3, 4), (1, 1, 1)), complex=True, log_det=lambda x: x),
    Case(Transpose(), MATRICES, complex=True, log_det=lambda x: x),
    Case(Transpose(0, -1), ((2, 3, 4),), complex=True, log_det=lambda x: x),
    Case(
        Chain(Symmetric(), Reshape((4, 4), (2, 8)), Transpose()),
        ((8, 2),),
        lambda x: (x.mT.reshape(4, 4) + x.mT.reshape(4, 4).mT).reshape(2, 8).mT,
        complex=True,
        log_det=lambda x: x[torch.ones_like(x).triu() == 1],
        free_of_value=lambda x: x.mT.reshape(4, 4)[torch.ones(4, 4).triu() == 1],
    ),
    Case(Frozen(), ANY, complex=True),
    Case(
        StableDiagonal(),
        ((4,), (2, 3)),
        lambda x: _complex_of_pairs(x if x.is_complex() else torch.complex(x, x.flip(-1))),
        complex=True,
        log_det=lambda x: x,
        free_of_value=torch.view_as_real,
    ),
    Case(
        Cat([Positive(), Interval(-2, 0.5)], lengths=(1, 2)),
        ((3, 4), (3,)),
        lambda x: torch.cat([x[:1].exp(), x[1:].sigmoid() * 2.4 - 1.95]),
        log_det=lambda x: x,
        free_of_value=lambda w: w,
    ),
    Case(
        Cat([Orthogonal("cayley"), SpectralNorm(), Frozen()], dim=-1),
        ((3, 9), (4, 6)),
        lambda x: torch.cat(
            [
                f(piece)
                for f, piece in zip(
                    [_numpy(_q_factor), _numpy(_unit_spectral_norm), torch.clone],
                    x.chunk(3, -1),
                    strict=True,
                )
            ],
            dim=-1,
        ),
        complex=True,
    ),
    Case(
        Stack([Symmetric(), PositiveDefinite()]),
        ((2, 3, 3),),
        lambda x: torch.stack([x[0] + x[0].mT, x[1] @ x[1].mH / 4 + torch.eye(3, dtype=x.dtype)]),
        complex=True,
        log_det=lambda x: torch.cat(
            [
                x[:9].reshape(3, 3).mT[torch.ones(3, 3).tril() == 1],
                _lower_entries(x[9:].reshape(3, 3)),
            ]
        ),
        free_of_value=_lower_entries,
    ),
    Case(transform(triple, third), ANY, complex=True, log_det=None),
    Case(Chain(WeightNorm(), Symmetric()), SQUARE[:1], lambda x: x + x.mT),
    Case(
        Chain(Skew(), Orthogonal("cayley")),
        ((4, 4),),
        _numpy(_q_factor),
        _numpy(_q_factor),
        complex=True,
        name="Chain(Skew(), Orthogonal('cayley'))",
    ),
    Case(Chain(LoRA(rank=2), Positive()), ((4, 4),), lambda x: x.exp()),
    Case(
        Chain(Interval(-9, 9), Positive()),
        ANY,
        lambda x: 5 * x.sigmoid(),
        log_det=lambda x: x,
    ),
]

# What takes the values of other weights, without them; with them it is in test_shared.py.
TAKING = [
    Case(RotateIn("R"), ((3, 4),), complex=True, measured=False),
    Case(RotateOut("R"), ((3, 4), (5,)), complex=True, measured=False),
]

ROWS = [(case, shape) for case in (*CASES, *TAKING) for shape in case.shapes]


def every_row(function):
    """Run a test for every transform and shape."""
    ids = [f"{case}-{'x'.join(map(str, shape))}" for case, shape in ROWS]
    return pytest.mark.parametrize(("case", "shape"), ROWS, ids=ids)(function)


def every_case(function):
    """Run a test for every transform, on its first shape."""
    rows = [(case, case.shapes[0]) for case in CASES]
    return pytest.mark.parametrize(("case", "shape"), rows, ids=[str(c) for c in CASES])(function)


def value_of(case: Case, shape: Shape, dtype: torch.dtype = torch.float64) -> Tensor:
    """A feasible value, well away from anything special."""
    return case.feasible(torch.randn(shape, dtype=dtype))


def raw_and_state(case: Case, shape: Shape, dtype: torch.dtype = torch.float64):
    """Raw and state away from where init puts them."""
    raw, state = case.transform.right_inverse(value_of(case, shape, dtype))
    moved = [t + 0.3 * torch.randn_like(t) for t in tensors(raw)]
    return rebuild(raw, moved), dict(state)


def tensors(raw) -> list[Tensor]:
    """The tensors of a raw or a state."""
    return [raw] if isinstance(raw, Tensor) else list(raw.values())


def rebuild(like, new):
    """A raw like `like` with the tensors of `new`."""
    return next(iter(new)) if isinstance(like, Tensor) else dict(zip(like, new, strict=True))


def forward_of(case: Case, raw, state):
    """`forward` as a function of raw's tensors, for checkers that take positional tensors."""

    def function(*moved: Tensor) -> Tensor:
        return case.transform.forward(rebuild(raw, moved), state)

    return function
