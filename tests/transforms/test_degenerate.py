"""Second derivatives where a norm is zero or singular values are equal, against differences."""

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev

import funcparam as fp
from funcparam.transforms import DoRA, SpectralNorm, UnitNorm, WeightStandardization

D = torch.float64


def differences(function, x, h=1e-5):
    """The Jacobian of a function of one tensor, by central differences."""
    basis = h * torch.eye(x.numel(), dtype=D).reshape(-1, *x.shape)
    columns = [(function(x + e) - function(x - e)) / (2 * h) for e in basis]
    return torch.stack(columns, -1).reshape(*columns[0].shape, *x.shape)


def assert_second_derivatives(f, x, third=False):
    expected = differences(grad(f), x)
    for outer, inner in ((jacrev, jacrev), (jacfwd, jacrev), (jacrev, jacfwd), (jacfwd, jacfwd)):
        torch.testing.assert_close(outer(inner(f))(x), expected, rtol=1e-6, atol=1e-7)
    if third:
        found = jacrev(hessian(f))(x)
        torch.testing.assert_close(found, differences(hessian(f), x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "value",
    [
        torch.diag(torch.tensor([3.0, 1, 1])),
        torch.diag(torch.tensor([2.0, 1, 1, 0])),
        torch.diag(torch.tensor([2.0, 0, 0])),
        torch.ones(3, 2),
        torch.ones(2, 3),
        torch.randn(4, 3),
        torch.randn(1, 3),
    ],
    ids=["3 1 1", "2 1 1 0", "2 0 0", "tall ones", "wide ones", "tall", "one row"],
)
def test_exact_spectral_norm_where_only_the_largest_singular_value_is_simple(value):
    weights = torch.randn(value.shape, dtype=D)
    transform = SpectralNorm(n_power_iterations=None)
    value = value.double()

    def loss(raw):
        return (transform.forward(raw, {}) * weights).sum()

    expected = value / torch.linalg.matrix_norm(value, 2)
    torch.testing.assert_close(transform.forward(value, {}), expected, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(grad(loss)(value), differences(loss, value), rtol=1e-6, atol=1e-8)
    assert_second_derivatives(loss, value, third=True)


@pytest.mark.parametrize(
    "value",
    [torch.eye(3), -torch.eye(3), torch.eye(3)[[1, 2, 0]], torch.zeros(3, 3)],
    ids=["identity", "minus the identity", "permutation", "zeros"],
)
def test_exact_spectral_norm_at_its_kinks_is_finite(value):
    transform = SpectralNorm(n_power_iterations=None)
    found = hessian(lambda raw: transform.forward(raw, {}).square().sum())(value.double())
    assert found.isfinite().all()


def test_weight_standardization_of_a_constant_row_is_linear_there():
    value = torch.randn(3, 4, dtype=D)
    value[1] = 2.0
    weights = torch.randn(3, 4, dtype=D)

    def loss(raw):
        return (WeightStandardization().forward(raw, {}) * weights).sum()

    found = jacrev(jacrev(loss))(value)
    assert found.isfinite().all()
    assert found[1].count_nonzero() == found[:, :, 1].count_nonzero() == 0
    assert_second_derivatives(lambda rows: loss(torch.cat([rows, value[1:]])), value[:1])


@pytest.mark.parametrize("transform", [UnitNorm(), UnitNorm(0), WeightStandardization()], ids=str)
def test_third_derivatives_of_norms(transform):
    weights = torch.randn(2, 3, dtype=D)
    value = torch.randn(2, 3, dtype=D)
    assert_second_derivatives(
        lambda raw: (transform.forward(raw, {}) * weights).sum(), value, third=True
    )


def test_unit_norm_beside_a_zero_vector():
    value = torch.randn(2, 3, dtype=D)
    value[1] = 0
    found = jacrev(jacrev(lambda raw: UnitNorm().forward(raw, {}).square().sum()))(value)
    assert found.isfinite().all()


def test_a_step_of_meta_learning_with_dora_and_a_pruned_row():
    net = torch.nn.Linear(3, 2, bias=False).double()
    with torch.no_grad():
        net.weight[1] = 0
    x = torch.randn(5, 3, dtype=D)
    p = fp.parametrize(net, {"weight": DoRA(1)})
    raw, state = p.init(net)

    def loss(raw):
        return functional_call(net, p(raw, state), (x,)).square().mean()

    def after_a_step(raw):
        g = grad(loss)(raw)["weight"]
        return loss({"weight": {k: t - 0.1 * g[k] for k, t in raw["weight"].items()}})

    for name, found in grad(after_a_step)(raw)["weight"].items():
        part = raw["weight"][name]
        expected = differences(
            lambda t, name=name: after_a_step({"weight": {**raw["weight"], name: t}}), part
        )
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
