"""The prepared call is `torch.func.functional_call`: values, errors, and what it leaves behind."""

import copy
import gc
import pickle
import threading
import time
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import grad, jvp, stack_module_state, vmap
from torch.testing import assert_close

import funcparam as fp
from funcparam.compat import parametrizations
from tests.effort import examples


class Net(nn.Module):
    """Layers with ties, a shared submodule, running statistics and a buffer it replaces."""

    def __init__(self, tied=True, shared=True):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(3, 3) for _ in range(3))
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("nothing", None)
        if tied:
            self.b.weight = self.a.weight
        if shared:
            self.again = self.c

    def forward(self, x, *, fail=False, scale=1.0):
        self.calls = self.calls + 1
        x = self.b(self.a(x)) * scale
        if fail:
            raise ArithmeticError("on the way")
        return self.norm(getattr(self, "again", self.c)(x)) + self.calls


NAMES = ["a.weight", "a.bias", "b.weight", "c.weight", "again.bias", "norm.weight"]
BUFFERS = ["calls", "norm.running_mean", "norm.num_batches_tracked"]
X = torch.linspace(-1, 1, 12).view(4, 3)


def net_and_params(names, tied=True, shared=True, seed=0):
    torch.manual_seed(seed)
    net = Net(tied, shared)
    every = {**dict(net.named_parameters(remove_duplicate=False)), **dict(net.named_buffers())}
    params = {}
    for name in names:
        if name in every:
            like = every[name]
            new = torch.rand(like.shape) if like.is_floating_point() else like.clone()
            params[name] = new
        else:
            params[name] = torch.rand(3)
    return net, params


def outcome(call, net, params, *args, **kwargs):
    """What it returns or raises, and what became of the caller's dict and of the module."""
    before = {name: id(t) for name, t in net.state_dict(keep_vars=True).items()}
    try:
        result = call(params, *args, **kwargs)
    except Exception as error:
        result = type(error)
    after = {name: id(t) for name, t in net.state_dict(keep_vars=True).items()}
    return result, params, net.state_dict(), before == after


@examples(150)
@given(
    names=st.lists(st.sampled_from([*NAMES, *BUFFERS, "unknown", "a.unknown"]), unique=True),
    tied=st.booleans(),
    fail=st.booleans(),
    strict=st.booleans(),
    training=st.booleans(),
    same=st.booleans(),
)
def test_it_is_torchs(names, tied, fail, strict, training, same):
    found = []
    for prepared in (False, True):
        net, params = net_and_params(names, tied, shared=False)
        net.train(training)
        if same and {"a.weight", "b.weight"} <= set(params):
            params["b.weight"] = params["a.weight"]
        if prepared:
            call = fp.functional_call(net)
        else:

            def call(*args, net=net, **kwargs):
                return torch.func.functional_call(net, *args, **kwargs)

        kwargs = {"fail": fail, "scale": 2.0}
        found.append(outcome(call, net, params, (X,), kwargs, strict=strict))
    (theirs, their_params, their_state, _), (ours, our_params, our_state, untouched) = found
    if isinstance(theirs, type):
        assert ours is theirs
    else:
        assert_close(ours, theirs)
    assert_close(our_params, their_params)
    assert_close(our_state, their_state)
    assert untouched == found[0][3]


def test_a_shared_submodule_is_restored_where_torch_leaves_the_values():
    net, _ = net_and_params([])
    before = {name: t.clone() for name, t in net.state_dict().items()}
    call = fp.functional_call(net)
    for names in (["c.weight"], ["again.weight"], ["c.bias"]):
        call({name: torch.zeros_like(net.get_parameter(name)) for name in names}, (X,))
        assert_close(
            {k: v for k, v in net.state_dict().items() if k[:2] in ("a.", "c.", "ag")},
            {k: v for k, v in before.items() if k[:2] in ("a.", "c.", "ag")},
        )


def test_a_tie_that_is_given_twice_hides_nothing_behind_it():
    net, _ = net_and_params([])
    zeros, ones = torch.zeros(3, 3), torch.ones(3, 3)
    seen = {}
    net.c.register_forward_pre_hook(lambda m, _: seen.update(c=m.weight))
    fp.functional_call(net)({"a.weight": zeros, "b.weight": zeros, "c.weight": ones}, (X,))
    assert seen["c"] is ones


