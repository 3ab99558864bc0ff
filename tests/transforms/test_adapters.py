"""The recipes of docs/adapters.md and the adapters that are classes, against peft's."""

import re
from pathlib import Path

import peft
import pytest
import torch
from peft import (
    BOFTConfig,
    C3AConfig,
    DeloraConfig,
    FourierFTConfig,
    HiraConfig,
    HRAConfig,
    LoKrConfig,
    LoraConfig,
    PsoftConfig,
    RandLoraConfig,
    ShiraConfig,
)
from peft.tuners.boft import layer as boft_layer
from torch import nn

import funcparam as fp
from funcparam.transforms import (
    BOFT,
    HRA,
    Chain,
    DeLoRA,
    Frozen,
    Gain,
    Kronecker,
    LoRA,
    LowRank,
    RandLoRA,
    Reshape,
    SpectralNorm,
    Sum,
    UnitNorm,
)
from tests.transforms.test_peers import adapted, assert_merged, convolution, linear

DOCS = Path(__file__).parents[2] / "docs" / "adapters.md"
RECIPES: dict = {}
exec(re.search(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)[1], RECIPES)

close = torch.testing.assert_close
LAYERS = pytest.mark.parametrize("make", [linear, convolution])


def start(transform, weight):
    raw, state = transform.right_inverse(weight)
    close(transform.forward(raw, state), weight)
    return raw, state


