"""Checkpoints in every spelling, in every direction, with PyTorch's own modules as the oracle."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import prune

import funcparam as fp
from funcparam import checkpoint
from funcparam.compat import to_stateful
from funcparam.transforms import (
    Chain,
    Frozen,
    LoRA,
    Mask,
    Orthogonal,
    Positive,
    PositiveDefinite,
    SpectralNorm,
    Symmetric,
    WeightNorm,
)
from tests.cases import every_case, raw_and_state, tensors
from tests.networks import Classifier, Tied, mixed


def legacy_weight_norm(layer, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer, **kwargs)


def legacy_spectral_norm(layer):
    return nn.utils.spectral_norm(layer)


def example(module):
    """A batch that the module takes."""
    size = module.weight.shape[1] if isinstance(module, nn.Linear) else module.in_channels
    return torch.randn(3, size, *[5] * (module.weight.ndim - 2))


def trained(module):
    """The module after a step in training mode, so that nothing is where it was at init."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module.train()(example(module)).square().mean().backward()
    optimizer.step()
    module.eval()(example(module))  # hooks write the value when they are called
    return module


def _linear():
    return nn.Linear(4, 3)


def _square():
    return nn.Linear(4, 4)


def _conv():
    return nn.Conv1d(2, 3, 3)


def _transposed():
    return nn.ConvTranspose2d(3, 2, 3)


def _torch(function, **kwargs):
    return lambda layer: getattr(torch_parametrizations, function)(layer, **kwargs)


ORACLES = {
    "weight_norm": (_conv, _torch("weight_norm"), WeightNorm(), "torch"),
    "weight_norm dim=1": (_linear, _torch("weight_norm", dim=1), WeightNorm(1), "torch"),
    "weight_norm dim=None": (_linear, _torch("weight_norm", dim=None), WeightNorm(None), "torch"),
    "spectral_norm": (_linear, _torch("spectral_norm"), SpectralNorm(), "torch"),
    "spectral_norm transposed": (_transposed, _torch("spectral_norm"), SpectralNorm(1), "torch"),
    **{
        f"orthogonal {name} {map}": (
            make,
            _torch("orthogonal", orthogonal_map=map),
            Orthogonal(map),
            "torch",
        )
        for map in ("matrix_exp", "cayley", "householder")
        for name, make in (("square", _square), ("wide", _linear))
    },
    "orthogonal without a base": (
        _linear,
        _torch("orthogonal", orthogonal_map="householder", use_trivialization=False),
        Orthogonal("householder", trivialize=False),
        "torch",
    ),
    "legacy weight_norm": (_conv, legacy_weight_norm, WeightNorm(), "legacy"),
    "legacy weight_norm dim=None": (
        _linear,
        lambda layer: legacy_weight_norm(layer, dim=None),
        WeightNorm(None),
        "legacy",
    ),
    "legacy spectral_norm": (_linear, legacy_spectral_norm, SpectralNorm(), "legacy"),
    "legacy spectral_norm transposed": (
        _transposed,
        legacy_spectral_norm,
        SpectralNorm(1),
        "legacy",
    ),
    "prune": (_conv, lambda m: prune.l1_unstructured(m, "weight", 0.5), Mask(), "legacy"),
}

oracles = pytest.mark.parametrize(
    ("make", "register", "transform", "style"), ORACLES.values(), ids=ORACLES
)


@oracles
def test_what_torch_saved_is_read_exactly(make, register, transform, style):
    module = trained(register(make()))
    p = fp.parametrize(make(), {"weight": transform})
    raw, state, others = checkpoint.read(module.state_dict(), p)
    torch.testing.assert_close(p(raw, state)["weight"], module.weight.detach())
    assert others == {}
    written = checkpoint.write(p, raw, state, style=style)
    assert written.keys() == module.state_dict().keys()
    for key, tensor in module.state_dict().items():
        assert torch.equal(written[key], tensor), key
        assert written[key].dtype == tensor.dtype


@oracles
def test_torch_loads_what_is_written(make, register, transform, style):
    net = make()
    with torch.no_grad():
        net.weight[0, 0] = 0  # something for a mask to keep
    p = fp.parametrize(net, {"weight": transform})
    raw, state = p.init(net)
    for tensor in tensors(raw["weight"]):
        tensor += 0.1 * torch.randn_like(tensor)
    module = register(make())
    module.load_state_dict(checkpoint.write(p, raw, state, style=style))
    module.eval()(example(module))
    torch.testing.assert_close(module.weight.detach(), p(raw, state)["weight"])