def test_one_name_of_a_tie_serves_all():
    net, _ = net_and_params([])
    zeros = torch.zeros(3, 3)
    seen = {}
    net.a.register_forward_pre_hook(lambda m, _: seen.update(a=m.weight))
    net.b.register_forward_pre_hook(lambda m, _: seen.update(b=m.weight))
    for name in ("a.weight", "b.weight"):
        seen.clear()
        fp.functional_call(net)({name: zeros}, (X,))
        assert seen["a"] is seen["b"] is zeros
    with pytest.raises(ValueError, match="tied"):
        fp.functional_call(net)({"a.weight": zeros, "b.weight": zeros + 1}, (X,))


def test_several_dicts_and_one_argument_alone():
    net = nn.Linear(3, 3)
    call = fp.functional_call(net)
    zeros = torch.zeros(3, 3)
    assert_close(call(({"weight": zeros}, {"bias": zeros[0]}), X), X * 0)
    with pytest.raises(ValueError, match="appeared in multiple dictionaries"):
        call(({"weight": zeros}, {"weight": zeros}), X)


def test_the_module_may_change_afterwards():
    net, _ = net_and_params([])
    call = fp.functional_call(net)
    call({"a.bias": torch.ones(3)}, (X,))
    net.b = nn.Linear(3, 3)
    params = {"b.weight": torch.rand(3, 3), "a.weight": torch.rand(3, 3)}
    net.eval()
    twin = copy.deepcopy(net)
    assert_close(call(dict(params), (X,)), torch.func.functional_call(twin, dict(params), (X,)))
    net.c.weight = net.b.weight  # a new tie
    twin = copy.deepcopy(net)
    params = {"b.weight": torch.rand(3, 3)}
    assert_close(call(dict(params), (X,)), torch.func.functional_call(twin, dict(params), (X,)))
    parametrizations.weight_norm(net.a)
    twin = copy.deepcopy(net)
    params = {"a.weight": torch.rand(3, 3)}
    assert_close(call(dict(params), (X,)), torch.func.functional_call(twin, dict(params), (X,)))


def test_a_tensor_may_get_another_name():
    net = nn.Linear(3, 3, bias=False)
    call = fp.functional_call(net)
    call({"weight": torch.zeros(3, 3)}, (X,))
    weight = net.weight
    del net.weight
    net.register_parameter("other", weight)
    zeros = {"weight": torch.zeros(3, 3)}  # under a name that is free now
    assert_close(call(dict(zeros), (X,)), torch.func.functional_call(net, dict(zeros), (X,)))
    assert net.other is weight
    assert not hasattr(net, "weight")


def test_a_new_tie_and_a_new_layer_are_seen():
    net = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    net.forward = lambda x: [layer(x) for layer in net.values()]
    call = fp.functional_call(net)
    zeros = torch.zeros(3, 3)
    call({"a.weight": zeros}, (X,))
    net["b"].weight = net["a"].weight
    net["c"] = nn.Linear(3, 3)
    net["c"].weight = net["a"].weight
    found = call({"a.weight": zeros}, (X,))
    assert_close(found, torch.func.functional_call(net, {"a.weight": zeros}, (X,)))
    assert_close(found, [layer.bias.expand(4, 3) for layer in net.values()])
    assert net["b"].weight is net["c"].weight is net["a"].weight
    net["a"]._parameters = dict(net["a"]._parameters)
    assert_close(call({"a.weight": zeros}, (X,))[0], net["a"].bias.expand(4, 3))


def test_other_names_next_time():
    net = nn.Linear(3, 3)
    call = fp.functional_call(net)
    zeros = torch.zeros(3, 3)
    assert_close(call({"weight": zeros, "bias": zeros[0]}, (X,)), X * 0)
    assert_close(call({"weight": zeros}, (X,)), net.bias.expand(4, 3))
    assert_close(call({"bias": zeros[0], "weight": zeros}, (X,)), X * 0)
    assert_close(call({}, (X,)), net(X))


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3, bias=False)
        self.depth = 0

    def forward(self, x, call=None):
        inner = 0 if call is None else call({"layer.weight": 2 * self.layer.weight}, (x,))
        return self.layer(x) + inner


def test_nested_calls():
    net = Nested()
    call = fp.functional_call(net)
    W = torch.rand(3, 3)
    before = net.layer.weight
    assert_close(call({"layer.weight": W}, (X,), {"call": call}), 3 * X @ W.T)
    assert net.layer.weight is before


