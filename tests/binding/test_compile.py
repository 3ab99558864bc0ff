"""A whole training step under torch.compile: one graph, no recompiles."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad_and_value
from torch.utils._pytree import tree_map

import funcparam as fp
from funcparam.transforms import Orthogonal, SpectralNorm, WeightNorm
from tests.effort import thorough
from tests.networks import loss_of, mixed, mlp


def sgd_step(net, p):
    def step(raw, state, x, y):
        g, loss = grad_and_value(loss_of(net, p))(raw, state, x, y)
        return tree_map(lambda r, d: r - 0.1 * d, raw, g), p.update(raw, state), loss

    return step


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@torch._dynamo.config.patch(error_on_recompile=True)
def test_a_training_step_is_one_graph(backend):
    net, p = mixed()
    if backend == "inductor" and not thorough():  # each kernel takes a second to compile
        p = fp.parametrize(net := mlp(depth=1), {"*.weight": SpectralNorm()})
    step = sgd_step(net, p)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    raw, state = p.init(net)
    x, y = torch.randn(2, 5, 6).double()
    for _ in range(4):  # raw changes value each time
        expected = step(raw, state, x, y)
        raw, state, loss = compiled(raw, state, x, y)
        torch.testing.assert_close((raw, state, loss), expected, rtol=1e-8, atol=1e-10)


def test_one_compile_for_48_equal_layers():
    layers = [nn.Linear(4, 4) for _ in range(48)]
    rules = {"weight": Orthogonal("householder"), "bias": WeightNorm(dim=None)}
    counter = CompileCounterWithBackend("aot_eager")

    def call(p, raw, state, x):
        return functional_call(layers[0], p(raw, state), (x,))

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    x = torch.randn(2, 4)
    for layer in layers:  # each with a parametrization of its own, equal to the others
        p = fp.parametrize(layer, rules)
        raw, state = p.init(layer)
        torch.testing.assert_close(compiled(p, raw, state, x), call(p, raw, state, x))
    assert counter.frame_count == 1


def test_48_equal_shells_share_one_graph():
    rules = {"weight": SpectralNorm()}
    counter = CompileCounterWithBackend("aot_eager")
    shells = []
    for _ in range(48):
        layer = nn.Linear(4, 4)
        shells.append(fp.Parametrized(layer, fp.parametrize(layer, rules)))

    def call(model, x):
        return model(x)

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    x = torch.randn(2, 4)
    for model in shells:
        expected = copy.deepcopy(model)(x)
        torch.testing.assert_close(compiled(model, x), expected)
    assert counter.frame_count == 1


def test_values_and_violations_are_one_graph():
    net, p = mixed()
    model = fp.Parametrized(net, p).eval()
    for look in (model.values, model.violation):
        compiled = torch.compile(look, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(), look())


@pytest.mark.parametrize("training", [False, True])
def test_a_write_to_a_ruled_weight_is_an_error_in_a_compiled_call_too(training):
    net = mlp(depth=1)
    model = fp.Parametrized(net, fp.parametrize(net, {"0.weight": SpectralNorm()})).train(training)
    call = torch.compile(model, backend="aot_eager")
    x = torch.ones(2, 6).double()
    call(x)
    with torch.no_grad(), model.bound():
        call(x)
    model.net[0].weight = nn.Parameter(torch.eye(6).double())
    with pytest.raises(RuntimeError, match="'0.weight' of this Parametrized's network was written"):
        call(x)


@torch._dynamo.config.patch(error_on_recompile=True)
def test_a_call_that_is_prepared_inside():
    net, p = mixed()
    raw, state = p.init(net)
    x = torch.ones(2, 6).double()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def call(values, x):
        return fp.functional_call(net)(values, (x,))

    for scale in (1.0, 2.0):
        values = {name: scale * value for name, value in p(raw, state).items()}
        torch.testing.assert_close(call(values, x), fp.functional_call(net)(values, (x,)))
