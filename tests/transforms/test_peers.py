"""Values of peers: peft's adapters, PyTorch's own parametrizations, scipy's matrix functions."""

import peft
import pytest
import scipy.linalg
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, OFTConfig, VeraConfig
from torch import nn
from torch.nn.utils import parametrizations as torchs

from funcparam.transforms import (
    IA3,
    OFT,
    DoRA,
    LoHa,
    LoRA,
    Orthogonal,
    SpectralNorm,
    VeRA,
    WeightNorm,
)

close = torch.testing.assert_close


def adapted(layer, config):
    """peft's adapter of a layer, as after some training."""
    net = peft.get_peft_model(nn.Sequential(layer), config).base_model.model
    for parameter in net.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)
    return net[0]


def assert_same(layer, adapter, weight):
    """The adapter's outputs, and the weight that it merges to, are those of `weight`."""
    x = torch.randn(3, layer.weight.shape[1], *[5] * (layer.weight.ndim - 2))
    outputs = adapter(x)
    plain = nn.functional.linear if layer.weight.ndim == 2 else nn.functional.conv2d
    close(outputs, plain(x, weight, layer.bias), rtol=1e-4, atol=1e-4)
    assert_merged(adapter, weight)


def assert_merged(adapter, weight):
    """The weight that peft merges to is `weight`, to rounding."""
    adapter.merge()
    found = adapter.get_base_layer().weight.detach()
    close(found, weight.detach(), rtol=0, atol=1e-6 * found.abs().max().item())


def linear():
    return nn.Linear(6, 5)


def convolution():
    return nn.Conv2d(4, 6, 3)


def pointwise():
    return nn.Conv2d(4, 6, 1)


LAYERS = pytest.mark.parametrize("make", [linear, convolution, pointwise])


@LAYERS
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_lora_and_dora(make, rslora, dora):
    layer = make()
    W = layer.weight.detach().clone()
    config = LoraConfig(
        r=2, lora_alpha=3, target_modules=["0"], use_rslora=rslora, use_dora=dora, bias="none"
    )
    adapter = adapted(layer, config)
    alpha = 3 * 2**0.5 if rslora else 3  # rank-stabilised: alpha / sqrt(rank)
    transform = DoRA(2, alpha) if dora else LoRA(2, alpha)
    raw, state = transform.right_inverse(W)
    raw = {
        "A": adapter.lora_A["default"].weight.flatten(1),
        "B": adapter.lora_B["default"].weight.flatten(1),
    }
    if dora:
        magnitude = adapter.lora_magnitude_vector["default"].weight
        nn.init.uniform_(magnitude, 0.5, 2.0)
        raw["magnitude"] = magnitude.flatten()
    assert_same(layer, adapter, transform.forward(raw, state).detach())


@LAYERS
def test_dora_starts_where_peft_does(make):
    layer = make()
    W = layer.weight.detach().clone()
    config = LoraConfig(r=2, target_modules=["0"], use_dora=True)
    net = peft.inject_adapter_in_model(config, nn.Sequential(layer))
    raw, _ = DoRA(2).right_inverse(W)
    close(raw["magnitude"], net[0].lora_magnitude_vector["default"].weight.detach().flatten())


@LAYERS
def test_loha(make):
    layer = make()
    W = layer.weight.detach().clone()
    adapter = adapted(layer, LoHaConfig(r=2, alpha=3, target_modules=["0"]))
    names = {"B1": "w1_a", "A1": "w1_b", "B2": "w2_a", "A2": "w2_b"}
    raw = {ours: getattr(adapter, f"hada_{name}")["default"] for ours, name in names.items()}
    _, state = LoHa(2, 3).right_inverse(W)
    assert_same(layer, adapter, LoHa(2, 3).forward(raw, state).detach())


def test_vera():
    layer = linear()
    W = layer.weight.detach().clone()
    adapter = adapted(layer, VeraConfig(r=3, target_modules=["0"]))
    raw = {
        "b": adapter.vera_lambda_b["default"].detach(),
        "d": adapter.vera_lambda_d["default"].detach(),
    }
    factors = {"A": adapter.vera_A["default"], "B": adapter.vera_B["default"]}
    value = VeRA(3).forward(raw, {"base": W, **factors})
    assert_same(layer, adapter, value)


def test_vera_starts_as_pefts():
    config = VeraConfig(r=100, target_modules=["0"])
    net = peft.get_peft_model(nn.Sequential(nn.Linear(300, 200)), config).base_model.model
    raw, state = VeRA(100).right_inverse(torch.randn(200, 300))
    for name in ("A", "B"):
        theirs = getattr(net[0], f"vera_{name}")["default"]
        assert state[name].shape == theirs.shape
        assert state[name].std().item() == pytest.approx(theirs.std().item(), rel=0.02)
        assert state[name].abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.01)
    for ours, theirs in (("b", "vera_lambda_b"), ("d", "vera_lambda_d")):
        assert torch.equal(raw[ours], getattr(net[0], theirs)["default"].detach())


