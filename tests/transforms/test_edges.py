"""Values at the edge: zeros, overflow, signs, infinities."""

import pytest
import torch
from torch import nn
from torch.func import grad

import funcparam as fp
from funcparam.transforms import (
    IA3,
    AlmostOrthogonal,
    Chain,
    Mask,
    Orthogonal,
    Sparse,
    SpectralNorm,
    WeightNorm,
    transform,
)


def test_weight_norm_of_a_row_of_zeros_is_kept_and_trains():
    value = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    raw, state = WeightNorm().right_inverse(value)
    assert torch.equal(WeightNorm().forward(raw, state), value)
    g = grad(lambda raw: WeightNorm().forward(raw, state).sum())(raw)
    assert all(t.isfinite().all() for t in g.values())
    assert g["magnitude"][0] != 0


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-24, 1e-19, 1e19, 1e20, 1e37])
def test_weight_norm_keeps_values_whose_squares_vanish_or_overflow(scale, dim):
    value = torch.tensor([[3.0, 4.0], [4.0, 3.0]]).mul(scale)
    norm = WeightNorm(dim)
    raw, state = norm.right_inverse(value)
    torch.testing.assert_close(norm.forward(raw, state), value, rtol=1e-6, atol=1e-44)
    length = torch.linalg.vector_norm(value.double(), dim=None if dim is None else 1 - dim)
    torch.testing.assert_close(
        raw["magnitude"].flatten().double(), length.reshape(-1), rtol=1e-6, atol=2e-45
    )
    ordinary = torch.randn(2, 2)
    assert torch.equal(norm.right_inverse(ordinary)[0]["direction"], ordinary)


@pytest.mark.parametrize("n_power_iterations", [1, None])
def test_spectral_norm_of_zero_is_zero_with_finite_gradients(n_power_iterations):
    norm = SpectralNorm(n_power_iterations=n_power_iterations)
    raw, state = norm.right_inverse(torch.zeros(3, 3))
    value = norm.forward(raw, state)
    assert value.count_nonzero() == 0
    assert grad(lambda raw: norm.forward(raw, state).sum())(raw).abs().amax() <= 1


def test_spectral_norm_recovers_from_zero():
    norm = SpectralNorm()
    _, state = norm.right_inverse(torch.zeros(4, 4))
    state = norm.update(torch.zeros(4, 4), state)
    raw = 0.1 * torch.randn(4, 4)
    for _ in range(200):
        state = norm.update(raw, state)
    assert norm.violation(norm.forward(raw, state), state) < 1e-4


@pytest.mark.parametrize("forward", ["update", "update_stacked"])
def test_power_iteration_keeps_its_vectors_where_a_norm_overflows(forward):
    norm = SpectralNorm()
    value = torch.full((4, 4), 2e19)
    raw, state = norm.right_inverse(value)
    if forward == "update":
        state = norm.update(raw, state)
    else:
        state = {
            name: vector[0]
            for name, vector in norm.update_stacked(
                raw[None], {name: vector[None] for name, vector in state.items()}
            ).items()
        }
    assert norm.violation(norm.forward(raw, state), state) < 1e-4


def test_spectral_norm_of_a_turned_sign_stays_bounded():
    norm = SpectralNorm()
    _, state = norm.right_inverse(torch.eye(2))
    assert norm.forward(-torch.eye(2), state).abs().amax() <= 1


@pytest.mark.parametrize("scale", [1e-13, 1e19])
def test_spectral_norm_at_any_scale(scale):
    value = scale * torch.randn(4, 4)
    norm = SpectralNorm(eps=1e-30)
    raw, state = norm.right_inverse(value)
    assert norm.violation(norm.forward(raw, state), state) < 1e-4


def test_power_iteration_is_constant_to_grad():
    norm = SpectralNorm()
    _, state = norm.right_inverse(torch.randn(3, 3))

    def moved(raw):
        return norm.update(raw, state)["u"].sum()

    assert grad(moved)(torch.randn(3, 3)).count_nonzero() == 0


@pytest.mark.parametrize("map", ["qr", "newton_schulz"])
def test_projections_do_not_see_the_scale_of_raw(map):
    """Weights are small: an identity that is subtracted and added would round them away."""
    project = Orthogonal(map, trivialize=False)
    X = torch.randn(5, 3)
    expected = project.forward(X.double(), {})
    for scale in (1e-9, 0.02, 1e9):
        value = project.forward(scale * X, {}).double()
        torch.testing.assert_close(value, expected, rtol=0, atol=2e-6)
    assert project.forward(torch.zeros(3, 3), {}).isfinite().all()


