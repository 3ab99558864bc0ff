"""Files as they are found: of other dimensions, versions and precisions, and parts of files."""

import logging
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations as torch_parametrizations

import funcparam as fp
from funcparam import checkpoint
from funcparam.transforms import Frozen, LoRA, Mask, Orthogonal, Positive, SpectralNorm, WeightNorm


def legacy_spectral_norm(layer):
    return nn.utils.spectral_norm(layer)


def iterated(layer, x, steps=50, rate=0.1):
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
    layer.eval()(x)  # hooks write the value when they are called
    return layer


# Spectral norm along another dimension than the transform's, where both fit


@pytest.mark.parametrize("register", [legacy_spectral_norm, torch_parametrizations.spectral_norm])
@pytest.mark.parametrize("steps", [1, 50])
@pytest.mark.parametrize(
    "layer", [lambda: nn.ConvTranspose2d(8, 8, 3), lambda: nn.Conv2d(8, 8, 3)], ids=["T", "conv"]
)
def test_spectral_norm_of_another_dim_is_read_by_value(register, steps, layer):
    x = torch.randn(2, 8, 5, 5)
    old, net = iterated(register(layer()), x, steps), layer()
    own = 1 if isinstance(net, nn.ConvTranspose2d) else 0  # torch's own choice
    for dim in (0, 1):
        p = fp.parametrize(net, {"weight": SpectralNorm(dim)})
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore" if dim != own else "error", "values of the file")
            raw, state, _ = checkpoint.read(old.state_dict(), p)
        if dim == own:
            original = next(t for k, t in old.state_dict().items() if "orig" in k)
            assert torch.equal(raw["weight"], original)
        else:  # the value has norm 1 along its own dimension, and is divided by its norm here
            ratio = p(raw, state)["weight"] / old.weight
            torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-3, atol=0)
        if dim == own:
            out = functional_call(net, p(raw, state), (x,))
            torch.testing.assert_close(out, old(x))


@pytest.mark.parametrize("dim", [0, 1])
def test_spectral_norm_of_funcparams_own_keys_too(dim):
    net = nn.Linear(6, 6)
    p = fp.parametrize(net, {"weight": SpectralNorm(dim)})
    saved = dict(checkpoint.write(p, *p.init(net)))  # a plain dict does not say the transform
    q = fp.parametrize(net, {"weight": SpectralNorm(1 - dim)})
    raw, state, _ = checkpoint.read(saved, q)
    expected = p(*p.init(net))["weight"]
    torch.testing.assert_close(q(raw, state)["weight"], expected)


def test_vectors_that_nothing_iterated_are_taken_for_what_the_transform_says():
    old = legacy_spectral_norm(nn.Linear(4, 4))  # random ones
    p = fp.parametrize(nn.Linear(4, 4), {"weight": SpectralNorm()})
    raw, _, _ = checkpoint.read(old.state_dict(), p)
    assert torch.equal(raw["weight"], old.weight_orig)


# Vectors that are not of unit length


@pytest.mark.parametrize(
    "keys",
    [
        ("raw.weight", "state.weight.u", "state.weight.v"),
        ("weight_orig", "weight_u", "weight_v"),
        tuple(f"parametrizations.weight.{part}" for part in ("original", "0._u", "0._v")),
    ],
)
def test_an_average_of_unit_vectors_is_normalised(keys):
    net = nn.Linear(8, 8, bias=False)
    p = fp.parametrize(net, {"weight": SpectralNorm()})
    raw, state = p.init(net)
    u, v = state["weight"].values()
    raw, state, _ = checkpoint.read(
        dict(zip(keys, (raw["weight"], 0.9 * u, 0.7 * v), strict=True)), p
    )
    assert torch.linalg.matrix_norm(p(raw, state)["weight"], 2).item() == pytest.approx(1, abs=1e-5)


