"""Oracles of their own for spectra, operators, quantizers, sparsity and hyper-connections."""

import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torch.func import grad, hessian, jacrev

from funcparam.transforms import (
    LSQ,
    Ball,
    CholeskyFactor,
    DoublyStochastic,
    FakeQuantize,
    FakeQuantizeFloat,
    Isospectral,
    NMSparse,
    OperatorNorm,
    PositiveDefinite,
    SpectralCap,
    Ternary,
    TopK,
)

D = torch.float64
close = torch.testing.assert_close


# Spectra


def test_spectral_cap_has_derivatives_where_singular_values_are_equal():
    """There a decomposition has none, and the map is smooth away from the bound."""
    transform, state = SpectralCap(1.5), {"cap": torch.tensor(1.5, dtype=D)}
    X = torch.diag(torch.tensor([3.0, 3.0, 1.0, 1.0], dtype=D))
    weights = torch.randn(4, 4, dtype=D)

    def loss(X):
        return (transform.forward(X, state) * weights).sum()

    def exact(m):
        u, s, vh = scipy.linalg.svd(m)
        return ((u * np.minimum(s, 1.5)) @ vh * weights.numpy()).sum()

    step = np.zeros((4, 4))
    for i, j in ((0, 0), (0, 1), (2, 3), (1, 3)):
        step[:] = 0
        step[i, j] = 1e-6
        slope = (exact(X.numpy() + step) - exact(X.numpy() - step)) / 2e-6
        assert grad(loss)(X)[i, j].item() == pytest.approx(slope, abs=1e-6)
    assert hessian(loss)(X).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_spectral_cap_trains_from_an_orthogonal_matrix(dtype):
    """All singular values are at the bound; no derivative of a projection is longer than 1."""
    Q = torch.linalg.qr(torch.randn(6, 6, dtype=dtype)).Q
    raw, state = SpectralCap(1.0).right_inverse(Q)
    J = torch.func.jacrev(lambda x: SpectralCap(1.0).forward(x, state))(raw).reshape(36, 36)
    torch.testing.assert_close(J, torch.eye(36, dtype=dtype), rtol=0, atol=1e-5)


def test_spectral_cap_keeps_large_ratios():
    U, V = (torch.linalg.qr(torch.randn(6, 6, dtype=D))[0] for _ in range(2))
    s = torch.tensor([1e4, 50.0, 2.0, 1.0, 1e-3, 1e-6], dtype=D)
    raw, state = SpectralCap(1.5).right_inverse(U * s @ V.mT)
    close(SpectralCap(1.5).forward(raw, state), U * s.clamp_max(1.5) @ V.mT, rtol=0, atol=1e-8)


@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-30, 1e-10, 1e-4])
def test_spectral_cap_keeps_values_far_below_the_bound(scale):
    X, weights = torch.randn(2, 5, 3) * scale, torch.randn(2, 5, 3)
    X[1] = torch.randn(5, 3) * 10  # the other matrix of the batch is cut
    transform, state = SpectralCap(1.0), {"cap": torch.tensor(1.0)}

    def loss(X):
        return (transform.forward(X, state) * weights).sum()

    assert transform.forward(X, state)[0].equal(X[0])
    assert grad(loss)(X)[0].equal(weights[0])
    assert grad(lambda X: grad(loss)(X).square().sum())(X)[0].count_nonzero() == 0


def test_isospectral_projects_to_the_nearest_whatever_the_order_in_state():
    """Against the reordering that von Neumann's trace inequality gives."""
    X = torch.randn(4, 3, dtype=D)
    _, state = Isospectral().right_inverse(torch.randn(4, 3, dtype=D))
    state = {**state, "s": torch.tensor([0.5, -3.0, 1.0], dtype=D)}
    u, _, vh = scipy.linalg.svd(X.numpy(), full_matrices=False)
    nearest = torch.from_numpy((u * np.array([3.0, 1.0, 0.5])) @ vh)
    found = Isospectral().project(X, state)
    close(found, nearest)
    assert Isospectral().violation(found, state) < 1e-13


def test_isospectral_keeps_its_spectrum_in_training():
    W = torch.randn(5, 3)
    raw, state = Isospectral().right_inverse(W)
    target = torch.randn(5, 3)
    for _ in range(20):
        g = grad(lambda r: (Isospectral().forward(r, state) - target).square().sum())(raw)
        raw = {key: X - 0.1 * g[key] for key, X in raw.items()}
    value = Isospectral().forward(raw, state)
    close(torch.linalg.svdvals(value), torch.linalg.svdvals(W), rtol=1e-5, atol=1e-5)
    assert (value - target).norm() < (W - target).norm()


