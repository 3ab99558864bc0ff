"""Weights of 1e-25 and 1e20, determinants that rounding hides, logarithms that would underflow."""

from itertools import product

import mpmath
import numpy as np
import pytest
import torch
from torch import nn
from torch.func import grad

import funcparam as fp
from funcparam.transforms import (
    AOL,
    BOFT,
    HRA,
    OFT,
    DeLoRA,
    DoRA,
    Identity,
    Invertible,
    Orthogonal,
    PositiveDefinite,
    Product,
    SpecialLinear,
    SpectralCap,
    SpectralNorm,
    Stiefel,
    UnitNorm,
    WeightNorm,
    WeightStandardization,
)
from tests.cases import CASES, every_case, value_of

# what bounds a norm from below by eps, adds a number, or has small values inside
NOT_TINY = ("SpectralNorm", "WeightStandardization", "Affine", "Ball")


def oracle(case):
    """What the map of values onto the constraint is, by the table; None if it is something else."""
    if case.projection is not None:
        return case.projection
    default = next(c for c in CASES if str(c) == "WeightNorm(dim=0)").feasible
    return (lambda x: x) if case.feasible is default else None


@every_case
@pytest.mark.parametrize("scale", [1e-25, 1e20])
def test_no_scale_is_too_small_or_too_large(case, shape, scale):
    """Maps onto the constraint that do not see the scale of a value, or keep it, do so at any."""
    project, value = oracle(case), torch.randn(shape, dtype=torch.float64)
    if project is None or (scale < 1 and str(case).startswith(NOT_TINY)):
        return
    try:
        case.transform.check(value)
    except ValueError:
        return
    here, tenfold = project(value), project(10 * value)
    if torch.allclose(here, tenfold):
        scale_out = 1.0
    elif torch.allclose(10 * here, tenfold):
        scale_out = scale
    else:
        return
    found = case.transform.forward(*case.transform.right_inverse((scale * value).float()))
    torch.testing.assert_close(found.double() / scale_out, here, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-42, 1e-25, 1e20, 1e37])
def test_dora_keeps_every_value(scale):
    value = torch.tensor([[3.0, 4.0], [4.0, 3.0]]) * scale
    raw, state = DoRA(1).right_inverse(value)
    torch.testing.assert_close(DoRA(1).forward(raw, state), value, rtol=1e-6, atol=2e-45)


def test_vectors_and_deviations_of_1e20():
    vector = torch.tensor([3e20, 4e20])
    torch.testing.assert_close(SpectralNorm().forward(vector, {}), torch.tensor([0.6, 0.8]))
    assert SpectralNorm().violation(vector, {}) > 1e20
    rows = torch.tensor([[1e20, 3e20], [5e20, 4e20]])
    expected = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])
    torch.testing.assert_close(WeightStandardization().forward(rows, {}), expected)


@pytest.mark.parametrize("scale", [1e-37, 1e-25, 1e20, 1e30])
def test_spectral_cap_does_not_see_the_scale_of_all(scale):
    value, cap = torch.diag(torch.tensor([3.0, 1.0])), float(2 * torch.tensor(scale))
    found = SpectralCap(cap).forward(*SpectralCap(cap).right_inverse(scale * value))
    torch.testing.assert_close(found / scale, torch.diag(torch.tensor([2.0, 1.0])))
    kept = SpectralCap(2 * cap)
    assert torch.equal(kept.forward(*kept.right_inverse(scale * value)), scale * value)


@pytest.mark.parametrize("scale", [1e-37, 1e-25, 1e-6, 1e20, 1e30])
@pytest.mark.parametrize("first", [Stiefel(), Orthogonal(), Orthogonal("qr")], ids=str)
def test_factors_of_a_product_take_values_of_any_scale(first, scale):
    value = scale * torch.randn(5, 2) @ torch.randn(2, 4)
    product = Product(first, Identity(), inner=2)
    found = product.forward(*product.right_inverse(value))
    torch.testing.assert_close(found / scale, value / scale, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("scale", [1e-37, 1e-25, 1e20, 1e30])
def test_reflections_do_not_see_the_lengths_of_their_vectors(scale):
    _, state = HRA(4).right_inverse(torch.randn(3, 5))
    u = torch.randn(5, 4)
    expected = HRA(4).forward(u, state)
    torch.testing.assert_close(HRA(4).forward(scale * u, state), expected)


@pytest.mark.parametrize("scale", [1e20, 1e30])
def test_delora_does_not_see_the_lengths_of_its_factors(scale):
    raw, state = DeLoRA(2).right_inverse(torch.randn(4, 5))
    raw["B"] = torch.randn(4, 2)
    expected = DeLoRA(2).forward(raw, state)
    lengthened = {"A": scale * raw["A"], "B": scale * raw["B"]}
    for keys in (["A"], ["B"], ["A", "B"]):
        longer = {**raw, **{key: lengthened[key] for key in keys}}
        torch.testing.assert_close(DeLoRA(2).forward(longer, state), expected)

    def gradient(A):
        loss = lambda B: DeLoRA(2).forward({**raw, "A": A, "B": B}, state).square().sum()  # noqa: E731
        return grad(loss)(raw["B"])

    torch.testing.assert_close(gradient(lengthened["A"]), gradient(raw["A"]))


@pytest.mark.parametrize("size", [1.0, 1e3, 1e4])
@pytest.mark.parametrize("transform", [BOFT(3), BOFT(5), OFT(3)], ids=str)
def test_turned_inputs_keep_inner_products_for_any_raw(transform, size):
    value = torch.randn(4, 15)
    raw, state = transform.right_inverse(value)
    if isinstance(raw, torch.Tensor):
        raw = size * torch.randn_like(raw)
    else:
        raw["R"] = size * torch.randn_like(raw["R"])
    turned = transform.forward(raw, state)
    torch.testing.assert_close(turned @ turned.mT, value @ value.mT, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-13, 1.0, 1e30])
