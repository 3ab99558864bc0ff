"""What `rebase` moves to, gradients by raw are carried to, exactly."""

import pytest
import torch
from torch.func import vjp

from funcparam.transforms import BOFT, Ball, Grassmann, SpectralCap, Stiefel, Transform, UnitNorm
from tests.cases import every_row, raw_and_state, tensors


@every_row
def test_a_gradient_by_raw_becomes_the_gradient_by_the_new_raw(case, shape):
    raw, state = raw_and_state(case, shape)
    new_raw, new_state = case.transform.rebase(raw, state)
    if case.straight_through or not tensors(raw) or case.transform.takes() or new_raw is raw:
        return
    if isinstance(case.transform, Ball | SpectralCap | BOFT):
        return  # on a boundary the derivative jumps, and factors can do other things from elsewhere
    value, old = vjp(lambda x: case.transform.forward(x, state), raw)
    _, new = vjp(lambda x: case.transform.forward(x, new_state), new_raw)
    g = torch.randn_like(value)
    if isinstance(case.transform, Grassmann):  # a loss of the subspace
        wide = value.shape[-2] < value.shape[-1]
        g = g - (g @ value.mH @ value if wide else value @ value.mH @ g)
    found = case.transform.transport(raw, state, new_raw, new_state, old(g)[0])
    torch.testing.assert_close(found, new(g)[0], rtol=1e-5, atol=1e-6)


FORMULAS = [
    (Stiefel(), (7, 3)),
    (Stiefel(), (3, 7)),
    (Stiefel(), (4, 4)),
    (Stiefel(), (2, 7, 3)),
    (Stiefel(), (5, 1)),
    (UnitNorm(), (4, 6)),
    (UnitNorm(dim=(0, 1), radius=None), (4, 6)),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("length", [1e-9, 0.1, 0.6, 3.0])
@pytest.mark.parametrize(("transform", "shape"), FORMULAS, ids=str)
def test_formulas_are_what_is_solved_for(transform, shape, length, dtype):
    """Of covectors that no gradient can be, too."""
    raw, state = transform.right_inverse(
        transform.project(torch.randn(shape, dtype=dtype), {"radius": torch.tensor(2.0)})
    )
    raw = raw + length * torch.nn.functional.normalize(torch.randn_like(raw), dim=(-1, -2))
    new_raw, new_state = transform.rebase(raw, state)
    covector = torch.randn_like(raw)
    found = transform.transport(raw, state, new_raw, new_state, covector)
    solved = Transform.transport(transform, raw, state, new_raw, new_state, covector)
    torch.testing.assert_close(found, solved, rtol=1e-9, atol=1e-9)


def test_what_is_solved_for_does_not_run_away():
    """Where all singular values are cut, the derivative is 0 to rounding in many directions."""
    transform, cap = SpectralCap(1.0), {"cap": torch.tensor(1.0, dtype=torch.float64)}
    for _ in range(40):
        U, _, Vh = torch.linalg.svd(torch.randn(5, 3, dtype=torch.float64), full_matrices=False)
        raw, W = U * (1.2 + 4 * torch.rand(3, dtype=torch.float64)) @ Vh, U @ Vh
        value, old = vjp(lambda x: transform.forward(x, cap), raw)
        g = torch.randn_like(value)
        found = transform.transport(raw, cap, W, cap, old(g)[0])  # by W a gradient is g itself
        torch.testing.assert_close(found, Stiefel().tangent(W, g, {}), rtol=0, atol=1e-9)