@pytest.mark.parametrize(("samples", "bound"), [(4, 0.5 ** (-1 / 4)), (8, 0.75 ** (-1 / 4))])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_operator_norm_of_layers_of_other_sizes(samples, bound, mode):
    for seed in range(3):
        torch.manual_seed(seed)
        conv = nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode, bias=False, dtype=D)
        transform = OperatorNorm(samples)
        value = transform.forward(conv.weight.detach(), {})

        def layer(x, conv=conv, value=value):
            return torch.func.functional_call(conv, {"weight": value}, x.reshape(1, 2, 7, 7))

        dense = jacrev(layer)(torch.zeros(98, dtype=D)).reshape(-1, 98)
        norm = torch.linalg.matrix_norm(dense, 2)
        assert 0.5 < norm <= bound**2


def test_operator_norm_is_not_that_of_the_reshaped_kernel():
    blur = torch.ones(1, 1, 7, 7)
    close(OperatorNorm().forward(blur, {}), blur / 49)
    close(torch.linalg.matrix_norm(blur.flatten(1), 2), torch.tensor(7.0))


# Quantizers


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_float_grids_are_pytorchs_bit_for_bit(name):
    """Ties, subnormals and the ends included."""
    dtype = getattr(torch, name)
    grid = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    grid = grid[grid.isfinite()].unique()
    x = torch.cat([grid, (grid[1:] + grid[:-1]) / 2, torch.randn(1000) * 3, torch.randn(99) * 1e-3])
    found = FakeQuantizeFloat(name).forward(x, {"scale": torch.tensor(1.0)})
    close(found, x.to(dtype).float(), rtol=0, atol=0)


def test_mxfp4_ties_go_to_even_numbers():
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 9.0])
    found = FakeQuantizeFloat("float4_e2m1fn").forward(x, {"scale": torch.tensor(1.0)})
    close(found, torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]))


def test_mxfp4_scales_are_those_of_the_specification():
    """2^(floor(log2(amax)) - emax), with emax = 2 of e2m1; one for 32 neighbours."""
    W = torch.randn(3, 64)
    transform = FakeQuantizeFloat("float4_e2m1fn", group_size=32, power_of_two=True)
    _, state = transform.right_inverse(W)
    amax = W.reshape(3, 2, 32).abs().amax(-1)
    close(state["scale"], 2.0 ** (amax.log2().floor() - 2))


def test_groups_are_pytorchs_channels_of_the_regrouped_weight():
    W = torch.randn(4, 64)
    transform = FakeQuantize(4, "affine", group_size=32)
    raw, state = transform.right_inverse(W)
    observer = torch.ao.quantization.PerChannelMinMaxObserver(
        ch_axis=0, dtype=torch.quint8, quant_min=0, quant_max=15, qscheme=torch.per_channel_affine
    )
    rows = W.reshape(-1, 32)
    observer(rows)
    scale, zero_point = observer.calculate_qparams()
    close(state["scale"].flatten(), scale)
    close(state["zero_point"].flatten(), zero_point.float())
    expected = torch.fake_quantize_per_channel_affine(rows, scale, zero_point, 0, 0, 15)
    close(transform.forward(raw, state), expected.reshape(4, 64))


def test_lsq_is_pytorchs_learnable_fake_quantize():
    """Its gradient of the scale, with the factor of the paper."""
    X = torch.randn(6, 5, requires_grad=True)
    scale = torch.tensor(0.3, requires_grad=True)
    out = torch._fake_quantize_learnable_per_tensor_affine(
        X, scale.reshape(1), torch.zeros(1), -3, 3, 1 / math.sqrt(30 * 3)
    )
    weights = torch.randn(6, 5)
    expected = torch.autograd.grad((out * weights).sum(), (X, scale))
    found = grad(lambda raw: (LSQ(bits=3).forward(raw, {}) * weights).sum())(
        {"weight": X.detach(), "scale": scale.detach()}
    )
    close(found["weight"], expected[0])
    close(found["scale"], expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-6, 1e-5, 1e-3, 0.02, 100.0])
@pytest.mark.parametrize(
    ("transform", "step"),
    [
        (FakeQuantize(8), 1 / 127),
        (FakeQuantize(8, "affine", group_size=4), 1 / 127),
        (LSQ(8), 1 / 127),
        (FakeQuantizeFloat("float8_e4m3fn"), 1 / 16),
        (FakeQuantizeFloat("float8_e5m2"), 1 / 8),
        (FakeQuantizeFloat("float8_e5m2", group_size=4), 1 / 8),
    ],
    ids=str,
)
def test_scales_of_small_weights_in_half_precision(transform, step, size, dtype):
    """No scale vanishes, and the largest entry is not clipped, or it would have no gradient."""
    W = (torch.randn(6, 8) * size).to(dtype)
    raw, state = transform.right_inverse(W)
    value = transform.forward(raw, state)
    assert value.dtype == dtype
    limit = step * W.double().abs().max() + torch.finfo(dtype).smallest_normal
    assert (value.double() - W.double()).abs().max() <= limit

    def total(W):
        own = {**raw, "weight": W} if isinstance(raw, dict) else W
        return transform.forward(own, state).float().sum()

    assert (grad(total)(W) == 1).all()


