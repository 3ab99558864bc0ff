"""Properties of every row of the table: extreme raw, ill-conditioned and nearly feasible values.

Hypothesis draws the numbers. Constraints hold to 64 roundings in float64 and float32, and gradients
are finite, wherever the docstring of the transform does not except it.
"""

from math import prod

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.func import grad

from funcparam.transforms import (
    LSQ,
    OFT,
    Cat,
    FakeQuantizeFloat,
    LeftHalfPlane,
    OperatorNorm,
    Orthogonal,
    OrthogonalConv,
    Positive,
    SpecialLinear,
    SpecialOrthogonal,
    SpectralCap,
    SpectralNorm,
    Ternary,
    Unitary,
    UnitNorm,
    WeightNorm,
    WeightStandardization,
)
from tests.cases import CASES, rebuild, tensors, value_of

DTYPES = [torch.float64, torch.float32]
every = pytest.mark.parametrize("case", CASES, ids=str)
few = settings(
    max_examples=3,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # examples are small as they are
    suppress_health_check=list(HealthCheck),
)

# From 1e-8 to 1e4, zero, and the smallest numbers there are.
MAGNITUDES = st.one_of(
    st.floats(-8, 4).map(lambda exponent: 10.0**exponent),
    st.sampled_from([0.0, 5e-324, 1e-310, 1.5e-45, 1e-40, 1e-8, 1.0, 1e4]),
)
ENTRIES = st.builds(lambda size, sign: sign * size, MAGNITUDES, st.sampled_from([-1.0, 1.0]))


def entries(shape):
    size = prod(shape)
    return st.lists(ENTRIES, min_size=size, max_size=size).map(
        lambda numbers: torch.tensor(numbers, dtype=torch.float64).reshape(shape)
    )


def extreme(raw):
    """Strategies for a raw like this one."""
    parts = (
        entries((*t.shape, 2)).map(torch.view_as_complex) if t.is_complex() else entries(t.shape)
        for t in tensors(raw)
    )
    return st.tuples(*parts).map(lambda new: rebuild(raw, new))


def cast(tree, dtype):
    kinds = {torch.float64: torch.complex128, torch.float32: torch.complex64}
    return rebuild(
        tree,
        [
            t.to(kinds[dtype] if t.is_complex() else dtype) if t.dtype != torch.bool else t
            for t in tensors(tree)
        ],
    )


def documented(transform, raw):
    """A raw of which the docstring promises something: elsewhere one that is nothing special."""
    match transform:
        case Positive(map="exp"):
            return raw.clamp(-88, 88)
        case Orthogonal(map="matrix_exp" | "cayley") | SpecialOrthogonal():
            return raw.clamp(-1e3, 1e3)
        case Unitary():
            return torch.view_as_complex(torch.view_as_real(raw).clamp(-1e3, 1e3))
        case OrthogonalConv():
            return {name: X.clamp(-1e3, 1e3) for name, X in raw.items()}
        case LeftHalfPlane():
            return {**raw, "log_decay": raw["log_decay"].clamp(-88, 88)}
        case LSQ():
            X, scale = raw["weight"], raw["scale"]
            return {**raw, "scale": torch.where(scale.abs() > 1e-30 * X.abs().max(), scale, 1)}
        case UnitNorm(dim=dim):
            return torch.where(raw.norm(dim=dim, keepdim=True) > 1e-30, raw, 1)
        case WeightNorm():
            X = raw["direction"]
            norm = transform.right_inverse(X)[0]["magnitude"]
            return {**raw, "direction": torch.where((norm > 1e-18) & (norm < 1e18), X, 1)}
        case SpectralNorm(eps=eps):
            return torch.where(raw.abs().max() > eps, raw, 1)
        case OperatorNorm():
            return torch.where(raw.abs().max() > 0, raw, 1)
        case WeightStandardization(dim=dim, eps=eps):
            others = [d for d in range(raw.ndim) if d != dim % raw.ndim]
            deviation = raw.std(others, correction=0, keepdim=True)
            varied = torch.arange(raw.numel(), dtype=raw.dtype).reshape(raw.shape)
            return torch.where(deviation > eps + 1e-4 * raw.abs().max(), raw, varied)
        case Orthogonal(map="qr" | "newton_schulz", trivialize=trivialize):
            eye = torch.eye(*raw.shape[-2:], dtype=raw.dtype)
            spectrum = torch.linalg.svdvals(raw + trivialize * eye)
            regular = spectrum[..., -1] > 1e-4 * spectrum[..., 0].clamp_min(1e-4)
            return torch.where(regular[..., None, None], raw, eye)
    return raw


