"""Values that are made when they are read, and made again for backward."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

import funcparam as fp
from funcparam.transforms import (
    Cat,
    Chain,
    Identity,
    LoRA,
    Mask,
    Orthogonal,
    SpectralNorm,
    Transpose,
    WeightNorm,
)
from tests.cases import every_case, value_of
from tests.networks import Classifier, Tied, mlp


@pytest.fixture(autouse=True)
def _all_sizes(monkeypatch):
    """Let small values count as large."""
    monkeypatch.setattr("funcparam.binding.evaluation.SMALLEST", 0)


X = torch.linspace(-1, 1, 4 * 5 * 3).reshape(4, 5, 3)
RULES = {"rnn.weight_hh_*": Orthogonal(), "head.weight": SpectralNorm(), "rnn.*": WeightNorm()}


def moved(raw):
    """Raw to train, away from where it starts."""

    def move(t):
        t = t + 0.1 * torch.randn_like(t) if t.is_floating_point() or t.is_complex() else t
        return t.requires_grad_()

    return tree_map(move, raw)


def setting(net, rules):
    p = fp.parametrize(net, rules)
    raw, state = p.init(net)
    return p, moved(raw), state


def gradients(output, inputs, **options):
    first = tree_leaves(output)[0]
    loss = first.abs().square().sum()
    return torch.autograd.grad(loss, inputs, allow_unused=True, **options)


def assert_same(net, rules, *args, exact=True):
    """The call and its gradients are those of a plain call; return both calls."""
    p, raw, state = setting(net, rules)
    inputs = [*tree_leaves(raw), *(x for x in args if x.requires_grad)]
    late, plain = fp.recompute(net, p), fp.functional_call(net)
    expected = plain(p(raw, state), args)
    found = late(raw, state, args)
    tolerance = {"rtol": 0, "atol": 0} if exact else {}
    torch.testing.assert_close(found, expected, **tolerance)
    torch.testing.assert_close(
        gradients(found, inputs), gradients(expected, inputs), equal_nan=True, **tolerance
    )


@pytest.fixture
def count(monkeypatch):
    """How often a WeightNorm was evaluated."""
    calls, forward = [], WeightNorm.forward

    def counted(self, raw, state):
        calls.append(self)
        return forward(self, raw, state)

    monkeypatch.setattr(WeightNorm, "forward", counted)
    return calls


class Product(nn.Module):
    """Uses a tensor of any shape such that backward needs it."""

    def __init__(self, value):
        super().__init__()
        self.w = nn.Parameter(value)

    def forward(self, x):
        return (self.w * x + self.w).sin()


@every_case
def test_every_transform_is_bit_equal_to_the_plain_call(case, shape):
    value = value_of(case, shape)
    x = torch.randn(value.shape, dtype=value.dtype).requires_grad_()
    assert_same(Product(value), {"w": case.transform}, x)


@pytest.mark.parametrize(
    ("net", "rules", "x"),
    [
        (Classifier(), RULES, X),
        (Classifier(), {"rnn.weight_*": Cat([Orthogonal("cayley")] * 4, dim=0)}, X),
        (nn.Conv2d(2, 3, 3), {"weight": SpectralNorm()}, torch.randn(2, 2, 5, 5)),
        (nn.Embedding(5, 4), {"weight": WeightNorm()}, torch.tensor([1, 1, 3])),
        (nn.GRU(3, 4), {"weight_*": WeightNorm()}, X),
        (mlp(depth=6), {"*.weight": WeightNorm()}, torch.randn(3, 6).double()),  # stacked
        (nn.Linear(3, 3), {"weight": Identity()}, X),
        (nn.Linear(3, 3), {"weight": Transpose(0, 1)}, X),
        (nn.Linear(3, 3), {"weight": Chain(Mask(), Orthogonal())}, X),
        (nn.Linear(3, 3, dtype=torch.complex64), {"weight": Orthogonal()}, X.to(torch.complex64)),
        (nn.Linear(3, 3).bfloat16(), {"weight": Orthogonal("cayley")}, X.bfloat16()),
    ],
    ids=lambda x: type(x).__name__,
)
def test_networks_are_bit_equal_to_the_plain_call(net, rules, x):
    assert_same(net.eval(), rules, x)


def test_ties_are_made_once_a_module_and_their_gradients_add_up():
    assert_same(Tied(), {"decoder.weight": Orthogonal()}, torch.randn(3, 5), exact=False)


class Views(nn.Module):
    """Saves views and copies of its weight, and what was computed from it."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        y = x @ self.w.t() + x @ self.w
        a, b = self.w.chunk(2, dim=1)
        y = y + (x @ a) @ b.mT + x @ self.w.detach() + (self.w[1:3] * self.w[::2]).sum()
        return y * self.w.diagonal() + (x * self.w.clone()[0]).exp() + self.w.view(2, 8).sin().sum()


