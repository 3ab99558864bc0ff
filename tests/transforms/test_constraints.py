"""Constraints against torch.distributions: values, log-determinants, and what is refused."""

import pytest
import torch
from torch.distributions import biject_to, constraints, transform_to
from torch.distributions import transforms as td

import funcparam as fp
from funcparam.transforms import (
    Cat,
    CholeskyFactor,
    CorrelationCholesky,
    Frozen,
    Identity,
    Interval,
    LeftHalfPlane,
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
    from_constraint,
)

close = torch.testing.assert_close


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("ours", "theirs", "shape"),
    [
        (Positive(), td.SoftplusTransform(), (3, 4)),
        (Positive("exp"), td.ExpTransform(), (3, 4)),
        (Interval(-1, 3), transform_to(constraints.interval(-1.0, 3.0)), (3, 4)),
        (Simplex(), td.SoftmaxTransform(), (3, 4)),
        (Simplex("stick_breaking"), td.StickBreakingTransform(), (3, 4)),
        (CorrelationCholesky(), td.CorrCholeskyTransform(), (3, 6)),
        (CorrelationCholesky(), td.CorrCholeskyTransform(), (1,)),
    ],
    ids=str,
)
def test_equals_torch_distributions(ours, theirs, shape):
    raw = randn(*shape)
    value = theirs(raw)
    _, state = ours.right_inverse(value)
    close(ours.forward(raw, state), value)
    close(theirs.inv(ours.forward(raw, state)), theirs.inv(value))
    if theirs.bijective:
        close(ours.right_inverse(value)[0], theirs.inv(value))
        expected = theirs.log_abs_det_jacobian(raw, value).sum()
        close(ours.log_abs_det_jacobian(raw, state), expected)


def test_positive_square_has_the_determinant_of_a_power_transform():
    raw = randn(5).abs()
    power = td.PowerTransform(torch.tensor(2.0, dtype=torch.float64))
    close(Positive("square").forward(raw, {}), power(raw))
    expected = power.log_abs_det_jacobian(raw, power(raw)).sum()
    close(Positive("square").log_abs_det_jacobian(raw, {}), expected)
    close(Positive("square").log_abs_det_jacobian(-raw, {}), expected)


def test_cholesky_and_positive_definite_are_a_composition():
    """LowerCholeskyTransform has the exponential on the diagonal, and no determinant."""
    raw = randn(3, 4, 4)
    log_softplus = torch.nn.functional.softplus(raw.diagonal(dim1=-2, dim2=-1)).log()
    theirs = raw.tril(-1) + torch.diag_embed(log_softplus)
    close(CholeskyFactor().forward(raw, {}), td.LowerCholeskyTransform()(theirs))
    close(PositiveDefinite().forward(raw, {}), td.PositiveDefiniteTransform()(theirs))


def test_ordered_is_an_ordered_vector():
    raw = randn(3, 5)
    steps = torch.nn.functional.softplus(raw[:, 1:])
    loop = [raw[:, 0]]
    for k in range(4):
        loop.append(loop[-1] + steps[:, k])
    close(Ordered().forward(raw, {}), torch.stack(loop, -1))


def test_stable_diagonal_is_the_exponential_of_a_complex_number():
    raw = {"nu": randn(4), "theta": randn(4)}
    expected = torch.exp(torch.complex(-raw["nu"].exp(), raw["theta"]))
    close(StableDiagonal().forward(raw, {}), expected)
    close(StableDiagonal(pairs=True).forward(raw, {}), torch.view_as_real(expected))
    assert StableDiagonal().forward(raw, {}).abs().max() < 1