@pytest.mark.parametrize("transform", [AOL(), SpectralNorm(), UnitNorm()], ids=str)
def test_rebase_keeps_values_whatever_the_length_of_raw(transform, scale):
    value = torch.randn(4) if isinstance(transform, SpectralNorm) else torch.randn(4, 3)
    raw, state = value * scale, {}
    found = transform.forward(*transform.rebase(raw, state))
    torch.testing.assert_close(found, transform.forward(raw, state), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("shape", "dim"), [((4, 0), 0), ((0, 4), None), ((4, 0, 3), 0)])
def test_weight_norm_of_nothing_has_finite_gradients(shape, dim):
    net = nn.Module()
    net.weight = nn.Parameter(torch.ones(shape))
    model = fp.Parametrized(net, fp.parametrize(net, {"weight": WeightNorm(dim)}))
    model.values()["weight"].sum().backward()
    raw = list(model.parameters())
    assert nn.utils.clip_grad_norm_(raw, 1.0) == 0
    assert all(t.grad.isfinite().all() for t in raw)


# determinants


@pytest.mark.parametrize(("n", "size"), [*product([2, 3, 5], [1.0, 1e3, 1e6, 1e8]), (2, 1e25)])
def test_log_determinant_of_invertible_at_large_raw(n, size):
    raw = torch.randn(n, n) * size
    state = {"base": torch.eye(n)}
    X = mpmath.matrix(raw.double().tolist())
    with mpmath.workdps(50):
        A = mpmath.matrix(n, n)
        for i in range(n):
            for j in range(i):
                A[i, j], A[j, i] = X[i, j], -X[i, j]
        expected = -(n - 1) * mpmath.log(mpmath.det(mpmath.eye(n) - A / 2))
        for k in range(n):
            x = X[k, k]
            expected += (n - k - 1) * mpmath.asinh(x)
            expected += mpmath.asinh(x) - mpmath.log(1 + x**2) / 2
    found = Invertible().log_abs_det_jacobian(raw, state).item()
    assert found == pytest.approx(float(expected), rel=2e-6, abs=1e-5)


def test_log_determinant_of_positive_definite_far_down():
    for dtype, numbers in ((torch.float32, [-1e3, -105.0, -88.5]), (torch.float64, [-800.0])):
        for number in numbers:
            raw = torch.full((1, 1), number, dtype=dtype)
            log_det = PositiveDefinite().log_abs_det_jacobian
            expected = float(np.log(2)) + 2 * number
            assert log_det(raw, {}).item() == pytest.approx(expected)
            assert grad(log_det)(raw, {}).item() == pytest.approx(2)


@pytest.mark.parametrize("x", [-50.0, -20.001, -19.999, -3.0, 0.0, 5.0, 60.0])
def test_log_softplus(x):
    from funcparam.transforms.numerics.softplus import log_softplus

    with mpmath.workdps(40):
        expected = float(mpmath.log(mpmath.log1p(mpmath.exp(x))))
    found = log_softplus(torch.tensor(x, dtype=torch.float64)).item()
    assert found == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    ("n", "std", "dtype"), [(16, 2, torch.float32), (32, 2, torch.float32), (64, 2, torch.float64)]
)
def test_rebase_of_special_linear_keeps_values_of_any_condition(n, std, dtype):
    for _ in range(5):
        _, state = SpecialLinear().right_inverse(torch.eye(n, dtype=dtype))
        raw = std * torch.randn(n, n, dtype=dtype)
        value = SpecialLinear().forward(raw, state)
        new, moved = SpecialLinear().rebase(raw, state)
        assert new.count_nonzero() == 0
        torch.testing.assert_close(
            SpecialLinear().forward(new, moved), value, rtol=0, atol=1e-6 * value.abs().max()
        )


def test_violation_of_special_linear_is_that_of_the_determinant():
    value = torch.diag(torch.tensor([1e4, 1.1e-4]))
    assert SpecialLinear().violation(value, {}).item() == pytest.approx(np.log(1.1), rel=1e-4)
    assert SpecialLinear().violation(torch.diag(torch.tensor([1.0, -1.0])), {}) == 2
    value = value_of(next(c for c in CASES if c.transform == SpecialLinear()), (4, 4))
    assert SpecialLinear().violation(value, {}) < 1e-13
