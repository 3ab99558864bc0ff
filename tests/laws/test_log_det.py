"""Law 5: log-determinants against slogdet of autograd's Jacobian over the free coordinates."""

import pytest
import torch
from torch.func import jacrev

from tests.cases import every_row, raw_and_state, rebuild, tensors


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
    parts = tensors(raw)
    flat = torch.cat([part.flatten() for part in parts])
    numbers = torch.arange(1.0, flat.numel() + 1)
    chosen = case.log_det(numbers.reshape(parts[0].shape) if len(parts) == 1 else numbers)
    chosen = chosen.flatten().long() - 1

    def free(coordinates):
        moved = flat.scatter(0, chosen, coordinates).split([part.numel() for part in parts])
        moved = [new.reshape(old.shape) for new, old in zip(moved, parts, strict=True)]
        value = case.transform.forward(rebuild(raw, moved), state)
        if case.free_of_value is not None:
            return case.free_of_value(value).flatten()
        return value.flatten()[chosen]

    if len(chosen) == 0:
        assert case.transform.log_abs_det_jacobian(raw, state) == 0
        return
    jacobian = jacrev(free)(flat[chosen])
    expected = torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(case.transform.log_abs_det_jacobian(raw, state), expected)