def test_transforms_go_through():
    net, params = net_and_params(["a.weight", "c.bias"])
    net.eval()
    call = fp.functional_call(net)

    calls = torch.zeros(())

    def prepared(params):
        return call({**params, "calls": calls}, (X,)).square().sum()

    def by_torch(params):
        params = {**params, "calls": calls}
        return torch.func.functional_call(net, params, (X,)).square().sum()

    assert_close(grad(prepared)(params), grad(by_torch)(params))
    tangent = {name: torch.ones_like(t) for name, t in params.items()}
    assert_close(jvp(prepared, (params,), (tangent,)), jvp(by_torch, (params,), (tangent,)))
    layers = [nn.Linear(3, 3) for _ in range(4)]
    raw, _ = stack_module_state(layers)
    many = vmap(lambda raw: fp.functional_call(layers[0])(raw, (X,)))(raw)
    assert_close(many, torch.stack([layer(X) for layer in layers]))


def test_compiled_whole():
    net = nn.Linear(3, 3)
    call = fp.functional_call(net)
    compiled = torch.compile(lambda W: call({"weight": W}, (X,)), backend="eager", fullgraph=True)
    W = torch.rand(3, 3)
    assert_close(compiled(W), X @ W.T + net.bias)


def test_threads_take_turns():
    net = nn.Sequential(*[nn.Linear(3, 3, bias=False) for _ in range(20)])
    call = fp.functional_call(net)
    before = [layer.weight for layer in net]
    wrong = []

    def work(k):
        W = torch.eye(3) * (1 + k / 100)
        params = {f"{i}.weight": W for i in range(20)}
        expected = X * (1 + k / 100) ** 20
        for _ in range(30):
            if not torch.allclose(call(params, (X,)), expected, rtol=1e-4):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(layer.weight is old for layer, old in zip(net, before, strict=True))


def test_it_holds_nothing_of_a_call():
    net = nn.Linear(3, 3)
    call = fp.functional_call(net)
    W = torch.rand(3, 3)
    held = weakref.ref(W)
    call({"weight": W}, (X,))
    del W
    gc.collect()
    assert held() is None
    net = Nested()
    call = fp.functional_call(net)
    W = torch.rand(3, 3)
    held = weakref.ref(W)
    call({"layer.weight": W}, (X,), {"call": call})
    del W
    gc.collect()
    assert held() is None


def test_copies_and_pickles():
    net = nn.Linear(3, 3)
    call = fp.functional_call(net)
    W = {"weight": torch.rand(3, 3)}
    expected = call(W, (X,))
    for twin in (copy.deepcopy(call), pickle.loads(pickle.dumps(call))):
        assert twin.net is not net
        assert_close(twin(W, (X,)), expected)


def test_what_is_no_module():
    with pytest.raises(TypeError, match="functional_call expects a module; got dict"):
        fp.functional_call({})


def test_modules_that_change_places_are_noticed():
    class Chosen(nn.Module):
        def __init__(self):
            super().__init__()
            self.d = nn.ModuleDict({"x": nn.Linear(2, 2, bias=False), "y": nn.Linear(2, 2, False)})

        def forward(self, v):
            return self.d["x"](v)

    net = Chosen()
    call = fp.functional_call(net)
    params = {"d.x.weight": torch.eye(2), "d.y.weight": torch.zeros(2, 2)}
    v = torch.tensor([[1.0, 2.0]])
    assert torch.equal(call(params, (v,)), v)
    one, two = net.d.pop("x"), net.d.pop("y")
    net.d["y"], net.d["x"] = one, two  # the same modules in the same order
    assert torch.equal(call(params, (v,)), v)
    net.d["z"] = net.d.pop("y")
    with pytest.raises(AttributeError):
        call({"d.y.weight": torch.eye(2)}, (v,))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_network_with_a_scripted_part_is_pytorchs():
    net = nn.Sequential(torch.jit.script(nn.Linear(2, 2)), nn.Linear(2, 2))
    params = {"1.weight": torch.eye(2), "1.bias": torch.zeros(2)}
    x = torch.ones(1, 2)
    out = fp.functional_call(net)(params, (x,))
    assert torch.equal(out, torch.func.functional_call(net, params, (x,)))
    assert torch.equal(out, net[0](x))