@oracles
def test_the_shell_loads_it(make, register, transform, style):
    module = trained(register(make()))
    net = make()
    shell = fp.Parametrized(net, fp.parametrize(net, {"weight": transform}))
    shell.load_state_dict(module.state_dict())
    torch.testing.assert_close(shell.values()["weight"], module.weight.detach())
    assert type(shell.fold()) is type(net)


@every_case
@pytest.mark.parametrize("style", ["funcparam", "torch"])
def test_every_transform_survives(case, shape, style):
    raw, state = raw_and_state(case, shape)
    p = fp.parametrize({"a.w": case.transform.forward(raw, state)}, {"a.w": case.transform})
    raw = {"a.w": raw}
    state = {"a.w": state} if state else {}
    written = checkpoint.write(p, raw, state, style=style)
    assert all(type(key) is str and isinstance(t, torch.Tensor) for key, t in written.items())
    raw2, state2, others = checkpoint.read(written, p)
    assert others == {}
    assert torch.equal(p(raw2, state2)["a.w"], p(raw, state)["a.w"])
    again = checkpoint.write(p, raw2, state2, style=style)
    assert again.keys() == written.keys()
    assert all(torch.equal(again[key], written[key]) for key in written)


@every_case
def test_folded_checkpoints_go_back(case, shape):
    raw, state = raw_and_state(case, shape)
    value = case.transform.forward(raw, state)
    p = fp.parametrize({"w": value}, {"w": case.transform})
    folded = checkpoint.write(p, {"w": raw}, {"w": state} if state else {}, style="plain")
    assert torch.equal(folded["w"], value)
    try:
        expected = p.init({"w": value})
    except (ValueError, NotImplementedError):
        with pytest.raises(ValueError, match="'w' is stored as its value, but"):
            checkpoint.read(folded, p)
        return
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "values of the file do not satisfy")
        raw2, state2, _ = checkpoint.read(folded, p)
    torch.manual_seed(1)
    expected = p.init({"w": value})
    assert torch.equal(p(raw2, state2)["w"], p(*expected)["w"])


@pytest.mark.parametrize(
    "transform",
    [
        WeightNorm(),
        WeightNorm(None),
        SpectralNorm(),
        Mask(),
        LoRA(rank=2),
        Orthogonal(),
        Orthogonal("qr"),
        Orthogonal("householder", False),
        PositiveDefinite(),
        Frozen(),
        Chain(Symmetric(), Positive()),
    ],
    ids=repr,
)
@pytest.mark.parametrize("start", ["funcparam", "torch", "plain"])
@pytest.mark.parametrize("to", ["funcparam", "torch", "plain"])
def test_every_direction(transform, start, to):
    net = nn.Linear(4, 4)
    with torch.no_grad():
        weight = (net.weight @ net.weight.mT).abs() + torch.eye(4)
        net.weight.copy_(weight)
    p = fp.parametrize(net, {"weight": transform})
    raw, state = p.init(net)
    first = checkpoint.write(p, raw, state, style=start)
    second = checkpoint.convert(first, p, style=to)
    raw2, state2, _ = checkpoint.read(second, p)
    torch.testing.assert_close(p(raw2, state2), p(raw, state), rtol=1e-4, atol=1e-5)
    if "plain" not in (start, to):
        assert torch.equal(p(raw2, state2)["weight"], p(raw, state)["weight"])


LEGACY = [k for k, (_, _, _, style) in ORACLES.items() if style == "legacy"]


@pytest.mark.parametrize("name", [*LEGACY, "spectral_norm"])
@pytest.mark.parametrize("wanted", [None, WeightNorm(1), LoRA(rank=1), Orthogonal()], ids=repr)
def test_a_value_that_is_known_goes_into_another_transform(name, wanted):
    make, register, _, _ = ORACLES[name]
    module = trained(register(make()))
    net = make()
    p = fp.parametrize(net, {"weight": wanted} if wanted else {})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "values of the file do not satisfy")
        raw, state, _ = checkpoint.read(module.state_dict(), p)
    expected = net.state_dict() | {"weight": module.weight.detach(), "bias": module.bias.detach()}
    torch.testing.assert_close(p(raw, state), p(*p.init(expected)))


