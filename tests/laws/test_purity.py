"""Law 2: nothing is written to, nothing is drawn in forward, nothing is remembered."""

import torch

from tests.cases import every_row, raw_and_state, tensors, value_of


def snapshot(*trees):
    return [(t, t._version, t.clone()) for tree in trees for t in tensors(tree)]


def assert_untouched(seen):
    for tensor, version, old in seen:
        assert tensor._version == version
        assert torch.equal(tensor, old)


@every_row
def test_forward_and_update(case, shape):
    raw, state = raw_and_state(case, shape)
    seen, rng = snapshot(raw, state), torch.get_rng_state()
    once = case.transform.forward(raw, state)
    case.transform.update(raw, state)
    case.transform.rebase(raw, state)
    assert torch.equal(case.transform.forward(raw, state), once)
    assert torch.equal(torch.get_rng_state(), rng)
    assert_untouched(seen)


@every_row
def test_right_inverse(case, shape):
    value = value_of(case, shape)
    seen = snapshot(value)
    case.transform.right_inverse(value)
    case.transform.violation(value, case.transform.right_inverse(value)[1])
    assert_untouched(seen)


@every_row
def test_draws_come_from_the_generator(case, shape):
    value, rng = value_of(case, shape), torch.get_rng_state()
    one, two = (
        case.transform.right_inverse(value, generator=torch.Generator().manual_seed(1))[0]
        for _ in range(2)
    )
    for a, b in zip(tensors(one), tensors(two), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), rng)


# singular vectors of power iterations, and ranges of quantizers
EVOLVING = ("u", "v", "scale", "zero_point")


@every_row
def test_update_keeps_what_does_not_evolve(case, shape):
    raw, state = raw_and_state(case, shape)
    new = case.transform.update(raw, state)
    assert new.keys() == state.keys()
    evolving = {name for name in state if name.rpartition(".")[2] in EVOLVING}
    assert all(new[name] is state[name] for name in state if name not in evolving)
