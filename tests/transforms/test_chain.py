"""Chains: log-determinants over free coordinates, violations, adapters among the parts."""

import pytest
import torch
from torch import nn

import funcparam as fp
from funcparam.transforms import (
    Affine,
    Cat,
    Chain,
    Frozen,
    Gain,
    Hermitian,
    Identity,
    LoRA,
    Mask,
    Ordered,
    Orthogonal,
    Permute,
    Positive,
    PositiveDefinite,
    Product,
    Reshape,
    Simplex,
    Skew,
    Sparse,
    SpectralNorm,
    Stack,
    Sum,
    Symmetric,
    Transpose,
    Triangular,
    UnitNorm,
)

D = torch.float64


def upper(W):
    return W[torch.ones_like(W).triu() == 1]


def lower(W):
    return W[torch.ones_like(W).tril() == 1]


def strictly_lower(W):
    return W[torch.ones_like(W).tril(-1) == 1]


def strictly_upper(W):
    return strictly_lower(W.mT)


def flipped(W):
    return lower(W.mT)


FREE = [
    (Chain(Symmetric(), Positive("exp")), (2, 2), upper, upper),
    (Chain(Symmetric(), Positive()), (3, 3), upper, upper),
    (Chain(Positive(), Symmetric()), (3, 3), upper, upper),
    (Chain(Skew(), Affine(2.0)), (2, 2), strictly_lower, strictly_lower),
    (Chain(Skew(), Positive("square"), Transpose()), (3, 3), strictly_lower, strictly_upper),
    (Chain(Transpose(), Affine(3.0), PositiveDefinite(), Affine(2.0)), (3, 3), flipped, lower),
    (Chain(Simplex("stick_breaking"), Affine(2.0)), (2,), lambda X: X, lambda W: W[:-1]),
    (Chain(Triangular(upper=True), Affine(2.0)), (3, 3), upper, upper),
    (Chain(Chain(Affine(2.0), Triangular()), Permute((1, 0))), (3, 2), lower, flipped),
    (Chain(Mask(), Affine(2.0), Reshape((2, 2), (4,))), (2, 2), strictly_lower, lambda W: W[2:3]),
    (Chain(Ordered(), Affine(2.0), Positive("exp"), Ordered()), (3,), lambda X: X, lambda W: W),
]  # fmt: skip


@pytest.mark.parametrize(
    ("chain", "shape", "of_raw", "of_value"),
    FREE,
    ids=lambda x: getattr(x, "__name__", str(x)[:60]),
)
def test_log_determinants_are_over_the_free_coordinates(chain, shape, of_raw, of_value):
    raw = torch.randn(shape, dtype=D)
    state = {f"{i}.{k}": t for i, part in enumerate(chain.parts) for k, t in _state(part).items()}
    if Mask() in chain.parts:
        state["0.mask"] = torch.ones(2, 2).tril(-1) == 1
    places = of_raw(torch.arange(raw.numel()).reshape(shape))

    def value(free):
        return of_value(chain.forward(raw.flatten().scatter(0, places, free).reshape(shape), state))

    jacobian = torch.func.jacrev(value)(raw.flatten()[places])
    expected = torch.linalg.slogdet(jacobian).logabsdet
    found = chain.log_abs_det_jacobian(raw, state)
    torch.testing.assert_close(found, expected)
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way, which users may look for
        gradient = torch.func.grad(chain.log_abs_det_jacobian)(raw, state)
    assert gradient.isfinite().all()


def _state(part):
    if isinstance(part, Chain):
        return {f"{i}.{k}": t for i, p in enumerate(part.parts) for k, t in _state(p).items()}
    number = torch.tensor([getattr(part, "scale", 0.0), getattr(part, "shift", 0.0)], dtype=D)
    return dict(zip(("scale", "shift"), number, strict=True)) if isinstance(part, Affine) else {}


def test_log_determinant_of_what_has_nothing_free_is_zero():
    chain = Chain(Frozen(), Affine(2.0))
    assert chain.log_abs_det_jacobian(*chain.right_inverse(torch.ones(3))) == 0


def test_log_determinant_behind_sparse_counts_its_entries():
    chain = Chain(Sparse(2), Affine(2.0), Transpose(), Positive("exp"))
    raw, state = chain.right_inverse(torch.tensor([[3.0, 2.0], [1.0, 4.0]], dtype=D))
    expected = 2 * torch.tensor(2.0, dtype=D).log() + 2 * raw.sum()
    torch.testing.assert_close(chain.log_abs_det_jacobian(raw, state), expected)


def test_hermitian_values_do_not_say_what_is_free_in_front_of_others():
    chain = Chain(Affine(2.0), Hermitian())
    raw = torch.randn(3, 3, dtype=D)
    state = {"0.scale": torch.tensor(2.0, dtype=D), "0.shift": torch.tensor(0.0, dtype=D)}
    found = chain.log_abs_det_jacobian(raw, state)
    torch.testing.assert_close(found, 9 * torch.tensor(2.0, dtype=D).log())
    with pytest.raises(NotImplementedError, match="does not say which entries are free"):
        Chain(Hermitian(), Transpose()).log_abs_det_jacobian(raw, {})


def test_log_determinant_behind_a_cat_of_chains():
    parts = Cat([Chain(Symmetric(), Transpose()), Positive(), Chain(Transpose(), Positive())])
    chain = Chain(parts, Affine(2.0))
    value = torch.rand(6, 2, dtype=D) + 0.1
    raw, state = chain.right_inverse(value)
    alone = parts.log_abs_det_jacobian(raw, {})
    found = chain.log_abs_det_jacobian(raw, state)
    torch.testing.assert_close(found, alone + (3 + 4 + 4) * torch.tensor(2.0, dtype=D).log())


