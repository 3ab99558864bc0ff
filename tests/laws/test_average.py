"""Averages: of one point with itself the value stays, and of several the constraint holds."""

import pytest
import torch

import funcparam as fp
from funcparam.transforms import LSQ, Diagonal, PSDLowRank, Sum
from tests.cases import CASES, raw_and_state

ROWS = [(case, shape) for case in CASES for shape in case.shapes]
every_row = pytest.mark.parametrize(
    ("case", "shape"), ROWS, ids=[f"{case}-{'x'.join(map(str, shape))}" for case, shape in ROWS]
)
# The right inverse finds other parts, or another step, unless a value reaches the ends of its grid.
NOT_FOUND_AGAIN = (
    Sum(PSDLowRank(2), Diagonal()),
    *(case.transform for case in CASES if isinstance(case.transform, LSQ)),
)


def points(case, shape, count=2):
    """One state, and several raws; with the parametrization that they belong to."""
    raw, state = raw_and_state(case, shape)
    value = case.transform.forward(raw, state)
    p = fp.parametrize({"w": value}, {"w": case.transform})
    raws = [raw, *(_nearby(raw) for _ in range(count - 1))]
    return p, [({"w": own}, {"w": state} if state else {}) for own in raws]


def _nearby(raw):
    if isinstance(raw, torch.Tensor):
        return raw + 0.1 * torch.randn_like(raw)
    return {key: _nearby(tensor) for key, tensor in raw.items()}


def averages(points, p, weights):
    """By each way that there is; a Karcher mean is there for few."""
    for how in ("raw", "values", "karcher"):
        try:
            yield how, fp.average(points, p, how, weights)
        except NotImplementedError:
            assert how == "karcher"


@every_row
def test_of_one_point_with_itself_the_value_stays(case, shape):
    p, ((raw, state),) = points(case, shape, 1)
    point = raw, p.refresh(raw, state)
    for how, found in averages([point, point], p, [1, 3]):
        if how == "raw" or case.transform not in NOT_FOUND_AGAIN:
            torch.testing.assert_close(p(*found), p(*point), rtol=1e-7, atol=1e-8)


@every_row
def test_an_average_satisfies_the_constraint(case, shape):
    p, many = points(case, shape, 3)
    for how, (raw, state) in averages(many, p, [1, 2, 3]):
        violation = p.violation(p(raw, state), state)["w"]
        assert violation.isnan() or violation < 1e-8, how
