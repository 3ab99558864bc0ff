"""Certified bounds of layers under every padding, by the dense matrix of the layer itself."""

import pytest
import scipy.linalg
import torch
from torch import nn
from torch.func import functional_call, jacrev

from funcparam.transforms import AOL, LInfLipschitz, OrthogonalConv
from funcparam.transforms.numerics.softplus import softplus

D = torch.float64

LAYERS = {
    "zeros": nn.Conv2d(2, 3, 3, padding=2, bias=False),
    "valid": nn.Conv2d(2, 3, 3, bias=False),
    "zeros, stride, dilation": nn.Conv2d(2, 3, 2, padding=3, stride=2, dilation=2, bias=False),
    "circular, same": nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular", bias=False),
    "circular, same, even": nn.Conv2d(2, 3, 4, padding="same", padding_mode="circular", bias=False),
    "circular, narrow": nn.Conv2d(2, 3, 4, padding=1, padding_mode="circular", bias=False),
    "circular, dilation": nn.Conv2d(
        2, 3, 3, padding=2, dilation=2, padding_mode="circular", bias=False
    ),
    "circular, groups": nn.Conv2d(
        2, 4, 3, padding=1, padding_mode="circular", groups=2, bias=False
    ),
    "transposed": nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1, bias=False),
    "transposed, groups": nn.ConvTranspose2d(4, 2, 3, groups=2, bias=False),
}
WIDE = {
    "circular, k=2": nn.Conv2d(1, 1, 2, padding=1, padding_mode="circular", bias=False),
    "circular, k=4": nn.Conv2d(1, 1, 4, padding=2, padding_mode="circular", bias=False),
    "circular, k=3": nn.Conv2d(1, 1, 3, padding=2, padding_mode="circular", bias=False),
    "reflect": nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect", bias=False),
    "replicate": nn.Conv2d(2, 3, 3, padding=1, padding_mode="replicate", bias=False),
}


def dense(layer, kernel):
    """The matrix of a layer, on images of 6 x 6."""
    shape = (1, layer.in_channels, 6, 6)
    matrix = jacrev(lambda x: functional_call(layer, {"weight": kernel}, (x.reshape(shape),)))(
        torch.zeros(torch.Size(shape).numel(), dtype=D)
    )
    return matrix.flatten(0, -2).numpy()


def values(transform, layer, tries):
    """Values at random raw, and those that many weights become."""
    for start in (torch.randn, torch.ones):
        for _ in range(tries):
            raw, state = transform.right_inverse(start(layer.weight.shape).double())
            if isinstance(raw, torch.Tensor):
                raw = raw + 0.1 * torch.randn_like(raw)
            else:
                raw = {name: X + torch.randn_like(X) for name, X in raw.items()}
            yield raw, transform.forward(raw, state)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("kind", [AOL, OrthogonalConv])
def test_spectral_norms_of_at_most_1_where_the_docstring_says_so(kind, layer):
    for _, kernel in values(kind(groups=layer.groups), layer, 2):
        assert scipy.linalg.svdvals(dense(layer, kernel))[0] <= 1 + 1e-12


@pytest.mark.parametrize("layer", WIDE.values(), ids=WIDE)
def test_wider_circular_reflected_and_replicated_padding_have_no_such_bound(layer):
    """What the docstring says is not certified is not."""
    norms = [
        scipy.linalg.svdvals(dense(layer, kernel))[0]
        for kind in (AOL, OrthogonalConv)
        for _, kernel in values(kind(), layer, 4)
    ]
    assert max(norms) > 1.05


@pytest.mark.parametrize("layer", [*LAYERS.values(), *WIDE.values()], ids=[*LAYERS, *WIDE])
def test_lipschitz_bounds_in_the_maximum_norm_hold_with_any_padding(layer):
    transform = LInfLipschitz(dim=1 if isinstance(layer, nn.ConvTranspose2d) else 0)
    for raw, kernel in values(transform, layer, 2):
        norm = abs(dense(layer, kernel)).sum(1).max()
        assert norm <= softplus(raw["bound"]) * (1 + 1e-12)


def test_lipschitz_bound_of_a_transposed_convolution_is_reached():
    layer = nn.ConvTranspose2d(4, 1, 1, bias=False)
    kernel = torch.ones(4, 1, 1, 1, dtype=D)
    raw, state = LInfLipschitz(dim=1).right_inverse(kernel)
    assert softplus(raw["bound"]).item() == pytest.approx(4)
    assert abs(dense(layer, kernel)).sum(1).max() == 4
    raw["bound"] = raw["bound"] - 2
    clipped = LInfLipschitz(dim=-3).forward(raw, state)
    assert clipped.sum().item() == pytest.approx(softplus(raw["bound"]).item())