def test_views_of_values():
    assert_same(Views(), {"w": WeightNorm()}, torch.randn(3, 4))


class Written(nn.Module):
    """Writes to its weight before and after it was used."""

    def __init__(self, when):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))
        self.other = nn.Parameter(torch.randn(4, 4))
        self.when = when

    def forward(self, x):
        if self.when == "before":
            self.w.mul_(2)
            return F.linear(x, self.w) @ self.other @ self.w
        y = F.linear(x, self.w)
        self.w.mul_(2)
        return y


def test_a_value_that_the_network_writes_to():
    assert_same(Written("before"), {"w": WeightNorm()}, torch.randn(3, 4).requires_grad_())


def test_a_value_that_is_written_to_after_it_was_saved_is_the_error_of_torch():
    net = Written("after")
    p, raw, state = setting(net, {"w": WeightNorm()})
    x = torch.randn(3, 4).requires_grad_()
    for call in (lambda: fp.functional_call(net)(p(raw, state), (x,)),):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            call().sum().backward()
    # the value that was used is made again, and so is right
    values = p(raw, state)
    (expected,) = torch.autograd.grad(F.linear(x, values["w"]).sum(), x)
    (found,) = torch.autograd.grad(fp.recompute(net, p)(raw, state, (x,)).sum(), x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["raw", "state", "activation"])
def test_what_is_written_to_before_backward_is_an_error(kind):
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    p, raw, state = setting(net, {"2.weight": SpectralNorm(), "0.weight": WeightNorm()})
    kept = []
    handle = net[1].register_forward_hook(lambda m, args, out: kept.append(out))
    out = fp.recompute(net, p)(raw, state, (torch.randn(3, 4),))
    handle.remove()
    what = {"raw": raw["2.weight"], "state": state["2.weight"]["u"], "activation": kept[0]}
    with torch.no_grad():
        what[kind].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation") as error:
        out.sum().backward()
    if kind != "activation":
        assert "raw or state of '2.weight'" in str(error.value)
        assert "Call backward before the optimizer's step" in str(error.value)