# One instance of everything torch registers, and a shape for it.
INSTANCES = [
    (constraints.real, (3, 4)),
    (constraints.real_vector, (3, 4)),
    (constraints.independent(constraints.positive, 1), (3, 4)),
    (constraints.independent(constraints.simplex, 1), (3, 4)),
    (constraints.positive, (3, 4)),
    (constraints.nonnegative, (3, 4)),
    (constraints.greater_than(1.5), (3, 4)),
    (constraints.greater_than(torch.tensor(1.5)), (3, 4)),
    (constraints.greater_than_eq(-1), (3, 4)),
    (constraints.less_than(0.25), (3, 4)),
    (constraints.unit_interval, (3, 4)),
    (constraints.interval(-1, 2), (3, 4)),
    (constraints.half_open_interval(-1.0, 2.0), (3, 4)),
    (constraints.simplex, (3, 4)),
    (constraints.lower_cholesky, (2, 4, 4)),
    (constraints.positive_definite, (2, 4, 4)),
    (constraints.positive_semidefinite, (2, 4, 4)),
    (constraints.corr_cholesky, (2, 4, 4)),
    (constraints.cat([constraints.positive, constraints.less_than(1)], 1, [1, 3]), (3, 4)),
    (constraints.cat([constraints.corr_cholesky, constraints.corr_cholesky]), (2, 3, 3)),
    (constraints.cat([constraints.positive, constraints.real]), (2, 4)),
    (constraints.stack([constraints.positive, constraints.unit_interval], -1), (3, 2)),
    (constraints.stack([constraints.positive, constraints.real]), (2, 4)),
]
REGISTERED = {
    (registry, kind)
    for registry in (biject_to, transform_to)
    for kind in registry._registry
    if kind.__module__ == constraints.__name__
}


def test_every_registered_constraint_has_an_instance_here():
    assert {kind for _, kind in REGISTERED} == {type(constraint) for constraint, _ in INSTANCES}


def _raw_shape(theirs, shape):
    if isinstance(theirs, td.CatTransform):  # has no inverse_shape of its own
        pieces = [_raw_shape(t, shape) for t in theirs.transforms]
        return (shape[0], *pieces[0][1:]) if theirs.dim == 0 else shape
    return theirs.inverse_shape(shape)


@pytest.mark.parametrize(("constraint", "shape"), INSTANCES, ids=str)
@pytest.mark.parametrize("registry", [biject_to, transform_to], ids=["biject_to", "transform_to"])
def test_from_constraint_keeps_what_torch_makes(constraint, shape, registry):
    if (registry, type(constraint)) not in REGISTERED:
        with pytest.raises(NotImplementedError):  # torch has no bijection for it
            registry(constraint)
        return
    theirs = registry(constraint)
    value = theirs(randn(*_raw_shape(theirs, shape)))
    ours = from_constraint(constraint)
    ours.check(value)
    raw, state = ours.right_inverse(value)
    back = ours.forward(raw, state)
    close(back, value)
    assert ours.violation(value, state) < 1e-12
    moved = {key: t + 1 for key, t in raw.items()} if isinstance(raw, dict) else raw + 1
    assert constraint.check(ours.forward(moved, state)).all()


@pytest.mark.parametrize(
    ("constraint", "value"),
    [
        (constraints.lower_triangular, randn(3, 3)),
        (constraints.symmetric, randn(3, 3)),
    ],
    ids=str,
)
def test_from_constraint_beyond_the_registry(constraint, value):
    ours = from_constraint(constraint)
    assert not constraint.check(value).all()
    assert constraint.check(ours.forward(*ours.right_inverse(value))).all()


def test_from_constraint_says_why_not():
    for constraint, match in [
        (constraints.boolean, r"Boolean\(\) is discrete: .*Simplex"),
        (constraints.one_hot, "is discrete"),
        (constraints.nonnegative_integer, "is discrete"),
        (constraints.multinomial(3), "is discrete"),
        (constraints.independent(constraints.boolean, 1), "is discrete"),
        (constraints.cat([constraints.real, constraints.boolean]), "is discrete"),
        (torch.distributions.Uniform.support, "depends on other values.*an instance"),
        (constraints.square, r"has no transform. Make one with fp.transform"),
        (constraints.greater_than(torch.zeros(3)), r"a bound of shape \(3,\), .*into state"),
    ]:
        with pytest.raises(NotImplementedError, match=match):
            from_constraint(constraint)
    with pytest.raises(TypeError, match="expects an instance"):
        from_constraint(constraints.greater_than)


