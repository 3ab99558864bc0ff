"""Structured, quantized and adapted weights: values and derivatives of peers, and refusals."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torch.distributions import transforms as td
from torch.func import grad

import funcparam as fp
from funcparam.transforms import (
    AOL,
    IA3,
    OFT,
    Affine,
    BlockDiagonal,
    Chain,
    Circulant,
    DoRA,
    DoublyStochastic,
    FakeQuantize,
    FakeQuantizeFloat,
    Identity,
    Kronecker,
    LInfLipschitz,
    LoHa,
    LoRA,
    LowRank,
    Monarch,
    Orthogonal,
    Permute,
    Positive,
    PSDLowRank,
    Reshape,
    Simplex,
    SpectralNorm,
    Symmetric,
    Ternary,
    Toeplitz,
    Transpose,
    UnitNorm,
    VeRA,
    WeightNorm,
    WeightStandardization,
)

close = torch.testing.assert_close


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


# structure


def test_values_are_those_of_scipy_and_torch():
    c, r = randn(4), randn(5)
    close(Circulant().forward(c, {}), torch.from_numpy(scipy.linalg.circulant(c.numpy())))
    expected = scipy.linalg.toeplitz(c.numpy(), np.r_[0, r.numpy()])
    close(Toeplitz().forward({"column": c, "row": r}, {}), torch.from_numpy(expected))
    blocks = randn(3, 2, 4)
    close(BlockDiagonal(3).forward(blocks, {}), torch.block_diag(*blocks))
    A, B = randn(2, 3), randn(4, 5)
    close(Kronecker((2, 3)).forward({"A": A, "B": B}, {}), torch.kron(A, B))


def test_circulant_is_circular_convolution():
    c, x = randn(7), randn(7)
    expected = torch.fft.ifft(torch.fft.fft(c) * torch.fft.fft(x)).real
    close(Circulant().forward(c, {}) @ x, expected)


def test_a_positive_semidefinite_value_of_lower_rank_is_kept_and_can_grow():
    start = torch.outer(torch.ones(4), torch.ones(4)).double()
    raw, state = PSDLowRank(3).right_inverse(start)
    close(PSDLowRank(3).forward(raw, state), start, rtol=0, atol=1e-14)
    target = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0])).double()
    optimizer = torch.optim.Adam([raw.requires_grad_()], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        (PSDLowRank(3).forward(raw, state) - target).square().sum().backward()
        optimizer.step()
    close(PSDLowRank(3).forward(raw, state).detach(), target, rtol=0, atol=1e-2)


@pytest.mark.parametrize("transform", [LowRank(2), Kronecker((2, 2))], ids=str)
def test_zero_is_kept_and_trains(transform):
    raw, state = transform.right_inverse(torch.zeros(4, 4))
    assert transform.forward(raw, state).count_nonzero() == 0
    g = grad(lambda raw: transform.forward(raw, state).sum())(raw)
    assert any(t.count_nonzero() > 0 for t in g.values())


def test_a_value_of_lower_rank_can_grow():
    value = torch.outer(torch.arange(1.0, 5.0), torch.ones(4))
    raw, state = LowRank(3).right_inverse(value)
    close(LowRank(3).forward(raw, state), value)
    assert (raw["A"].norm(dim=1) > 0.1).all()


# norms


def test_weight_standardization_is_the_papers():
    W = randn(4, 3, 2, 2)
    rows = W.reshape(4, -1)
    expected = (rows - rows.mean(1, keepdim=True)) / (
        rows.var(1, keepdim=True, correction=0)
    ).sqrt()
    close(WeightStandardization().forward(W, {}), expected.reshape(W.shape))


def test_weight_standardization_of_what_does_not_vary_is_zero_with_finite_gradients():
    W = torch.full((2, 3), 0.1, requires_grad=True)
    value = WeightStandardization().forward(W, {})
    assert value.abs().max() < 1e-2
    value[0, 0].backward()
    assert W.grad.isfinite().all()


def test_l_inf_lipschitz_is_the_papers():
    X, c = randn(5, 4), torch.tensor(0.3, dtype=torch.float64)
    sums = X.abs().sum(1)
    expected = X * torch.minimum(torch.ones(5), nn.functional.softplus(c) / sums).unsqueeze(1)
    close(LInfLipschitz().forward({"weight": X, "bound": c}, {}), expected)


def test_l_inf_lipschitz_bounds_a_convolution():
    raw, state = LInfLipschitz().right_inverse(randn(3, 2, 3, 3))
    bound = torch.tensor(0.5, dtype=torch.float64)
    W = LInfLipschitz().forward({**raw, "bound": bound}, state)
    x, y = randn(1, 2, 8, 8), randn(1, 2, 8, 8)
    change = nn.functional.conv2d(x, W) - nn.functional.conv2d(y, W)
    assert change.abs().max() <= nn.functional.softplus(bound) * (x - y).abs().max()


def test_l_inf_lipschitz_of_zero_trains():
    raw, state = LInfLipschitz().right_inverse(torch.zeros(2, 3))
    g = grad(lambda raw: LInfLipschitz().forward(raw, state).sum())(raw)
    assert (g["weight"] == 1).all()


@pytest.mark.parametrize("shape", [(4, 4), (6, 3), (3, 6)])
def test_aol_has_spectral_norm_at_most_one(shape):
    for scale in (1e-200, 1e-8, 1, 1e150):
        value = AOL().forward(scale * randn(*shape), {})
        assert scipy.linalg.svdvals(value.numpy())[0] <= 1 + 1e-14


def test_aol_keeps_orthogonal_matrices_and_zero_columns():
    Q = torch.linalg.qr(randn(5, 5)).Q[:, :3]
    close(AOL().forward(*AOL().right_inverse(Q)), Q)
    Q[:, 1] = 0
    close(AOL().forward(*AOL().right_inverse(Q)), Q)
    assert AOL().forward(*AOL().right_inverse(torch.zeros(3, 2))).count_nonzero() == 0


def test_aol_divides_what_is_smaller_by_its_norm():
    """Its image is smaller than the spectral norms of at most 1 that `violation` asks for."""
    Q = torch.linalg.qr(randn(4, 4)).Q
    assert AOL().violation(Q / 2, {}) == 0
    close(AOL().forward(*AOL().right_inverse(Q / 2)), Q)


def test_doubly_stochastic_projection_is_sinkhorns_limit():
    value = randn(5, 5).abs() + 0.1
    expected = value.numpy().copy()
    for _ in range(1000):
        expected /= expected.sum(1, keepdims=True)
        expected /= expected.sum(0, keepdims=True)
    transform = DoublyStochastic(iterations=100)
    close(transform.forward(*transform.right_inverse(value)), torch.from_numpy(expected))


def test_permutations_are_kept():
    P = torch.eye(5)[torch.randperm(5)]
    close(DoublyStochastic().forward(*DoublyStochastic().right_inverse(P)), P)
    assert DoublyStochastic().violation(2 * P, {}) == 1
    assert DoublyStochastic().violation(P - 0.5, {}) >= 0.5


# adapters: what peft computes, by its formulas


def peft_weight(base, A, B, scaling, magnitude=None):
    """LoRA's `get_delta_weight` and DoRA's `get_weight_norm`, for Linear and Conv2d."""
    if base.ndim == 2:
        delta = B @ A * scaling
    elif base.shape[2:] == (1, 1):
        delta = (B[:, :, 0, 0] @ A[:, :, 0, 0])[..., None, None] * scaling
    else:
        delta = nn.functional.conv2d(A.permute(1, 0, 2, 3), B).permute(1, 0, 2, 3) * scaling
    if magnitude is None:
        return base + delta
    norm = torch.linalg.vector_norm(base + delta, dim=tuple(range(1, base.ndim)), keepdim=True)
    return magnitude.reshape(norm.shape) / norm * (base + delta)


@pytest.mark.parametrize(
    ("layer", "a", "b"),
    [
        (nn.Linear(5, 4), (2, 5), (4, 2)),
        (nn.Conv2d(3, 6, 3), (2, 3, 3, 3), (6, 2, 1, 1)),
        (nn.Conv2d(3, 6, 1), (2, 3, 1, 1), (6, 2, 1, 1)),
    ],
    ids=str,
)
def test_adapters_equal_peft(layer, a, b):
    W = layer.weight.detach().double()
    A, B, magnitude = randn(*a), randn(*b), randn(len(W)).abs()
    factors = {"A": A.flatten(1), "B": B.flatten(1)}
    _, state = LoRA(2, 3.0).right_inverse(W)
    close(LoRA(2, 3.0).forward(factors, state), peft_weight(W, A, B, 1.5))
    raw, state = DoRA(2, 3.0).right_inverse(W)
    close(DoRA(2, 3.0).forward(raw, state), W)
    value = DoRA(2, 3.0).forward({**factors, "magnitude": magnitude}, state)
    close(value, peft_weight(W, A, B, 1.5, magnitude))
    close(value.flatten(1).norm(dim=1), magnitude)


def test_dora_keeps_a_row_of_zeros_with_finite_gradients():
    value = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    raw, state = DoRA(1).right_inverse(value)
    assert torch.equal(DoRA(1).forward(raw, state), value)
    g = grad(lambda raw: DoRA(1).forward(raw, state).sum())(raw)
    assert all(t.isfinite().all() for t in g.values())


def test_ia3_scales_outputs_or_inputs():
    layer, x = nn.Linear(3, 2).double(), randn(4, 3)
    for dim, scaled in ((0, lambda s: s * layer(x)), (1, lambda s: layer(s * x))):
        s = randn(layer.weight.shape[dim])
        bias = layer.bias * s if dim == 0 else layer.bias
        W = IA3(dim).forward({"factor": s}, {"base": layer.weight})
        close(nn.functional.linear(x, W, bias), scaled(s))
    value = randn(4, 3)
    assert IA3(1).violation(value * randn(3), {"base": value}) < 1e-12
    assert IA3(1).violation(value + 1, {"base": value}) > 1e-3
    with pytest.raises(ValueError, match="expects state with a 'base'"):
        IA3().violation(value, {})


def test_adapters_equal_pefts_other_formulas():
    W = randn(4, 6)
    raw, state = VeRA(3).right_inverse(W)
    raw = {name: randn(*t.shape) for name, t in raw.items()}
    A, B = state["A"], state["B"]
    expected = W + torch.diag(raw["b"]) @ B @ torch.diag(raw["d"]) @ A
    close(VeRA(3).forward(raw, state), expected)
    raw, state = LoHa(2, 3.0).right_inverse(W)
    raw = {name: randn(*t.shape) for name, t in raw.items()}
    expected = W + 1.5 * (raw["B1"] @ raw["A1"]) * (raw["B2"] @ raw["A2"])
    close(LoHa(2, 3.0).forward(raw, state), expected)


def test_oft_turns_inputs():
    W = randn(4, 6)
    raw, state = OFT(2).right_inverse(W)
    raw = randn(*raw.shape)
    A = raw.tril() - raw.tril().mT
    eye = torch.eye(3, dtype=torch.float64)
    Q = torch.block_diag(*(torch.linalg.solve(eye - a / 2, eye + a / 2) for a in A))
    value = OFT(2).forward(raw, state)
    close(value, W @ Q.mT)
    assert OFT(2).violation(value, state) < 1e-12
    assert OFT(2).violation(W + 1, state) > 0.01
    assert OFT(2).violation(W @ torch.linalg.qr(randn(6, 6)).Q, state) > 0.01
    with pytest.raises(ValueError, match="expects state with a 'base'"):
        OFT(2).violation(value, {})


def test_violation_of_adapters_is_the_rank_beyond():
    W = randn(6, 7)
    for transform, rank in ((VeRA(2), 2), (LoHa(1), 1)):
        _, state = transform.right_inverse(W)
        assert transform.violation(W, state) < 1e-12
        delta = randn(6, 7)
        expected = scipy.linalg.svdvals(delta.numpy())[rank]
        assert transform.violation(W + delta, state).item() == pytest.approx(expected)
        with pytest.raises(ValueError, match="expects state with a 'base'"):
            transform.violation(W, {})


def test_monarch_is_two_block_diagonals_and_permutations():
    L, R = randn(2, 3, 2), randn(2, 2, 4)
    x = randn(8)
    parts = (BlockDiagonal(2).forward(R, {}) @ x).reshape(2, 2).mT.flatten()
    expected = (BlockDiagonal(2).forward(L, {}) @ parts).reshape(2, 3).mT.flatten()
    close(Monarch(2).forward({"L": L, "R": R}, {}) @ x, expected)


# quantization


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("scheme", ["narrow", "full", "affine"])
@pytest.mark.parametrize("dim", [None, 0, 1])
def test_fake_quantize_equals_torch(bits, scheme, dim):
    transform = FakeQuantize(bits, scheme, dim)
    _, state = transform.right_inverse(torch.randn(6, 7))
    W = 1.5 * torch.randn(6, 7)  # some of it outside of the range
    W.requires_grad_()
    half = 2 ** (bits - 1)
    low, high = {
        "narrow": (1 - half, half - 1),
        "full": (-half, half - 1),
        "affine": (0, 2 * half - 1),
    }[scheme]
    zero_point = state["zero_point"].int()
    if dim is None:
        theirs = torch.fake_quantize_per_tensor_affine(W, state["scale"], zero_point, low, high)
    else:
        theirs = torch.fake_quantize_per_channel_affine(
            W, state["scale"], zero_point, dim, low, high
        )
    ours = transform.forward(W, state)
    close(ours, theirs)
    weights = torch.randn(6, 7)
    close(*(torch.autograd.grad((out * weights).sum(), W)[0] for out in (ours, theirs)))


def test_fake_quantize_range_is_the_observers():
    W = torch.randn(5, 6)
    low, high = W.min().clamp_max(0), W.max().clamp_min(0)
    _, state = FakeQuantize(8, "affine").right_inverse(W)
    close(state["scale"], (high - low) / 255)
    assert state["zero_point"] == -(low / state["scale"]).round()
    _, state = FakeQuantize().right_inverse(W)
    close(state["scale"], W.abs().max() / 127)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dim", [None, 0])
@pytest.mark.parametrize("scheme", ["full", "affine"])
def test_fake_quantize_schemes_are_those_of_torchs_observers(scheme, dim, bits):
    from torch.ao.quantization import MinMaxObserver, PerChannelMinMaxObserver

    W = torch.randn(5, 6)
    half = 2 ** (bits - 1)
    low, dtype = (-half, torch.qint8) if scheme == "full" else (0, torch.quint8)
    kind = "symmetric" if scheme == "full" else "affine"
    options = {"dtype": dtype, "quant_min": low, "quant_max": low + 2 * half - 1}
    if dim is None:
        observer = MinMaxObserver(qscheme=getattr(torch, f"per_tensor_{kind}"), **options)
    else:
        scheme_of_channels = getattr(torch, f"per_channel_{kind}")
        observer = PerChannelMinMaxObserver(ch_axis=dim, qscheme=scheme_of_channels, **options)
    observer(W)
    scale, zero_point = observer.calculate_qparams()
    _, state = FakeQuantize(bits, scheme, dim).right_inverse(W)
    assert torch.equal(state["scale"].reshape(-1), scale)
    assert torch.equal(state["zero_point"].reshape(-1), zero_point.float())


def test_fake_quantize_rounds_a_grid_that_does_not_reach_its_ends_to_its_own():
    on_a_grid = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
    transform = FakeQuantize(bits=3)
    expected = torch.tensor([-2.0, -4 / 3, 0.0, 4 / 3, 2.0])  # steps of 2 / 3
    close(transform.forward(*transform.right_inverse(on_a_grid)), expected)
    reaching = torch.tensor([-3.0, -1.0, 0.0, 1.0, 2.0])
    assert torch.equal(transform.forward(*transform.right_inverse(reaching)), reaching)


def test_fake_quantize_scale_has_the_derivative_of_learned_step_size():
    W, step = randn(50), torch.tensor(0.4, dtype=torch.float64)
    zero = torch.zeros_like(step)
    transform = FakeQuantize(bits=3)

    def loss(step):
        return transform.forward(W, {"scale": step, "zero_point": zero}).sum()

    steps = W / step
    inside = steps.round().abs() <= 3
    expected = torch.where(inside, steps.round() - steps, 3 * steps.sign()).sum()
    close(grad(loss)(step), expected)


@pytest.mark.parametrize("value", [torch.zeros(3, 2), torch.full((3, 2), 1e-45)])
def test_quantization_of_next_to_nothing_is_finite(value):
    for transform in (FakeQuantize(), FakeQuantize(scheme="affine"), Ternary()):
        close(transform.forward(*transform.right_inverse(value)), value)


def test_violation_of_a_grid_is_the_distance_from_it():
    transform = FakeQuantize(bits=2)
    value = torch.tensor([-1.0, 0.0, 1.0])
    _, state = transform.right_inverse(value)
    assert transform.violation(value, state) == 0
    assert transform.violation(torch.tensor([0.25, 3.0]), state) == 2
    close(Ternary().violation(torch.tensor([0.0, -2.0, 4.0]), {}), torch.tensor(1.0))


@pytest.mark.parametrize(
    "transform",
    [
        FakeQuantize(),
        FakeQuantize(4, "affine", dim=0),
        FakeQuantize(4, group_size=2),
        FakeQuantizeFloat("float8_e4m3fn"),
        FakeQuantizeFloat("float4_e2m1fn", group_size=2, power_of_two=True),
    ],
    ids=str,
)
def test_the_range_follows_raw_in_training(transform):
    target, raw = randn(3, 4), 0.01 * randn(3, 4)
    state = transform.right_inverse(raw)[1]
    for _ in range(300):
        state = transform.update(raw, state)
        gradient = grad(lambda X, s: (transform.forward(X, s) - target).square().sum())(raw, state)
        raw = raw - 0.1 * gradient
    nearest = transform.project(target, transform.right_inverse(target)[1])
    error = (transform.forward(raw, state) - target).abs().max()
    assert error <= 3 * (nearest - target).abs().max() + 1e-2  # it goes to and fro between levels


# plumbing


def test_plumbing_equals_torch_distributions():
    x = randn(2, 6)
    affine = td.AffineTransform(0.5, -2.0)
    raw, state = Affine(-2.0, 0.5).right_inverse(affine(x))
    close(raw, x)
    close(
        Affine(-2.0, 0.5).log_abs_det_jacobian(x, state),
        affine.log_abs_det_jacobian(x, affine(x)).sum(),
    )
    reshape = td.ReshapeTransform((6,), (3, 2))
    close(Reshape((6,), (3, 2)).forward(x, {}), reshape(x))
    y = randn(2, 3, 4)
    close(Permute((2, 0, 1)).forward(y, {}), y.permute(2, 0, 1))


def test_an_orthogonal_convolution():
    conv = nn.Conv2d(3, 8, 3)
    p = fp.parametrize(conv, {"weight": Chain(Orthogonal(), Reshape((8, 27), (8, 3, 3, 3)))})
    raw, state = p.init(conv)
    assert raw["weight"].shape == (8, 27)
    W = p(raw, state)["weight"].flatten(1)
    close(W @ W.mT, torch.eye(8))


def test_columns_that_sum_to_one():
    transform = Chain(Simplex(), Transpose())
    close(transform.forward(randn(3, 4), {}).sum(0), torch.ones(3).double())


def test_a_chain_checks_the_shape_that_each_part_returns():
    chain = Chain(Symmetric(), Reshape((4, 4), (2, 8)))
    chain.check(torch.ones(2, 8))
    with pytest.raises(ValueError, match="ends in"):
        chain.check(torch.ones(4, 4))
    with pytest.raises(ValueError, match="square"):
        Chain(Symmetric(), Reshape((2, 8), (4, 4))).check(torch.ones(4, 4))


def test_a_chain_says_which_part_has_named_raw():
    chain = Chain(Identity(), WeightStandardization(), WeightNorm(), Identity(), Identity())
    with pytest.raises(ValueError, match=r"got WeightNorm\(dim=0\) at position 2"):
        chain.right_inverse(torch.ones(2, 2))


def test_the_violation_of_a_chain_looks_through_moved_entries():
    kernel = Chain(Orthogonal(), Reshape((8, 27), (8, 3, 3, 3)), Permute((1, 0, 2, 3)))
    value = randn(3, 8, 3, 3)
    expected = Orthogonal().violation(value.transpose(0, 1).reshape(8, 27), {})
    close(kernel.violation(value, {}), expected)
    assert kernel.violation(kernel.forward(*kernel.right_inverse(value)), {}) < 1e-12
    assert Chain(Transpose(), Reshape((2, 3), (6,))).violation(randn(6), {}) == 0
    assert Chain(Orthogonal(), Positive(), Transpose()).violation(-torch.eye(2), {}) == 1
    assert Chain(Orthogonal(), Identity()).violation(2 * torch.eye(2), {}) == 3


def test_the_violation_of_a_chain_is_0_where_the_chain_returns_to():
    chain = Chain(UnitNorm(), SpectralNorm(n_power_iterations=None))
    value = chain.forward(randn(3, 4), {})
    assert chain.violation(value, {}) < 1e-12
    raw, _ = SpectralNorm(n_power_iterations=None).right_inverse(value)
    assert UnitNorm().violation(raw, {}) > 0.01  # so it says nothing about the value
    close(chain.forward(*chain.right_inverse(value)), value)
    asymmetric = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert Chain(Symmetric(), Positive()).violation(asymmetric, {}) == 0
