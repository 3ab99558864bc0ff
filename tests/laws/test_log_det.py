"""Law 5: log-determinants against slogdet of autograd's Jacobian over the free coordinates."""

import random
from functools import cache

import pytest
import torch
from torch.func import jacrev

from funcparam.transforms import (
    Affine,
    Chain,
    Hermitian,
    Identity,
    Interval,
    LeftHalfPlane,
    LowerBound,
    Permute,
    Positive,
    Reshape,
    SkewHermitian,
    Sparse,
    StableDiagonal,
    Transpose,
    UpperBound,
)
from tests.cases import CASES, ROWS, every_row, raw_and_state, rebuild, tensors, value_of

PAIRS = 300


@every_row
def test_against_the_jacobian(case, shape):
    raw, state = raw_and_state(case, shape)
    if case.log_det is None:
        if not tensors(raw):  # nothing is free
            assert case.transform.log_abs_det_jacobian(raw, state) == 0
            return
        with pytest.raises(NotImplementedError, match="no log_abs_det_jacobian: "):
            case.transform.log_abs_det_jacobian(raw, state)
        return
    parts = tensors(raw)
    flat = torch.cat([part.flatten() for part in parts])
    numbers = torch.arange(1.0, flat.numel() + 1)
    chosen = case.log_det(numbers.reshape(parts[0].shape) if len(parts) == 1 else numbers)
    chosen = chosen.flatten().long() - 1

    def free(coordinates):
        moved = flat.scatter(0, chosen, coordinates).split([part.numel() for part in parts])
        moved = [new.reshape(old.shape) for new, old in zip(moved, parts, strict=True)]
        value = case.transform.forward(rebuild(raw, moved), state)
        if case.free_of_value is not None:
            return case.free_of_value(value).flatten()
        return value.flatten()[chosen]

    if len(chosen) == 0:
        assert case.transform.log_abs_det_jacobian(raw, state) == 0
        return
    jacobian = jacrev(free)(flat[chosen])
    expected = torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(case.transform.log_abs_det_jacobian(raw, state), expected)


# Chains of two rows: those that have a determinant each, each of the first with each of the second
# that takes its value. What stands here is found from the table, not from what the library says.

ONE_BY_ONE = (
    Affine, Identity, Interval, LowerBound, Permute, Positive, Reshape, Transpose, UpperBound
)  # fmt: skip


COMPLEX = (StableDiagonal(), LeftHalfPlane())
# Of a Hermitian diagonal the imaginary part is not free, which no mask of entries says; and where
# the entries of Sparse are, only state says.
APART = (Hermitian(), SkewHermitian(), Sparse(4))


def is_one_by_one(transform):
    parts = transform.parts if isinstance(transform, Chain) else (transform,)
    return all(isinstance(part, ONE_BY_ONE) for part in parts)


@cache
def pairs():
    """A deterministic sample of (row, row, shape of the value, raw shape of the second)."""
    found = []
    for two, shape in ROWS:
        raw, _ = two.transform.right_inverse(value_of(two, shape).to("meta"))
        if two.log_det is None or not isinstance(raw, torch.Tensor):
            continue
        found += [
            (one, two, shape, tuple(raw.shape))
            for one in CASES
            if one.log_det is not None
            and tuple(raw.shape) in one.shapes
            and (two.complex or one.transform not in COMPLEX)
            and one.transform not in APART
        ]
    return random.Random(0).sample(found, min(len(found), PAIRS))


def numbers(shape):
    return torch.arange(1.0, torch.Size(shape).numel() + 1, dtype=torch.float64).reshape(shape)


def as_real(x):
    return torch.view_as_real(x) if x.is_complex() else x


def places_behind(one, two, shape):
    """Where the second, which maps each entry by itself or moves it, puts the free ones."""
    places, pick = numbers(shape), one.free_of_value or one.log_det
    if pick is torch.view_as_real:
        return slice(None)
    behind = two.transform.forward(places, {}) if two.transform.moves_entries else places
    return torch.isin(behind.flatten(), pick(places).flatten()).nonzero().flatten()


@pytest.mark.parametrize("i", range(PAIRS))
def test_chains_of_two_against_the_jacobian(i):
    one, two, shape, between = pairs()[i % len(pairs())]
    chain = Chain(one.transform, two.transform)
    raw, state = raw_and_state(one, between)
    _, own = two.transform.right_inverse(value_of(two, shape))
    state = {f"0.{k}": t for k, t in state.items()} | {f"1.{k}": t for k, t in own.items()}
    parts = tensors(raw)
    flat = torch.cat([part.flatten() for part in parts])

    apart = is_one_by_one(one.transform), is_one_by_one(two.transform)

    def free(flat):
        new = flat.split([part.numel() for part in parts])
        new = [n.reshape(old.shape) for n, old in zip(new, parts, strict=True)]
        value = chain.forward(rebuild(raw, new), state)
        if apart[1]:  # what is free before it is so behind it
            return value.flatten()[places_behind(one, two, between)]
        return as_real((two.free_of_value or two.log_det)(value)).flatten()

    try:
        found = chain.log_abs_det_jacobian(raw, state)
    except NotImplementedError as error:
        found = error
    if isinstance(found, Exception):  # which is right only where both mix entries
        assert "no log_abs_det_jacobian: not every entry" in str(found)
        assert apart == (False, False)
        return
    if free(flat).numel() == 0:
        assert found == 0
        return
    jacobian = jacrev(lambda x: as_real(free(x)).flatten())(flat)
    columns = jacobian.any(0).nonzero().flatten()
    jacobian = jacobian[:, columns]
    assert len(jacobian) == len(columns)
    expected = torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
