"""Law 5: log-determinants against slogdet of autograd's Jacobian over the free coordinates."""

import random
from functools import cache

import pytest
import torch
from torch.func import jacrev

from funcparam.transforms import (
    Affine,
    Chain,
    Identity,
    Interval,
    LowerBound,
    Permute,
    Positive,
    Reshape,
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
            and (two.complex or one.transform != StableDiagonal())
        ]
    return random.Random(0).sample(found, min(len(found), PAIRS))


def numbers(shape):
    return torch.arange(1.0, torch.Size(shape).numel() + 1, dtype=torch.float64).reshape(shape)


def places_in_value(case, shape):
    pick = case.free_of_value or case.log_det
    if pick is torch.view_as_real:
        return None
    return pick(numbers(shape)).flatten().long() - 1


def as_real(x):
    return torch.view_as_real(x) if x.is_complex() else x


@pytest.mark.parametrize("i", range(PAIRS))
def test_chains_of_two_against_the_jacobian(i):
    one, two, shape, between = pairs()[i % len(pairs())]
    chain = Chain(one.transform, two.transform)
    raw, state = raw_and_state(one, between)
    _, own = two.transform.right_inverse(value_of(two, shape))
    state = {f"0.{k}": t for k, t in state.items()} | {f"1.{k}": t for k, t in own.items()}
    parts = tensors(raw)
    flat = torch.cat([part.flatten() for part in parts])

    def value(flat):
        new = flat.split([part.numel() for part in parts])
        new = [n.reshape(old.shape) for n, old in zip(new, parts, strict=True)]
        return as_real(chain.forward(rebuild(raw, new), state)).flatten()

    apart = is_one_by_one(one.transform), is_one_by_one(two.transform)
    try:
        found = chain.log_abs_det_jacobian(raw, state)
    except NotImplementedError as error:
        found = error
    if isinstance(found, Exception):  # which is right only where both mix entries
        assert "no log_abs_det_jacobian: not every entry" in str(found)
        assert apart == (False, False)
        return
    jacobian = jacrev(value)(flat)
    columns = jacobian.any(0).nonzero().flatten()
    if not apart[1]:
        rows = places_in_value(two, shape)
    elif (rows := places_in_value(one, between)) is not None:
        moved = numbers(between)
        if two.transform.moves_entries:
            moved = two.transform.forward(moved, {})
        rows = torch.isin(moved.flatten(), 1.0 + rows).nonzero().flatten()
    jacobian = jacobian[:, columns] if rows is None else jacobian[rows][:, columns]
    assert len(jacobian) == len(columns)
    expected = torch.linalg.slogdet(jacobian).logabsdet if len(columns) else torch.zeros(())
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-9, atol=1e-9)
