"""Law 4: every floating dtype, autocast included; the constraint to a stated bound in each."""

import re

import pytest
import torch

from funcparam.transforms.contract.function import Function
from tests.cases import every_case, every_row, raw_and_state, rebuild, tensors, value_of

# what one rounding of each entry of an orthogonal matrix may do to W^T W, and to the rest less
BOUNDS = {
    torch.float64: 1e-13,
    torch.float32: 1e-5,
    torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps,
    torch.float16: 4 * torch.finfo(torch.float16).eps,
}


def cast(tree, dtype):
    floats = [t.to(dtype) if t.is_floating_point() else t for t in tensors(tree)]
    return rebuild(tree, floats)


@every_row
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_value_and_constraint(case, shape, dtype):
    raw, state = raw_and_state(case, shape)
    if "SpectralNorm" not in str(case):
        exact = case.transform.forward(raw, state)
    else:  # sigma is as good as the vectors
        for _ in range(300):
            state = case.transform.update(raw, state)
        exact = case.transform.forward(raw, state)
    raw, state = cast(raw, dtype), cast(state, dtype)
    value = case.transform.forward(raw, state)
    assert value.dtype == dtype or value.is_complex()  # from real raw: there is no complex half
    value = value.to(exact.dtype)
    if case.measured:
        assert case.transform.violation(value, cast(state, torch.float64)) <= BOUNDS[dtype]
    bound = 40 * torch.finfo(dtype).eps * exact.abs().amax().clamp_min(1)
    assert (value - exact).abs().amax() <= bound


@every_row
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_right_inverse_and_update(case, shape, dtype):
    value = value_of(case, shape)
    if value.is_complex():  # there is no complex half
        return
    value = value.to(dtype)
    raw, state = case.transform.right_inverse(value)
    assert all(t.dtype == dtype for t in tensors(raw))
    assert all(t.dtype in (dtype, torch.bool) for t in tensors(case.transform.update(raw, state)))
    back = case.transform.forward(raw, state)
    torch.testing.assert_close(back, value, rtol=0.05, atol=16 * torch.finfo(dtype).eps)


@every_row
def test_autocast_changes_nothing(case, shape):
    raw, state = (cast(tree, torch.float32) for tree in raw_and_state(case, shape))
    expected = case.transform.forward(raw, state), case.transform.update(raw, state)
    with torch.autocast("cpu", torch.bfloat16):
        got = case.transform.forward(raw, state), case.transform.update(raw, state)
        value = value_of(case, shape, torch.float32)
        inverse, _ = case.transform.right_inverse(value)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert all(t.dtype in (torch.float32, torch.complex64) for t in tensors(inverse))


@every_row
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32_and_rounded_once(case, shape, dtype):
    value = value_of(case, shape)
    if value.is_complex():
        return
    low = [cast(tree, dtype) for tree in raw_and_state(case, shape)]
    wide = [cast(tree, torch.float32) for tree in low]
    # a chain rounds what goes from part to part
    eps = 4 * torch.finfo(dtype).eps if "Chain" in str(case) else 0
    computed = [case.transform.forward]
    if "Quantize" not in str(case):  # whose scale is rounded up
        computed += [case.transform.update, case.transform.refresh]
    # factors are drawn in the dtype, and the scale of LSQ is rounded up
    if not case.transform.is_adapter and not {"LoRA", "LSQ"} & set(re.findall(r"\w+", str(case))):
        computed.append(inverse(case, value))
    for compute in computed:
        pairs = zip(tensors(compute(*low)), tensors(compute(*wide)), strict=True)
        for found, expected in pairs:
            if not found.is_complex():  # from real raw: there is no complex half
                torch.testing.assert_close(found, expected.to(found.dtype), rtol=eps, atol=eps)


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_violation_in_half_precision_is_that_of_the_value_in_float32(case, shape, dtype):
    if isinstance(case.transform, Function):  # a user's two, which compute in what they are given
        return
    low = [cast(tree, dtype) for tree in (value_of(case, shape), raw_and_state(case, shape)[1])]
    found = case.transform.violation(*low)
    expected = case.transform.violation(*(cast(tree, torch.float32) for tree in low))
    torch.testing.assert_close(found, expected.to(found.dtype), equal_nan=True)


@every_row
def test_state_keeps_its_precision_beside_raw_in_half(case, shape):
    raw, state = (cast(tree, torch.float32) for tree in raw_and_state(case, shape))
    low = cast(raw, torch.bfloat16)
    value = case.transform.forward(low, state)
    expected = case.transform.forward(cast(low, torch.float32), state)
    eps = 4 * torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(value.to(expected.dtype), expected, rtol=eps, atol=eps)
    moved, base = case.transform.rebase(low, state)
    dtypes = {key: tensor.dtype for key, tensor in state.items()}
    for new in (base, case.transform.update(low, state)):
        assert {key: tensor.dtype for key, tensor in new.items()} == dtypes
    assert [t.dtype for t in tensors(moved)] == [t.dtype for t in tensors(low)]


MIXED = [
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float64, torch.float32),
    (torch.float32, torch.float64),
]


@every_case
def test_several_precisions_are_computed_in_the_widest_and_rounded_once(case, shape):
    """An adapter keeps the dtype of the weight, which is in state; others have that of raw."""
    given, held = raw_and_state(case, shape)
    floats = {t.is_floating_point() for t in tensors(held)}
    if True not in floats or not tensors(given):
        return
    for of_raw, of_state in MIXED:
        raw, state = cast(given, of_raw), cast(held, of_state)
        wide = torch.promote_types(of_raw, of_state)
        value = case.transform.forward(raw, state)
        expected = case.transform.forward(cast(raw, wide), cast(state, wide))
        composed = str(case).startswith(("Chain", "Cat", "Stack"))  # parts have their own dtypes
        if not composed:
            keys = [""] if isinstance(given, torch.Tensor) else list(given)
            adapts = any(map(case.transform.adapts, keys))
            assert value.dtype == (of_state if adapts else of_raw)
        eps = 4 * max(torch.finfo(t).eps for t in (of_raw, of_state)) * composed
        torch.testing.assert_close(value, expected.to(value.dtype), rtol=eps, atol=eps)


def inverse(case, value):
    def compute(raw, state):
        dtype = next((t.dtype for t in tensors(raw) if t.is_floating_point()), torch.float32)
        value_ = value.to(torch.bfloat16).to(torch.float16)  # a number of all three dtypes
        return case.transform.right_inverse(value_.to(dtype), generator=torch.manual_seed(0))[0]

    return compute
