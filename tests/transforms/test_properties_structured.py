"""Extreme raw: structured and normalised weights keep to a bound, gradients are finite."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import toeplitz
from torch import Tensor
from torch.func import grad

from funcparam.transforms import (
    AOL,
    IA3,
    OFT,
    Affine,
    BlockDiagonal,
    Circulant,
    DoRA,
    DoublyStochastic,
    FakeQuantize,
    Kronecker,
    LInfLipschitz,
    LoHa,
    LowRank,
    Monarch,
    Permute,
    Reshape,
    Ternary,
    Toeplitz,
    Transpose,
    VeRA,
    WeightStandardization,
)
from tests.effort import examples
from tests.transforms.test_properties_constraints import entries

DTYPES = [torch.float64, torch.float32]
LOW = [torch.bfloat16, torch.float16]


def named(**shapes):
    return st.fixed_dictionaries({name: entries(*shape) for name, shape in shapes.items()})


# A transform, a shape of its value, its raw, and how many roundings of the largest entry (at
# least 1) a value may be off by.
FAMILIES = [
    (LowRank(2), (4, 5), named(A=(2, 5), B=(4, 2)), 16),
    (Circulant(), (4, 4), entries(4), 0),
    (Toeplitz(), (3, 5), named(column=(3,), row=(4,)), 1),
    (BlockDiagonal(2), (4, 6), entries(2, 2, 3), 0),
    (Kronecker((2, 3)), (4, 6), named(A=(2, 3), B=(2, 2)), 16),
    (DoublyStochastic(), (4, 4), entries(4, 4), 16),
    (AOL(), (4, 3), entries(4, 3), 8),
    (AOL(), (3, 4), entries(3, 4), 8),
    (LInfLipschitz(), (3, 4), named(weight=(3, 4), bound=()), 0),
    (DoRA(2), (4, 5), named(A=(2, 5), B=(4, 2), magnitude=(4,)), 0),
    (VeRA(2), (4, 5), named(b=(4,), d=(2,)), 16),
    (LoHa(1), (4, 5), named(A1=(1, 5), B1=(4, 1), A2=(1, 5), B2=(4, 1)), 16),
    (OFT(2), (4, 6), entries(2, 3, 3), 64),
    (Monarch(2), (4, 6), named(L=(2, 2, 2), R=(2, 2, 3)), 16),
    (IA3(), (4, 5), named(factor=(4,)), 4),
    (Ternary(), (4, 5), entries(4, 5), 4),
    (Ternary(dim=0), (4, 5), entries(4, 5), 4),
    (FakeQuantize(), (4, 5), entries(4, 5), 1),
    (FakeQuantize(4, "affine", dim=0), (4, 5), entries(4, 5), 1),
    (Affine(-2.0, 3.0), (6,), entries(6), 0),
    (Reshape((6,), (2, 3)), (2, 3), entries(6), 0),
    (Permute((1, 0)), (2, 3), entries(3, 2), 0),
    (Transpose(), (2, 3), entries(3, 2), 0),
]


def cast(tree, dtype):
    return tree.to(dtype) if isinstance(tree, Tensor) else {k: t.to(dtype) for k, t in tree.items()}


def gradients(transform, raw, state):
    gradient = grad(lambda raw: transform.forward(raw, state).abs().sum())(raw)
    return [gradient] if isinstance(gradient, Tensor) else list(gradient.values())


def largest_entry(value):
    return max(1, value.abs().max().item())


def holds(transform, raw, state, roundings, dtype, size=largest_entry):
    raw, state = cast(raw, dtype), cast(state, dtype)
    value = transform.forward(raw, state)
    assert value.isfinite().all()
    bound = roundings * torch.finfo(dtype).eps * size(value.double())
    violation = transform.violation(value.double(), cast(state, torch.float64))
    assert violation.isnan() if isinstance(transform, DoRA) else violation <= bound
    assert all(t.isfinite().all() for t in gradients(transform, raw, state))
    return value


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("transform", "shape", "raws", "roundings"), FAMILIES, ids=[str(row[0]) for row in FAMILIES]
)
def test_extreme_raw(transform, shape, raws, roundings, dtype):
    torch.manual_seed(0)
    _, state = transform.right_inverse(torch.randn(shape, dtype=torch.float64).abs())

    @examples(60)
    @given(raws)
    def check(raw):
        holds(transform, raw, state, roundings, dtype)

    check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_keep_below_the_bound(dtype):
    @examples(60)
    @given(named(weight=(3, 4), bound=()))
    def check(raw):
        value = LInfLipschitz().forward(cast(raw, dtype), {}).double()
        info = torch.finfo(dtype)
        bound = torch.nn.functional.softplus(raw["bound"], threshold=50).clamp_min(info.tiny)
        # the scale of a row may be a denormal number, which is rounded to eps * tiny
        rounding = 8 * info.eps * (bound + info.tiny * raw["weight"].abs().sum(1))
        assert (value.abs().sum(1) <= bound + rounding).all()

    check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_standardized_where_it_varies(dtype):
    transform = WeightStandardization()

    @examples(60)
    @given(entries(3, 5))
    def check(raw):
        raw = raw.to(dtype)
        value = transform.forward(raw, {}).double()
        spread = raw.amax(1) - raw.amin(1)
        # half of the spread of n entries is at most sqrt(n) deviations
        varies = spread > 2 * 5**0.5 * transform.eps
        varies &= spread > 64 * torch.finfo(dtype).eps * raw.abs().amax(1)
        assert (value.mean(1).abs() <= 4 * torch.finfo(dtype).eps).all()
        deviation = value.std(1, correction=0)
        assert ((deviation - 1).abs()[varies] <= 8 * torch.finfo(dtype).eps).all()
        assert (deviation <= 1 + 8 * torch.finfo(dtype).eps).all()
        assert all(t.isfinite().all() for t in gradients(transform, raw, {}))

    check()


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("n", [2, 8, 30])
def test_half_precision_is_off_by_its_own_rounding(n, dtype):
    """Sums of n rounded entries of at most 1, and singular values."""
    X = torch.randn(n, n)
    for transform, scale in ((DoublyStochastic(), 3), (AOL(), 1), (LowRank(1), 1)):
        raw, state = transform.right_inverse((scale * X).abs())
        value = transform.forward(cast(raw, dtype), state)
        assert value.dtype == dtype
        bound = torch.finfo(dtype).eps * value.double().norm()
        assert transform.violation(value.double(), {}) <= bound


def conditioned(m, n, condition):
    U = torch.linalg.qr(torch.randn(m, n, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
    return (U * torch.logspace(0, -np.log10(condition), n, dtype=torch.float64)) @ V.mT


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_ill_conditioned_matrices_are_kept(scale, dtype):
    """Condition 1e6: the error is some roundings of the largest entry."""
    W = scale * conditioned(20, 12, 1e6)
    for transform, value in (
        (LowRank(12), W),
        (Kronecker((5, 3)), torch.kron(W[:5, :3], conditioned(4, 4, 1e6))),
        (Toeplitz(), scale * torch.from_numpy(toeplitz(np.exp(-0.1 * np.arange(12) ** 2)))),
    ):
        value = value.to(dtype)
        back = transform.forward(*transform.right_inverse(value))
        bound = 32 * torch.finfo(dtype).eps * torch.linalg.matrix_norm(value, 2)
        assert (back - value).abs().max() <= bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ratio", [1.0, 1e3, 1e6])
def test_aol_keeps_what_unequal_columns_gave(ratio, dtype):
    """The positive vector that the right inverse finds spans the range of the columns' lengths."""
    lengths = torch.logspace(0, np.log10(ratio), 6, dtype=torch.float64)
    value = AOL().forward((torch.randn(8, 6, dtype=torch.float64) * lengths).to(dtype), {})
    back = AOL().forward(*AOL().right_inverse(value))
    assert (back - value).abs().max() <= 1e4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_almost_doubly_stochastic_values_move_by_no_more_than_they_are_off(dtype):
    value = DoublyStochastic().forward(torch.randn(6, 6, dtype=dtype), {})
    for noise in (1e-10, 1e-6, 1e-3):
        near = value * (1 + noise * torch.randn_like(value))
        back = DoublyStochastic().forward(*DoublyStochastic().right_inverse(near))
        assert (back - near).abs().max() <= 10 * noise + 8 * torch.finfo(dtype).eps
