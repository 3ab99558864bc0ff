"""Between parametrized modules and the functional form: equal bit for bit, both ways."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize as torch_parametrize

import funcparam as fp
from funcparam.compat import parametrizations, parametrize, to_functional, to_stateful
from funcparam.transforms import LoRA, Mask, Orthogonal, Positive, SpectralNorm, WeightNorm
from tests.networks import Tied, mixed


class Scale(nn.Module):
    """A legacy parametrization with a parameter and a buffer that moves in training."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.full((), 2.0))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, X):
        if self.training:
            self.calls = self.calls + 1
        return self.factor * X + 0 * self.calls

    def right_inverse(self, X):
        return X / self.factor


class Sum(nn.Module):
    def forward(self, a, b):
        return a + b

    def right_inverse(self, X):
        return X / 3, X * 2 / 3


def build(register, library):
    """A network with each of torch's parametrizations and legacy ones, moved away from init."""
    torch.manual_seed(0)
    net = nn.ModuleDict(
        {
            "square": library.orthogonal(nn.Linear(4, 4)),
            "cayley": library.orthogonal(nn.Linear(4, 4), orthogonal_map="cayley"),
            "tall": library.orthogonal(nn.Linear(3, 5)),
            "bare": library.orthogonal(nn.Linear(3, 5), use_trivialization=False),
            "norm": library.weight_norm(nn.Linear(3, 5)),
            "whole": library.weight_norm(nn.Linear(3, 5), dim=None),
            "spectral": library.spectral_norm(nn.Conv2d(2, 3, 3)),
            "vector": library.spectral_norm(nn.Linear(3, 3), "bias"),
            "legacy": register(nn.Linear(3, 3), "weight", Scale()),
            "two": register(nn.Linear(3, 3), "weight", Sum()),
            "chain": register(register(nn.Linear(3, 3), "weight", Scale()), "weight", Scale()),
            "buffer": register(nn.BatchNorm1d(3), "running_var", Scale()),
            "plain": nn.Linear(2, 2),
        }
    )
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "original" in name and "bare" not in name:
                lower = parameter.dim() == 2 and name.rpartition(".")[2] == "original"
                noise = 0.1 * torch.randn_like(parameter)
                parameter.add_(noise.tril(-1) if lower else noise)
    return net


LIBRARIES = [
    (parametrize.register_parametrization, parametrizations),
    (torch_parametrize.register_parametrization, torch_parametrizations),
]


@pytest.mark.parametrize(("register", "library"), LIBRARIES, ids=["compat", "torch"])
@pytest.mark.parametrize("training", [True, False])
def test_values_are_equal_bit_for_bit(register, library, training):
    module = build(register, library).train(training)
    before = copy.deepcopy(module.state_dict())
    net, p, raw, state = to_functional(module)
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    assert not any(parametrize.is_parametrized(part) for part in net.modules())
    assert {type(part) for part in net.children()} <= {nn.Linear, nn.Conv2d, nn.BatchNorm1d}
    assert net.training == training
    values = p(raw, state)
    module.eval()
    for name in ("square", "cayley", "tall", "bare", "norm", "whole", "spectral", "legacy", "two"):
        assert torch.equal(values[f"{name}.weight"], module[name].weight), name
    assert torch.equal(values["vector.bias"], module["vector"].bias)
    assert torch.equal(values["chain.weight"], module["chain"].weight)
    assert torch.equal(values["buffer.running_var"], module["buffer"].running_var)


@pytest.mark.parametrize(("register", "library"), LIBRARIES, ids=["compat", "torch"])
def test_the_round_trip_is_equal(register, library):
    module = build(register, library)
    back = to_stateful(*to_functional(module))
    assert back.state_dict().keys() == module.state_dict().keys()
    for name, tensor in module.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    module.eval()
    back.eval()
    for name in ("square", "tall", "norm", "spectral", "legacy", "two", "chain"):
        assert torch.equal(back[name].weight, module[name].weight), name
    assert {n for n, _ in back.named_parameters()} == {n for n, _ in module.named_parameters()}


def test_gradients_reach_the_parameters_of_legacy_modules():
    layer = parametrize.register_parametrization(nn.Linear(3, 3), "weight", Scale())
    net, p, raw, state = to_functional(layer)
    x = torch.randn(2, 3)
    g = torch.func.grad(lambda r: functional_call(net, p(r, state), (x,)).square().sum())(raw)
    layer.eval()(x).square().sum().backward()
    held = layer.parametrizations.weight
    torch.testing.assert_close(g["weight"]["original"], held.original.grad)
    torch.testing.assert_close(g["weight"]["0.factor"], held[0].factor.grad)


def test_forward_is_pure_and_update_advances_legacy_buffers():
    layer = parametrize.register_parametrization(nn.Linear(3, 3), "weight", Scale())
    _, p, raw, state = to_functional(layer.train())
    calls = state["weight"]["0.calls"].clone()
    p(raw, state)
    assert torch.equal(state["weight"]["0.calls"], calls)
    new = p.update(raw, state)
    assert new["weight"]["0.calls"] == calls + 1
    assert torch.equal(state["weight"]["0.calls"], calls)


def test_torch_spectral_norm_advances_as_a_read_in_training_mode():
    layer = torch_parametrizations.spectral_norm(nn.Linear(4, 4)).train()
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(torch.randn(4, 4))
    _, p, raw, state = to_functional(layer)
    new = p.update(raw, state)
    assert torch.equal(layer.weight, p(raw, new)["weight"])
    assert torch.equal(layer.parametrizations.weight[0]._u, new["weight"]["0._u"])


@pytest.mark.parametrize(
    "transform",
    [
        Orthogonal(),
        Orthogonal("householder", False),
        Orthogonal("qr"),
        WeightNorm(dim=None),
        SpectralNorm(),
        Mask(),
        LoRA(rank=2),
        fp.transforms.Chain(Positive(), Mask()),
    ],
    ids=repr,
)
def test_from_functional_to_stateful_and_back(transform):
    net = nn.Linear(4, 3)
    with torch.no_grad():
        net.weight.abs_()
    p = fp.parametrize(net, {"weight": transform})
    raw, state = p.init(net)
    module = to_stateful(net, p, raw, state)
    assert torch.equal(module.eval().weight, p(raw, state)["weight"])
    assert type(net) is nn.Linear
    _, q, raw2, state2 = to_functional(module)
    assert dict(q) == dict(p)
    assert torch.equal(q(raw2, state2)["weight"], p(raw, state)["weight"])
    x = torch.randn(2, 4)
    module.train()(x).sum().backward()


def test_ties_share_one_parametrization():
    net = Tied()
    p = fp.parametrize(net, {"encoder.weight": Orthogonal()})
    module = to_stateful(net, p, *p.init(net))
    assert module.encoder.parametrizations.weight is module.decoder.parametrizations.weight
    assert torch.equal(module.encoder.weight, module.decoder.weight)
    assert len(list(module.parameters())) == 3


def test_outputs_of_a_whole_network():
    net, p = mixed()
    raw, state = p.init(net)
    module = to_stateful(net, p, raw, state).eval()
    x = torch.randn(3, 6).double()
    assert torch.equal(module(x), functional_call(net, p(raw, state), (x,)))


def test_the_shell_takes_a_converted_module():
    module = build(*LIBRARIES[1])
    net, p, raw, _ = to_functional(nn.Sequential(module["legacy"], module["two"]))
    with pytest.raises(NotImplementedError, match="'0.weight': Legacy.* to_functional returns"):
        fp.Parametrized(net, p)
    assert set(raw["0.weight"]) == {"original", "0.factor"}