def test_every_distribution_with_continuous_parameters():
    """The constraint of every parameter of torch's distributions, but those that are dependent."""
    seen = 0
    for name in torch.distributions.__all__:
        kind = getattr(torch.distributions, name)
        own = getattr(kind, "arg_constraints", None)
        for constraint in own.values() if isinstance(own, dict) else ():
            if constraints.is_dependent(constraint) or constraint.is_discrete:
                with pytest.raises(NotImplementedError):
                    from_constraint(constraint)
            else:
                assert isinstance(from_constraint(constraint), fp.Transform)
                seen += 1
    assert seen > 40


# The documented projections that take values of a certain kind only.


@pytest.mark.parametrize("map", ["softmax", "stick_breaking"])
def test_simplex_scales(map):
    value = 7 * torch.rand(3, 4, dtype=torch.float64)
    back = Simplex(map).forward(*Simplex(map).right_inverse(value))
    close(back, value / value.sum(-1, keepdim=True))
    assert Simplex(map).violation(value, {}) > 0.1
    assert Simplex(map).violation(torch.tensor([1.5, -0.5]), {}) == 0.5


def test_positive_definite_takes_the_symmetric_part():
    value = torch.eye(3, dtype=torch.float64) + 0.1 * randn(3, 3)
    back = PositiveDefinite().forward(*PositiveDefinite().right_inverse(value))
    close(back, (value + value.mT) / 2)
    assert PositiveDefinite().violation(value, {}) > 1e-2
    indefinite = torch.tensor([[1.0, 2], [2, 1]])
    close(PositiveDefinite().violation(indefinite, {}), torch.tensor(1.0))
    close(PositiveDefinite(0.5).violation(indefinite, {}), torch.tensor(1.5))


def test_cholesky_factors_take_the_lower_triangle():
    value = randn(3, 3) + 5 * torch.eye(3, dtype=torch.float64)
    transform = CholeskyFactor()
    close(transform.forward(*transform.right_inverse(value)), value.tril())
    correlation = CorrelationCholesky()
    rows = value.tril()
    close(
        correlation.forward(*correlation.right_inverse(value)),
        rows / rows.norm(dim=-1, keepdim=True),
    )
    for t in (transform, correlation):
        close(t.violation(value, {}), value.triu(1).abs().max(), rtol=1, atol=10)
        assert t.violation(-torch.eye(2), {}) == 1


def test_violations_measure_what_is_outside():
    for transform, value, expected in [
        (Positive(), [-2.0, 1.0], 2.0),
        (LowerBound(1), [0.5, 3.0], 0.5),
        (UpperBound(1), [0.5, 3.0], 2.0),
        (Ordered(), [1.0, 3.0, 2.5], 0.5),
        (UnitNorm(), [3.0, 4.0], 4.0),
        (Triangular(), [[1.0, -2.0], [3.0, 4.0]], 2.0),
        (StableDiagonal(), [3.0 + 4.0j], 4.0),
        (StableDiagonal(pairs=True), [[3.0, 4.0]], 4.0),
        (PSDLowRank(1), [[3.0, 0.0], [0.0, 2.0]], 2.0),
        (PSDLowRank(1), [[3.0, 0.0], [0.0, -2.0]], 2.0),
        (Cat([Identity(), Positive()]), [-5.0, -1.0], 1.0),
    ]:
        found = transform.violation(torch.tensor(value), {})
        assert found.shape == ()
        close(found.item(), expected)