def test_several_forwards_before_one_backward_have_the_state_of_each():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    p = fp.parametrize(net, {"*.weight": SpectralNorm()})
    plain, late = fp.Parametrized(net, p), fp.Parametrized(net, p, recompute=True)
    for name, parameter in late.named_parameters():
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter))
            plain.get_parameter(name).copy_(parameter)
    x = torch.randn(3, 4)
    for model in (plain, late):
        (model(x).sum() + model(2 * x).square().sum() - model(x).exp().sum()).backward()
    for a, b in zip(late.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert_states_equal(late, plain)


def assert_states_equal(a, b):
    torch.testing.assert_close(dict(a.state_dict()), dict(b.state_dict()), rtol=0, atol=0)


def train(model, x, steps=4):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return model


def test_training_the_shell_is_bit_equal():
    net = Classifier()
    p = fp.parametrize(net, RULES)
    plain, late = fp.Parametrized(net, p), fp.Parametrized(net, p, recompute=True)
    train(plain, X)
    train(late, X)
    assert_states_equal(late, plain)
    for twin in (copy.deepcopy(late), pickle.loads(pickle.dumps(late))):
        assert twin.recompute
        assert_states_equal(train(twin, X), train(copy.deepcopy(plain), X))


def test_double_backward():
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    p, raw, state = setting(net, {"0.weight": Orthogonal("cayley"), "2.weight": SpectralNorm()})
    leaves, spec = torch.utils._pytree.tree_flatten(raw)
    call = fp.recompute(net, p)
    x = torch.randn(4, 3).double()

    def function(*leaves):
        return call(torch.utils._pytree.tree_unflatten(leaves, spec), state, (x,))

    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


@pytest.mark.parametrize("rules", [{"*.weight": WeightNorm()}, {"*.weight": Orthogonal()}])
def test_a_gradient_penalty_and_third_order(rules):
    net = mlp(depth=2)
    p, raw, state = setting(net, rules)
    x = torch.randn(3, 6).double().requires_grad_()
    inputs = tree_leaves(raw)

    def penalty(out):
        (g,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        (h,) = torch.autograd.grad(g.square().sum(), x, create_graph=True)
        return torch.autograd.grad(h.square().sum() + g.sum(), inputs, allow_unused=True)

    found = penalty(fp.recompute(net, p)(raw, state, (x,)))
    expected = penalty(fp.functional_call(net)(p(raw, state), (x,)))
    torch.testing.assert_close(found, expected)


def test_raw_that_was_computed_itself():
    net = mlp(depth=2)
    p, raw, state = setting(net, {"*.weight": WeightNorm()})
    x = torch.randn(3, 6).double()
    call, plain = fp.recompute(net, p), fp.functional_call(net)

    def adapted(output):
        inputs = tree_leaves(raw)
        grads = iter(gradients(output(raw), inputs, create_graph=True))
        new = tree_map(lambda t: t - 0.1 * next(grads), raw)
        return gradients(output(new), inputs)

    found = adapted(lambda raw: call(raw, state, (x,)))
    expected = adapted(lambda raw: plain(p(raw, state), (x,)))
    torch.testing.assert_close(found, expected)


def test_frozen_raw_state_that_is_trained_and_inputs_alone():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    p, raw, state = setting(net, {"0.weight": WeightNorm(), "2.weight": LoRA(rank=2)})
    raw["0.weight"]["magnitude"].requires_grad_(False)
    raw["0.bias"].requires_grad_(False)
    state["2.weight"]["base"].requires_grad_()
    x = torch.randn(3, 4).requires_grad_()
    inputs = [x, state["2.weight"]["base"], raw["0.weight"]["direction"], raw["2.weight"]["A"]]
    call, plain = fp.recompute(net, p), fp.functional_call(net)
    torch.testing.assert_close(
        gradients(call(raw, state, (x,)), inputs), gradients(plain(p(raw, state), (x,)), inputs)
    )
    frozen = tree_map(torch.Tensor.detach, (raw, state))
    (found,) = gradients(call(*frozen, (x,)), [x])
    (expected,) = gradients(plain(p(*frozen), (x,)), [x])
    torch.testing.assert_close(found, expected)
    assert not call(*frozen, (x.detach(),)).requires_grad


@pytest.mark.parametrize("around_backward", [False, True])
def test_autocast(around_backward):
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    product = fp.transform(lambda raw: raw @ raw)  # one that autocast computes in bfloat16
    p = fp.parametrize(net, {"0.weight": product, "2.weight": WeightNorm()})
    raw = {k: v.detach().clone() for k, v in net.named_parameters()}
    raw["2.weight"] = WeightNorm().right_inverse(raw["2.weight"])[0]
    raw = moved(raw)
    inputs, x = tree_leaves(raw), torch.randn(3, 4)
    call, plain = fp.recompute(net, p), fp.functional_call(net)
    found = []
    for output in (lambda: call(raw, {}, (x,)), lambda: plain(p(raw), (x,))):
        with torch.autocast("cpu", torch.bfloat16):
            out = output()
            if around_backward:
                found.append((out, *gradients(out, inputs)))
        if not around_backward:
            found.append((out, *gradients(out, inputs)))
    assert found[0][0].dtype == torch.bfloat16
    torch.testing.assert_close(*found, rtol=0, atol=0)


class Modes(nn.Module):
    """Reads its weights in other modes than it is called in."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.third = nn.Linear(4, 4)

    def forward(self, x):
        with torch.no_grad():
            x = self.first(x)
        with torch.enable_grad():
            x = self.second(x)
        with torch.autocast("cpu", torch.bfloat16):
            a = self.third(x)
        with torch.autocast("cpu", enabled=False):
            return self.third(x) + self.first(x) + a.float()


@pytest.mark.parametrize("outside", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_values_are_those_of_the_modes_of_the_call(outside):
    net = Modes()
    product = fp.transform(lambda raw: raw @ raw)
    p = fp.parametrize(net, {"*.weight": product})
    raw = moved({name: t.detach().clone() for name, t in net.named_parameters()})
    x = torch.randn(3, 4)
    with outside():
        found, expected = fp.recompute(net, p)(raw, {}, (x,)), net_of(net, p, raw, x)
    assert torch.equal(found, expected)
    assert found.requires_grad == expected.requires_grad
    if outside is torch.enable_grad:
        inputs = tree_leaves(raw)
        torch.testing.assert_close(gradients(found, inputs), gradients(expected, inputs))


def net_of(net, p, raw, x):
    return torch.func.functional_call(net, p(raw, {}), (x,))


class Failing(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count = self.count + 1
        self.linear(x)
        raise KeyError("stop")


def test_an_exception_leaves_the_network_as_it_was():
    net = Failing()
    before = {m: (m.__dict__["_parameters"], dict(m._parameters)) for m in net.modules()}
    p, raw, state = setting(net, {"linear.weight": WeightNorm()})
    buffers = {"count": torch.ones(())}
    with pytest.raises(KeyError, match="stop"):
        fp.recompute(net, p)(raw, state, (X,), buffers=buffers)
    for module, (table, tensors) in before.items():
        assert module.__dict__["_parameters"] is table
        assert type(table) is dict
        assert all(table[name] is t for name, t in tensors.items())
    assert buffers["count"] == 2
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def test_what_comes_in_and_goes_out_may_be_anything():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x, *, scale=None):
            self.count += 1
            return {
                "y": [self.linear(x)],
                "weight": self.linear.weight,
                "scale": scale,
                "none": None,
            }

    net = Odd()
    p, raw, state = setting(net, {"linear.weight": WeightNorm()})
    call = fp.recompute(net, p)
    out = call(raw, state, X, {"scale": "s"}, buffers={"count": torch.zeros(())})
    assert net.count == 0
    assert out["scale"] == "s"
    assert torch.equal(out["weight"], p(raw, state)["linear.weight"])
    found = gradients(out["y"][0] + out["weight"].sum(), tree_leaves(raw))
    values = p(raw, state)
    expected = F.linear(X, values["linear.weight"], values["linear.bias"])
    expected = gradients(expected + values["linear.weight"].sum(), tree_leaves(raw))
    torch.testing.assert_close(found, expected)


def test_wrong_raw_is_an_error_before_anything_is_computed(count):
    net = nn.Linear(3, 3)
    p, raw, state = setting(net, {"weight": WeightNorm()})
    call = fp.recompute(net, p)
    count.clear()
    with pytest.raises(ValueError, match="raw: unknown name 'other'"):
        call({**raw, "other": torch.ones(1)}, state, (X,))
    with pytest.raises(ValueError, match="raw: missing 'bias'"):
        call({"weight": raw["weight"]}, state, (X,))
    assert not count


def test_what_is_no_module_and_no_parametrization():
    net = nn.Linear(3, 3)
    with pytest.raises(TypeError, match="recompute expects a module; got a dict"):
        fp.recompute({}, fp.parametrize(net, {}))
    with pytest.raises(TypeError, match="recompute expects a parametrization; got a dict"):
        fp.recompute(net, {})


# Checkpoints


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_checkpoint_around_it(use_reentrant, recompute):
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    p = fp.parametrize(net, {"0.weight": WeightNorm(), "2.weight": SpectralNorm()})
    plain, late = fp.Parametrized(net, p), fp.Parametrized(net, p, recompute=recompute)
    x = torch.randn(3, 4).requires_grad_()
    plain(x).square().sum().backward()
    kept = []
    late.net[1].register_forward_hook(lambda m, args, out: kept.append(weakref.ref(out)))
    out = checkpoint(late, x, use_reentrant=use_reentrant)
    gc.collect()
    assert kept[0]() is None  # the checkpoint does what it is for
    out.square().sum().backward()
    for a, b in zip(late.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert_states_equal(late, plain)  # the second computation does not advance state


def test_saved_tensor_hooks_around_it_see_everything_but_values():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    p, raw, state = setting(net, {"*.weight": Orthogonal()})
    seen = []

    def pack(t):
        seen.append(t.shape)
        return t.detach().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = fp.recompute(net, p)(raw, state, (torch.randn(3, 4),))
        after = torch.ones(2, requires_grad=True).exp()
    assert torch.Size((3, 4)) in seen  # the output of tanh
    assert seen[-1] == after.shape
    out.sum().backward()


# Memory and time


def test_each_map_is_evaluated_once_in_forward_and_once_in_backward(count):
    net = Classifier()
    p, raw, state = setting(net, {"rnn.weight_*": WeightNorm(), "head.weight": WeightNorm()})
    call = fp.recompute(net, p)
    count.clear()
    out = call(raw, state, (X,))
    assert len(count) == 3
    gradients(out, tree_leaves(raw))
    assert len(count) == 6


class Loop(nn.Module):
    """Two cells that take turns."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)

    def forward(self, x):
        for _ in range(100):
            x = torch.tanh(self.b(torch.tanh(self.a(x))))
        return x


@pytest.mark.parametrize("grad", [True, False])
def test_a_loop_does_not_make_its_values_at_each_step(count, grad):
    net = Loop()
    p, raw, state = setting(net, {"*.weight": WeightNorm()})
    call = fp.recompute(net, p)
    x = torch.randn(3, 4)
    count.clear()
    with torch.set_grad_enabled(grad):
        first = call(raw, state, (x,))
    assert len(count) <= 4
    if grad:
        found = gradients(first, tree_leaves(raw))
        assert len(count) <= 10
        expected = gradients(fp.functional_call(net)(p(raw, state), (x,)), tree_leaves(raw))
        torch.testing.assert_close(found, expected)
    count.clear()
    with torch.set_grad_enabled(grad):
        assert torch.equal(call(raw, state, (x,)), first)
    assert len(count) <= 4


def living(net, monkeypatch):
    """Count the values that are alive, at each evaluation."""
    alive, most, forward = [], [], WeightNorm.forward

    def watched(self, raw, state):
        value = forward(self, raw, state)
        alive.append(weakref.ref(value.untyped_storage()))
        most.append(sum(r() is not None for r in alive))
        return value

    monkeypatch.setattr(WeightNorm, "forward", watched)
    return most


@pytest.mark.parametrize("wrap", [fp.recompute, lambda net, p: None], ids=["call", "shell"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_values_of_one_module_are_alive_at_a_time(wrap, mode, monkeypatch):
    net = nn.Sequential(*[nn.Linear(n, n + 1) for n in range(3, 9)])
    p, raw, state = setting(net, {"*.weight": WeightNorm()})
    call = wrap(net, p)
    if call is None:
        model = fp.Parametrized(net, p, recompute=True)
        call = lambda raw, state, args: model(*args)  # noqa: E731
    most = living(net, monkeypatch)
    with mode():
        out = call(raw, state, (torch.randn(2, 3),))
    if mode is torch.enable_grad:
        out.sum().backward()
        assert len(most) == 12
    else:
        assert len(most) == 6
    assert max(most) == 1


def test_without_gradients_the_shell_makes_values_when_they_are_read(monkeypatch):
    net = nn.Sequential(*[nn.Linear(n, n + 1) for n in range(3, 9)])
    model = fp.Parametrized(net, fp.parametrize(net, {"*.weight": WeightNorm()}))
    x = torch.randn(2, 3)
    expected = model(x)
    most = living(net, monkeypatch)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    assert max(most) == 1


def test_gradients_of_inputs_alone_hold_one_value(monkeypatch):
    net = nn.Sequential(*[nn.Linear(n, n + 1) for n in range(3, 9)])
    p, raw, state = setting(net, {"*.weight": WeightNorm()})
    x = torch.randn(2, 3).requires_grad_()
    most = living(net, monkeypatch)
    torch.autograd.grad(fp.recompute(net, p)(raw, state, (x,)).sum(), x)
    assert max(most) == 1


def test_a_graph_that_is_kept_serves_twice():
    net = mlp(depth=2)
    p, raw, state = setting(net, {"*.weight": WeightNorm()})
    out = fp.recompute(net, p)(raw, state, (torch.randn(3, 6).double(),))
    first = gradients(out, tree_leaves(raw), retain_graph=True)
    assert all(
        torch.equal(a, b) for a, b in zip(first, gradients(out, tree_leaves(raw)), strict=True)
    )
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        gradients(out, tree_leaves(raw))


def test_nothing_of_a_call_is_held():
    net = mlp(depth=2)
    p, raw, state = setting(net, {"*.weight": WeightNorm()})
    call = fp.recompute(net, p)
    out = call(raw, state, (torch.randn(3, 6).double(),))
    held = [weakref.ref(t) for t in tree_leaves(raw)]
    out.sum().backward()
    del out, raw
    assert all(r() is None for r in held)  # without a collection: there is no cycle


# Who reads


class Reads(nn.Module):
    """Reads weights in every way there is."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.RNN(4, 4)
        self.head = nn.Linear(4, 4)
        self.own = nn.Parameter(torch.randn(4, 4))
        self.attention = nn.MultiheadAttention(4, 2)
        self.tail = nn.Linear(4, 4)

    def forward(self, x):
        h = torch.tanh(x @ self.rnn.weight_hh_l0.t() + self.own.sum())  # rnn is not called
        h = self.attention(h, h, h)[0]
        h = h + sum(q.sum() for q in self.parameters()) + getattr(self.head, "weight")[0]  # noqa: B009
        tensors = {**self.tail._parameters, **self.head._parameters}
        assert self.tail._parameters.copy().keys() == self.tail._parameters.keys()
        assert "weight" in self.tail._parameters
        assert isinstance(self.tail._parameters, dict)
        assert len(list(self.head._parameters.items())) == 2
        assert len(self.state_dict()) == len(list(self.named_parameters()))
        if not torch.is_grad_enabled():
            twin = copy.deepcopy(self.tail)
            assert type(twin._parameters) is dict
            h = h + twin(h)
        return F.linear(h, tensors["weight"], self.tail.bias) + self.own[0]


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_any_way_to_read_a_weight(mode):
    net = Reads().eval()
    p, raw, state = setting(net, {"*weight*": Orthogonal("cayley"), "own": WeightNorm()})
    x = torch.randn(3, 2, 4)
    with mode():
        found = fp.recompute(net, p)(raw, state, (x,))
        expected = torch.func.functional_call(net, p(raw, state), (x,))
    assert torch.equal(found, expected)
    if mode is torch.enable_grad:
        inputs = tree_leaves(raw)
        grads = gradients(found, inputs), gradients(expected, inputs)
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_transformer_in_evaluation(mode):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    p = fp.parametrize(net, {"*weight": WeightNorm()})
    model = fp.Parametrized(net, p).eval()
    x = torch.randn(2, 5, 8)
    with mode():
        expected = torch.func.functional_call(net, p(*p.init(net)), (x,))
        for _ in range(3):
            assert torch.equal(model(x), expected)


class Changing(nn.Module):
    """Writes to, replaces and removes its own weights while it runs."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.c = nn.Linear(4, 4)

    def forward(self, x):
        self.a.weight.mul_(2)
        x = self.a(x)
        x = self.b(x)
        self.b.weight = nn.Parameter(torch.eye(4))
        del self.c.bias
        self.c.bias = None
        x = self.a(self.b(x)) + self.c(x)
        del self.c.weight
        assert not hasattr(self.c, "weight")
        return x


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_network_that_changes_its_weights_while_it_runs(mode):
    net = Changing()
    p, raw, state = setting(net, {"*weight": WeightNorm()})
    x = torch.randn(3, 4)
    with mode():
        found = fp.recompute(net, p)(raw, state, (x,))
        expected = torch.func.functional_call(net, p(raw, state), (x,))
    assert torch.equal(found, expected)
    assert [len(m._parameters) for m in (net.a, net.b, net.c)] == [2, 2, 2]


def test_a_network_that_is_changed_between_calls():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    p, raw, state = setting(net, {"*weight": WeightNorm()})
    call = fp.recompute(net, p)
    x = torch.randn(3, 4)
    expected = call(raw, state, (x,))
    net[1] = nn.Linear(4, 4)
    assert torch.equal(call(raw, state, (x,)), expected)


class Nested(nn.Module):
    """Calls itself, with other weights."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4)
        self.inner = None

    def forward(self, x):
        x = self.linear(x)
        if self.inner is not None:
            call, self.inner = self.inner, None
            x = call(x) + self.linear(x)
        return self.other(x)


@pytest.mark.parametrize("grad", [True, False])
def test_nested_calls(grad):
    net = Nested()
    p, raw, state = setting(net, {"*weight": WeightNorm()})
    raw2 = moved(raw)
    x = torch.randn(3, 4)
    late, plain = fp.recompute(net, p), fp.functional_call(net)
    with torch.set_grad_enabled(grad):
        found = []
        for call in (late, lambda raw, state, args: plain(p(raw, state), args)):
            for other in (late, lambda raw, state, args: plain(p(raw, state), args)):
                net.inner = lambda x, other=other: other(raw2, state, (x,))
                found.append(call(raw, state, (x,)))
    assert all(torch.equal(a, found[0]) for a in found[1:])
    if grad:
        inputs = tree_leaves((raw, raw2))
        grads = [gradients(out, inputs) for out in found]
        for one in grads[1:]:
            torch.testing.assert_close(one, grads[0])


def test_a_kept_loss_keeps_no_frozen_value():
    net = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512))
    p = fp.parametrize(net, {"*.weight": WeightNorm()})
    raw, state = p.init(net)
    trained = tree_leaves(raw["1.weight"])
    for tensor in trained:
        tensor.requires_grad_()
    call = fp.recompute(net, p)
    x = torch.randn(2, 512, requires_grad=True)

    def values():
        tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor]
        return len({t.data_ptr() for t in tensors if t.shape == (512, 512)})

    before = values()
    losses = [call(raw, state, (x,)).sum() for _ in range(3)]
    for loss in losses:
        loss.backward()
    assert values() - before <= 1  # the gradient of the trained direction


def test_raw_of_inference_mode_is_served():
    net = nn.Linear(512, 512)
    p = fp.parametrize(net, {"weight": WeightNorm()})
    with torch.inference_mode():
        raw, state = p.init(net)
    x = torch.randn(2, 512)
    expected = torch.func.functional_call(net, p(raw, state), (x,))
    torch.testing.assert_close(fp.recompute(net, p)(raw, state, (x,)), expected)


# Compilation, transforms, forward mode


@pytest.mark.parametrize("transform", [WeightNorm(), SpectralNorm()], ids=str)
def test_compiled_backward_gets_raw_and_no_value(transform):
    net = nn.Sequential(*[layer for _ in range(3) for layer in (nn.Linear(65, 65), nn.Tanh())])
    p = fp.parametrize(net, {"*.weight": transform})
    late = fp.Parametrized(net, p, recompute=True)
    plain = copy.deepcopy(fp.Parametrized(net, p))
    plain.load_state_dict(late.state_dict())
    x = torch.randn(4, 65)
    matrices = []
    for model in (plain, late):
        given = []

        def backward(graph, inputs, given=given):
            given.append(sum(t.shape == (65, 65) for t in inputs))
            return make_boxed_func(graph.forward)

        backend = aot_autograd(
            fw_compiler=lambda graph, inputs: make_boxed_func(graph.forward),
            bw_compiler=backward,
            partition_fn=min_cut_rematerialization_partition,
        )
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        compiled(x).square().sum().backward()
        matrices += given
    assert matrices == [5, 3]  # the value of the first layer is not needed
    for a, b in zip(late.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert_states_equal(late, plain)


def test_inside_of_transforms_the_values_are_made_at_once():
    net = mlp(depth=2)
    p, raw, state = setting(net, {"*.weight": WeightNorm()})
    raw = tree_map(torch.Tensor.detach, raw)
    call, plain = fp.recompute(net, p), fp.functional_call(net)
    x = torch.randn(3, 6).double()

    def late(raw):
        return call(raw, state, (x,)).square().sum()

    def expected(raw):
        return plain(p(raw, state), (x,)).square().sum()

    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(late)(raw), transform(expected)(raw))
    stacked = tree_map(lambda t: torch.stack([t, 2 * t]), raw)
    many = torch.func.vmap(late)(stacked)
    torch.testing.assert_close(many, torch.func.vmap(expected)(stacked))
    with forward_ad.dual_level():
        dual = tree_map(lambda t: forward_ad.make_dual(t, torch.ones_like(t)), raw)
        a, b = (forward_ad.unpack_dual(f(dual)) for f in (late, expected))
        torch.testing.assert_close(a.tangent, b.tangent)


class Inside(nn.Module):
    """Transforms inside of the network."""

    def __init__(self, transform):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4)
        self.transform = transform

    def forward(self, x):
        def energy(row):
            return self.other(self.linear(row).tanh()).square().sum()

        y = torch.func.vmap(torch.func.grad(energy) if self.transform == "grad" else energy)(x)
        return y.sum() + self.other(self.linear(x))


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_transforms_inside_of_a_network_in_evaluation(transform):
    net = Inside(transform)
    p, raw, state = setting(net, {"*weight": Orthogonal("cayley")})
    x = torch.randn(3, 4)
    with torch.no_grad():
        found = fp.recompute(net, p)(raw, state, (x,))
        torch.testing.assert_close(found, fp.functional_call(net)(p(raw, state), (x,)))


def test_transforms_inside_of_a_network_in_training():
    x = torch.randn(3, 4)
    assert_same(Inside("vmap"), {"*weight": Orthogonal("cayley")}, x, exact=False)
    net = Inside("grad")
    p, raw, state = setting(net, {"*weight": WeightNorm()})
    with pytest.raises(RuntimeError, match="don't yet support saved tensor hooks"):
        fp.recompute(net, p)(raw, state, (x,))


def test_threads_of_one_call():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    p, _, state = setting(net, {"*.weight": WeightNorm()})
    call, plain = fp.recompute(net, p), fp.functional_call(net)
    x = torch.randn(3, 4)
    raws = [moved(p.init(net)[0]) for _ in range(8)]
    expected = [gradients(plain(p(raw, state), (x,)), tree_leaves(raw)) for raw in raws]
    found = [None] * 8

    def work(k):
        for _ in range(10):
            found[k] = gradients(call(raws[k], state, (x,)), tree_leaves(raws[k]))

    threads = [threading.Thread(target=work, args=(k,), daemon=True) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