# Files from before PyTorch 1.1 and 0.4


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_spectral_norm_from_before_torch_11(shape):
    weight, u = torch.randn(shape), F.normalize(torch.randn(shape[0]), dim=0)
    for _ in range(2):
        v = F.normalize(weight.mT @ u, dim=0)
        u = F.normalize(weight @ v, dim=0)
    value = weight / (u @ weight @ v)
    old = {"weight_orig": weight, "weight": value, "weight_u": u}
    assert checkpoint.explain(old).stored[0].style == "legacy spectral_norm"

    p = fp.parametrize({"weight": weight}, {"weight": SpectralNorm()})
    raw, state, others = checkpoint.read(old, p)
    torch.testing.assert_close(p(raw, state)["weight"], value)
    torch.testing.assert_close(state["weight"]["v"], v)
    assert torch.equal(raw["weight"], weight)
    assert others == {}

    torchs = legacy_spectral_norm(nn.Linear(*shape[::-1], bias=False))  # the oracle
    torchs.load_state_dict({**old, "weight_v": v})
    torch.testing.assert_close(torchs.eval()(torch.eye(shape[1])).mT, p(raw, state)["weight"])

    for other in ({}, {"weight": WeightNorm()}):  # by anything else it is its value
        q = fp.parametrize({"weight": weight}, other)
        raw, state, _ = checkpoint.read(old, q)
        torch.testing.assert_close(q(raw, state)["weight"], value)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("keys", [("weight_g", "weight_v"), ("original0", "original1")])
def test_the_length_of_a_whole_tensor_in_any_shape(shape, keys):
    if keys[0] == "original0":
        keys = [f"parametrizations.weight.{key}" for key in keys]
    direction = torch.randn(3, 4)
    old = {keys[0]: torch.full(shape, 2.0), keys[1]: direction, "bias": torch.zeros(3)}
    p = fp.parametrize(nn.Linear(4, 3), {"weight": WeightNorm(dim=None)})
    raw, state, _ = checkpoint.read(old, p)
    torch.testing.assert_close(p(raw, state)["weight"], 2 * direction / direction.norm())
    if keys[0] == "weight_g":  # the keys say it
        q = fp.parametrize(nn.Linear(4, 3), {})
        raw, _, _ = checkpoint.read(old, q)
        torch.testing.assert_close(raw["weight"], 2 * direction / direction.norm())


@pytest.mark.parametrize("stored", [(), (1,)])
@pytest.mark.parametrize("wanted", [(), (1,)])
def test_scalars_had_a_dimension(stored, wanted):
    p = fp.parametrize({"scale": torch.ones(wanted)}, {"scale": Positive()})
    raw, state, _ = checkpoint.read({"scale": torch.full(stored, 3.0)}, p)
    torch.testing.assert_close(p(raw, state)["scale"], torch.full(wanted, 3.0))


# Precision