def test_bounds_in_state_are_swept_by_vmap():
    raw, state = LowerBound(-1).right_inverse(torch.zeros(3))
    lows = torch.tensor([-1.0, 0.0, 5.0])
    values = torch.func.vmap(LowerBound(-1).forward, (None, 0))(raw, {"low": lows})
    close(values, (lows + 1).unsqueeze(-1).expand(3, 3))
    assert LowerBound(-1).violation(values[0], {"low": lows[2]}) == 5
    raw, state = UpperBound(1).right_inverse(torch.zeros(3))
    close(UpperBound(1).forward(raw, {"high": state["high"] + 2}), torch.full((3,), 2.0))


def test_frozen_complex_values_have_a_distance():
    _, state = Frozen().right_inverse(torch.zeros(2, dtype=torch.complex64))
    assert Frozen().violation(torch.tensor([1j, 0]), state) == 1


def test_frozen_parts_stay_and_gates_stay_orthogonal():
    lstm = torch.nn.LSTM(3, 4)
    gates = Cat([fp.transforms.Orthogonal()] * 3 + [Frozen()])
    p = fp.parametrize(lstm, {"weight_hh_l0": gates})
    net = fp.Parametrized(lstm, p)
    before = net.fold().weight_hh_l0.clone()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(5, 2, 3))[0].square().sum().backward()
        optimizer.step()
    after = net.fold().weight_hh_l0
    assert torch.equal(before[12:], after[12:])
    assert not torch.allclose(before[:12], after[:12])
    for gate in after.detach().split(4)[:3]:
        close(gate @ gate.mT, torch.eye(4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_saturated_intervals_stay_inside(dtype):
    raw = torch.tensor([-1e4, -50.0, -3.0, 3.0, 50.0, 1e4], dtype=dtype)
    low = torch.randn(200, dtype=dtype)
    high = low + torch.arange(1, 201).to(dtype) / 7
    bounds = {"low": low, "high": high}
    loop = [
        Interval(0, 1).forward(raw, {"low": a, "high": b}) for a, b in zip(low, high, strict=True)
    ]
    batched = torch.func.vmap(Interval(0, 1).forward, (None, 0))(raw, bounds)
    for value in (torch.stack(loop), batched):
        assert (value > low.unsqueeze(1)).all()
        assert (value < high.unsqueeze(1)).all()
        eps = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(value[:, -1], high, rtol=eps, atol=1e-7)
        torch.testing.assert_close(value[:, 0], low, rtol=eps, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [LeftHalfPlane, StableDiagonal])
@pytest.mark.parametrize("size", [0.0, 1.0, 3.0, 1e4])
def test_points_of_the_plane_are_brought_inside(kind, dtype, size):
    """Open sets, whose projection is next to the nearest point; what is inside stays."""
    transform = kind(pairs=True)
    value = (torch.randn(50, 2) * size).to(dtype)
    value[:4] = size * torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.6, 0.8]]).to(dtype)
    inside = 0.5 * torch.rand(50, 2).to(dtype) - 0.6
    found = transform.project(value, {})
    assert transform.violation(found, {}) == 0
    raw, _ = transform.right_inverse(found)  # which refuses the bound
    assert all(t.isfinite().all() for t in raw.values())
    assert transform.project(inside, {}).equal(inside)
    nearest = torch.complex(*value.double().unbind(-1))
    if kind is LeftHalfPlane:
        nearest.real.clamp_(max=0)
    else:
        nearest = nearest / nearest.abs().clamp_min(1)
    rtol = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        found.double(), torch.view_as_real(nearest), rtol=rtol, atol=torch.finfo(dtype).tiny + rtol
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_decay_never_vanishes(dtype):
    raw = {"log_decay": torch.full((3,), -1e4, dtype=dtype), "frequency": torch.ones(3)}
    value = LeftHalfPlane(pairs=True).forward({k: t.to(dtype) for k, t in raw.items()}, {})
    assert (value[:, 0] < 0).all()
    assert value.dtype == dtype