def test_lsq_starts_as_in_the_paper():
    W = torch.randn(6, 8)
    raw, _ = LSQ(bits=4, init="lsq").right_inverse(W)
    close(raw["scale"], 2 * W.abs().mean() / math.sqrt(7))
    raw, _ = LSQ(bits=2, group_size=4, init="lsq").right_inverse(W)
    close(raw["scale"], 2 * W.reshape(6, 2, 4).abs().mean(-1))


def test_bitnet():
    """As `WeightQuant` of transformers' integrations/bitnet.py."""
    W = torch.randn(6, 8)
    scale = 1.0 / W.abs().mean().clamp_(min=1e-5)
    expected = (W * scale).round().clamp(-1, 1) / scale
    transform = Ternary(0.5, scale="absmean")
    close(transform.forward(*transform.right_inverse(W)), expected)
    again, state = transform.right_inverse(expected)  # a trained weight stays as it is
    close(transform.forward(again, state), expected)


# Sparsity


def test_nm_sparse_is_what_hardware_takes():
    value = NMSparse().forward(torch.randn(8, 16), {})
    assert (value.reshape(8, 4, 4) != 0).sum(-1).eq(2).all()


@pytest.mark.parametrize("transform", [NMSparse(), TopK(0.5)], ids=str)
def test_the_penalty_of_sr_ste_is_its_gradient(transform):
    """g + decay (1 - mask) X, equation 8 of arXiv 2102.04010."""
    X, weights, decay = torch.randn(4, 8), torch.randn(4, 8), 0.3

    def loss(X):
        value = transform.forward(X, {})
        return (value * weights).sum() + decay / 2 * (X - value.detach()).square().sum()

    mask = transform.forward(X, {}) != 0
    # straight through, the value moves with X, but not in the penalty
    close(grad(loss)(X), weights + decay * torch.where(mask, 0, X))


# Others


@pytest.mark.parametrize("transform", [PositiveDefinite(), CholeskyFactor()], ids=str)
def test_complex_log_determinants(transform):
    X = torch.randn(3, 3, dtype=torch.complex128)
    lower = torch.ones(3, 3).tril() == 1
    strict = torch.ones(3, 3).tril(-1) == 1

    def coordinates(M):
        return torch.cat([M.real[lower], M.imag[strict]])

    def free(x):
        re = torch.zeros(3, 3, dtype=D).index_put(torch.where(lower), x[:6])
        im = torch.zeros(3, 3, dtype=D).index_put(torch.where(strict), x[6:])
        return coordinates(transform.forward(torch.complex(re, im), {}))

    expected = torch.linalg.slogdet(jacrev(free)(coordinates(X))).logabsdet
    close(transform.log_abs_det_jacobian(X, {}), expected)


def test_doubly_stochastic_on_activations():
    """A matrix for each token, from logits that depend on the input: mHC's residual mixing."""
    logits = torch.randn(2, 7, 4, 4, dtype=D)
    H = DoublyStochastic().forward(logits, {})
    assert H.shape == logits.shape
    close(H.sum(-1), torch.ones(2, 7, 4, dtype=D))
    close(H.sum(-2), torch.ones(2, 7, 4, dtype=D))


def test_a_low_temperature_is_a_permutation():
    logits = torch.eye(4)[[2, 0, 3, 1]] + 0.1 * torch.rand(4, 4)
    close(DoublyStochastic(temperature=0.01).forward(logits, {}), torch.eye(4)[[2, 0, 3, 1]])


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_a_ball_is_what_a_solver_finds(p):
    """Against the variational inequality of projections: (X - W, V - W) <= 0 for V in the ball."""
    X = torch.randn(6, dtype=D) * 2
    W = Ball(p, 1.5).forward(*Ball(p, 1.5).right_inverse(X))
    V = torch.randn(500, 6, dtype=D)
    V = 1.5 * V / V.norm(p, dim=-1, keepdim=True)
    assert ((V - W) @ (X - W)).max() <= 1e-12


def nearest_of_the_1_norm(numbers, radius):
    """Duchi's projection in rational numbers."""
    sizes, found = [abs(Fraction(x)) for x in numbers], Fraction(0)
    if sum(sizes) <= radius:
        return numbers
    total = Fraction(0)
    for count, size in enumerate(sorted(sizes, reverse=True), 1):
        total += size
        if size > (total - radius) / count:
            found = (total - radius) / count
    return [math.copysign(max(size - found, 0), x) for size, x in zip(sizes, numbers, strict=True)]


@pytest.mark.parametrize(
    "numbers",
    [
        [1e10, 0.0],
        [-1e10, 1e10],
        [1e6, 1e6 - 0.5, -7.0],
        [3e38, 3e38],
        [3.0, -2.5, 0.5],
        [0.25, -0.25],
        [1e-30, -1e-40],
        [0.0, 0.0],
    ],
    ids=str,
)
def test_the_ball_of_the_1_norm_is_exact_for_entries_of_any_size(numbers):
    X = torch.tensor(numbers)
    expected = nearest_of_the_1_norm(X.tolist(), Fraction(1))
    found = Ball(1).forward(X, {"radius": torch.tensor(1.0)})
    close(found, torch.tensor(expected), rtol=1e-7, atol=0)
