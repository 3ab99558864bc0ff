"""Law 4: torch.compile without a graph break, values and gradients equal, one compile."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_map

import funcparam as fp
from funcparam.transforms import Orthogonal, WeightNorm
from tests.cases import CASES, every_case, raw_and_state, tensors
from tests.networks import mlp


class Scaled(nn.Module):
    """A layer with a weight of any shape and dtype."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        return x * self.weight


def step(case, value):
    """Gradients of two evaluations in a network of two layers, a dict being written to between."""
    net = nn.Sequential(Scaled(value), nn.Dropout(0.0))
    p = fp.parametrize(net, {"0.weight": case.transform})
    weights = torch.randn_like(value)

    def loss(raw, state):
        raw = {"0.weight": raw}
        outs = {"once": functional_call(net, p(raw, state), (weights,))}
        state = p.update(raw, state)
        outs["twice"] = functional_call(net, p(raw, state), (outs["once"],))
        return outs["twice"].sum().real, (outs, state)

    return grad(loss, has_aux=True)


def given(case, shape):
    """Raw, and the state of a parametrization."""
    raw, state = raw_and_state(case, shape)
    return raw, {"0.weight": state} if state else {}


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@every_case
@torch._dynamo.config.patch(error_on_recompile=True)
def test_fullgraph_once(case, shape):
    raw, state = given(case, shape)
    if not tensors(raw):
        return
    eager = step(case, case.transform.forward(raw, state.get("0.weight", {})))
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    assert_close(compiled(raw, state), eager(raw, state))
    raw, state = given(case, shape)  # raw changes, the graph does not
    assert_close(compiled(raw, state), eager(raw, state))


@pytest.mark.parametrize(
    "case",
    [
        c
        for c in CASES
        if str(c)
        in {
            "Orthogonal(map='cayley', trivialize=True)",
            "WeightNorm(dim=0)",
            "SpectralNorm(dim=0, n_power_iterations=2, eps=1e-12)",
        }
    ],
    ids=str,
)
def test_inductor(case):
    raw, state = raw_and_state(case, case.shapes[0])
    weights = torch.randn(case.shapes[0], dtype=torch.float64)

    def loss(raw, state):
        value = case.transform.forward(raw, state)
        return (value * weights).sum(), (value, case.transform.update(raw, state))

    compiled = torch.compile(grad(loss, has_aux=True), fullgraph=True)
    assert_close(compiled(raw, state), grad(loss, has_aux=True)(raw, state))


@pytest.mark.parametrize(
    ("transform", "names"),
    [(WeightNorm(), ["raw"]), (WeightNorm(), ["raw", "state"]), (Orthogonal(), ["raw", "state"])],
    ids=["state left out", "no state", "state"],
)
def test_meta_learning_is_one_graph(transform, names):
    net = mlp(width=2, depth=2)
    p = fp.parametrize(net, {"*.weight": transform})
    raw, *state = p.init(net)[: len(names)]

    def error(raw, x, y):
        return (functional_call(net, p(raw, *state), (x,)) - y).square().mean()

    def after_two_steps(raw, x, y):
        for _ in range(2):
            raw = tree_map(lambda w, g: w - 0.1 * g, raw, grad(error)(raw, x, y))
        return error(raw, x, y)

    def meta_loss(raw, tasks):
        return vmap(after_two_steps, in_dims=(None, 0, 0))(raw, *tasks).mean()

    tasks = torch.randn(2, 3, 1, 2, dtype=torch.float64)
    counter = CompileCounter()
    compiled = torch.compile(grad(meta_loss), fullgraph=True, backend=counter)
    assert_close(compiled(raw, tasks), grad(meta_loss)(raw, tasks))
    assert counter.frame_count == 1