def settled(transform, raw, state):
    """State with the singular vectors of this very raw: old ones bound nothing."""
    if isinstance(transform, SpectralNorm):
        return transform.right_inverse(raw)[1]
    if isinstance(transform, Cat):
        for i, part in enumerate(transform.parts):
            own = settled(part, raw.get(str(i)), {})
            state = {**state, **{f"{i}.{key}": t for key, t in own.items()}}
    return state


def assert_feasible(case, value, state, dtype, like, raw=None):
    assert value.isfinite().all()
    if not case.measured:
        return
    off = case.transform.violation(cast(value, torch.float64), cast(state, torch.float64))
    # the nearest turn of a base of condition 1e6 is known to less
    roundings = 32 if isinstance(case.transform, OFT) else 1
    if isinstance(case.transform, SpecialLinear):  # a determinant has the rounding of the entries
        roundings = torch.linalg.cond(cast(value, torch.float64)).max()  # times the condition
    if isinstance(case.transform, SpectralCap):  # near the bound, and of a large raw, it says so
        rounding = torch.finfo(dtype).eps * (0 if raw is None else torch.linalg.norm(raw))
        assert off <= 1e-5 * case.transform.cap + rounding
    else:
        assert off <= roundings * bound(dtype, like)


def assert_finite_gradients(case, raw, state):
    if not tensors(raw):
        return

    def loss(raw):
        value = case.transform.forward(raw, state)  # |z| itself has no derivative in tiny numbers
        return (torch.view_as_real(value) if value.is_complex() else value).abs().sum()

    gradient = grad(loss)(raw)
    assert all(t.isfinite().all() for t in tensors(gradient))


def bound(dtype, value):
    return 64 * torch.finfo(dtype).eps * max(1, value.abs().max().item())


@every
def test_extreme_raw(case):
    pairs = [case.transform.right_inverse(value_of(case, shape)) for shape in case.shapes]

    @few
    @given(st.tuples(*(extreme(raw) for raw, _ in pairs)))
    def check(raws):
        for raw64, (_, state64) in zip(raws, pairs, strict=True):
            for dtype in DTYPES:
                raw = documented(case.transform, cast(raw64, dtype))
                state = settled(case.transform, raw, cast(state64, dtype))
                value = case.transform.forward(raw, state)
                assert_feasible(case, value, state, dtype, value, raw)
                assert_finite_gradients(case, raw, state)

    check()


def conditioned(shape):
    """Matrices of condition 1e6."""
    U, _, Vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    return (U * torch.logspace(0, -6, U.shape[-1], dtype=torch.float64)) @ Vh


def jumps(transform):
    """Whether a value that is hardly off may go far, as the docstring says."""
    match transform:
        case Ternary(scale="absmean"):  # a mean over all entries, unless they are levels
            return True
        case FakeQuantizeFloat(power_of_two=True):  # where the largest entry leaves its octave
            return True
    return False


def kept(case, value, dtype, least=0.0):
    """Bring a value to raw and back: it stays, and is on the constraint."""
    raw, state = case.transform.right_inverse(value)
    back = case.transform.forward(raw, state)
    assert_feasible(case, back, state, dtype, value)
    assert (back - value).abs().max() <= least + bound(dtype, value)
    assert_finite_gradients(case, raw, state)


@every
@few
@given(st.integers(0, 2**32))
def test_ill_conditioned_values(case, seed):
    torch.manual_seed(seed)
    for shape in case.shapes:
        for dtype in DTYPES if len(shape) > 1 else ():
            kept(case, cast(case.feasible(conditioned(shape)), dtype), dtype)


@every
@few
@given(st.integers(0, 2**32))
def test_nearly_feasible_values_move_by_what_they_are_off(case, seed):
    if jumps(case.transform):
        return
    torch.manual_seed(seed)
    for shape in case.shapes:
        for dtype in DTYPES:
            value = value_of(case, shape)
            kept(case, cast(value + 1e-6 * torch.randn_like(value), dtype), dtype, least=1e-4)