@pytest.mark.parametrize("transform", [WeightNorm(), SpectralNorm(), LoRA(1), Frozen()], ids=repr)
@pytest.mark.parametrize("style", ["plain", "torch", "funcparam"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_what_is_read_has_the_precision_of_the_parametrization(transform, style, dtype):
    net = nn.Linear(4, 3)
    p = fp.parametrize(net, {"weight": transform})
    saved = checkpoint.write(p, *p.init(net), style=style)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "values of the file")
        raw, state, _ = checkpoint.read({k: t.to(dtype) for k, t in saved.items()}, p)
    values = p(raw, state)
    assert {t.dtype for t in values.values()} == {torch.float32}
    torch.testing.assert_close(values, p(*p.init(net)), atol=3e-2, rtol=3e-2)


# Names that look like parts


class MaskedLinear(nn.Linear):
    def __init__(self, *size):
        super().__init__(*size)
        self.register_buffer("weight_mask", torch.ones(3, 3).tril())

    def forward(self, x):
        return F.linear(x, self.weight * self.weight_mask, self.bias)


@pytest.mark.parametrize("name", ["weight_mask", "weight_u", "weight_v", "weight_g", "weight_orig"])
@pytest.mark.parametrize("transform", [WeightNorm(), SpectralNorm(), Mask(), None], ids=repr)
@pytest.mark.filterwarnings("ignore:values of the file do not satisfy")
def test_buffers_may_be_called_like_parts(name, transform):
    net = nn.Linear(3, 3)
    net.register_buffer(name, torch.rand(3, 3))
    p = fp.parametrize(net, {"weight": transform} if transform else {})
    for buffers in ((), (name,)):
        raw, state, others = checkpoint.read(net.state_dict(), p, buffers=buffers)
        assert list(others) == [name]
        assert torch.equal(others[name], getattr(net, name))
        expected = p(*p.init(net))["weight"]
        torch.testing.assert_close(p(raw, state)["weight"], expected)


@pytest.mark.parametrize(
    "pair", [("q_u", "q_v"), ("q_g", "q_v"), ("q_orig", "q_mask"), ("q_orig", "q_u")]
)
def test_several_at_once(pair):
    net = nn.ParameterDict({"q": torch.ones(3)})
    for name in pair:
        net.register_buffer(name, torch.rand(3))
    p = fp.parametrize(net, {"q": Positive()})
    raw, _, others = checkpoint.read(net.state_dict(), p, buffers=pair)
    assert sorted(others) == sorted(pair)
    torch.testing.assert_close(p(raw)["q"], torch.ones(3))


def test_half_a_weight_is_no_weight():
    p = fp.parametrize(nn.Linear(3, 3), {"weight": WeightNorm()})
    old = {"weight_g": torch.ones(3, 1), "bias": torch.ones(3)}
    for strict in (True, False):
        with pytest.raises(ValueError, match="'weight_g': part of 'weight', of which the other"):
            checkpoint.read(old, p, strict=strict)


# Parts of a file


def backbone(kind):
    net = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Linear(4, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if kind == "torch":
            torch_parametrizations.weight_norm(net[0])
        elif kind == "legacy":
            nn.utils.weight_norm(net[0])
    state_dict = net.state_dict()
    if kind == "funcparam":
        p = fp.parametrize(net, {"0.weight": WeightNorm()})
        state_dict = checkpoint.write(p, *p.init(net))
    return {k: t for k, t in state_dict.items() if "1." not in k.replace("original1", "")}


@pytest.mark.parametrize("kind", ["plain", "torch", "legacy", "funcparam"])
def test_a_file_without_the_head(kind):
    net = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Linear(4, 2))
    p = fp.parametrize(net, {"0.weight": WeightNorm(), "1.weight": Orthogonal()})
    given = backbone(kind)
    found = checkpoint.read(given, p, strict=False)
    assert sorted(found.missing) == ["1.bias", "1.weight"]
    assert sorted(found.raw) == ["0.bias", "0.weight"]
    assert found.others == {}
    with pytest.raises(ValueError, match=r"missing '1\.weight'; got the keys"):
        checkpoint.read(given, p)


def test_nothing_at_all_may_be_there():
    p = fp.parametrize(nn.Linear(3, 3), {"weight": WeightNorm()})
    found = checkpoint.read({"strange": torch.ones(1)}, p, strict=False)
    assert found.missing == ("weight", "bias")
    assert found.raw == found.state == {}
    assert list(found.others) == ["strange"]


# Funcparam's own keys: of modules now and before, nested, and of the functional form


def spellings_of_own():
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    p = fp.parametrize(net, {"0.weight": WeightNorm()})
    raw, state = p.init(net)
    buffers = dict(net.named_buffers())
    raws = {
        "raw.0.weight.magnitude": raw["0.weight"]["magnitude"],
        "raw.0.weight.direction": raw["0.weight"]["direction"],
    }
    plain = {name: raw[name] for name in ("0.bias", "1.weight", "1.bias")}
    now = raws | {f"net.{name}": t for name, t in (plain | buffers).items()}
    before = raws | {f"raw.{name}": t for name, t in plain.items()}
    before |= {f"net_buffers.{name}": t for name, t in buffers.items()}
    return (
        net,
        p,
        {
            "now": now,
            "before": before,
            "functional": {"raw": raw, "state": state, "buffers": buffers},
            "functional, flat": raws | {f"raw.{name}": t for name, t in plain.items()} | buffers,
        },
    )


@pytest.mark.parametrize("which", ["now", "before", "functional", "functional, flat"])
@pytest.mark.parametrize("wrap", ["", "module.", "model.", "state_dict.model._orig_mod."])
def test_every_layout_of_funcparams_own(which, wrap):
    net, p, layouts = spellings_of_own()
    given = layouts[which]
    if wrap:
        if which == "functional":
            given = {wrap[:-1]: given}
        else:
            given = {f"{wrap}{key}": tensor for key, tensor in given.items()}
    raw, state, others = checkpoint.read(given, p)
    assert torch.equal(raw["0.weight"]["direction"], net[0].weight)
    assert torch.equal(p(raw, state)["1.bias"], net[1].bias)
    assert sorted(others) == sorted(dict(net.named_buffers()))


def test_shells_in_a_bigger_network():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

    net = nn.ModuleDict({"blocks": nn.ModuleList([Block(), Block()]), "head": nn.Linear(3, 2)})
    p = fp.parametrize(net, {"blocks.*.lin.weight": Orthogonal(), "head.weight": WeightNorm()})
    raw, state = p.init(net)
    given, plain = {}, dict(net.state_dict())
    for i in (0, 1):
        given[f"blocks.{i}.raw.lin.weight"] = raw[f"blocks.{i}.lin.weight"]
        given[f"blocks.{i}.state.lin.weight.base"] = state[f"blocks.{i}.lin.weight"]["base"]
        del plain[f"blocks.{i}.lin.weight"]
    for name, tensor in plain.items():
        head = ".".join(name.split(".")[:2]) if name.startswith("blocks") else "head"
        if name != "head.weight":
            given[name.replace(head, f"{head}.net", 1)] = tensor
    given["head.raw.weight.magnitude"] = raw["head.weight"]["magnitude"]
    given["head.raw.weight.direction"] = raw["head.weight"]["direction"]
    for state_dict in (given, {f"module.{key}": t for key, t in given.items()}):
        found = checkpoint.read(state_dict, p)
        for name, value in p(raw, state).items():
            assert torch.equal(p(found.raw, found.state)[name], value), name
        assert sorted(found.others) == sorted(dict(net.named_buffers()))
    styles = {item.style for item in checkpoint.explain(given).stored}
    assert styles == {"funcparam"}
    del given["blocks.1.raw.lin.weight"]
    with pytest.raises(ValueError, match=r"missing 'blocks.1.raw.lin.weight', which Orthogonal"):
        checkpoint.read(given, p)


def test_raw_in_the_module_form_is_no_value():
    given = {"net.bias": torch.ones(2), "raw.weight": torch.ones(2, 2)}
    p = fp.parametrize(nn.Linear(2, 2), {})
    with pytest.raises(ValueError, match=r"'weight' is stored as \['raw.weight'\], which does not"):
        checkpoint.read(given, p)


# Projections say so


def test_a_projection_says_by_how_much():
    net = nn.Linear(4, 4)
    p = fp.parametrize(net, {"weight": Orthogonal()})
    with pytest.warns(UserWarning, match=r"were projected: 'weight' by up to 0\.\d+, to Orthogona"):
        found = checkpoint.read(net.state_dict(), p)
    moved = (p(found.raw, found.state)["weight"] - net.weight).abs().max().item()
    assert found.moved == {"weight": pytest.approx(moved)}
    assert not math.isclose(moved, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_satisfies_its_constraint_is_not_moved(dtype):
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).to(dtype)
    p = fp.parametrize(net, {"0.weight": Orthogonal(), "1.weight": WeightNorm()})
    folded = checkpoint.write(p, *p.init(net), style="plain")
    assert checkpoint.read(folded, p).moved == {}
    assert checkpoint.read({k: t.bfloat16() for k, t in folded.items()}, p).moved == {}


def test_init_logs_what_it_moves(monkeypatch):
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    p = fp.parametrize(net, {"0.weight": Orthogonal(), "1.weight": WeightNorm()})
    logger, said = logging.getLogger("funcparam"), []
    monkeypatch.setattr(logger, "handle", lambda record: said.append(record.getMessage()))
    p.init(net)
    assert said == []  # most weights move at init: who wants to know has to say so
    monkeypatch.setattr(logger, "level", logging.INFO)
    logger.manager._clear_cache()
    raw, state = p.init(net)
    moved = (p(raw, state)["0.weight"] - net[0].weight).abs().max().item()
    p.init(fp.fold(net, p(raw, state)))
    torch.func.vmap(p.init)({n: t[None] for n, t in net.named_parameters()})
    monkeypatch.undo()
    logger.manager._clear_cache()
    assert said == [f"'0.weight' was projected by up to {moved:.2g}, to {Orthogonal()!r}"]
