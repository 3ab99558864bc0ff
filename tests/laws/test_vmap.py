"""Law 4: vmap equals a loop, without a fallback (warnings are errors)."""

import torch
from torch.func import vmap

from tests.cases import every_row, raw_and_state, rebuild, tensors, value_of


def stack(trees):
    return rebuild(trees[0], [torch.stack(ts) for ts in zip(*map(tensors, trees), strict=True)])


def assert_equal_to_loop(batched, loop):
    for many, each in zip(tensors(batched), zip(*map(tensors, loop), strict=True), strict=True):
        torch.testing.assert_close(many, torch.stack(each), rtol=1e-10, atol=1e-12)


@every_row
def test_forward_and_update(case, shape):
    pairs = [raw_and_state(case, shape) for _ in range(3)]
    raws, states = stack([raw for raw, _ in pairs]), stack([state for _, state in pairs])
    values = vmap(case.transform.forward)(raws, states)
    assert_equal_to_loop(values, [case.transform.forward(*pair) for pair in pairs])
    if states:
        new = vmap(case.transform.update)(raws, states)
        assert_equal_to_loop(new, [case.transform.update(*pair) for pair in pairs])


@every_row
def test_forward_with_shared_state(case, shape):
    pairs = [raw_and_state(case, shape) for _ in range(3)]
    if not tensors(pairs[0][0]):
        return
    state = pairs[0][1]
    values = vmap(case.transform.forward, in_dims=(0, None))(stack([r for r, _ in pairs]), state)
    assert_equal_to_loop(values, [case.transform.forward(raw, state) for raw, _ in pairs])


@every_row
def test_right_inverse(case, shape):
    values = [value_of(case, shape) for _ in range(3)]
    inverse = vmap(case.transform.right_inverse, randomness="different")
    raws, states = inverse(torch.stack(values))
    back = vmap(case.transform.forward)(raws, states)
    expected = [case.transform.forward(*case.transform.right_inverse(v)) for v in values]
    assert_equal_to_loop(back, expected)
