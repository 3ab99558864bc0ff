"""Values strictly inside of open sets, in every dtype, at every raw."""

import pytest
import torch
from torch.distributions import Beta, NegativeBinomial, constraints, transform_to
from torch.func import grad

from funcparam.transforms import (
    CholeskyFactor,
    CorrelationCholesky,
    Interval,
    LowerBound,
    Positive,
    UpperBound,
    from_constraint,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
RAW = [0.0, 6.5, 9.0, 17.0, 40.0, 89.0, 1e3, 6e4, float("inf")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-1, 1), (0.1, 0.7), (-3, -2), (1, 1e4), (-1e-4, 0), (1000, 1001.5)]
)
def test_interval(low, high, dtype):
    transform = Interval(low, high)
    if low == 1000 and dtype in (torch.bfloat16, torch.float16):
        low, high = 1000, 1050
        transform = Interval(low, high)
    state = {"low": torch.tensor(float(low)), "high": torch.tensor(float(high))}
    for held in (state, {k: t.to(dtype) for k, t in state.items()}):
        raw = torch.tensor([*RAW, *(-x for x in RAW)], dtype=dtype)
        value = transform.forward(raw, held)
        assert value.dtype == dtype
        exact = value.double()
        assert (exact > held["low"].double()).all()
        assert (exact < held["high"].double()).all()
        near = torch.lerp(*(held[k].double() for k in ("low", "high")), raw.double().sigmoid())
        step = 3 * torch.finfo(dtype).eps * max(abs(low), abs(high))
        assert (exact - near).abs().max() <= max(step, torch.finfo(dtype).tiny)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bound", [0.0, 1.0, -0.3, 100.0])
def test_one_sided_bounds(bound, dtype):
    raw = torch.tensor([0.0, -6.0, -12.0, -18.0, -110.0, -1e3], dtype=dtype)
    held = torch.tensor(bound)
    above = LowerBound(bound).forward(raw, {"low": held})
    below = UpperBound(bound).forward(raw, {"high": held})
    assert (above.double() > held.double()).all()
    assert (below.double() < held.double()).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("map", ["softplus", "exp"])
def test_positive(map, dtype):
    raw = torch.tensor([0.0, -20.0, -110.0, -800.0, -6e4], dtype=dtype)
    assert (Positive(map).forward(raw, {}) > 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", [-17.0, -110.0, -1e3, 110.0, 1e3])
def test_diagonals_of_cholesky_factors(number, dtype):
    for transform, shape in ((CholeskyFactor(), (3, 3)), (CorrelationCholesky(), (3,))):
        value = transform.forward(torch.full(shape, number, dtype=dtype), {})
        assert (value.diagonal() > 0).all()


def test_the_derivative_of_the_square_is_no_larger_than_its_dtype():
    raw = torch.tensor([4e4], dtype=torch.float16)
    expected = torch.tensor([8e4]).log().half()  # of a number that float16 does not have
    assert torch.equal(Positive("square").log_derivative(raw, {}), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_raw_stays_infinite_and_nan_is_nan(dtype):
    raw = torch.tensor([torch.inf, torch.nan], dtype=dtype)
    value = LowerBound(1.0).forward(raw, {"low": torch.tensor(1.0)})
    assert value[0] == torch.inf
    assert value[1].isnan()


def test_the_derivative_is_that_of_the_formula_where_the_value_is_moved():
    state = {"low": torch.tensor(-1.0), "high": torch.tensor(1.0)}
    for number, dtype in ((-18.0, torch.float32), (6.5, torch.bfloat16), (-40.0, torch.float64)):
        raw = torch.tensor([number], dtype=dtype)
        found = grad(lambda raw: Interval(-1, 1).forward(raw, state).sum())(raw)
        exact = 2 * torch.sigmoid(raw.double()) * torch.sigmoid(-raw.double())
        torch.testing.assert_close(found, exact.to(dtype))
        assert found > 0


@pytest.mark.parametrize(
    "constraint",
    [
        constraints.unit_interval,
        constraints.half_open_interval(0.0, 1.0),
        constraints.interval(-1.0, 1.0),
        constraints.positive,
        constraints.greater_than(1.0),
        constraints.less_than(1.0),
        constraints.lower_cholesky,
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [6.5, 17.0, 110.0])
def test_torchs_own_check_holds_at_saturation(constraint, size):
    transform = from_constraint(constraint)
    start = transform_to(constraint)(torch.full((2, 2), -0.5))
    raw, state = transform.right_inverse(start)
    for sign in (-1, 1):
        value = transform.forward(torch.full_like(raw, sign * size), state)
        assert constraint.check(value).all()


def test_distributions_take_saturated_values():
    transform = from_constraint(constraints.half_open_interval(0.0, 1.0))
    _, state = transform.right_inverse(torch.tensor([0.5]))
    p = transform.forward(torch.tensor([17.0]), state)
    assert Beta(2.0, 2.0).log_prob(p).isfinite().all()
    NegativeBinomial(3.0, p, validate_args=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("low", "high"),
    [(100, 104), (-1, 1), (0.1, 0.7), (0, 2), (-8, -2), (1000, 1064), (-0.3, 64.25)],
)
def test_saturated_values_are_the_next_numbers_beside_the_bounds(low, high, dtype):
    """The numbers of a dtype by their bits, as no function of PyTorch's gives them for float16."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).double()
    raw = torch.tensor([-torch.inf, torch.inf], dtype=dtype)
    for held in (torch.float32, dtype):
        state = {"low": torch.tensor(low, dtype=held), "high": torch.tensor(high, dtype=held)}
        between = every[(every > state["low"].double()) & (every < state["high"].double())]
        if low == 0:  # subnormal numbers are no bfloat16 of a device
            between = between[between >= torch.finfo(torch.float32).tiny]
        near = between.sort().values
        first, last = Interval(low, high).forward(raw, state).double()
        beyond = 1 if held == dtype else 2  # from a bound that is no number of the dtype
        assert first in near[:beyond]
        assert last in near[-beyond:]
