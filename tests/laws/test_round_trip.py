"""Law 3: forward(right_inverse(value)) is the value, or its documented projection."""

import pytest
import torch

from funcparam.transforms import Frozen, Interval, LoRA, Mask, Positive, Transform
from tests.cases import every_row, raw_and_state, value_of


def there_and_back(case, value):
    return case.transform.forward(*case.transform.right_inverse(value))


@every_row
def test_feasible_values_are_kept(case, shape):
    value = value_of(case, shape)
    torch.testing.assert_close(there_and_back(case, value), value, rtol=1e-12, atol=1e-13)


@every_row
def test_feasible_complex_values_are_kept(case, shape):
    if not case.complex:
        with pytest.raises(ValueError, match="expects a real tensor; got"):
            case.transform.check(torch.ones(shape, dtype=torch.complex128))
        return
    value = value_of(case, shape, torch.complex128)
    torch.testing.assert_close(there_and_back(case, value), value, rtol=1e-12, atol=1e-13)


@every_row
def test_other_values_are_projected(case, shape):
    if case.projection is None:  # every value is feasible, or test_errors.py has the refusal
        return
    other = torch.randn(shape, dtype=torch.float64)
    expected = case.projection(other)
    torch.testing.assert_close(there_and_back(case, other), expected, rtol=1e-10, atol=1e-12)


@every_row
def test_violation_is_zero_on_every_value_of_forward(case, shape):
    raw, state = raw_and_state(case, shape)
    for _ in range(200):  # spectral norm is as exact as its singular vectors
        state = case.transform.update(raw, state)
    violation = case.transform.violation(case.transform.forward(raw, state), state)
    assert violation.shape == ()
    assert violation < 1e-9 if case.measured else violation.isnan()


@every_row
def test_violation_sees_infeasible_values(case, shape):
    if case.projection is None or not case.measured:
        return
    other = 3 * torch.randn(shape, dtype=torch.float64)
    if torch.allclose(case.projection(other), other):
        return
    assert case.transform.violation(other, {}) > 1e-3


@pytest.mark.parametrize(
    ("transform", "value", "outside", "violation"),
    [
        (Interval(-1, 1), torch.tensor([0.5]), torch.tensor([3.5]), 2.5),
        (Positive(), torch.tensor([1.0]), torch.tensor([-2.0]), 2.0),
        (Mask(), torch.tensor([0.0, 1.0]), torch.tensor([3.0, 5.0]), 3.0),
        (Frozen(), torch.tensor([1, 2]), torch.tensor([1, 4]), 2.0),
        (LoRA(rank=1), torch.eye(3), 3 * torch.eye(3), 2.0),
    ],
    ids=lambda x: repr(x) if isinstance(x, Transform) else "",
)
def test_violation_of_bounds_and_of_constraints_in_state(transform, value, outside, violation):
    _, state = transform.right_inverse(value)
    assert transform.violation(value, state) == 0
    assert transform.violation(outside, state).item() == pytest.approx(violation)


@every_row
def test_rebase_moves_the_base_point(case, shape):
    raw, state = raw_and_state(case, shape)
    if not isinstance(raw, torch.Tensor) or not any(
        k.startswith(("base", "0.base")) for k in state
    ):
        return
    assert raw.count_nonzero() > 0
    value = case.transform.forward(raw, state)
    moved, state = case.transform.rebase(raw, state)
    assert moved.count_nonzero() == 0 or torch.equal(state["base"], value)


@every_row
def test_rebase_keeps_the_value(case, shape):
    raw, state = raw_and_state(case, shape)
    value = case.transform.forward(raw, state)
    new = case.transform.forward(*case.transform.rebase(raw, state))
    torch.testing.assert_close(new, value, rtol=1e-12, atol=1e-13)