def test_masked_infinities_are_zero():
    _, state = Mask().right_inverse(torch.tensor([0.0, 1.0]))
    assert torch.equal(
        Mask().forward(torch.tensor([torch.inf, 2.0]), state), torch.tensor([0.0, 2])
    )


def test_a_chain_updates_without_evaluating_maps_for_nothing():
    calls = []

    def counted(raw):
        calls.append(raw)
        return raw

    chain = Chain(transform(counted, lambda v: v), Orthogonal())
    raw, state = chain.right_inverse(torch.eye(3))
    chain.update(raw, state)
    assert calls == []
    chain = Chain(transform(counted, lambda v: v), SpectralNorm())
    chain.update(*chain.right_inverse(torch.eye(3)))
    assert len(calls) == 1


def test_ia3_of_a_base_with_a_row_of_zeros():
    base = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    state = {"base": base}
    assert IA3().violation(2 * base, state) == 0
    assert IA3().violation(base + torch.tensor([[0.5, 0.0], [0.0, 0.0]]), state) == 0.5


def test_a_batch_may_be_empty_where_its_matrices_are_not():
    value = torch.ones(0, 3, 2)
    transform = AlmostOrthogonal(0.5)
    transform.check(value)
    assert transform.forward(*transform.right_inverse(value)).shape == (0, 3, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cayley_of_huge_raw_is_minus_the_base_or_says_that_it_is_singular(dtype):
    cayley = Orthogonal("cayley")
    even = cayley.forward(
        torch.full((4, 4), 1e20, dtype=dtype), {"base": torch.eye(4, dtype=dtype)}
    )
    torch.testing.assert_close(even, -torch.eye(4, dtype=dtype))

    raw, base = torch.full((3, 3), 1e20, dtype=dtype), torch.eye(3, dtype=dtype)
    text = f"raw well below .* in {str(dtype)[6:]}; got larger entries. Lower the learning"
    with pytest.raises(torch.linalg.LinAlgError, match=text):
        cayley.forward(raw, {"base": base})
    with pytest.raises(torch.linalg.LinAlgError, match=text):
        torch.func.vmap(cayley.forward)(raw[None], {"base": base[None]})
    assert cayley.forward(raw * torch.nan, {"base": base}).isnan().all()


def test_compiled_cayley_of_huge_raw_is_not_finite():
    raw, base = torch.full((3, 3), 1e20), torch.eye(3)
    compiled = torch.compile(Orthogonal("cayley").forward, backend="aot_eager", fullgraph=True)
    assert not compiled(raw, {"base": base}).isfinite().all()


@pytest.mark.usefixtures("entries_are_far")
def test_cayley_of_huge_raw_is_not_finite_on_a_device():
    raw, base = torch.full((2, 3, 3), 1e20), torch.eye(3).repeat(2, 1, 1)
    raw[1] = 0.5
    value = Orthogonal("cayley").forward(raw, {"base": base})
    assert not value[0].isfinite().all()
    assert value[1].isfinite().all()


def test_half_precision_takes_state_by_name():
    raw, state = SpectralNorm().right_inverse(torch.eye(3))
    raw = raw.bfloat16()
    new = SpectralNorm().update(raw, state=state)
    assert new["u"].dtype == new["v"].dtype == torch.float32
    assert SpectralNorm().forward(raw, state=state).dtype == torch.bfloat16


@pytest.mark.parametrize("transform", [Mask(), Sparse(3)], ids=str)
def test_masks_may_be_numbers(transform):
    """Casts of all buffers make numbers of a mask, and torch averages numbers only."""
    net = nn.Linear(3, 2)
    with torch.no_grad():
        net.weight[0, 0] = 0.0
    model = fp.Parametrized(net, fp.parametrize(net, {"weight": transform}))
    expected = model.values()["weight"].detach()
    model.type(torch.float64)
    assert model.state.weight.mask.dtype == torch.float64
    torch.testing.assert_close(model.values()["weight"], expected.double())
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for _ in range(3):
        average.update_parameters(model)
    torch.testing.assert_close(average.module.values()["weight"], expected.double())
    value, state = transform.forward(*transform.right_inverse(expected)), {"mask": expected != 0}
    numbers = {"mask": 3.0 * state["mask"]}
    assert transform.violation(value, numbers) == transform.violation(value, state) == 0