def weight_of(layer):
    return layer.weight.detach().clone()


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("scale", ["lora", "rslora"])
def test_lora_starts(init, scale):
    layer = linear()
    transform = LoRA(2, 3, init, scale)
    raw, state = start(transform, weight_of(layer))
    config = LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["0"],
        init_lora_weights=init,
        use_rslora=scale == "rslora",
    )
    adapter = peft.inject_adapter_in_model(config, nn.Sequential(layer))[0]
    A, B = adapter.lora_A["default"].weight, adapter.lora_B["default"].weight
    close(B @ A, raw["B"] @ raw["A"])  # the signs of singular vectors are anyone's
    close(A.abs(), raw["A"].abs())
    close(adapter.get_base_layer().weight.detach(), state["base"], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        A += 0.1
        B -= 0.1
    assert_merged(adapter, transform.forward({"A": A, "B": B}, state))


def test_lora_starts_are_drawn_as_in_peft():
    W = torch.zeros(64, 4096)
    A = LoRA(8, init="gaussian").right_inverse(W, generator=torch.manual_seed(0))[0]["A"]
    config = LoraConfig(r=8, target_modules=["0"], init_lora_weights="gaussian")
    layer = peft.inject_adapter_in_model(config, nn.Sequential(nn.Linear(4096, 64)))[0]
    close(A.std(), layer.lora_A["default"].weight.std(), rtol=0.05, atol=0)


def test_pissa_is_a_sum_whose_first_part_takes_what_it_can():
    W = torch.randn(5, 4, dtype=torch.float64)
    raw, state = LoRA(2, init="pissa").right_inverse(W)
    sums, own = Sum(LowRank(2), Frozen()).right_inverse(W)
    close(sums["0.B"] @ sums["0.A"], raw["B"] @ raw["A"])
    close(own["1.value"], state["base"])


@LAYERS
def test_lokr(make):
    layer = make()
    W = weight_of(layer)
    adapter = adapted(layer, LoKrConfig(r=8, alpha=3, target_modules=["0"], decompose_factor=2))
    w1, w2 = (factor["default"].detach() for factor in (adapter.lokr_w1, adapter.lokr_w2))
    transform = RECIPES["lokr"](tuple(w1.shape), 3 / 8)
    if W.ndim > 2:
        kernel = Chain(*transform.parts[1].parts, Reshape((-1,), (-1, *W.shape[2:])))
        transform = Sum(Frozen(), kernel)
    _, state = start(transform, W)
    assert_merged(adapter, transform.forward({"1.A": w1, "1.B": w2.flatten(1)}, state))


def test_lokr_of_low_rank():
    layer = nn.Linear(16, 12)
    W = weight_of(layer)
    adapter = adapted(layer, LoKrConfig(r=2, alpha=3, target_modules=["0"], decompose_factor=2))
    w1, a, b = (
        getattr(adapter, f"lokr_{name}")["default"].detach() for name in ("w1", "w2_a", "w2_b")
    )
    transform = RECIPES["lokr"](tuple(w1.shape), 3 / 2, rank=2)
    _, state = start(transform, W)
    assert_merged(adapter, transform.forward({"1.A": w1, "1.B.B": a, "1.B.A": b}, state))


def test_lora_xs():
    """The paper's R, W_0 + B R A, starts at 0; ours, of which that of W_0 is a part, at I."""
    W = weight_of(linear())
    U, S, Vh = torch.linalg.svd(W)
    R = torch.randn(2, 2)
    transform = RECIPES["lora_xs"](2)
    raw, state = start(transform, W)
    close(raw["0.1"], torch.eye(2))
    close(state["0.0.value"] @ state["0.2.value"], U[:, :2] * S[:2] @ Vh[:2])
    value = transform.forward({"0.1": torch.eye(2) + R}, state)
    close(value, W + state["0.0.value"] @ R @ state["0.2.value"])


@pytest.mark.parametrize("start_of_factors", ["psoft_init", "pissa_init"])
@pytest.mark.parametrize("vectors", [True, False])
def test_psoft(start_of_factors, vectors):
    layer = linear()
    W = weight_of(layer)
    config = PsoftConfig(
        r=2,
        psoft_alpha=2,
        target_modules=["0"],
        ab_svd_init=start_of_factors,
        psoft_mag_a=vectors,
        psoft_mag_b=vectors,
    )
    adapter = adapted(layer, config)
    rotation = adapter.psoft_R["default"]
    transform = RECIPES["psoft"](2)
    raw, state = start(transform, W)
    close(raw["0.1"], torch.ones(2))
    A, B = adapter._get_psoft_ab_cache_buffers("default")
    state |= {"0.0.value": B, "0.4.value": A}  # the signs of singular vectors, and who has them
    raw["0.2"] = 2 * rotation._skew_symmetric().detach().tril()
    if vectors:
        raw |= {"0.1": rotation.vector_b.detach(), "0.3": rotation.vector_a.detach()}
    assert_merged(adapter, transform.forward(raw, state))


@pytest.mark.parametrize("make", [linear, convolution])
def test_hira(make):
    layer = make()
    W = weight_of(layer)
    adapter = adapted(layer, HiraConfig(r=2, target_modules=["0"]))
    A, B = (factor["default"].detach() for factor in (adapter.hira_A, adapter.hira_B))
    if W.ndim > 2:  # peft keeps the factors as kernels of a composed convolution
        delta = adapter.get_delta_weight("default").detach()
        close((B.flatten(1) @ A.flatten(1)).reshape(W.shape), delta)
    transform = RECIPES["hira"](2)
    matrix = W.flatten(1)
    _, state = start(transform, matrix)
    value = transform.forward({"1.A": A.flatten(1), "1.B": B.flatten(1)}, state)
    assert_merged(adapter, value.reshape(W.shape))


def test_c3a():
    layer = nn.Linear(6, 4)
    W = weight_of(layer)
    adapter = adapted(layer, C3AConfig(block_size=2, target_modules=["0"]))
    transform = RECIPES["c3a"](2, 1 / 6)
    _, state = start(transform, W)
    kernel = adapter.c3a_kernel["default"].detach()
    turned = kernel[..., -torch.arange(2) % 2]  # peft turns the other way round
    assert_merged(adapter, transform.forward({"1": turned}, state))


def test_shira():
    layer = linear()
    W = weight_of(layer)
    adapter = adapted(layer, ShiraConfig(r=1, target_modules=["0"]))
    transform = RECIPES["shira"](11)
    raw, state = start(transform, W)
    assert raw["1"].shape == (11,)
    assert state["1.mask"].sum() == 11
    rows, columns = adapter.shira_indices["default"].long()
    delta = torch.zeros_like(W)
    delta[rows, columns] = adapter.shira_weight["default"].detach()
    state |= {"1.mask": delta != 0}
    with torch.sparse.check_sparse_tensor_invariants():  # it warns where nobody has asked for them
        assert_merged(adapter, transform.forward({"1": delta[delta != 0]}, state))


def test_fourierft():
    layer = linear()
    W = weight_of(layer)
    config = FourierFTConfig(n_frequency=7, scaling=50.0, target_modules=["0"])
    adapter = adapted(layer, config)
    transform = RECIPES["fourierft"](7, 50.0)
    _, state = start(transform, W)
    rows, columns = adapter.indices["default"]
    dense = torch.zeros_like(W)
    dense[rows, columns] = adapter.fourierft_spectrum["default"].detach()
    state |= {"1.0.mask": dense != 0}
    assert_merged(adapter, transform.forward({"1": dense[dense != 0]}, state))


@LAYERS
def test_hra(make):
    layer = make()
    W = weight_of(layer)
    adapter = adapted(layer, HRAConfig(r=4, target_modules=["0"]))
    transform = HRA(4)
    raw, state = start(transform, W)
    close(raw[:, ::2], raw[:, 1::2])
    assert_merged(adapter, transform.forward(adapter.hra_u["default"], state))


@LAYERS
@pytest.mark.parametrize(("size", "factors"), [(2, 1), (2, 2), (2, 3), (4, 2)])
def test_boft(make, size, factors, monkeypatch):
    class BlockDiagonal:  # what peft has in CUDA alone
        @staticmethod
        def apply(blocks):
            return torch.stack([torch.block_diag(*each) for each in blocks])

    monkeypatch.setattr(boft_layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(boft_layer, "FastBlockDiag", BlockDiagonal)
    layer = nn.Linear(8, 5) if make is linear else nn.Conv2d(4, 6, (2, 2))
    W = weight_of(layer)
    config = BOFTConfig(
        boft_block_size=size,
        boft_block_num=0,
        boft_n_butterfly_factor=factors,
        target_modules=["0"],
        bias="none",
    )
    adapter = adapted(layer, config)
    X = adapter.boft_R["default"].detach()
    _, state = start(BOFT(size, factors), W)
    raw = {"R": -(X - X.mT), "s": adapter.boft_s["default"].detach().flatten()}
    assert_merged(adapter, BOFT(size, factors).forward(raw, state))


def test_delora():
    layer = linear()
    W = weight_of(layer)
    adapter = adapted(layer, DeloraConfig(r=2, target_modules=["0"]))
    _, state = start(DeLoRA(2), W)
    close(state["norms"], adapter.delora_w_norm["default"])
    raw = {
        "A": adapter.delora_A["default"],
        "B": adapter.delora_B["default"],
        "lambda": adapter.delora_lambda["default"].squeeze(),
    }
    assert_merged(adapter, DeLoRA(2).forward(raw, state))


@pytest.mark.parametrize("sides", [(6, 5), (5, 6), (4, 4)])
def test_randlora(sides):
    layer = nn.Linear(*sides)
    W = weight_of(layer)
    adapter = adapted(layer, RandLoraConfig(r=2, randlora_alpha=3, target_modules=["0"]))
    transform = RandLoRA(2, 3)
    raw, state = start(transform, W)
    A, B = adapter.randlora_A["default"], adapter.randlora_B["default"]
    k = raw["lambda"].shape[0]
    # peft numbers what it sums over by basis in B and by rank in A, which is a permutation of B
    columns = B.flatten(1)[:, torch.arange(2 * k).reshape(2, k).T.flatten()]
    state |= {"A": A[:, 0], "B": columns.reshape(-1, k, 2).transpose(0, 1)}
    raw = {
        "lambda": adapter.randlora_lambda["default"].T,
        "gamma": adapter.randlora_gamma["default"],
    }
    assert_merged(adapter, transform.forward(raw, state))


def test_stiefel_lora():
    W = torch.randn(6, 4, dtype=torch.float64)
    transform = RECIPES["stiefel_lora"](2)
    raw, state = start(transform, W)
    moved = {key: t + 0.3 * torch.randn_like(t) for key, t in raw.items()}
    delta = transform.forward(moved, state) - W
    B = delta @ torch.linalg.pinv(moved["1.1"])  # the factor that must be orthonormal
    close(B.mT @ B, torch.eye(2, dtype=torch.float64))


def test_sigma_reparam():
    """W = g X / sigma(X), as apple/ml-sigma-reparam computes it."""
    W = torch.randn(5, 3, dtype=torch.float64)
    raw, state = start(RECIPES["sigma_reparam"](), W)
    close(raw["gain"], torch.linalg.matrix_norm(W, 2))
    X, g = raw["0"], torch.tensor(0.7)
    close(
        Gain(SpectralNorm()).forward({"0": X, "gain": g}, state),
        0.7 * X / torch.linalg.svdvals(X)[0],
    )


def test_edm2():
    """As MPConv of NVlabs/edm2 computes it, whose normalize makes roots of mean squares 1."""
    X, gain = torch.randn(4, 3, 2, 2, dtype=torch.float64), torch.tensor(0.7)
    size = X.square().mean((1, 2, 3), keepdim=True).sqrt()
    expected = X / size * (gain / X[0].numel() ** 0.5)
    transform, raw = RECIPES["edm2"](), {"0": X, "gain": gain}
    close(transform.forward(raw, {}), expected)
    again, _ = transform.rebase(raw, {})
    close(again["0"].flatten(1).norm(dim=1), torch.ones(4, dtype=torch.float64))
    close(transform.forward(again, {}), expected)


def test_low_rank_plus_diagonal_is_a_covariance():
    W = torch.randn(4, 4, dtype=torch.float64)
    W = W @ W.mT
    transform = RECIPES["low_rank_plus_diagonal"](2)
    raw, state = transform.right_inverse(W)
    factor, d = raw["0"], torch.nn.functional.softplus(raw["1"])
    normal = torch.distributions.LowRankMultivariateNormal(torch.zeros(4), factor, d)
    close(transform.forward(raw, state), normal.covariance_matrix)


def test_gain_of_unit_rows_is_weight_norm():
    W = torch.randn(4, 3, dtype=torch.float64)
    layer = nn.Linear(3, 4, dtype=torch.float64)
    layer.weight.data = W
    layer = torch.nn.utils.parametrizations.weight_norm(layer)
    raw, _ = start(Gain(UnitNorm(), dim=0), W)
    close(raw["gain"], layer.parametrizations.weight.original0.detach().flatten())


def test_factors_of_zero_train():
    """All of a weight is reached, not the first inputs alone, as unit rows would."""
    W = torch.randn(4, 6, dtype=torch.float64)
    for part in (LowRank(2), Kronecker((2, 2)), *(RECIPES["stiefel_lora"](2).parts[1:])):
        transform = Sum(Frozen(), part)
        raw, state = start(transform, W)
        raw = {key: tensor.requires_grad_() for key, tensor in raw.items()}
        transform.forward(raw, state).square().sum().backward()
        moved = {key: (t - 0.1 * t.grad).detach() for key, t in raw.items()}
        assert ((transform.forward(moved, state) - W).abs() > 1e-8).float().mean() > 0.9


@pytest.mark.parametrize(
    "transform",
    [
        Sum(Frozen(), LowRank(2)),
        Sum(LowRank(2), Frozen()),
        RECIPES["hira"](2),
        RECIPES["psoft"](2),
        Gain(Frozen()),
    ],
    ids=str,
)
def test_a_frozen_weight_in_half_precision_with_raw_in_float32(transform):
    """The usual way to fine-tune: raw trains, the value is of the weight's dtype, rounded once."""
    net = nn.Linear(6, 5, dtype=torch.bfloat16).requires_grad_(False)
    p = fp.parametrize(net, {"weight": transform})
    raw, state = p.init(net)
    wide = {key: t.float() + 0.1 for key, t in raw["weight"].items()}
    value = transform.forward(wide, state["weight"])
    assert value.dtype == torch.bfloat16
    exact = transform.forward(
        {key: t.double() for key, t in wide.items()},
        {key: t.double() for key, t in state["weight"].items()},
    )
    assert (value != exact.bfloat16()).sum() <= 1  # of float32 and of bfloat16, but once
    model = fp.Parametrized(net, p)
    model(torch.randn(2, 6, dtype=torch.bfloat16)).sum().backward()
    assert all(t.grad is not None for t in model.raw.parameters())
    assert len(list(model.raw.parameters())) >= len(raw["weight"])