def test_a_chain_of_torch_modules_is_read():
    layer = nn.Linear(3, 3)

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.tensor([[True, False, True]]).expand(3, 3).clone())

        def forward(self, X):
            return X.where(self.mask, 0)

    torch_parametrizations.spectral_norm(layer)
    nn.utils.parametrize.register_parametrization(layer, "weight", Masked())
    trained(layer)
    p = fp.parametrize(nn.Linear(3, 3), {"weight": Chain(SpectralNorm(), Mask())})
    raw, state, _ = checkpoint.read(layer.state_dict(), p)
    torch.testing.assert_close(p(raw, state)["weight"], layer.weight.detach())
    assert checkpoint.write(p, raw, state, style="torch").keys() == layer.state_dict().keys()


def test_what_compat_saves_is_read():
    net, p = mixed()
    raw, state = p.init(net)
    module = to_stateful(net, p, raw, state)
    raw2, state2, others = checkpoint.read(module.state_dict(), p)
    assert others == {}
    for name, value in p(raw, state).items():
        assert torch.equal(p(raw2, state2)[name], value), name
    for key, tensor in checkpoint.write(p, raw, state, style="torch").items():
        assert torch.equal(module.state_dict()[key], tensor), key


def test_what_was_made_from_legacy_modules_keeps_their_names():
    from funcparam.compat import to_functional

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.full((), 2.0))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, X):
            return self.factor * X

    layer = nn.utils.parametrize.register_parametrization(nn.Linear(3, 3), "weight", Scale())
    _, p, raw, state = to_functional(layer)
    written = checkpoint.write(p, raw, state, style="torch")
    assert written.keys() == layer.state_dict().keys()
    raw2, state2, _ = checkpoint.read(layer.state_dict(), p)
    assert torch.equal(p(raw2, state2)["weight"], layer.weight)


def test_householder_signs_that_were_turned_are_kept_in_the_value():
    layer = torch_parametrizations.orthogonal(nn.Linear(3, 5), orthogonal_map="householder")
    with torch.no_grad():
        layer.parametrizations.weight.original.diagonal()[1] = 1
        layer.parametrizations.weight.original[3, 0] = 0.5
    p = fp.parametrize(nn.Linear(3, 5), {"weight": Orthogonal("householder")})
    raw, state, _ = checkpoint.read(layer.state_dict(), p)
    torch.testing.assert_close(p(raw, state)["weight"], layer.weight.detach())


def test_householder_that_weight_decay_killed_in_torch_is_alive_here():
    layer = torch_parametrizations.orthogonal(nn.Linear(4, 3), orthogonal_map="householder")
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(0.99)
    assert not layer.weight.any()  # problem 2
    p = fp.parametrize(nn.Linear(4, 3), {"weight": Orthogonal("householder")})
    raw, state, _ = checkpoint.read(layer.state_dict(), p)
    assert p.violation(p(raw, state))["weight"] < 1e-6
    layer.load_state_dict(checkpoint.write(p, raw, state, style="torch"))
    torch.testing.assert_close(layer.weight.detach(), p(raw, state)["weight"])


@pytest.mark.parametrize("style", ["funcparam", "torch", "plain"])
def test_a_whole_network_with_buffers(style):
    net = Classifier()
    net.norm.running_mean.fill_(3.0)
    p = fp.parametrize(
        net,
        {
            "rnn.weight_hh_l0": SpectralNorm(),
            "head.weight": WeightNorm(),
            "norm.running_var": Positive(),
        },
    )
    shell = fp.Parametrized(net, p)
    saved = checkpoint.convert(shell.state_dict(), p, style=style)
    other = fp.Parametrized(Classifier(), p)
    other.load_state_dict(saved)
    x = torch.randn(2, 5, 3)
    torch.testing.assert_close(other.eval()(x), shell.eval()(x))
    plain = Classifier().eval()
    plain.load_state_dict(checkpoint.convert(saved, p, style="plain"))
    torch.testing.assert_close(plain(x), shell(x))
    if style != "plain":
        assert other.state_dict().keys() == shell.state_dict().keys()
        for key, tensor in shell.state_dict().items():
            assert torch.equal(other.state_dict()[key], tensor), key


