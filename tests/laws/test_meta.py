"""Law 4: shapes and dtypes on the meta device are those of real tensors."""

from torch._subclasses import FakeTensorMode

import funcparam as fp
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
def test_fake_tensors_have_no_entries_to_look_at(case, shape):
    value = value_of(case, shape)
    if case.transform.takes():  # from weights that are not here: test_shared.py has them
        return
    with FakeTensorMode() as mode:
        fake = {"w": mode.from_tensor(value)}
        p = fp.parametrize(fake, {"w": case.transform})
        raw, state = p.init(fake)
        out = p.advance(raw, state)[0]["w"]
    assert (out.shape, out.dtype) == (value.shape, value.dtype)


@every_row
def test_empty_tensors_keep_their_shape(case, shape):
    """An empty batch, or no outputs, or no inputs: served, or refused by `check`."""
    like = value_of(case, shape)
    for dim in range(len(shape)):
        value = like.narrow(dim, 0, 0).contiguous()
        try:
            case.transform.check(value)
        except ValueError:
            continue
        raw, state = case.transform.right_inverse(value)
        back = case.transform.forward(raw, state)
        assert (back.shape, back.dtype) == (value.shape, value.dtype)
        violation = case.transform.violation(value, state)
        assert violation == 0 if case.measured else violation.isnan()
        assert all(
            new.shape == old.shape
            for new, old in zip(
                tensors(case.transform.update(raw, state)), tensors(state), strict=True
            )
        )