@pytest.mark.parametrize("make", [linear, convolution])
def test_oft(make):
    layer = make()
    W = layer.weight.detach().clone()
    config = OFTConfig(
        r=2, oft_block_size=0, target_modules=["0"], use_cayley_neumann=False, bias="none"
    )
    adapter = adapted(layer, config)
    rotation = adapter.oft_R["default"]
    side = W.flatten(1).shape[1] // 2
    skew = rotation._pytorch_skew_symmetric(rotation.weight.detach(), side)
    # peft's map is (I - S) (I + S)^-1
    _, state = OFT(2).right_inverse(W)
    value = OFT(2).forward(-2 * skew, state)
    if W.ndim == 2:
        assert_same(layer, adapter, value)
    else:  # peft's outputs of a convolution are of turned pixels, not of the weight it merges to
        assert_merged(adapter, value)


@pytest.mark.parametrize("make", [linear, convolution])
@pytest.mark.parametrize("dim", [0, 1])
def test_ia3(make, dim):
    layer = make()
    layer.bias = None  # of outputs, peft scales it too
    W = layer.weight.detach().clone()
    config = IA3Config(target_modules=["0"], feedforward_modules=["0"] if dim else [])
    adapter = adapted(layer, config)
    factor = adapter.ia3_l["default"].detach().flatten()
    assert_same(layer, adapter, IA3(dim).forward({"factor": factor}, {"base": W}))


# torch.nn.utils.parametrizations


@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (3, 5)])
@pytest.mark.parametrize(
    ("map", "trivialize"),
    [("matrix_exp", True), ("cayley", True), ("householder", True), ("householder", False)],
)
def test_orthogonal(map, trivialize, shape):
    layer = nn.Linear(shape[1], shape[0], dtype=torch.float64)
    torchs.orthogonal(layer, orthogonal_map=map, use_trivialization=trivialize)
    part, original = layer.parametrizations.weight[0], layer.parametrizations.weight.original
    if trivialize:
        with torch.no_grad():  # the diagonal is of no account, but PyTorch keeps signs there
            original.copy_(torch.randn_like(original).fill_diagonal_(-1))
        state = {"base": part.base}
    else:
        tall = original if shape[0] >= shape[1] else original.mT
        state = {"signs": -tall.diagonal().detach()}
    close(Orthogonal(map, trivialize).forward(original, state), layer.weight)


@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_norm(dim):
    layer = torchs.weight_norm(nn.Conv2d(3, 4, 2, dtype=torch.float64), dim=dim)
    originals = layer.parametrizations.weight
    raw = {"magnitude": originals.original0, "direction": originals.original1}
    close(WeightNorm(dim).forward(raw, {}), layer.weight)
    nn.init.normal_(originals.original0)
    nn.init.normal_(originals.original1)
    close(WeightNorm(dim).forward(raw, {}), layer.weight)


@pytest.mark.parametrize(("kind", "dim"), [(nn.Linear, 0), (nn.Bilinear, 1)])
@pytest.mark.parametrize("steps", [1, 3])
def test_spectral_norm(kind, dim, steps):
    layer = kind(*[5, 4, 3][: 2 + dim], dtype=torch.float64)
    torchs.spectral_norm(layer, n_power_iterations=steps, dim=dim)
    part, original = layer.parametrizations.weight[0], layer.parametrizations.weight.original
    transform = SpectralNorm(dim, steps)
    state = {"u": part._u.clone(), "v": part._v.clone()}
    for _ in range(3):
        nn.init.normal_(original)
        state = transform.update(original, state)
        close(transform.forward(original, state), layer.weight)  # which takes a step too
        close(state, {"u": part._u, "v": part._v})


# scipy.linalg


def test_exponential_and_logarithm():
    X = torch.randn(4, 4, dtype=torch.float64) / 3
    A = X.tril() - X.tril().mT
    Q = torch.from_numpy(scipy.linalg.expm(A.numpy()))
    base = {"base": torch.eye(4, dtype=torch.float64)}
    close(Orthogonal().forward(X, base), Q)
    logarithm = torch.from_numpy(scipy.linalg.logm(Q.numpy()))
    close(logarithm, A)
    close(Orthogonal().forward(logarithm.tril(), base), Q)


@pytest.mark.parametrize("shape", [(4, 4), (6, 3)])
def test_projections(shape):
    X = torch.randn(shape, dtype=torch.float64)
    polar = torch.from_numpy(scipy.linalg.polar(X.numpy())[0])
    close(Orthogonal("newton_schulz", trivialize=False).forward(X, {}), polar)
    q, r = scipy.linalg.qr(X.numpy(), mode="economic")
    signs = r.diagonal() / abs(r.diagonal())
    close(Orthogonal("qr", trivialize=False).forward(X, {}), torch.from_numpy(q * signs))
