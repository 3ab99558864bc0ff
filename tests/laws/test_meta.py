"""Law 4: shapes and dtypes on the meta device are those of real tensors."""

import torch

from tests.cases import every_row, tensors, value_of


@every_row
def test_right_inverse_forward_update(case, shape):
    value = value_of(case, shape)
    real_raw, real_state = case.transform.right_inverse(value)
    raw, state = case.transform.right_inverse(value.to("meta"))
    state = case.transform.update(raw, state)
    for real, meta in ((real_raw, raw), (real_state, state)):
        for a, b in zip(tensors(real), tensors(meta), strict=True):
            assert b.is_meta
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
    out = case.transform.forward(raw, state)
    assert out.is_meta
    assert (out.shape, out.dtype) == (value.shape, value.dtype)


@every_row
def test_empty_tensors_keep_their_shape(case, shape):
    if len(shape) < 3 or not hasattr(case.transform, "map"):
        return
    value = torch.empty(0, *shape[1:], dtype=torch.float64)
    raw, state = case.transform.right_inverse(value)
    assert case.transform.forward(raw, state).shape == value.shape
    assert case.transform.violation(value, state) == 0
