"""Kernels of convolutions: what holds for the whole operator, whatever the input's size."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad
from torch.nn import functional as F

import funcparam as fp
from funcparam.transforms import AOL, OrthogonalConv
from tests.effort import examples
from tests.transforms.convolutions import operator, orthogonal_kernel
from tests.transforms.test_properties_constraints import entries
from tests.transforms.test_training_constraints import close, trained

DTYPES = [torch.float64, torch.float32]


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def value_at_random_raw(transform, *shape):
    raw, state = transform.right_inverse(randn(*shape))
    if isinstance(raw, torch.Tensor):
        return transform.forward(randn(*raw.shape), state)
    return transform.forward({name: randn(*X.shape) for name, X in raw.items()}, state)


def singular_values(matrix):
    return scipy.linalg.svdvals(matrix.numpy())


# the whole operator

KERNELS = [
    ((3, 3, 3), 1, [(2,), (3,), (4,), (7,)]),
    ((2, 4, 5), 1, [(4,), (9,)]),
    ((4, 2, 3), 1, [(5,)]),
    ((4, 2, 3), 2, [(5,)]),
    ((2, 3, 2, 2), 2, [(3, 2)]),
    ((2, 2, 3, 3), 1, [(3, 3), (2, 5)]),
    ((3, 2, 1, 4), 1, [(3, 5)]),
    ((2, 2, 2, 1, 2), 1, [(2, 2, 3)]),
]


@pytest.mark.parametrize(("shape", "groups", "tori"), KERNELS)
@pytest.mark.parametrize("map", ["matrix_exp", "cayley", "householder"])
def test_orthogonal_convolutions(shape, groups, tori, map):
    kernel = value_at_random_raw(OrthogonalConv(map, groups), *shape)
    assert kernel.shape == shape
    for sides in tori:
        np.testing.assert_allclose(
            singular_values(operator(kernel, sides, groups)), 1, rtol=0, atol=1e-13
        )


@pytest.mark.parametrize(("shape", "groups", "tori"), KERNELS)
def test_almost_orthogonal_convolutions(shape, groups, tori):
    kernel = value_at_random_raw(AOL(groups), *shape)
    assert kernel.shape == shape
    for sides in tori:
        assert singular_values(operator(kernel, sides, groups))[0] <= 1 + 1e-14


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("convolution", [F.conv2d, F.conv_transpose2d])
@pytest.mark.parametrize("transform", [AOL(2), OrthogonalConv(groups=2)], ids=str)
def test_zero_padding_strides_and_dilations_keep_the_bound(
    transform, convolution, padding, dilation, stride
):
    kernel = value_at_random_raw(transform, 4, 2, 3, 2)
    channels = 4
    basis = torch.eye(channels * 36, dtype=torch.float64).reshape(-1, channels, 6, 6)
    images = convolution(basis, kernel, padding=padding, stride=stride, dilation=dilation, groups=2)
    assert singular_values(images.flatten(1))[0] <= 1 + 1e-13


def test_orthogonal_kernels_are_almost_orthogonal_ones():
    for shape in ((3, 3, 3), (4, 2, 2, 2)):
        kernel = value_at_random_raw(OrthogonalConv(), *shape)
        close(AOL().forward(kernel, {}), kernel, 1e-13)
        close(AOL().forward(*AOL().right_inverse(kernel)), kernel, 1e-13)


# violation


def test_violation_of_an_orthogonal_kernel_is_the_operators():
    kernel = value_at_random_raw(OrthogonalConv(), 2, 3, 3) + 0.01 * randn(2, 3, 3)
    matrix = operator(kernel, (9,))
    expected = (matrix @ matrix.T - torch.eye(len(matrix))).abs().max()
    close(OrthogonalConv().violation(kernel, {}), expected, 1e-14)
    close(OrthogonalConv().violation(kernel.transpose(0, 1), {}), expected, 1e-14)


@pytest.mark.parametrize("shape", [(3, 2, 3), (2, 3, 2, 3)])
def test_violation_of_an_almost_orthogonal_kernel_is_the_operators(shape):
    kernel = randn(*shape)
    matrix = operator(kernel, tuple(4 * taps for taps in shape[2:]))
    close(AOL().violation(kernel, {}), singular_values(matrix)[0] - 1, 1e-12)


def test_orthogonal_kernels_of_another_kind_are_told_and_projected():
    """Two-tap factors that take turns between the axes, as those of BCOP."""
    one, two = (value_at_random_raw(OrthogonalConv(), 4, 4, 2, 2) for _ in range(2))
    both = F.conv2d(one.transpose(0, 1), two.flip(2, 3), padding=1).transpose(0, 1)
    np.testing.assert_allclose(singular_values(operator(both, (4, 4))), 1, atol=1e-13)
    assert OrthogonalConv().violation(both, {}) > 1e-2
    back = OrthogonalConv().forward(*OrthogonalConv().right_inverse(both))
    assert OrthogonalConv().violation(back, {}) < 1e-13


# right inverse and rebase


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 4, 3), (3, 5, 3), (6, 3, 2, 3), (8, 8, 3, 3)])
@pytest.mark.parametrize("distance", [0, 1e-9, 1e-7, 1e-5, 1e-3, 0.1, 3])
def test_kernels_near_a_shift_of_the_identity_are_kept_to_rounding(shape, distance, dtype):
    """Their first and last taps have singular values of any size, zero and rounding among them."""
    start = nn.init.dirac_(torch.empty(shape, dtype=torch.float64))
    raw, state = OrthogonalConv().right_inverse(start)
    raw = {name: distance * randn(*X.shape) for name, X in raw.items()}
    value = OrthogonalConv().forward(raw, state).to(dtype)
    back = OrthogonalConv().forward(*OrthogonalConv().right_inverse(value))
    assert (back - value).abs().max() <= 32 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("taps", "dtype", "bound"),
    [
        (5, torch.float64, 1e-13),
        (9, torch.float64, 1e-4),
        (17, torch.float64, 0.1),
        (5, torch.float32, 1e-5),
        (9, torch.float32, 4e-2),
    ],
)
def test_long_kernels_move_as_documented_and_stay_orthogonal(taps, dtype, bound):
    for _ in range(4):
        value = value_at_random_raw(OrthogonalConv(), 16, 16, taps).to(dtype)
        back = OrthogonalConv().forward(*OrthogonalConv().right_inverse(value))
        assert (back - value).abs().max() < bound
        assert OrthogonalConv().violation(back.double(), {}) < 32 * torch.finfo(dtype).eps


def test_the_identity_starts_in_the_middle_of_what_can_be_reached():
    value = nn.init.dirac_(torch.empty(6, 6, 3, 3))
    raw, state = OrthogonalConv().right_inverse(value)
    for name in ("axis0", "axis1"):
        assert state[name].shape == (2, 1, 6, 6)
        close(state[name].diagonal(dim1=-2, dim2=-1).sum(-1), torch.full((2, 1), 3.0), 1e-5)
    gradient = grad(lambda raw: (OrthogonalConv().forward(raw, state) * randn(6, 6, 3, 3)).sum())
    assert all(g.count_nonzero() for g in gradient(raw).values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_moves_of_the_base_do_not_add_up(dtype):
    transform = OrthogonalConv()
    raw, state = transform.right_inverse(randn(4, 4, 3, 3).to(dtype))
    for _ in range(200):
        raw = {name: X + 0.1 * torch.randn_like(X) for name, X in raw.items()}
        before = transform.forward(raw, state)
        raw, state = transform.rebase(raw, state)
        assert all(X.count_nonzero() == 0 for X in raw.values())
        assert (transform.forward(raw, state) - before).abs().max() < 16 * torch.finfo(dtype).eps
    assert transform.violation(before.double(), {}) < 16 * torch.finfo(dtype).eps


def test_a_kernel_with_one_tap_is_a_matrix():
    kernel = value_at_random_raw(OrthogonalConv(), 3, 4, 1, 1)
    close(kernel[..., 0, 0] @ kernel[..., 0, 0].T, torch.eye(3).double(), 1e-14)
    raw, state = OrthogonalConv().right_inverse(kernel)
    assert raw["axis0"].shape == raw["axis1"].shape == (0, 1, 4, 4)
    close(OrthogonalConv().forward(raw, state), kernel, 1e-14)


@pytest.mark.parametrize("transform", [AOL(2), OrthogonalConv(groups=2)], ids=str)
def test_groups_are_independent(transform):
    value = randn(6, 2, 3)
    one = type(transform)()
    expected = [one.forward(*one.right_inverse(part)) for part in value.chunk(2)]
    close(transform.forward(*transform.right_inverse(value)), torch.cat(expected), 1e-14)


# another library


def test_aol_equals_orthogoniums():
    from orthogonium.layers.conv.AOL.aol import AOLReparametrizer

    for groups in (1, 2):
        X = torch.randn(4, 3, 3, 3)
        theirs = AOLReparametrizer(3 * groups, groups)
        theirs.requires_grad_(False)
        # theirs scales the first dimension of the transposed kernel
        parts = X.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        back = theirs(parts).unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        close(AOL(groups).forward(X, {}), back, 1e-6)


@pytest.mark.parametrize(("inputs", "outputs"), [(4, 4), (4, 2), (2, 4)])
def test_orthogoniums_smallest_kernels_are_kept(inputs, outputs):
    """A pair of two-tap factors is of this kind; its singular values agree with ours as well."""
    from orthogonium.layers.conv.AOC.fast_block_ortho_conv import (
        FastBlockConv2d,
        conv_singular_values_numpy,
    )

    theirs = FastBlockConv2d(inputs, outputs, 2)
    kernel = theirs.weight.detach()
    if inputs != outputs:  # their axes then come in the other order
        kernel = kernel.transpose(2, 3)
    assert OrthogonalConv().violation(kernel, {}) < 1e-5
    back = OrthogonalConv().forward(*OrthogonalConv().right_inverse(kernel))
    close(back, kernel, 1e-5)  # theirs is iterated to so much
    ours = value_at_random_raw(OrthogonalConv(), outputs, inputs, 3, 3)
    low, high, _ = conv_singular_values_numpy(ours.unsqueeze(0).numpy(), (8, 8))
    assert [low, high] == pytest.approx([1, 1], abs=1e-12)


# layers


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(3, 3, 3, padding=1, padding_mode="circular", bias=False),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", bias=False),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, padding_mode="circular", bias=False, groups=2),
        nn.Conv3d(2, 2, (3, 1, 3), padding=(1, 0, 1), padding_mode="circular", bias=False),
    ],
    ids=str,
)
def test_a_layer_keeps_the_length_of_its_input(layer):
    layer = layer.double()
    p = fp.parametrize(layer, {"weight": OrthogonalConv(groups=layer.groups)})
    raw, state = p.init(layer)
    x = randn(2, layer.in_channels, *[6] * len(layer.kernel_size))
    y = functional_call(layer, p(raw, state), (x,))
    close(y.norm(), x.norm(), 1e-12)


# training


def determinant(kernel):
    """Of the convolution at frequency 0; it is 1 or -1 throughout training."""
    return torch.linalg.det(kernel.flatten(2).sum(-1))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("shape", [(4, 4, 3), (4, 4, 3, 3)])
def test_an_orthogonal_convolution_is_found_from_what_it_does(shape, seed):
    torch.manual_seed(seed)
    teacher = orthogonal_kernel(randn(*shape), rank=2)
    start = nn.init.dirac_(torch.empty(shape, dtype=torch.float64))
    start[0] *= determinant(start) * determinant(teacher)
    x = randn(8, 4, *[8] * (len(shape) - 2))
    convolve = F.conv1d if len(shape) == 3 else F.conv2d
    y = convolve(x, teacher)
    value = trained(OrthogonalConv(), start, lambda W: (convolve(x, W) - y).square().mean())
    close(value, teacher, 1e-6)


def test_an_almost_orthogonal_convolution_is_found_from_what_it_does():
    teacher = AOL().forward(randn(4, 3, 3, 3), {})
    x = randn(8, 3, 8, 8)
    y = F.conv2d(x, teacher)
    value = trained(AOL(), randn(4, 3, 3, 3), lambda W: (F.conv2d(x, W) - y).square().mean())
    close(value, teacher, 1e-6)


# extreme raw


def holds(transform, raw, state, dtype, bound):
    def cast(tree):
        if isinstance(tree, torch.Tensor):
            return tree.to(dtype)
        return {name: t.to(dtype) for name, t in tree.items()}

    raw, state = cast(raw), cast(state)
    value = transform.forward(raw, state)
    assert value.isfinite().all()
    assert transform.violation(value.double(), {}) <= bound * torch.finfo(dtype).eps
    gradient = grad(lambda raw: transform.forward(raw, state).abs().sum())(raw)
    parts = [gradient] if isinstance(gradient, torch.Tensor) else gradient.values()
    assert all(g.isfinite().all() for g in parts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 2, 3), (2, 2, 2, 2)])
def test_almost_orthogonal_at_extreme_raw(shape, dtype):
    @examples(40)
    @given(entries(*shape))
    def check(raw):
        holds(AOL(), raw, {}, dtype, 8)

    check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("map", ["cayley", "householder", "matrix_exp"])
def test_orthogonal_at_extreme_raw(map, dtype):
    _, state = OrthogonalConv(map).right_inverse(randn(2, 3, 3))
    raws = st.fixed_dictionaries({"matrix": entries(1, 2, 3), "axis0": entries(2, 1, 3, 3)})

    @examples(40)
    @given(raws)
    def check(raw):
        if map == "matrix_exp":  # as Orthogonal: up to about 1e3
            raw = {name: X / 10 for name, X in raw.items()}
        holds(OrthogonalConv(map), raw, state, dtype, 64)

    check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("transform", [AOL(), OrthogonalConv()], ids=str)
def test_half_precision_is_off_by_its_own_rounding(transform, dtype):
    raw, state = transform.right_inverse(torch.randn(8, 8, 3, 3).to(dtype))
    value = transform.forward(raw, state)
    assert value.dtype == dtype
    assert transform.violation(value.double(), {}) <= 4 * torch.finfo(dtype).eps