def test_a_tie_may_come_apart_for_a_call():
    net, _ = net_and_params([], shared=False)
    net.eval()
    call = fp.functional_call(net)
    for tie_weights in (True, False):
        found = call({"a.weight": torch.zeros(3, 3)}, (X,), tie_weights=tie_weights)
        twin = copy.deepcopy(net)
        twin.calls.sub_(1)
        given = {"a.weight": torch.zeros(3, 3)}
        expected = torch.func.functional_call(twin, given, (X,), tie_weights=tie_weights)
        assert_close(found, expected)
        net.calls.zero_()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("wrap", "text"),
    [
        (lambda net: torch.jit.trace(net, X), "Jitted modules"),
        (torch.jit.script, "Jitted modules"),
        (nn.DataParallel, "DataParallel"),
    ],
    ids=["traced", "scripted", "DataParallel"],
)
def test_what_torch_refuses(wrap, text):
    net = wrap(nn.Linear(3, 3))
    for params in ({"weight": torch.zeros(3, 3)}, {}):
        with pytest.raises(RuntimeError, match=text):
            fp.functional_call(net)(params, (X,))


class Slow(nn.Linear):
    def forward(self, x):
        time.sleep(0.002)
        return super().forward(x)


@pytest.mark.parametrize("kinds", [("call", "call"), ("call", "bound"), ("bound", "recompute")])
def test_prepared_calls_of_one_network_take_turns(kinds):
    net, wrong = Slow(3, 3, bias=False), []
    p = fp.parametrize(net, {"weight": fp.transforms.Identity()})

    def work(kind, value):
        values = {"weight": torch.full((3, 3), value)}
        for _ in range(10):
            if kind == "call":
                out = fp.functional_call(net)(values, (torch.ones(1, 3),))
            elif kind == "recompute":
                out = fp.recompute(net, p)(values, {}, (torch.ones(1, 3),))
            else:
                with fp.bound(net, values) as same:
                    out = same(torch.ones(1, 3))
            if out[0, 0] != 3 * value:
                wrong.append(value)

    args = [(kinds[0], 1.0), (kinds[1], 2.0)]
    threads = [threading.Thread(target=work, args=own, daemon=True) for own in args]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong


def test_a_tie_does_not_leave_the_prepared_way(monkeypatch):
    net, _ = net_and_params([])
    p = fp.parametrize(net, [])
    values = p(*p.init(net))
    assert {"a.weight", "b.weight", "again.bias", "c.bias"} <= values.keys()
    monkeypatch.setattr("torch.func.functional_call", None)
    own = {name: id(t) for name, t in net.named_parameters(remove_duplicate=False)}
    assert fp.functional_call(net)(values, (X,)).isfinite().all()
    assert own == {name: id(t) for name, t in net.named_parameters(remove_duplicate=False)}


def test_a_block_that_fails_leaves_the_network_as_it_was():
    net = nn.LSTM(3, 3)
    own, lists = dict(net._parameters), list(net._flat_weights)
    values = {name: torch.zeros_like(t) for name, t in net.named_parameters()}
    kept = []
    net.register_forward_hook(lambda m, args, out: kept.append(out[0]))
    with pytest.raises(RuntimeError, match="expanded size"), fp.bound(net, values):
        net(net(torch.ones(2, 1, 3))[0].expand(2, 2, 5))
    assert not kept[0].any()
    assert all(net._parameters[name] is t for name, t in own.items())
    assert all(a is b for a, b in zip(net._flat_weights, lists, strict=True))
    net.weight_ih_l0 = nn.Parameter(torch.ones(12, 3))
    assert net(torch.ones(2, 1, 3))[0].any()


def test_a_parameter_that_became_a_buffer():
    net = nn.Linear(2, 2)
    call = fp.functional_call(net)
    params = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    expected = call(params, (torch.ones(1, 2),))
    bias = net.bias
    del net.bias
    net.register_buffer("bias", bias)  # the same tensor, in the same order
    assert torch.equal(call(params, (torch.ones(1, 2),)), expected)
    assert net.bias is bias


def test_a_network_that_deletes_a_buffer():
    class Deletes(nn.Linear):
        def forward(self, x):
            out = super().forward(x)
            del self._buffers["seen"]
            return out

    net = Deletes(2, 2)
    net.register_buffer("seen", torch.zeros(1))
    params = {"weight": torch.ones(2, 2), "seen": torch.ones(1)}
    fp.functional_call(net)(params, (torch.ones(1, 2),))
    assert torch.equal(params["seen"], torch.ones(1))
    assert torch.equal(net.seen, torch.zeros(1))
