"""Law 4: first and second derivatives against finite differences, in float64.

Along a random direction of raw and of the value; `make test-all` takes every entry of the Jacobian.
"""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacfwd, jacrev, vmap

from tests.cases import every_case, every_row, forward_of, raw_and_state, rebuild, tensors
from tests.effort import thorough


@every_row
def test_reverse_and_forward_mode(case, shape):
    raw, state = raw_and_state(case, shape)
    inputs = [t.requires_grad_() for t in tensors(raw)]
    if inputs and case.straight_through is None:
        assert gradcheck(
            forward_of(case, raw, state),
            inputs,
            check_forward_ad=True,
            check_batched_grad=True,
            fast_mode=not thorough(),
        )


@every_row
def test_second_order(case, shape):
    raw, state = raw_and_state(case, shape)
    inputs = [t.requires_grad_() for t in tensors(raw)]
    if inputs and case.straight_through is None:
        assert gradgradcheck(
            forward_of(case, raw, state),
            inputs,
            check_fwd_over_rev=True,
            check_rev_over_rev=True,
            fast_mode=not thorough(),
        )


@every_row
def test_straight_through_derivatives(case, shape):
    if case.straight_through is None:
        return
    raw, state = raw_and_state(case, shape)

    expected = jacrev(case.straight_through)(raw, state)
    for derivative in (jacrev, jacfwd):
        torch.testing.assert_close(derivative(case.transform.forward)(raw, state), expected)
    if not isinstance(raw, torch.Tensor):
        return
    # of the square the second derivative is not 0: the documented one is constant in pieces
    hessian = 2 * expected.reshape(raw.numel(), -1).mT @ expected.reshape(raw.numel(), -1)
    for outer, inner in ((jacrev, jacrev), (jacfwd, jacrev), (jacrev, jacfwd)):
        second = outer(inner(lambda x: case.transform.forward(x, state).square().sum()))(raw)
        torch.testing.assert_close(second.reshape(hessian.shape), hessian)


@every_row
def test_vmap_of_grad(case, shape):
    pairs = [raw_and_state(case, shape) for _ in range(3)]
    if not tensors(pairs[0][0]):
        return
    weights = torch.randn(shape, dtype=torch.float64)

    def loss(raw, state):
        return (case.transform.forward(raw, state) * weights).sum().real

    raws, states = (
        rebuild(trees[0], [torch.stack(ts) for ts in zip(*map(tensors, trees), strict=True)])
        for trees in zip(*pairs, strict=True)
    )
    many = vmap(grad(loss))(raws, states)
    each = [grad(loss)(*pair) for pair in pairs]
    for batched, loop in zip(tensors(many), zip(*map(tensors, each), strict=True), strict=True):
        torch.testing.assert_close(batched, torch.stack(loop), rtol=1e-9, atol=1e-11)


def _identity(shape):
    return torch.eye(shape[0], max(torch.Size(shape[1:]).numel(), 1)).reshape(shape)


def _with_first(shape, number):
    value = torch.randn(shape)
    value[:1] = number
    return value


SPECIAL = {
    "zeros": torch.zeros,
    "ones": torch.ones,
    "identity": _identity,
    "a zero row": lambda shape: _with_first(shape, 0),
    "a constant row": lambda shape: _with_first(shape, 1),
    "no columns apart": lambda shape: torch.randn((*shape[:-1], 1)).expand(shape).contiguous(),
}


@every_case
@pytest.mark.parametrize("special", SPECIAL.values(), ids=SPECIAL)
def test_first_and_second_derivatives_are_finite(case, shape, special):
    """At points that people start from. One without derivatives is refused."""
    value = special(shape).double()
    try:
        case.transform.check(value)
    except ValueError:
        value = value.to(torch.complex128)
    try:
        raw, state = case.transform.right_inverse(value)
    except ValueError:
        return
    inputs = [t.detach().requires_grad_() for t in tensors(raw)]
    if not inputs:
        return
    out = forward_of(case, raw, state)(*inputs)
    assert out.isfinite().all()
    weights = torch.randn(out.shape, dtype=out.dtype)
    loss = (out * weights).sum().real + (out * out.conj()).sum().real
    first = torch.autograd.grad(loss, inputs, create_graph=True)
    assert all(g.isfinite().all() for g in first)
    along = sum((g * torch.randn_like(g)).sum() for g in first).real
    if along.requires_grad:
        second = torch.autograd.grad(along, inputs, allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in second)
