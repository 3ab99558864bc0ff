"""Stacked evaluation is the evaluation one by one, in values and in every derivative."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import EagerAndRecordGraphs
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import funcparam as fp
from funcparam.transforms import (
    AlmostOrthogonal,
    DoRA,
    FixedRank,
    Interval,
    Orthogonal,
    SpecialOrthogonal,
    SpectralNorm,
    Stiefel,
    UnitNorm,
    WeightNorm,
    WeightStandardization,
)

TRANSFORMS = [
    Orthogonal(),
    Orthogonal("cayley"),
    Orthogonal("householder"),
    Orthogonal("householder", trivialize=False),
    Orthogonal("qr"),
    Orthogonal("newton_schulz"),
    WeightNorm(),
    WeightNorm(1),
    WeightNorm(None),
    SpectralNorm(),
    SpectralNorm(1),
    SpectralNorm(n_power_iterations=None),
    UnitNorm(),
    UnitNorm(0),
    WeightStandardization(),
    DoRA(rank=2),
    Stiefel(),
    FixedRank(rank=2),
    AlmostOrthogonal(0.3),
]


def moved(raw):
    return torch.utils._pytree.tree_map(lambda x: x + 0.3 * torch.randn_like(x), raw)


@pytest.fixture(params=TRANSFORMS, ids=str)
def case(request):
    """A parametrization of as many equal layers as a stack takes and another one."""
    torch.manual_seed(0)
    count = request.param.stacks("cpu")[0]
    layers = [nn.Linear(4, 5) for _ in range(count)] + [nn.Linear(4, 2)]
    net = nn.ModuleList(layers).double()
    p = fp.parametrize(net, {"*.weight": request.param})
    raw, state = p.init(net)
    return p, moved(raw), state


def one_by_one(p, raw, state):
    values = {name: p[name].forward(raw[name], state.get(name, {})) for name in p}
    return {name: values.get(name, tensor) for name, tensor in raw.items()}


def energy(values):
    return sum((v * torch.arange(v.numel()).view_as(v)).sin().sum() for v in values.values())


def test_as_many_as_pay_are_stacked(case):
    p, _, _ = case
    count = p["0.weight"].stacks("cpu")[0]
    table = str(p.plan()).splitlines()
    assert len(table) == 4
    assert f"{count}  in one call" in table[2]
    assert f"one by one: fewer than {count}" in table[3]


def test_values_and_order(case):
    p, raw, state = case
    values = p(raw, state)
    assert list(values) == list(raw)
    assert_close(values, one_by_one(p, raw, state))


def test_gradients(case):
    p, raw, state = case
    ours = grad(lambda raw: energy(p(raw, state)))(raw)
    assert_close(ours, grad(lambda raw: energy(one_by_one(p, raw, state)))(raw))


def test_gradients_of_autograd(case):
    p, raw, state = case
    leaves, spec = torch.utils._pytree.tree_flatten(raw)
    leaves = [x.requires_grad_() for x in leaves]
    raw = torch.utils._pytree.tree_unflatten(leaves, spec)
    ours = torch.autograd.grad(energy(p(raw, state)), leaves, create_graph=True)
    theirs = torch.autograd.grad(energy(one_by_one(p, raw, state)), leaves, create_graph=True)
    assert_close(ours, theirs)
    second = torch.autograd.grad(sum(x.square().sum() for x in ours), leaves, allow_unused=True)
    expected = torch.autograd.grad(sum(x.square().sum() for x in theirs), leaves, allow_unused=True)
    for a, b in zip(second, expected, strict=True):
        assert_close(torch.zeros(()) if a is None else a, torch.zeros(()) if b is None else b)


def test_forward_mode_and_vmap(case):
    p, raw, state = case
    tangent = torch.utils._pytree.tree_map(torch.ones_like, raw)
    ours = jvp(lambda raw: p(raw, state), (raw,), (tangent,))
    assert_close(ours, jvp(lambda raw: one_by_one(p, raw, state), (raw,), (tangent,)))
    many = torch.utils._pytree.tree_map(lambda x: torch.stack([x, x + 0.1]), raw)
    ours = vmap(grad(lambda raw: energy(p(raw, state))))(many)
    theirs = vmap(grad(lambda raw: energy(one_by_one(p, raw, state))))(many)
    assert_close(ours, theirs)


def test_compiled_whole(case):
    p, raw, state = case
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    values = torch.compile(p, backend=backend, fullgraph=True)(raw, state)
    assert_close(values, p(raw, state))
    assert len(graphs) == 1


def test_a_trace_has_the_operations_of_leaves_up_to_64_by_64_once():
    count = WeightNorm().stacks("cpu")[0]
    for size, times in ((64, 1), (65, count)):
        net = nn.ModuleList(nn.Linear(size, size) for _ in range(count))
        p = fp.parametrize(net, {"*.weight": WeightNorm()})
        raw, state = p.init(net)
        backend = EagerAndRecordGraphs()
        values = torch.compile(p, backend=backend, fullgraph=True)(raw, state)
        assert_close(values, p(raw, state))
        (graph,) = backend.graphs
        norms = [n for n in graph.graph.nodes if "vector_norm" in str(n.target)]
        assert len(norms) == times


@pytest.mark.parametrize("compiled", [False, True])
def test_networks_may_write_to_the_values_of_a_stack(compiled):
    """An embedding with max_norm does, without gradients."""
    found = []
    for count in (1, 4):
        torch.manual_seed(0)
        net = nn.ModuleList(nn.Embedding(4, 4, max_norm=0.5) for _ in range(count))
        model = fp.Parametrized(net, fp.parametrize(net, {"*.weight": SpectralNorm()}))
        model.net.forward = lambda i, net=model.net: sum(layer(i) for layer in net[:1])
        call = torch.compile(model, backend="aot_eager") if compiled else model
        out = call(torch.tensor([0, 2]))
        out.square().sum().backward()
        found.append((out, next(model.parameters()).grad))
    assert_close(*found)


class SavesItsValue(fp.Transform):
    """exp(v), whose backward needs the value itself."""

    def stacks(self, kind):
        return 4, 64

    def forward(self, raw, state):
        return raw.exp()

    def right_inverse(self, value, *, generator=None):
        return value.log(), {}

    def violation(self, value, state=None):
        return -value.min()


def test_writing_to_a_value_does_not_change_what_the_map_saved():
    torch.manual_seed(0)
    raw = {f"w{i}": torch.rand(3, 2, requires_grad=True) for i in range(4)}
    p = fp.parametrize(raw, {"*": SavesItsValue()})
    value = p(raw, {})["w0"]
    value.mul_(3)
    (found,) = torch.autograd.grad(value.sum(), raw["w0"])
    assert_close(found, 3 * raw["w0"].exp())


def test_advance_compiled_whole(case):
    p, raw, state = case
    found = torch.compile(p.advance, backend="eager", fullgraph=True)(raw, state)
    assert_close(found, p.advance(raw, state))


def test_update(case):
    p, raw, state = case
    new = p.update(raw, state)
    expected = {name: p[name].update(raw[name], own) for name, own in state.items()}
    assert list(new) == list(state)
    assert_close(new, expected)
    for name, own in state.items():
        for key, tensor in own.items():
            assert (new[name][key] is tensor) == (expected[name][key] is tensor)


def test_advance_is_update_and_evaluation(case):
    p, raw, state = case
    values, new = p.advance(raw, state)
    expected = p.update(raw, state)
    assert_close(new, expected)
    assert_close(values, p(raw, expected))
    for name, own in state.items():
        for key, tensor in own.items():
            assert (new[name][key] is tensor) == (expected[name][key] is tensor)


def test_advance_carries_no_gradients_in_the_state(case):
    p, raw, state = case
    ours = grad(lambda raw: energy(p.advance(raw, state)[0]))(raw)
    new = p.update(raw, state)
    assert_close(ours, grad(lambda raw: energy(p(raw, new)))(raw))
    moved = torch.utils._pytree.tree_map(lambda x: x.requires_grad_(), raw)
    for own in p.advance(moved, state)[1].values():
        assert not any(tensor.requires_grad for tensor in own.values())


def stack_of(transform, shape=(4, 4), **kwargs):
    torch.manual_seed(0)
    values = {f"w{i}": torch.randn(shape, **kwargs) for i in range(transform.stacks("cpu")[0])}
    p = fp.parametrize(values, {"*": transform})
    raw, state = p.init(values)
    return p, raw, state


@pytest.mark.parametrize("given", [[], ["w0"], ["w2", "w1"], ["w0", "w1", "w2", "w3"]], ids=str)
def test_an_empty_state_may_be_given_or_left_out(given):
    p, raw, _ = stack_of(SpectralNorm(n_power_iterations=None))
    state = {name: {} for name in given}
    assert p.update(raw, state) == state
    values, new = p.advance(raw, state)
    assert new == state
    assert_close(values, p(raw, state))


def test_a_frozen_leaf_in_a_stack():
    p, raw, state = stack_of(Orthogonal())
    raw["w0"].requires_grad_()
    raw["w2"].requires_grad_()
    energy(p(raw, state)).backward()
    assert raw["w1"].grad is None
    expected = grad(lambda x: energy(p({**raw, "w2": x}, state)))(raw["w2"].detach())
    assert_close(raw["w2"].grad, expected)


@pytest.mark.parametrize("transform", [Orthogonal(), WeightNorm(), SpectralNorm()], ids=str)
def test_values_of_frozen_leaves_need_no_gradient(transform):
    p, raw, state = stack_of(transform)
    first = raw["w0"]
    for tensor in [first] if isinstance(first, torch.Tensor) else first.values():
        tensor.requires_grad_()
    alike = list(raw)[1:]
    for values in (p(raw, state), p.advance(raw, state)[0]):
        assert values["w0"].requires_grad
        assert not any(values[name].requires_grad for name in alike)


def test_mixed_precision_and_devices_go_one_by_one():
    p, raw, state = stack_of(WeightNorm())
    raw["w1"] = {name: tensor.double() for name, tensor in raw["w1"].items()}
    values = p(raw, state)
    expected = [torch.float32, torch.float64, torch.float32, torch.float32]
    assert [v.dtype for v in values.values()][:4] == expected
    raw["w1"] = {name: tensor.to("meta") for name, tensor in raw["w1"].items()}
    assert [v.device.type for v in p(raw, state).values()][:4] == ["cpu", "meta", "cpu", "cpu"]


class Tagged(torch.Tensor):
    pass


def test_subclasses_go_one_by_one():
    p, raw, state = stack_of(Orthogonal())
    expected = p(raw, state)
    raw = {name: tensor.as_subclass(Tagged) for name, tensor in raw.items()}
    values = p(raw, state)
    assert all(type(v) is Tagged for v in values.values())
    assert_close({n: v.as_subclass(torch.Tensor) for n, v in values.items()}, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transform", [Orthogonal(), WeightNorm(), SpectralNorm()], ids=str)
def test_half_precision_and_autocast(transform, dtype):
    p, raw, state = stack_of(transform, dtype=dtype)
    assert_close(p(raw, state), one_by_one(p, raw, state))
    p, raw, state = stack_of(transform)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(p(raw, state), one_by_one(p, raw, state))


def test_batches_of_matrices_and_empty_ones():
    for transform in (Orthogonal(), Orthogonal("householder")):
        p, raw, state = stack_of(transform, shape=(2, 4, 3))
        raw = moved(raw)
        assert_close(p(raw, state), one_by_one(p, raw, state))
        p, raw, state = stack_of(transform, shape=(0, 4, 3))
        assert p(raw, state)["w1"].shape == (0, 4, 3)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_kernels_of_convolutions(dim):
    for transform in (SpectralNorm(dim, n_power_iterations=2), WeightNorm(dim)):
        p, raw, state = stack_of(transform, shape=(3, 2, 2, 2))
        assert "in one call" in str(p.plan())
        raw = moved(raw)
        assert_close(p(raw, state), one_by_one(p, raw, state))
        new = {name: p[name].update(raw[name], own) for name, own in state.items()}
        assert_close(p.update(raw, state), new)


def test_a_group_of_very_different_norms():
    p, raw, state = stack_of(Orthogonal())
    steps = {"w0": 1e-6, "w1": 300.0, "w2": 1.0, "w3": 10.0}
    raw = {name: raw[name] + step for name, step in steps.items()}
    found, expected = p(raw, state), one_by_one(p, raw, state)
    for name, step in steps.items():  # an angle of a thousand has that many roundings of one
        assert_close(found[name], expected[name], rtol=0, atol=1e-6 * max(1, step))


def test_what_is_not_stacked_and_why():
    layers = [nn.Linear(3, 3) for _ in range(4)] + [nn.Linear(300, 300) for _ in range(4)]
    net = nn.ModuleList(layers)
    rules = {"*.weight": Orthogonal(), "*.bias": Interval(-1, 1)}
    table = str(fp.parametrize(net, rules).plan())
    assert "in one call" in table
    assert "one by one: 90000 entries, no gain above 4096" in table
    assert "one by one: no gain measured" in table
    assert str(fp.parametrize(net, {}).plan()).splitlines()[0].startswith("transform")


def test_a_plan_is_for_a_kind_of_device():
    net = nn.ModuleList(nn.Linear(99, 99) for _ in range(4))
    p = fp.parametrize(net, {"*.weight": Orthogonal(), "*.bias": Interval(-1, 1)})
    near, far = str(p.plan()), str(p.plan(torch.device("cuda", 1)))
    assert "on cpu  " in near
    assert "on cuda, not measured" in far
    assert "one by one: 9801 entries, no gain above 4096" in near
    assert "in one call" in far
    assert "one by one: no gain measured" in near
    assert "one by one: no gain measured" in far
    assert str(p.plan("mps")).replace("mps", "cuda").split() == far.split()


def test_leaves_are_mapped_by_the_plan_of_their_device():
    """On the meta device, which was not measured: larger leaves are stacked there."""
    net = nn.ModuleList(nn.Linear(99, 99) for _ in range(4))
    p = fp.parametrize(net, {"*.weight": SpectralNorm()})
    raw, state = p.init(net)
    calls = []

    class Counts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    def reciprocals(device):
        calls.clear()
        there = torch.utils._pytree.tree_map(lambda t: t.to(device), (raw, state))
        with Counts():
            p(*there)
        return calls.count("reciprocal")

    assert (reciprocals("cpu"), reciprocals("meta")) == (4, 1)


def test_different_settings_are_different_groups():
    net = nn.ModuleList(nn.Linear(3, 3) for _ in range(8))
    rules = [("[0-3].weight", Orthogonal()), ("*.weight", Orthogonal("cayley"))]
    assert str(fp.parametrize(net, rules).plan()).count("4  in one call") == 2


def test_ties_are_one_leaf_of_a_stack():
    net = nn.ModuleList(nn.Linear(3, 3) for _ in range(5))
    net[2].weight = net[0].weight
    p = fp.parametrize(net, {"*.weight": SpecialOrthogonal("cayley")})
    assert "4  in one call" in str(p.plan())
    raw, state = p.init(net)
    raw = moved(raw)
    values = p(raw, state)
    assert values["0.weight"] is values["2.weight"]
    assert_close({name: values[name] for name in raw}, one_by_one(p, raw, state))


def test_a_network_trains_on_stacked_weights():
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(4, 4) for _ in range(16)]).double()
    p = fp.parametrize(net, {"*.weight": WeightNorm()})
    assert "16  in one call" in str(p.plan())
    model = fp.Parametrized(net, p)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(8, 4).double()
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    raw, state = p.init(net)
    for _ in range(3):

        def loss(raw):
            return functional_call(net, one_by_one(p, raw, state), (x,)).square().mean()

        step = grad(loss)(raw)
        raw = torch.utils._pytree.tree_map(lambda a, b: a - 0.1 * b, raw, step)
    assert_close(model.fold()[1].weight.detach(), p(raw, state)["1.weight"])


def test_second_derivatives_of_a_stack():
    p, raw, state = stack_of(WeightNorm(), shape=(2, 2), dtype=torch.double)

    def f(x, evaluate):
        return energy(evaluate({**raw, "w1": {**raw["w1"], "direction": x}}, state))

    x = raw["w1"]["direction"]
    ours = hessian(lambda x: f(x, p))(x)
    theirs = hessian(lambda x: f(x, lambda raw, state: one_by_one(p, raw, state)))(x)
    assert_close(ours, theirs)
