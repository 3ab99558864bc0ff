"""Refreshing keeps what is exact, and makes values satisfy the constraint whatever state became."""

import torch

from tests.cases import every_row, raw_and_state, value_of


@every_row
def test_what_is_exact_stays(case, shape):
    raw, state = case.transform.right_inverse(value_of(case, shape))
    new = case.transform.refresh(raw, state)
    assert new.keys() == state.keys()
    torch.testing.assert_close(
        case.transform.forward(raw, new), case.transform.forward(raw, state), rtol=1e-9, atol=1e-9
    )


@every_row
def test_means_of_states_are_mended(case, shape):
    """As an average of buffers leaves them, after some of whose steps raw or base has moved."""
    raw, state = raw_and_state(case, shape)
    after, moved = case.transform.rebase(raw, case.transform.update(raw, state))
    mean = {
        key: torch.lerp(tensor, moved[key], 0.3)
        if tensor.is_floating_point() or tensor.is_complex()
        else tensor
        for key, tensor in state.items()
    }
    new = case.transform.refresh(after, mean)
    value = case.transform.forward(after, new)
    violation = case.transform.violation(value, new)
    assert violation.isnan() or violation < 1e-8
    again = case.transform.refresh(after, new)
    torch.testing.assert_close(case.transform.forward(after, again), value, rtol=1e-9, atol=1e-9)
    assert all(new[key].dtype == state[key].dtype for key in state)
