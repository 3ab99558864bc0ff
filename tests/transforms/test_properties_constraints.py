"""Extreme raw and ill-conditioned values: constraints hold to a bound, gradients are finite."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad

from funcparam.transforms import (
    CholeskyFactor,
    CorrelationCholesky,
    Identity,
    LowerBound,
    Ordered,
    Positive,
    PositiveDefinite,
    PSDLowRank,
    Simplex,
    StableDiagonal,
    Triangular,
    UnitNorm,
    UpperBound,
)
from tests.effort import examples

DTYPES = [torch.float64, torch.float32]

# From 1e-8 to 1e4, zero, and the smallest numbers there are.
MAGNITUDES = st.one_of(
    st.floats(-8, 4).map(lambda exponent: 10.0**exponent),
    st.sampled_from([0.0, 5e-324, 1e-310, 1.5e-45, 1e-40, 1e-8, 1.0, 1e4]),
)
ENTRIES = st.builds(lambda size, sign: sign * size, MAGNITUDES, st.sampled_from([-1.0, 1.0]))


def entries(*shape: int):
    return st.lists(ENTRIES, min_size=int(np.prod(shape)), max_size=int(np.prod(shape))).map(
        lambda numbers: torch.tensor(numbers, dtype=torch.float64).reshape(shape)
    )


# A transform, its raw, and how many roundings of the largest entry (at least 1) a value may be
# off by.
FAMILIES = [
    (Positive(), entries(6), 0),
    (Positive("square"), entries(6), 0),
    (LowerBound(-2), entries(6), 0),
    (UpperBound(0.5), entries(6), 0),
    (Identity(), entries(6), 0),
    (Simplex(), entries(2, 6), 8),
    (Simplex("stick_breaking"), entries(2, 5), 40),
    (Ordered(), entries(2, 6), 0),
    (Triangular(), entries(3, 4), 0),
    (CholeskyFactor(), entries(4, 4), 0),
    (PositiveDefinite(), entries(4, 4), 16),
    (PositiveDefinite(0.5), entries(4, 4), 16),
    (PSDLowRank(2), entries(4, 2), 16),
    (CorrelationCholesky(), entries(10), 40),
    (StableDiagonal(), st.fixed_dictionaries({"nu": entries(5), "theta": entries(5)}), 4),
    (StableDiagonal(pairs=True), st.fixed_dictionaries({"nu": entries(5), "theta": entries(5)}), 4),
]


def state_of(transform, dtype):
    name = {LowerBound: "low", UpperBound: "high"}.get(type(transform))
    return {name: torch.tensor(getattr(transform, name), dtype=dtype)} if name else {}


def cast(raw, dtype):
    return raw.to(dtype) if isinstance(raw, Tensor) else {k: t.to(dtype) for k, t in raw.items()}


def holds(transform, raw, roundings, dtype):
    raw, state = cast(raw, dtype), state_of(transform, dtype)
    value = transform.forward(raw, state)
    assert (
        torch.view_as_real(value).isfinite().all()
        if value.is_complex()
        else (value.isfinite().all())
    )
    bound = roundings * torch.finfo(dtype).eps * max(1, value.abs().max().item())
    exact = value.to(torch.complex128 if value.is_complex() else torch.float64)
    assert transform.violation(exact, cast(state, torch.float64)) <= bound

    def loss(raw):
        return transform.forward(raw, state).abs().sum()

    gradient = grad(loss)(raw)
    for t in [gradient] if isinstance(gradient, Tensor) else gradient.values():
        assert t.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("transform", "raws", "roundings"), FAMILIES, ids=lambda x: str(x)[:40])
def test_extreme_raw(transform, raws, roundings, dtype):
    @examples(60)
    @given(raws)
    def check(raw):
        holds(transform, raw, roundings, dtype)

    check()


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float64, 700.0), (torch.float32, 88.0)])
def test_exponential_up_to_where_it_overflows(dtype, largest):
    for size in (5e-324, 1e-8, 1.0, largest):
        holds(Positive("exp"), torch.tensor([size, -size]), 0, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unit_norm_of_any_length(dtype):
    """Gradients shrink as 1 / |X| and overflow where that does; lengths are right everywhere."""
    smallest = torch.finfo(dtype).smallest_normal

    @examples(60)
    @given(entries(3, 4))
    def check(raw):
        raw = raw.to(dtype)
        value = UnitNorm().forward(raw, {})
        some = raw.abs().amax(-1) > 0
        norms = value.double().norm(dim=-1)
        assert ((norms - 1).abs()[some] <= 4 * torch.finfo(dtype).eps).all()
        assert (norms[~some] == 0).all()
        raw = raw * (raw.abs().amax(-1, keepdim=True) > 1e3 * smallest)
        assert grad(lambda x: UnitNorm().forward(x, {}).abs().sum())(raw).isfinite().all()

    check()
    huge = torch.tensor([3.0, 4.0], dtype=dtype) * (torch.finfo(dtype).max / 8)
    torch.testing.assert_close(UnitNorm().forward(huge, {}).tolist(), [0.6, 0.8])


def conditioned(n, condition, dtype):
    Q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
    spectrum = torch.logspace(0, -torch.tensor(condition).log10().item(), n, dtype=torch.float64)
    W = (Q * spectrum) @ Q.mT
    return ((W + W.mT) / 2).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [2, 8, 30])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_ill_conditioned_matrices_are_kept(n, scale, dtype):
    """Condition 1e6: backward stable, so the error is some roundings of the largest entry."""
    bound = 4 * n * torch.finfo(dtype).eps * scale
    W = scale * conditioned(n, 1e6, dtype)
    for transform in (PositiveDefinite(), PSDLowRank(n)):
        raw, _ = transform.right_inverse(W)
        back = transform.forward(raw, {})
        assert (back - W).abs().max() <= bound
        assert grad(lambda x: transform.forward(x, {}).square().sum())(raw).isfinite().all()  # noqa: B023
    L = torch.linalg.cholesky(W.double()).to(dtype)
    back = CholeskyFactor().forward(*CholeskyFactor().right_inverse(L))
    torch.testing.assert_close(back, L, rtol=64 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nearly_degenerate_values_are_kept(dtype):
    tiny = torch.finfo(dtype).smallest_normal
    eps = torch.finfo(dtype).eps
    for transform, value in [
        (Positive(), [tiny, eps, 1 / eps]),
        (Positive("exp"), [tiny, eps, 1 / eps]),
        (Positive("square"), [tiny, eps, 1 / eps]),
        (LowerBound(0), [tiny, eps, 1 / eps]),
        (Simplex(), [1 - 2 * eps, eps, eps]),
        (Simplex("stick_breaking"), [1 - 2 * eps, eps, eps]),
        (Simplex("stick_breaking"), [eps, eps, 1 - 2 * eps]),
        (Ordered(), [1.0, 1 + 4 * eps, 2.0, 1 / eps]),
        (StableDiagonal(pairs=True), [[1 - 2 * eps, 0.0], [0.0, -eps]]),
    ]:
        value = torch.tensor(value, dtype=dtype)
        back = transform.forward(*transform.right_inverse(value))
        # logarithms of 1e-38 have 90 times the rounding of 1
        rtol = 1024 * eps if dtype == torch.float64 else 128 * eps
        torch.testing.assert_close(back, value, rtol=rtol, atol=eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distance", [1e-3, 1e-6])
def test_nearly_singular_correlations_are_kept(distance, dtype):
    """The last row is nearly that of the first: a correlation of 1 - distance."""
    cosine = 1 - distance
    L = torch.eye(3, dtype=torch.float64)
    L[2] = torch.tensor([cosine, 0.0, (1 - cosine**2) ** 0.5], dtype=torch.float64)
    L = L.to(dtype)
    raw, state = CorrelationCholesky().right_inverse(L)
    back = CorrelationCholesky().forward(raw, state)
    torch.testing.assert_close(back, L, rtol=64 * torch.finfo(dtype).eps, atol=1e-15)
    assert CorrelationCholesky().violation(back, {}) <= 8 * torch.finfo(dtype).eps
