"""Beside geotorch: equal values where the maps coincide, and equal images elsewhere."""

import geotorch
import pytest
import torch

from funcparam.transforms import (
    Affine,
    AlmostOrthogonal,
    Chain,
    FixedRank,
    Grassmann,
    Invertible,
    LowRank,
    Orthogonal,
    PSDLowRank,
    Skew,
    SpecialLinear,
    SpecialOrthogonal,
    Stiefel,
    UnitNorm,
)
from tests.cases import rebuild, tensors

close = torch.testing.assert_close

TRIVIALIZATIONS = {"matrix_exp": "expm", "cayley": "cayley"}


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def at_base(manifold, base):
    """A manifold of geotorch in float64, moved to a base point."""
    manifold = manifold.double()
    manifold.base.copy_(base)
    return manifold


@pytest.mark.parametrize("map", TRIVIALIZATIONS)
@pytest.mark.parametrize("transform", [Orthogonal, SpecialOrthogonal])
@pytest.mark.parametrize("shape", [(5, 5), (2, 4, 4), (1, 1)], ids=str)
def test_rotations_have_its_values(transform, map, shape):
    raw, (_, state) = randn(*shape), transform(map).right_inverse(randn(*shape))
    theirs = at_base(geotorch.SO(shape, triv=TRIVIALIZATIONS[map]), state["base"])
    close(transform(map).forward(raw, state), theirs(raw))


@pytest.mark.parametrize("map", TRIVIALIZATIONS)
@pytest.mark.parametrize("shape", [(6, 3), (3, 6), (2, 5, 2), (4, 1)], ids=str)
def test_orthonormal_columns_have_its_values(map, shape):
    raw, (_, state) = randn(*shape), Orthogonal(map).right_inverse(randn(*shape))
    theirs = at_base(geotorch.Stiefel(shape, triv=TRIVIALIZATIONS[map]), state["base"])
    close(Orthogonal(map).forward(raw, state), theirs(raw))


@pytest.mark.parametrize("shape", [(6, 3), (3, 6), (2, 5, 2), (4, 1)], ids=str)
def test_subspaces_have_its_values(shape):
    """geotorch's raw are coordinates in the complement of the base point, ours are vectors."""
    whole = Orthogonal().right_inverse(randn(*shape))[1]["base"]
    k = min(shape[-2:])
    frame, complement = whole[..., :k], whole[..., k:]
    raw = randn(*shape)
    wide = shape[-2] < shape[-1]
    tilt = complement @ (raw.mT if wide else raw)[..., k:, :]
    state = {"base": frame.mT if wide else frame}
    theirs = at_base(geotorch.Grassmannian(shape, triv="cayley"), whole)
    close(Grassmann().forward(tilt.mT if wide else tilt, state), theirs(raw))


def test_spheres_and_skew_matrices_have_its_values():
    raw = randn(3, 5)
    sphere = Chain(UnitNorm(), Affine(scale=2.5))
    _, state = sphere.right_inverse(randn(3, 5))
    close(sphere.forward(raw, state), geotorch.SphereEmbedded(raw.shape, radius=2.5)(raw))
    raw = randn(2, 4, 4)
    close(Skew().forward(raw, {}), geotorch.Skew(raw.shape)(raw))


IMAGES = [
    (Orthogonal(), geotorch.Stiefel, (6, 3)),
    (Stiefel(), geotorch.Stiefel, (6, 3)),
    (Stiefel(), geotorch.Stiefel, (2, 3, 5)),
    (Stiefel(), geotorch.SO, (4, 4)),
    (SpecialOrthogonal("householder"), geotorch.SO, (4, 4)),
    (Grassmann(), geotorch.Grassmannian, (6, 2)),
    (Grassmann(), geotorch.Grassmannian, (2, 6)),
    (LowRank(2), lambda size: geotorch.LowRank(size, rank=2), (6, 4)),
    (FixedRank(2), lambda size: geotorch.FixedRank(size, rank=2), (6, 4)),
    (FixedRank(2), lambda size: geotorch.FixedRank(size, rank=2), (2, 3, 5)),
    (PSDLowRank(2), lambda size: geotorch.PSSDLowRank(size, rank=2), (5, 5)),
    (Invertible(), geotorch.GLp, (4, 4)),
    (SpecialLinear(), geotorch.SL, (4, 4)),
    (SpecialLinear(), geotorch.SL, (2, 3, 3)),
    (AlmostOrthogonal(0.2), lambda size: geotorch.AlmostOrthogonal(size, lam=0.2), (5, 3)),
    (AlmostOrthogonal(0.9), lambda size: geotorch.AlmostOrthogonal(size, lam=0.9), (4, 4)),
]


@pytest.mark.parametrize(
    ("transform", "manifold", "shape"), IMAGES, ids=[f"{t}-{s}" for t, _, s in IMAGES]
)
def test_values_are_in_its_manifold_and_its_samples_are_kept(transform, manifold, shape):
    theirs = manifold(shape).double()
    raw, state = transform.right_inverse(randn(*shape))
    for size in (0.1, 1.0, 10.0):
        moved = rebuild(raw, [part + size * torch.randn_like(part) for part in tensors(raw)])
        assert theirs.in_manifold(transform.forward(moved, state))
    sample = theirs.sample().double()
    assert theirs.in_manifold(sample)
    back = transform.forward(*transform.right_inverse(sample))
    # a sample is made of single-precision tensors where geotorch says no dtype
    close(back, sample, rtol=1e-5, atol=1e-5)


def test_its_manifolds_refuse_what_is_not_in_them():
    """So that the test above can fail."""
    for transform, manifold, shape in IMAGES:
        if isinstance(transform, Invertible):
            continue
        assert not manifold(shape).double().in_manifold(3 * randn(*shape)), transform
