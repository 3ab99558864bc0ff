"""Extreme raw and ill-conditioned values on manifolds of matrices."""

import numpy as np
import pytest
import torch
from hypothesis import given

from funcparam.transforms import (
    AlmostOrthogonal,
    FixedRank,
    Grassmann,
    Invertible,
    SpecialLinear,
    Stiefel,
    Unitary,
)
from tests.cases import rebuild, tensors
from tests.effort import examples
from tests.transforms.test_properties_constraints import entries
from tests.transforms.test_properties_structured import (
    conditioned,
    holds,
    largest_entry,
    named,
)

DTYPES = [torch.float64, torch.float32]

# A transform, a shape of its value, its raw, and how many roundings of the largest entry (at
# least 1) a value may be off by.
FAMILIES = [
    (Stiefel(), (5, 3), entries(5, 3), 16),
    (Stiefel(), (2, 4), entries(2, 4), 16),
    (Stiefel(), (4, 4), entries(4, 4), 16),
    (Grassmann(), (5, 2), entries(5, 2), 32),
    (Grassmann(), (3, 4), entries(3, 4), 32),
    (FixedRank(2), (4, 5), named(U=(4, 2), S=(2,), V=(5, 2)), 16),
    (AlmostOrthogonal(0.4), (4, 3), named(U=(4, 3), S=(3,), V=(3, 3)), 16),
    (AlmostOrthogonal(1.0), (3, 4), named(U=(3, 3), S=(3,), V=(4, 3)), 16),
    (Invertible(), (4, 4), entries(4, 4), 16),
    (SpecialLinear(), (3, 3), entries(3, 3), 16),
]


def test_a_determinant_of_an_ill_conditioned_value():
    raw = torch.tensor([[-1, -10, -1], [-1, -100, -1], [-1, -1, 10.0]])
    torch.manual_seed(0)
    _, state = SpecialLinear().right_inverse(torch.randn(3, 3, dtype=torch.float64))
    for dtype in DTYPES:
        holds(SpecialLinear(), raw, state, 16, dtype, torch.linalg.cond)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("transform", "shape", "raws", "roundings"), FAMILIES, ids=[str(row[0]) for row in FAMILIES]
)
def test_extreme_raw(transform, shape, raws, roundings, dtype):
    torch.manual_seed(0)
    _, state = transform.right_inverse(torch.randn(shape, dtype=torch.float64))

    # that of a determinant is off by the rounding of entries times the condition number
    size = torch.linalg.cond if isinstance(transform, SpecialLinear) else largest_entry

    @examples(60)
    @given(raws)
    def check(raw):
        holds(transform, raw, state, roundings, dtype, size)

    check()


@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex64], ids=str)
@pytest.mark.parametrize("map", ["matrix_exp", "cayley"])
def test_unitary_with_large_raw(map, dtype):
    raw, state = Unitary(map).right_inverse(torch.randn(4, 4, dtype=dtype))
    for size in (1e-8, 1.0, 1e2):
        value = Unitary(map).forward(raw + size * torch.randn_like(raw), state)
        assert Unitary(map).violation(value, state) <= 1e3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_ill_conditioned_matrices_are_kept(scale, dtype):
    """Condition 1e6: the error is some roundings of the largest entry."""
    tall = scale * conditioned(20, 12, 1e6)
    square = scale * conditioned(12, 12, 1e6)
    volume = torch.linalg.slogdet(square)
    unit = square * torch.exp(-volume.logabsdet / 12)
    unit[:, -1] *= volume.sign
    for transform, value in (
        (FixedRank(12), tall),
        (FixedRank(5), torch.nn.functional.pad(tall[:, :5], (0, 3))),
        (Invertible(), square),
        (SpecialLinear(), unit),
    ):
        value = value.to(dtype)
        back = transform.forward(*transform.right_inverse(value))
        bound = 32 * torch.finfo(dtype).eps * torch.linalg.matrix_norm(value, 2)
        assert (back - value).abs().max() <= bound, transform


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("transform", "shape"),
    [
        (Stiefel(), (6, 3)),
        (Grassmann(), (3, 6)),
        (FixedRank(2), (5, 4)),
        (AlmostOrthogonal(0.3), (5, 4)),
        (SpecialLinear(), (4, 4)),
    ],
    ids=str,
)
def test_nearly_feasible_values_move_by_no_more_than_they_are_off(transform, shape, dtype):
    raw, state = transform.right_inverse(torch.randn(shape, dtype=dtype))
    raw = rebuild(raw, [part + 0.2 * torch.randn_like(part) for part in tensors(raw)])
    value = transform.forward(raw, state)
    for noise in (1e-10, 1e-6, 1e-3):
        near = value + noise * torch.randn_like(value)
        back = transform.forward(*transform.right_inverse(near))
        assert (back - near).abs().max() <= 20 * noise + 32 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "transform", [Stiefel(), Grassmann(), FixedRank(3), AlmostOrthogonal(0.3)], ids=str
)
def test_base_points_can_be_moved_for_ever(transform, dtype):
    """Rounding does not add up over 100 steps with a rebase after each."""
    raw, state = transform.right_inverse(torch.randn(7, 3, dtype=dtype))
    for _ in range(100):
        raw = rebuild(raw, [part + 0.1 * torch.randn_like(part) for part in tensors(raw)])
        value = transform.forward(raw, state)
        raw, state = transform.rebase(raw, state)
    back = transform.forward(raw, state)
    eps = torch.finfo(dtype).eps * max(1, np.sqrt(value.square().sum().item()))
    assert (back - value).abs().max() <= 32 * eps
    assert transform.violation(back.double(), {}) <= 32 * eps
