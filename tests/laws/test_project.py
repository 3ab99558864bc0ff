"""Projections satisfy the constraint and are idempotent; tangents are what values move along.

A projection of a step is a retraction.
"""

from contextlib import suppress

import torch
from torch.func import jvp

import funcparam as fp
from funcparam.transforms import Ordered, WeightStandardization
from tests.cases import every_case, every_row, raw_and_state, tensors, value_of


def projected(case, shape):
    """A projection of any value, onto the constraint that lies in the transform and in state."""
    raw, state = raw_and_state(case, shape)
    value = torch.randn_like(case.transform.forward(raw, state))
    try:
        return case.transform.project(value, state), state
    except (NotImplementedError, ValueError):  # an adapter, or too far away to be sensible
        return None, state


@every_row
def test_project(case, shape):
    value, state = projected(case, shape)
    if value is None:
        return
    violation = case.transform.violation(value, state)
    assert violation.isnan() or violation < 1e-8
    if not isinstance(case.transform, Ordered):  # equal entries are no step down
        case.transform.right_inverse(value)  # of an open set the point is inside
    again = case.transform.project(value, state)
    torch.testing.assert_close(again, value, rtol=1e-7, atol=1e-8)


@every_row
def test_feasible_values_are_kept(case, shape):
    value = value_of(case, shape)
    _, state = case.transform.right_inverse(value)
    try:
        kept = case.transform.project(value, state)
    except NotImplementedError:
        return
    torch.testing.assert_close(kept, value, rtol=1e-7, atol=1e-8)


@every_case
def test_nan_is_never_an_index(case, shape):
    """A step with NaN ends with NaN, or with an error that says so; on a device an index kills."""
    raw, state = raw_and_state(case, shape)
    value = case.transform.forward(raw, state).contiguous()
    if value.is_floating_point():
        value.view(-1)[0] = torch.nan
    for method, given in (("project", (value,)), ("tangent", (value, torch.ones_like(value)))):
        with suppress(NotImplementedError, ValueError, torch.linalg.LinAlgError):
            getattr(case.transform, method)(*given, state)


@every_row
def test_tangent(case, shape):
    """Symmetric, idempotent, and it keeps whatever the value moves along."""
    raw, state = raw_and_state(case, shape)
    if case.straight_through or not tensors(raw):
        return
    if isinstance(case.transform, WeightStandardization) and shape == (1, 2):
        return  # two entries are +1 and -1, and move by eps alone
    value = case.transform.forward(raw, state)
    raw, state = case.transform.right_inverse(value)
    value = case.transform.forward(raw, state)
    if isinstance(raw, torch.Tensor):
        move = torch.randn_like(raw)
    else:
        move = {key: torch.randn_like(tensor) for key, tensor in raw.items()}
    along = jvp(lambda r: case.transform.forward(r, state), (raw,), (move,))[1]
    a, b = torch.randn(2, *value.shape, dtype=value.dtype)

    def tangent(vector):
        return case.transform.tangent(value, vector, state)

    try:
        tangent(along)
    except NotImplementedError:  # an adapter
        return
    torch.testing.assert_close(tangent(along), along, rtol=1e-5, atol=1e-6)
    pa = tangent(a)
    torch.testing.assert_close(tangent(pa), pa, rtol=1e-5, atol=1e-6)
    left, right = (pa.conj() * b).real.sum(), (a.conj() * tangent(b)).real.sum()
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


@every_row
def test_retract(case, shape):
    """A retraction: R(0) = W, its derivative there is the identity, and R is on the constraint."""
    if case.straight_through or case.transform.takes():
        return
    if isinstance(case.transform, WeightStandardization) and shape == (1, 2):
        return  # two entries are +1 and -1, and move by eps alone
    value = value_of(case, shape)
    _, state = case.transform.right_inverse(value)
    vector = torch.randn_like(value)
    p = fp.parametrize({"w": value}, {"w": case.transform})

    def retract(step):
        return p.retract({"w": value}, {"w": step}, {"w": state})["w"]

    try:
        along = p.tangent({"w": value}, {"w": vector}, {"w": state})["w"]
        kept = retract(torch.zeros_like(value))
    except NotImplementedError:  # an adapter
        return
    torch.testing.assert_close(kept, value, rtol=1e-7, atol=1e-8)
    h = 1e-6
    slope = (retract(h * along) - retract(-h * along)) / (2 * h)
    torch.testing.assert_close(slope, along, rtol=1e-5, atol=1e-6)
    far = retract(0.1 * along)
    violation = case.transform.violation(far, state)
    assert violation.isnan() or violation < 1e-8
