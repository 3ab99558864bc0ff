"""What is done to a layer of a shell's network reaches its raw, or says what to do instead."""

import copy
import pickle

import pytest
import torch
from torch import nn

import funcparam as fp
from funcparam.transforms import LoRA, Positive, SpectralNorm, UnitNorm, WeightNorm
from tests.networks import Tied

X = torch.ones(2, 4)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.head = nn.Linear(4, 3)
        self.temperature = 1.0

    def forward(self, x):
        return self.head(self.body(x)) / self.temperature


RULES = {"body.0.weight": WeightNorm(), "head.weight": SpectralNorm()}
RAW = ["raw.body.0.weight.magnitude", "raw.body.0.weight.direction", "raw.head.weight"]


def shell(rules=RULES, make=Net):
    torch.manual_seed(0)
    net = make()
    return fp.Parametrized(net, fp.parametrize(net, rules))


def trained(model):
    return {name for name, tensor in model.named_parameters() if tensor.requires_grad}


def of(layer):
    return [name for name, _ in layer.named_parameters()]


# Parameters


def by_type(model):
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.requires_grad_(False)


def by_parameters(model):
    for layer in (model.body, model.head):
        for tensor in layer.parameters():
            tensor.requires_grad = False


@pytest.mark.parametrize(
    "freeze",
    [
        by_type,
        by_parameters,
        lambda model: model.net.requires_grad_(False),
        lambda model: model.requires_grad_(False),
    ],
    ids=["type", "parameters", "net", "shell"],
)
@pytest.mark.parametrize(
    "copied",
    [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["", "deepcopy", "pickle"],
)
def test_freezing_reaches_raw(freeze, copied):
    first = shell()
    model = copied(first)
    freeze(model)
    assert trained(model) == set()
    assert model is first or len(trained(first)) == 5
    before = model.values()
    model.train()(X)
    torch.testing.assert_close(model.values()["body.0.weight"], before["body.0.weight"])


def test_freezing_one_layer_leaves_the_others():
    model = shell()
    model.head.requires_grad_(False)
    assert trained(model) == {"net.body.0.bias", *RAW[:2]}
    model.head.requires_grad_()
    assert len(trained(model)) == 5


def test_names():
    model = shell()
    assert of(model.net) == ["body.0.bias", "head.bias", *RAW]
    assert of(model.body) == ["0.bias", "raw.0.weight.magnitude", "raw.0.weight.direction"]
    assert of(model.head) == ["bias", "raw.weight"]
    assert of(model) == ["net.body.0.bias", "net.head.bias", *RAW]
    assert [n for n, _ in model.head.named_parameters("x")] == ["x.bias", "x.raw.weight"]
    own = list(model.head.named_parameters(recurse=False))
    assert [name for name, _ in own] == ["bias"]  # what walks through all modules writes there
    assert len(list(model.net.named_parameters(remove_duplicate=False))) == 2


def test_optimizers_of_layers():
    model = shell()
    groups = [{"params": model.body.parameters()}, {"params": model.head.parameters(), "lr": 0.1}]
    optimizer = torch.optim.SGD(groups, lr=0.0)
    before = model.eval().values()
    model(X).sum().backward()
    optimizer.step()
    after = model.values()
    assert torch.equal(after["body.0.weight"], before["body.0.weight"])
    assert not torch.equal(after["head.weight"], before["head.weight"])
    model.head.zero_grad()
    assert model.raw.head.weight.grad is None


def test_either_owner_of_a_tie_reaches_its_raw():
    for owner in ("encoder", "decoder"):
        model = shell({"encoder.weight": UnitNorm()}, Tied)
        getattr(model, owner).requires_grad_(False)
        assert not model.raw.encoder.weight.requires_grad
        assert of(model.net).count("raw.encoder.weight") == 1


def test_adapters_and_buffers():
    model = shell({"head.weight": LoRA(2)})
    model.head.requires_grad_(False)
    assert trained(model) == {"net.body.0.weight", "net.body.0.bias"}
    model = shell({"running_var": Positive()}, lambda: nn.BatchNorm1d(3))
    assert of(model.net) == ["weight", "bias"]


class Penalised(Net):
    def forward(self, x):
        return super().forward(x) + sum(t.square().sum() for t in self.parameters())


@pytest.mark.parametrize("compiled", [False, True])
def test_a_network_that_asks_in_forward_gets_values(compiled):
    model = shell(make=Penalised).eval()
    values = model.values()
    expected = torch.func.functional_call(Penalised(), values, (X,))
    call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    torch.testing.assert_close(call(X), expected)
    with model.bound() as net:
        assert {name: id(t) for name, t in net.named_parameters()}.keys() == values.keys()


def test_folding_leaves_nothing_behind():
    model = shell()
    plain = model.fold()
    assert of(plain.head) == ["weight", "bias"]
    assert not any("named_parameters" in vars(layer) for layer in plain.modules())
    assert of(model.head) == ["bias", "raw.weight"]
    net = fp.shells(Net(), {"head.weight": SpectralNorm()}, block=nn.Linear)
    assert of(fp.unshelled(net).head) == ["weight", "bias"]


def test_a_shell_in_a_shell():
    inner = shell()
    p = fp.parametrize(inner, {"net.head.bias": Positive()})
    inner.net.head.bias.data.fill_(1.0)
    outer = fp.Parametrized(inner, p)
    outer.net.net.head.requires_grad_(False)
    assert trained(outer) == {
        "net.net.body.0.bias",
        *(f"net.{name}" for name in RAW[:2]),
    }
    again = outer.fold()
    assert of(again.net.head) == ["bias", "raw.weight"]


# Initialising


def init(module):
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        module.bias.data.zero_()


def test_initialising_by_apply_says_what_to_do():
    model = shell()
    before = model.values()
    layer = model.net.body[0]
    for apply in (model.apply, model.net.apply, layer.apply, nn.Sequential(model).apply):
        with pytest.raises(RuntimeError, match=r"'body.0.weight' cannot be init.*Initialise the n"):
            apply(init)
    for part in (layer, copy.deepcopy(model).net.body[0], pickle.loads(pickle.dumps(layer))):
        with pytest.raises(RuntimeError, match=r"'body.0.weight' cannot be initialised"):
            part.reset_parameters()
    torch.testing.assert_close(model.values(), before)
    plain = model.fold()
    assert plain.apply(init).body[0].reset_parameters() is None
    model = shell({"head.bias": Positive()}, lambda: Net().apply(ones))
    with pytest.raises(RuntimeError, match=r"'head.bias' cannot be initialised"):
        model.apply(init)


def test_what_is_bound_can_be_initialised():
    model = shell()
    with model.bound() as net:
        net.body[0].reset_parameters()
        assert net.apply(init) is net


def ones(module):
    if isinstance(module, nn.Linear):
        module.bias.data.fill_(1.0)


def test_other_errors_of_what_is_applied_are_its_own():
    def wrong(module):
        if isinstance(module, nn.ReLU):
            raise TypeError("mine")

    with pytest.raises(TypeError, match="^mine$"):
        shell().apply(wrong)
    assert shell().apply(lambda _: None).head is not None


def test_what_the_errors_say_works():
    model = shell({"weight": WeightNorm()}, lambda: nn.Linear(4, 3))
    value = torch.randn(3, 4)
    model.load_state_dict({"weight": value}, strict=False)
    torch.testing.assert_close(model.values()["weight"], value)


# Attributes


def test_attributes_are_set_where_they_are_read():
    model = shell()
    model.temperature = 2.0
    assert model.net.temperature == 2.0
    assert "temperature" not in vars(model)
    model.mine = 3
    assert model.mine == 3
    assert not hasattr(model.net, "mine")
    model = shell({"weight": WeightNorm()}, lambda: nn.Linear(4, 3)).eval()
    before = model(X)
    bias = nn.Parameter(torch.full((3,), 5.0))
    old, model.bias = model.bias, bias
    assert model.net.bias is bias
    torch.testing.assert_close(model(X), before - old + 5.0)
    assert set(of(model)) == {"net.bias", "raw.weight.magnitude", "raw.weight.direction"}


@pytest.mark.parametrize("value", [torch.ones(3, 4), nn.Parameter(torch.ones(3, 4)), None])
def test_a_weight_with_a_rule_cannot_be_set(value):
    model = shell({"weight": WeightNorm()}, lambda: nn.Linear(4, 3)).eval()
    before = model(X)
    with pytest.raises(AttributeError, match="'weight' of this .*has a rule.*load_state_dict"):
        model.weight = value
    assert torch.equal(model(X), before)
    torch.testing.assert_close(model.weight, model.values()["weight"])


def test_a_module_cannot_be_replaced_through_the_shell():
    model = shell().eval()
    before = model(X)
    for name in ("head", "body"):
        with pytest.raises(AttributeError, match=f"'{name}' is a module .*Replace modules before"):
            setattr(model, name, nn.Linear(4, 2))
    assert torch.equal(model(X), before)
    assert len(of(model)) == 5


class OfItsOwn(nn.Linear):
    """Has attributes that are called as a shell's."""

    raw = state = "its own"

    def __init__(self):
        super().__init__(4, 3)
        self.recompute = self._flags = self._evaluation = "its own"


def test_names_that_both_have():
    model = shell({"weight": WeightNorm()}, OfItsOwn)
    assert model(X).shape == (2, 3)
    assert isinstance(model.raw, nn.Module)
    model.recompute = True
    assert model.net.recompute == model.net._flags == "its own"


def test_containers_are_looked_into():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    model = fp.Parametrized(net, fp.parametrize(net, {"0.weight": SpectralNorm()})).train()
    before = model.state_dict()["state.0.weight.u"].clone()
    assert len(model) == 3
    assert model[0] is model.net[0]
    assert model[-1] is model.net[2]
    assert list(model) == list(model.net)
    assert torch.equal(model.state_dict()["state.0.weight.u"], before)
    assert copy.deepcopy(model)[2].out_features == 3
    both = nn.ModuleDict({"a": nn.Linear(4, 4)})
    named = fp.Parametrized(both, fp.parametrize(both, {"a.weight": UnitNorm()}))
    assert "a" in named
    assert list(named) == ["a"]
    assert named["a"] is named.net["a"]
    with pytest.raises(TypeError):
        len(shell())
    assert shell()
