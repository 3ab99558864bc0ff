"""Between parametrized modules and the functional form: equal bit for bit, both ways."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize as torch_parametrize
from torch.testing import assert_close

import funcparam as fp
from funcparam.compat import hooks, parametrizations, parametrize, to_functional, to_stateful
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


# a transform in the place of torch's own module is equal to rounding, all else bit for bit
BIT_FOR_BIT = {"rtol": 0, "atol": 0}
CONVERSIONS = [
    (*LIBRARIES[0], True, BIT_FOR_BIT),
    (*LIBRARIES[1], True, {}),
    (*LIBRARIES[1], False, BIT_FOR_BIT),
]
IDS = ["compat", "torch", "called"]
CONVERSION = pytest.mark.parametrize(
    ("register", "library", "native", "close"), CONVERSIONS, ids=IDS
)
WEIGHTS = ("square", "cayley", "tall", "bare", "norm", "whole", "spectral", "legacy", "two")


@CONVERSION
@pytest.mark.parametrize("training", [True, False])
def test_values_are_equal(register, library, native, close, training):
    module = build(register, library).train(training)
    before = copy.deepcopy(module.state_dict())
    net, p, raw, state = to_functional(module, native=native)
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    assert not any(parametrize.is_parametrized(part) for part in net.modules())
    assert {type(part) for part in net.children()} <= {nn.Linear, nn.Conv2d, nn.BatchNorm1d}
    assert net.training == training
    values = p(raw, state)
    module.eval()
    for name in WEIGHTS:
        assert_close(values[f"{name}.weight"], module[name].weight, **close)
    assert_close(values["vector.bias"], module["vector"].bias, **close)
    assert torch.equal(values["chain.weight"], module["chain"].weight)
    assert torch.equal(values["buffer.running_var"], module["buffer"].running_var)


@CONVERSION
def test_the_round_trip_is_equal(register, library, native, close):
    module = build(register, library)
    back = to_stateful(*to_functional(module, native=native))
    assert back.state_dict().keys() == module.state_dict().keys()
    for name, tensor in module.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    module.eval()
    back.eval()
    for name in ("square", "tall", "norm", "spectral", "legacy", "two", "chain"):
        assert_close(back[name].weight, module[name].weight, **close)
    assert {n for n, _ in back.named_parameters()} == {n for n, _ in module.named_parameters()}


def test_torchs_own_become_transforms():
    _, p, _, _ = to_functional(build(*LIBRARIES[1]))
    assert p["square.weight"] == Orthogonal()
    assert p["cayley.weight"] == Orthogonal("cayley")
    assert p["tall.weight"] == Orthogonal("householder")
    assert p["bare.weight"] == Orthogonal("householder", False)
    assert p["norm.weight"] == WeightNorm()
    assert p["whole.weight"] == WeightNorm(None)
    assert p["spectral.weight"] == SpectralNorm()
    assert p["vector.bias"] == SpectralNorm()
    _, p, _, _ = to_functional(build(*LIBRARIES[1]), native=False)
    assert {type(transform).__name__ for transform in p.values()} == {"Legacy"}


def test_second_derivatives_of_a_converted_weight_norm_are_right():
    torch.manual_seed(0)
    layer, x = torch_parametrizations.weight_norm(nn.Linear(4, 3).double()), torch.randn(2, 4)
    net, p, raw, state = to_functional(nn.Sequential(layer, nn.Tanh()))

    def loss(magnitude, direction):
        own = {**raw, "0.weight": {"magnitude": magnitude, "direction": direction}}
        return functional_call(net, p(own, state), (x.double(),)).square().sum()

    weight = raw["0.weight"]
    inputs = [weight[name].requires_grad_() for name in ("magnitude", "direction")]
    assert torch.autograd.gradgradcheck(loss, inputs)


def test_a_subclass_of_torchs_parametrization_stays_the_computation_it_is():
    class Halved(torch_parametrizations._SpectralNorm):
        def forward(self, weight):
            return super().forward(weight) / 2

    layer = nn.Linear(4, 3)
    torch_parametrize.register_parametrization(layer, "weight", Halved(layer.weight))
    _, p, raw, state = to_functional(layer.eval())
    assert torch.equal(p(raw, state)["weight"], layer.weight)


def test_a_householder_whose_diagonal_is_no_sign_stays_torchs():
    layer = torch_parametrizations.orthogonal(nn.Linear(3, 5))
    with torch.no_grad():
        layer.parametrizations.weight.original.diagonal()[0] = 0.5  # as weight decay leaves it
    _, p, raw, state = to_functional(layer)
    assert torch.equal(p(raw, state)["weight"], layer.weight)
    assert repr(p["weight"]) == "Legacy(_Orthogonal)"


def hooked(library):
    """A network with the older hooks, moved away from init by training."""
    torch.manual_seed(0)
    net = nn.Sequential(
        library.weight_norm(nn.Conv1d(2, 4, 3)),
        library.weight_norm(nn.ConvTranspose1d(4, 2, 3), dim=1),
        library.weight_norm(nn.Conv1d(2, 2, 3), dim=None),
        library.spectral_norm(nn.Conv1d(2, 3, 3), n_power_iterations=2),
        nn.Sequential(library.spectral_norm(nn.ConvTranspose1d(3, 2, 3))),
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        net(torch.randn(2, 2, 12)).square().mean().backward()
        optimizer.step()
    return net


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("library", [nn.utils, hooks], ids=["torch", "compat"])
def test_older_hooks_become_transforms(library):
    module, x = hooked(library), torch.randn(2, 2, 12)
    before = copy.deepcopy(module.state_dict())
    net, p, raw, state = to_functional(module)
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    assert p["1.weight"] == WeightNorm(1)
    assert p["2.weight"] == WeightNorm(None)
    assert p["3.weight"] == SpectralNorm(n_power_iterations=2)
    assert p["4.0.weight"] == SpectralNorm(dim=1)
    assert not any(part._forward_pre_hooks for part in net.modules())
    assert_close(functional_call(net, p(raw, state), (x,)), module.eval()(x))
    fresh = copy.deepcopy(net)  # torch leaves a hook behind that refuses plain keys
    fresh.load_state_dict({**net.state_dict()})
    back = to_stateful(net, p, raw, state).eval()
    assert_close(back(x), module(x))
    module.load_state_dict(before)


def test_one_name_of_a_tie_can_be_made_plain_again():
    net = Tied()
    nn.init.uniform_(net.encoder.weight, 1, 2)
    p = fp.parametrize(net, {"encoder.weight": Positive()})
    module = to_stateful(net, p, *p.init(net))
    before = module.encoder.weight.detach().clone()
    parametrize.remove_parametrizations(module.decoder, "weight")
    for layer in (module.encoder, module.decoder):
        assert_close(layer.weight.detach(), before)


def test_the_older_spectral_norm_of_a_vector_is_refused():
    layer = hooks.spectral_norm(nn.Linear(3, 3), "bias")
    with pytest.raises(TypeError, match="'bias': the hook of spectral_norm computes a vector"):
        to_functional(layer)


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
    (_, p, raw, state), (_, q, raw2, state2) = (
        to_functional(layer, native=native) for native in (True, False)
    )
    new, called = p.update(raw, state), q.update(raw2, state2)
    value = layer.weight
    assert torch.equal(value, q(raw2, called)["weight"])
    assert torch.equal(layer.parametrizations.weight[0]._u, called["weight"]["0._u"])
    assert_close(p(raw, new)["weight"], value)
    assert_close(new["weight"]["u"], called["weight"]["0._u"])


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
    module = nn.Sequential(module["legacy"], module["two"]).eval()
    net, p, raw, state = to_functional(module)
    with pytest.raises(NotImplementedError, match="'0.weight': Legacy.* to_functional returns"):
        fp.Parametrized(net, p)
    assert set(raw["0.weight"]) == {"original", "0.factor"}
    shell, x = fp.Parametrized(net, p, raw=raw, state=state).eval(), torch.randn(2, 3)
    assert torch.equal(shell(x), module(x))
    shell(x).sum().backward()
    assert all(parameter.grad is not None for parameter in shell.parameters())


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_the_shell_takes_converted_hooks_and_torchs_own():
    for module, x in (
        (hooked(nn.utils), torch.randn(2, 2, 12)),
        (nn.Sequential(build(*LIBRARIES[1])["norm"]), torch.randn(2, 3)),
    ):
        net, p, raw, state = to_functional(module.eval())
        shell = fp.Parametrized(net, p, raw=raw, state=state).eval()
        assert_close(shell(x), module(x))
