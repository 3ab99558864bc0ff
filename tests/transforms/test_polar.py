"""The polar factor by products: its coefficients, its reach, and what cannot be projected."""

import mpmath
import numpy as np
import pytest
import scipy.linalg
import torch
from torch.func import grad

from funcparam.transforms import Orthogonal, Stiefel
from funcparam.transforms.numerics import polar

REACH, FLOOR, CUSHION = mpmath.mpf("1e-5"), mpmath.mpf("0.2"), mpmath.mpf("1e-3")


def minimax(low, high):
    """The odd polynomial of degree five nearest to 1 on an interval, by Remez' algorithm."""
    points = [low, (3 * low + high) / 4, (low + 3 * high) / 4, high]
    for _ in range(40):
        rows = [[x, x**3, x**5, (-1) ** i] for i, x in enumerate(points)]
        a, b, c, error = mpmath.lu_solve(mpmath.matrix(rows), mpmath.matrix([1, 1, 1, 1]))
        root = mpmath.sqrt(9 * b**2 - 20 * a * c)  # of the derivative, in x^2
        points[1:3] = sorted(mpmath.sqrt((-3 * b + s * root) / (10 * c)) for s in (1, -1))
    return (a, b, c), abs(error)


def test_the_steps_are_the_best_one_after_the_other():
    with mpmath.workdps(40):
        low, high = REACH, mpmath.mpf(1)
        for i, step in enumerate(polar._STEPS):
            start = max(low, FLOOR * high) * (1 - CUSHION if i else 1)
            (a, b, c), error = minimax(start, high * (1 + CUSHION))
            least = min(a * low + b * low**3 + c * low**5, 1 - error)
            scale = 2 / (least + 1 + error)  # as far below 1 as above
            np.testing.assert_allclose(step, [float(scale * x) for x in (a, b, c)], rtol=1e-13)
            low, high = scale * least, scale * (1 + error)


@pytest.mark.parametrize(("last", "bound"), [(0, 6e-3), (1, 5e-7), (2, 1e-15)], ids=str)
def test_they_take_every_singular_value_from_1e_5_on_to_1(last, bound):
    x = np.geomspace(1e-5, 1, 100_000)
    for a, b, c in (*polar._STEPS, *[polar._NEWTON_SCHULZ] * last):
        x = a * x + b * x**3 + c * x**5
    assert abs(x - 1).max() < bound


def of_condition(n, condition, kind, dtype):
    """A square matrix with singular values from 1 / condition to 1, and its polar factor."""
    U, V = (torch.linalg.qr(torch.randn(n, n, dtype=dtype)).Q for _ in range(2))
    spectrum = {
        "one small": torch.ones(n),
        "even": torch.logspace(0, -float(np.log10(condition)), n),
        "one large": torch.full((n,), 1 / condition),
    }[kind].to(dtype)
    spectrum[0], spectrum[-1] = 1, 1 / condition
    return (U * spectrum) @ V, U @ V


@pytest.mark.parametrize("kind", ["one small", "even", "one large"])
@pytest.mark.parametrize("condition", [3, 1e3, 9e3])
@pytest.mark.parametrize("n", [16, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128], ids=str)
def test_it_is_orthonormal_to_rounding_up_to_the_documented_condition(n, condition, kind, dtype):
    transform = Orthogonal("newton_schulz", trivialize=False)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    value, exact = of_condition(n, condition, kind, wide)
    raw, state = transform.right_inverse(value.to(dtype))
    frame = transform.forward(raw, state)
    eps = torch.finfo(dtype).eps
    assert transform.violation(frame.to(wide), state) < 16 * eps
    assert (frame - exact).abs().max() < 4 * condition * eps


def test_it_equals_scipys():
    for shape in ((6, 4), (4, 6), (5, 5)):
        X = torch.randn(shape, dtype=torch.float64)
        frame = Orthogonal("newton_schulz", trivialize=False).forward(X, {})
        np.testing.assert_allclose(frame, scipy.linalg.polar(X.numpy())[0], atol=1e-14)


@pytest.mark.parametrize("scale", [1e-37, 1e-25, 1e20, 1e37])
@pytest.mark.parametrize("map", ["qr", "newton_schulz"])
def test_no_scale_is_too_small_or_too_large(map, scale):
    transform = Orthogonal(map, trivialize=False)
    X = torch.randn(5, 3)
    raw, state = transform.right_inverse(X * scale)
    torch.testing.assert_close(transform.forward(raw, state), transform.forward(X, {}))


SINGULAR = {
    "zeros": torch.zeros(3, 3),
    "ones": torch.ones(4, 2),
    "a zero row": torch.diag(torch.tensor([2.0, 0.0, 1.0])),
    "no last pivot": torch.diag(torch.tensor([2.0, 1.0, 1.0, 0.0])),
    "equal columns": torch.randn(4, 1).expand(4, 2).contiguous(),
    "a batch with one": torch.stack([torch.eye(3), torch.zeros(3, 3)]),
}


@pytest.mark.parametrize("value", SINGULAR.values(), ids=SINGULAR)
@pytest.mark.parametrize("map", ["qr", "newton_schulz"])
def test_singular_matrices_are_refused_where_there_is_no_base_point(map, value):
    transform = Orthogonal(map, trivialize=False)
    with pytest.raises(ValueError, match="expects a matrix that is not singular"):
        transform.right_inverse(value)
    raw, state = Orthogonal(map).right_inverse(value)  # with one they train
    gradient = grad(lambda raw: Orthogonal(map).forward(raw, state).square().sum())(raw)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("value", SINGULAR.values(), ids=SINGULAR)
@pytest.mark.parametrize("transform", [Orthogonal(), Stiefel()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.bfloat16], ids=str)
def test_singular_matrices_are_projected_to_one_of_the_nearest(transform, value, dtype):
    """At a distance that is that of their singular values from 1."""
    for matrix in (value.to(dtype), value.mT.to(dtype)):
        found = transform.project(matrix, {})
        assert found.dtype == dtype
        wide = torch.complex128 if dtype.is_complex else torch.float64
        assert transform.violation(found.to(wide), {}) < 8 * torch.finfo(dtype).eps
        spectrum = torch.linalg.svdvals(matrix.to(wide))
        distance = (found - matrix).to(wide).norm()
        torch.testing.assert_close(distance, (spectrum - 1).norm(), rtol=1e-2, atol=1e-5)


def test_infinite_values_are_projected_to_nothing():
    found = Orthogonal().project(torch.full((3, 2), torch.inf), {})
    assert found.isnan().all()


def test_what_is_accepted_is_orthonormal():
    """Gaussian matrices of 256 columns, of which some have condition numbers above 1e4."""
    transform = Orthogonal("newton_schulz", trivialize=False)
    for _ in range(10):
        raw, state = transform.right_inverse(torch.randn(256, 256))
        assert transform.violation(transform.forward(raw, state).double(), state) < 2e-6
