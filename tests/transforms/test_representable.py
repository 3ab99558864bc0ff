"""Numbers that a dtype does not have are refused with the rule, or with the weight."""

import dataclasses
import math

import pytest
import torch
from torch import nn

import funcparam as fp
from funcparam.transforms import (
    Affine,
    AlmostOrthogonal,
    Ball,
    Cat,
    Chain,
    DoRA,
    Interval,
    Isospectral,
    LoHa,
    LoRA,
    LowerBound,
    Orthogonal,
    RandLoRA,
    SpectralCap,
    Transpose,
    UnitNorm,
    UpperBound,
)
from tests.cases import CASES, value_of

HALF, B, F, D = torch.float16, torch.bfloat16, torch.float32, torch.float64


def of(transform, dtype, value=None):
    value = torch.full((4, 4), 0.5) if value is None else value
    return fp.parametrize({"w": value.to(dtype)}, {"w": transform})


@pytest.mark.parametrize(
    ("transform", "name", "dtype", "wider"),
    [
        (Interval(0, 7e4), "high", HALF, B),
        (Interval(-7e4, 1), "low", HALF, B),
        (Interval(0, 1e39), "high", F, D),
        (Interval(-3e38, 3e38), "width", F, D),
        (LowerBound(-7e4), "low", HALF, B),
        (UpperBound(7e4), "high", HALF, B),
        (UpperBound(1e39), "high", B, D),
        (Ball(2, 7e4), "radius", HALF, B),
        (Ball(math.inf, 1e-9), "radius", HALF, B),
        (SpectralCap(7e4), "cap", HALF, B),
        (SpectralCap(1e-9), "cap", HALF, B),
        (AlmostOrthogonal(1e-9), "lam", HALF, B),
        (Affine(7e4), "scale", HALF, B),
        (Affine(1e-9), "scale", HALF, B),
        (Affine(2.0, 7e4), "shift", HALF, B),
        (Affine(1e-50), "scale", F, D),
        (LoRA(1, 1e-9), "scale", HALF, B),
        (DoRA(1, 7e4), "scale", HALF, B),
        (LoHa(1, 7e4), "scale", HALF, B),
        (RandLoRA(1, 1e-9), "scale", HALF, B),
        (Chain(Orthogonal(), Affine(7e4), Transpose()), "scale", HALF, B),
        (Cat([Orthogonal(), UpperBound(7e4)]), "high", HALF, B),
    ],
    ids=str,
)
def test_a_number_that_state_cannot_hold_is_refused_with_the_rule(transform, name, dtype, wider):
    text = f"'w': .*expects {name} to be a number of {str(dtype)[6:]}, .*wider dtype"
    with pytest.raises(ValueError, match=text):
        of(transform, dtype)
    of(transform, wider)


@pytest.mark.parametrize("number", [1e5, 1e-9])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_number_that_init_writes_into_state_is_looked_at(case, number):
    """A scalar of state that has the name of an argument is that argument."""
    transform = case.transform
    value = value_of(case, case.shapes[0], F)
    held = {k for k, t in transform.right_inverse(value)[1].items() if t.ndim == 0}
    fields = {f.name for f in dataclasses.fields(transform) if f.type in ("float", "float | None")}
    for name in held & fields:
        if number < 1 and name in ("low", "high", "shift"):  # is 0 then, which is as good
            continue
        try:
            moved = dataclasses.replace(transform, **{name: -number if name == "low" else number})
        except ValueError:  # out of range in every dtype
            continue
        with pytest.raises(ValueError, match=f"expects {name} to be a number of float16"):
            moved.check(value.half())


@pytest.mark.parametrize("dtype", [HALF, B], ids=str)
def test_bounds_between_which_there_is_nothing_to_train(dtype):
    text = r"'w': Interval\(.*\) expects bounds with several numbers of \w*float16 between them"
    with pytest.raises(ValueError, match=text):
        of(Interval(100, 100.1), dtype)
    of(Interval(100, 104), dtype)
    of(Interval(100, 100.1), F)


@pytest.mark.parametrize(
    ("transform", "key"),
    [(UnitNorm(None, None), "radius"), (Isospectral(), "s"), (DoRA(1), "magnitude")],
    ids=str,
)
def test_what_a_weight_leads_to_is_a_number_of_its_dtype(transform, key):
    net = nn.Linear(40, 40, bias=False, dtype=HALF)
    nn.init.constant_(net.weight, 3e4)
    p = fp.parametrize(net, {"weight": transform})
    text = f"'weight': .*cannot represent this value in float16: .*'{key}' .*65504.*wider dtype"
    with pytest.raises(ValueError, match=text):
        p.init(net)
    net.bfloat16()
    p = fp.parametrize(net, {"weight": transform})
    assert p(*p.init(net))["weight"].isfinite().all()
