"""Manifolds of matrices: tangents, gauges, derivatives of complex ones, determinants."""

from math import inf, log

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacrev, jvp, vmap

import funcparam as fp
from funcparam.transforms import (
    AlmostOrthogonal,
    FixedRank,
    Grassmann,
    Invertible,
    Orthogonal,
    SpecialLinear,
    Stiefel,
    Unitary,
)
from tests.cases import rebuild, tensors

close = torch.testing.assert_close


def randn(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


def moved(raw, size=0.3):
    return rebuild(raw, [part + size * torch.randn_like(part) for part in tensors(raw)])


COMPLEX = [
    (Unitary(), (3, 3)),
    (Unitary("cayley"), (3, 3)),
    (Stiefel(), (4, 2)),
    (Grassmann(), (2, 4)),
    (FixedRank(2), (4, 3)),
    (AlmostOrthogonal(0.4), (2, 3)),
    (Invertible(), (3, 3)),
    (SpecialLinear(), (3, 3)),
]


@pytest.mark.parametrize(("transform", "shape"), COMPLEX, ids=str)
def test_derivatives_of_complex_raw(transform, shape):
    raw, state = transform.right_inverse(randn(*shape, dtype=torch.complex128))
    raw = moved(raw)
    parts = [part.requires_grad_() for part in tensors(raw)]

    def forward(*parts):
        return transform.forward(rebuild(raw, parts), state)

    assert gradcheck(forward, parts, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(forward, parts, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize(("transform", "shape"), COMPLEX, ids=str)
def test_complex_values_satisfy_the_constraint(transform, shape):
    raw, state = transform.right_inverse(randn(*shape, dtype=torch.complex128))
    for size in (1e-8, 1.0, 30.0):
        value = transform.forward(moved(raw, size), state)
        assert value.is_complex()
        assert transform.violation(value, state) <= 1e-13 * value.abs().amax().clamp_min(1)


# Stiefel, Grassmann, Unitary


@pytest.mark.parametrize("shape", [(6, 3), (3, 6), (4, 4), (2, 5, 1)], ids=str)
def test_a_small_step_is_the_projection_on_the_tangent_space(shape):
    raw, state = Stiefel().right_inverse(randn(*shape))
    B = state["base"] if shape[-2] >= shape[-1] else state["base"].mT
    X = randn(*B.shape)
    # Edelman, Arias and Smith, equation 2.4
    expected = B @ (B.mT @ X - X.mT @ B) / 2 + X - B @ (B.mT @ X)
    if shape[-2] < shape[-1]:
        X, expected = X.mT, expected.mT
    _, tangent = jvp(lambda raw: Stiefel().forward(raw, state), (raw,), (X,))
    close(tangent, expected)


@pytest.mark.parametrize("shape", [(6, 3), (3, 6), (2, 5, 1)], ids=str)
def test_a_subspace_moves_at_right_angles_to_itself(shape):
    raw, state = Grassmann().right_inverse(randn(*shape))
    X = randn(*shape)
    value, tangent = jvp(lambda raw: Grassmann().forward(raw, state), (raw,), (X,))
    inner = value.mT @ tangent if shape[-2] > shape[-1] else value @ tangent.mT
    close(inner, torch.zeros_like(inner))
    assert tangent.abs().amax() > 0.1


def test_a_subspace_has_the_gauge_of_its_base_point():
    """Turning the base point turns the frame with it: the projector does not see it."""
    _, state = Grassmann().right_inverse(randn(6, 2))
    turn = Orthogonal().right_inverse(randn(2, 2))[1]["base"]
    X = randn(6, 2)
    one = Grassmann().forward(X, state)
    two = Grassmann().forward(X @ turn, {"base": state["base"] @ turn})
    close(two, one @ turn)
    within = state["base"] @ randn(2, 2)
    close(Grassmann().forward(X + within, state), one)


def test_a_subspace_at_right_angles_is_reached():
    _, state = Grassmann().right_inverse(torch.eye(4, 2, dtype=torch.float64))
    raw = 2 * torch.eye(4, 2, dtype=torch.float64).roll(2, 0)
    close(Grassmann().forward(raw, state), raw / 2)


def test_thin_frames_take_thin_memory():
    raw, state = Stiefel().right_inverse(torch.randn(20_000, 2))
    W = Stiefel().forward(raw + 1, state)  # a complement would have 4e8 entries
    assert Stiefel().violation(W, state) < 1e-5


# fixed rank, almost orthogonal


@pytest.mark.parametrize("transform", [FixedRank(2), AlmostOrthogonal(0.5)], ids=str)
def test_raw_reaches_every_direction_of_the_manifold(transform):
    """The rank of the Jacobian is the dimension of the matrices near the value."""
    m, n = 5, 3
    U, _, Vh = torch.linalg.svd(randn(m, n), full_matrices=False)
    spectrum = torch.tensor([1.2, 1.1, 0.8], dtype=torch.float64)
    raw, state = transform.right_inverse(U * spectrum @ Vh)
    jacobian = jacrev(lambda raw: transform.forward(raw, state))(raw)
    J = torch.cat([part.reshape(m * n, -1) for part in tensors(jacobian)], dim=1)
    dimension = 2 * (m + n - 2) if isinstance(transform, FixedRank) else m * n
    assert torch.linalg.matrix_rank(J, rtol=1e-9) == dimension


def test_equal_singular_values_have_finite_derivatives():
    """A derivative of the singular value decomposition would divide by their differences."""
    for transform in (FixedRank(3), AlmostOrthogonal(0.5)):
        raw, state = transform.right_inverse(torch.eye(4, 3, dtype=torch.float64))
        hessian = jacrev(jacrev(lambda raw, t=transform, s=state: t.forward(raw, s).sum()))(raw)
        assert all(t.isfinite().all() for row in hessian.values() for t in row.values())


def test_a_radius_in_state_can_be_swept():
    raw, state = AlmostOrthogonal(0.5).right_inverse(randn(4, 3))
    raw = {**raw, "S": torch.tensor([0.5, 1.0, -1.5], dtype=torch.float64)}
    radii = torch.tensor([0.0, 0.1, 0.9], dtype=torch.float64)
    values = vmap(lambda lam: AlmostOrthogonal(0.5).forward(raw, {**state, "lam": lam}))(radii)
    expected = 1 + radii[:, None] * raw["S"].sin()
    close(torch.linalg.svdvals(values), expected.sort(-1, descending=True).values)
    assert AlmostOrthogonal(0.5).violation(values[2], {"lam": radii[2]}) == 0
    assert AlmostOrthogonal(0.5).violation(values[2], state) > 0.2


def test_values_on_the_bound_are_kept_and_those_outside_train():
    value = torch.diag(torch.tensor([1.5, 1.0, 0.5], dtype=torch.float64))
    back = AlmostOrthogonal(0.5).forward(*AlmostOrthogonal(0.5).right_inverse(value))
    close(back, value)
    raw, state = AlmostOrthogonal(0.5).right_inverse(2 * value)
    g = grad(lambda raw: AlmostOrthogonal(0.5).forward(raw, state).diagonal().sum())(raw)
    assert (g["S"].abs() > 0.05).all()


# invertible


def test_the_value_is_the_base_point():
    value = randn(5, 5)
    raw, state = Invertible().right_inverse(value)
    assert torch.equal(state["base"], value)
    assert raw.count_nonzero() == 0


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_determinant_keeps_its_sign(sign):
    value = torch.diag(torch.tensor([sign, 2.0, 1e-3], dtype=torch.float64))
    raw, state = Invertible().right_inverse(value)
    for size in (1.0, 10.0, 100.0):
        W = Invertible().forward(moved(raw, size), state)
        assert torch.linalg.slogdet(W).sign == sign
        assert Invertible().violation(W, state) == 0
    other = torch.diag(torch.tensor([-sign, 2.0, 0.5], dtype=torch.float64))
    close(Invertible().violation(other, state), torch.tensor(0.5, dtype=torch.float64))


@pytest.mark.parametrize("n", [1, 2, 4])
def test_log_determinant_of_complex_raw(n):
    raw, state = Invertible().right_inverse(randn(n, n, dtype=torch.complex128))
    X = torch.view_as_real(moved(raw))

    def coordinates(X):
        return torch.view_as_real(Invertible().forward(torch.view_as_complex(X), state)).flatten()

    jacobian = jacrev(coordinates)(X).flatten(1)
    actual = Invertible().log_abs_det_jacobian(torch.view_as_complex(X), state)
    close(actual, torch.linalg.slogdet(jacobian).logabsdet)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_determinant_one(dtype):
    raw, state = SpecialLinear().right_inverse(randn(2, 4, 4, dtype=dtype))
    for size in (0.0, 1.0, 10.0):
        determinant = torch.linalg.det(SpecialLinear().forward(moved(raw, size), state))
        close(determinant, torch.ones(2, dtype=dtype), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "value",
    [[[2e3, 0.0], [0.0, 1e-3]], [[2e3, 0.0], [0.0, -5e-4]], [[2e3, 0.0], [0.0, -5e-4j]]],
    ids=["determinant 2", "determinant -1", "determinant -i"],
)
def test_a_least_singular_value_near_rounding_keeps_no_other_determinant(value):
    value = torch.tensor(value)
    moved_value = SpecialLinear().forward(*SpecialLinear().right_inverse(value))
    determinant = torch.linalg.det(moved_value)
    close(determinant, torch.ones_like(determinant), atol=1e-5, rtol=0)


def test_large_random_matrices_get_determinant_one():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(100, 96, 96, generator=generator, dtype=torch.float32)
    value = SpecialLinear().forward(*SpecialLinear().right_inverse(X))
    sign, size = torch.linalg.slogdet(value.double())
    assert (sign == 1).all()
    assert size.abs().amax() < 0.1


@pytest.mark.parametrize("transform", [Invertible(), SpecialLinear()], ids=str)
def test_a_stack_is_evaluated_like_each(transform):
    values = {f"w{i}": randn(4, 4) for i in range(transform.stacks("cpu")[0])}
    p = fp.parametrize(values, {"*": transform})
    assert "in one call" in str(p.plan())
    raw, state = p.init(values)
    raw = {name: moved(part) for name, part in raw.items()}
    close(p(raw, state), {name: transform.forward(raw[name], state[name]) for name in raw})


def test_how_far_a_determinant_is_from_one():
    def violation(*diagonal):
        return SpecialLinear().violation(torch.diag(torch.tensor(diagonal)), {}).item()

    assert violation(4.0, 0.25, 1.0) == pytest.approx(0)
    assert violation(4.0, 0.5, 1.0) == pytest.approx(log(2))
    assert violation(4.0, -0.25, 1.0) == pytest.approx(0.5)
    assert violation(4.0, 0.0, 1.0) == inf