def test_training_goes_on_bit_for_bit_after_a_checkpoint_in_torchs_spelling():
    net, p = mixed()
    x, y = torch.randn(8, 6).double(), torch.randn(8, 6).double()

    def steps(model, n):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(n):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()

    model = fp.Parametrized(net, p)
    steps(model, 3)
    resumed = fp.Parametrized(net, p)
    resumed.load_state_dict(checkpoint.convert(model.state_dict(), p, style="torch"))
    steps(model, 3)
    steps(resumed, 3)
    for key, tensor in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], tensor), key


def test_the_shell_inside_of_another_module_loads_too():
    net = nn.Linear(4, 3)
    outer = nn.Sequential(
        nn.Linear(4, 4), fp.Parametrized(net, fp.parametrize(net, {"weight": WeightNorm()}))
    )
    old = nn.Sequential(nn.Linear(4, 4), legacy_weight_norm(nn.Linear(4, 3)))
    outer.load_state_dict(old.state_dict())
    x = torch.randn(2, 4)
    torch.testing.assert_close(outer(x), old(x))


@pytest.mark.parametrize("style", ["funcparam", "torch", "plain"])
def test_ties_survive(style):
    net = Tied()
    p = fp.parametrize(net, {"decoder.weight": SpectralNorm()})
    raw, state = p.init(net)
    written = checkpoint.write(p, raw, state, style=style)
    raw2, state2, _ = checkpoint.read(written, p)
    torch.testing.assert_close(p(raw2, state2), p(raw, state))
    if style == "plain":
        net.load_state_dict(written)
    for key in [key for key in written if key.startswith("encoder.") and "bias" not in key]:
        one_side = {k: t for k, t in written.items() if k != key or style != "plain"}
        raw2, state2, _ = checkpoint.read(one_side, p)
        torch.testing.assert_close(p(raw2, state2), p(raw, state))
        broken = dict(written) | {key: written[key] + 1}
        with pytest.raises(ValueError, match=r"'encoder.weight' and 'decoder.weight' are tied"):
            checkpoint.read(broken, p)


def test_nested_dictionaries_and_trees_are_read():
    p = fp.parametrize({"a": [torch.eye(2), torch.ones(3)]}, {"a.0": Orthogonal()})
    raw, state = p.init({"a": [torch.eye(2), torch.ones(3)]})
    raw2, state2, _ = checkpoint.read({"raw": raw, "state": state}, p)
    assert torch.equal(p(raw2, state2)["a"][0], torch.eye(2))
    flat = checkpoint.write(p, raw, state, style="plain")
    assert list(flat) == ["a.0", "a.1"]


def test_a_network_whose_modules_are_called_raw_and_state():
    net = nn.ModuleDict({"raw": nn.Linear(2, 2), "state": nn.Linear(2, 2)})
    p = fp.parametrize(net, {"raw.weight": SpectralNorm(), "state.weight": WeightNorm()})
    for style in ("plain", "funcparam", "torch"):
        raw, state = p.init(net)
        raw2, state2, others = checkpoint.read(checkpoint.write(p, raw, state, style=style), p)
        assert others == {}
        torch.testing.assert_close(p(raw2, state2), p(raw, state))


def test_names_that_only_look_like_parts_are_plain():
    tree = {"w": torch.ones(2), "w_g": torch.ones(2), "w_v": torch.zeros(2)}
    p = fp.parametrize(tree, {"w": Positive()})
    raw, _, others = checkpoint.read(tree, p)
    assert others == {}
    assert torch.equal(raw["w_v"], tree["w_v"])


def test_nothing_is_shared_and_nothing_is_changed():
    net = trained(torch_parametrizations.weight_norm(nn.Linear(3, 3)))
    given = net.state_dict()
    before = copy.deepcopy(given)
    p = fp.parametrize(nn.Linear(3, 3), {"weight": WeightNorm()})
    raw, _, _ = checkpoint.read(given, p)
    raw["bias"].zero_()
    raw["weight"]["direction"].zero_()
    assert all(torch.equal(given[key], before[key]) for key in before)


def test_extra_state_is_carried():
    p = fp.parametrize({"w": torch.ones(2)}, {})
    given = {"w": torch.ones(2), "part._extra_state": {"version": 3}}
    raw, state, others = checkpoint.read(given, p)
    assert others == {"part._extra_state": {"version": 3}}
    assert checkpoint.write(p, raw, state, others)["net.part._extra_state"] == {"version": 3}