@pytest.mark.parametrize(
    "chain",
    [Chain(Symmetric(), Ordered()), Chain(Ordered(), Symmetric()), Chain(Skew(), Triangular())],
    ids=str,
)
def test_two_that_mix_entries_are_refused_unless_all_are_free_between_them(chain):
    with pytest.raises(NotImplementedError, match="not every entry of what .* is free"):
        chain.log_abs_det_jacobian(torch.randn(2, 2), {})


def test_a_transform_that_does_not_say_what_is_free_is_refused_in_a_chain():
    class Upper(fp.Transform[torch.Tensor]):
        def __repr__(self):
            return "Upper()"

        def forward(self, raw, state):
            return raw.triu()

        def right_inverse(self, value, *, generator=None):
            return value.triu(), {}

        def violation(self, value, state):
            return value.tril(-1).abs().amax()

        def log_abs_det_jacobian(self, raw, state):
            return raw.new_zeros(())

    raw = torch.randn(2, 2)
    assert Chain(Upper()).log_abs_det_jacobian(raw, {}) == 0
    with pytest.raises(NotImplementedError, match="does not say which entries are free"):
        Chain(Upper(), Positive()).log_abs_det_jacobian(raw, {})


# violation


def test_violation_in_front_of_an_affine_is_measured():
    chain = Chain(SpectralNorm(), Affine(scale=2.0))
    value = torch.diag(torch.tensor([4.33, 1.0]))
    _, state = chain.right_inverse(torch.eye(2))
    assert chain.violation(value, state).item() == pytest.approx(4.33 / 2 - 1)
    assert chain.violation(value, {}).item() == pytest.approx(4.33 / 2 - 1)
    state["1.scale"] = torch.tensor(4.33)  # the one in state counts
    assert chain.violation(value, state) < 1e-6


@pytest.mark.parametrize(
    ("chain", "value"),
    [
        (Chain(Orthogonal(), Affine(0.5)), torch.eye(3) / 2),
        (Chain(Orthogonal(), Affine(-0.5, 1.0), Transpose()), 1 - torch.eye(3) / 2),
        (Chain(Orthogonal(), Chain(Affine(0.5), Transpose())), torch.eye(3) / 2),
        (Chain(UnitNorm(), Affine(2.0), Affine(0.25)), torch.eye(3) / 2),
    ],
    ids=str,
)
def test_violation_behind_affine_maps_is_that_of_what_is_scaled(chain, value):
    _, state = chain.right_inverse(value)
    assert chain.violation(value, state) < 1e-6
    assert chain.violation(3 * value, state) > 0.5


def test_a_chain_that_constrains_nothing_has_no_violation():
    chain = Chain(Affine(2.0), Transpose(), Affine(1.0, 3.0))
    assert chain.violation(torch.randn(2, 3), {}) == 0


# adapters among the parts

ADAPTED = [
    (LoRA(1), (12, 4), {"A", "B"}),
    (Cat([LoRA(1), Frozen(), LoRA(1)]), (12, 4), {"0.A", "0.B", "2.A", "2.B"}),
    (Cat([LoRA(1), Orthogonal(), LoRA(1)]), (12, 4), {"0.A", "0.B", "2.A", "2.B"}),
    (Stack([LoRA(1), Positive()]), (2, 3, 3), {"0.A", "0.B"}),
    (Chain(LoRA(1), Transpose()), (4, 12), {"A", "B"}),
    (Chain(Cat([LoRA(1), Positive()]), Affine(2.0)), (4, 4), {"0.A", "0.B"}),
    (Cat([Chain(LoRA(1), Transpose()), Chain(Affine(2.0), Positive())]), (4, 2), {"0.A", "0.B"}),
    (Chain(Positive(), Affine(2.0)), (4, 4), set()),
    (Sum(Frozen(), Symmetric()), (3, 3), {"1"}),
    (Sum(Positive(), Symmetric()), (3, 3), set()),
    (Product(Frozen(), Identity(), inner="in"), (3, 4), {"1"}),
    (Gain(LoRA(1)), (3, 3), {"gain", "0.A", "0.B"}),
    (Gain(Frozen()), (3, 3), {"gain"}),
    (Gain(Orthogonal()), (3, 3), set()),
]


@pytest.mark.parametrize(
    ("transform", "shape", "trained"),
    ADAPTED,
    ids=lambda x: str(sorted(x) if isinstance(x, set) else x),
)
def test_adapters_train_on_a_frozen_weight_wherever_they_stand(transform, shape, trained):
    net = nn.Module()
    net.weight = nn.Parameter(torch.rand(shape) + 0.5, requires_grad=False)
    model = fp.Parametrized(net, fp.parametrize(net, {"weight": transform}))
    names = {
        name.removeprefix("raw.weight.")
        for name, tensor in model.named_parameters()
        if tensor.requires_grad
    }
    assert names == trained


def test_lora_of_query_and_value_of_a_frozen_attention_trains():
    attention = nn.MultiheadAttention(4, 1).requires_grad_(False)
    rules = {"in_proj_weight": Cat([LoRA(1), Frozen(), LoRA(1)])}
    model = fp.Parametrized(attention, fp.parametrize(attention, rules))
    optimizer = torch.optim.SGD([t for t in model.parameters() if t.requires_grad], lr=1.0)
    x = torch.randn(3, 1, 4)
    before = model.values()["in_proj_weight"].clone()
    model(x, x, x)[0].square().sum().backward()
    optimizer.step()
    moved = (model.values()["in_proj_weight"] != before).reshape(3, -1).any(1)
    assert moved.tolist() == [True, False, True]
