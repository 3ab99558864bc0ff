"""Law 5: log-determinants against slogdet of autograd's Jacobian over the free coordinates."""

import pytest
import torch
from torch.func import jacrev

from tests.cases import every_row, raw_and_state, tensors


@every_row
def test_against_the_jacobian(case, shape):
    raw, state = raw_and_state(case, shape)
    if case.log_det is None:
        if not tensors(raw):  # nothing is free
            assert case.transform.log_abs_det_jacobian(raw, state) == 0
            return
        with pytest.raises(NotImplementedError, match="no log_abs_det_jacobian: "):
            case.transform.log_abs_det_jacobian(raw, state)
        return
    chosen = case.log_det(torch.arange(1.0, raw.numel() + 1).reshape(shape)).long() - 1

    def free(coordinates):
        full = raw.flatten().scatter(0, chosen.flatten(), coordinates)
        return case.transform.forward(full.reshape(shape), state).flatten()[chosen.flatten()]

    jacobian = jacrev(free)(raw.flatten()[chosen.flatten()])
    expected = torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(case.transform.log_abs_det_jacobian(raw, state), expected)
