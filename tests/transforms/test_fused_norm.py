"""WeightNorm on PyTorch's kernels is the composed formula, in every derivative."""

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.autograd.functional import hessian, jacobian
from torch.testing import assert_close

from funcparam.transforms import WeightNorm
from funcparam.transforms.numerics.fused_norm import can_fuse


def composed(g, v, dim):
    others = [i for i in range(v.ndim) if i != dim % v.ndim]
    return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=True))


CASES = [((4, 3), 0), ((4, 3), 1), ((4, 3), -1), ((5, 2, 3, 3), 0), ((2, 3, 4), 2), ((1, 1), 0)]


@pytest.fixture(params=CASES, ids=str)
def case(request):
    shape, dim = request.param
    g = torch.rand([n if i == dim % len(shape) else 1 for i, n in enumerate(shape)]).double()
    v = torch.randn(shape).double()
    assert can_fuse(g, v)

    def value(g, v):
        return WeightNorm(dim).forward({"magnitude": g, "direction": v}, {})

    return value, g.requires_grad_(), v.requires_grad_(), dim


def test_values_and_all_derivatives(case):
    value, g, v, dim = case
    assert_close(value(g, v), composed(g, v, dim))
    with torch.no_grad():
        assert_close(value(g, v), composed(g, v, dim))
    assert gradcheck(value, (g, v), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(value, (g, v))


def test_one_of_the_two_trains(case):
    value, g, v, dim = case
    for a, b in ((g.detach(), v), (g, v.detach())):
        trained = [t for t in (a, b) if t.requires_grad]
        ours = torch.autograd.grad(value(a, b).square().sum(), trained)
        theirs = torch.autograd.grad(composed(a, b, dim).square().sum(), trained)
        assert_close(ours, theirs)


def test_forward_mode_in_one_argument(case):
    value, g, v, dim = case
    for i in range(2):
        pair = [g.detach(), v.detach()]
        with forward_ad.dual_level():
            pair[i] = forward_ad.make_dual(pair[i], torch.ones_like(pair[i]))
            ours = forward_ad.unpack_dual(value(*pair)).tangent
            theirs = forward_ad.unpack_dual(composed(*pair, dim)).tangent
        assert_close(ours, theirs)


def test_vectorized_jacobians_warn_of_nothing():
    g, v = torch.rand(3, 1), torch.randn(3, 2)

    def value(g, v):
        return WeightNorm(0).forward({"magnitude": g, "direction": v}, {})

    for ours, theirs in zip(
        jacobian(value, (g, v), vectorize=True),
        jacobian(lambda g, v: composed(g, v, 0), (g, v)),
        strict=True,
    ):
        assert_close(ours, theirs)
    ours = hessian(lambda v: value(g, v).pow(3).sum(), v)
    assert_close(ours, hessian(lambda v: composed(g, v, 0).pow(3).sum(), v))


def test_what_is_not_fused_is_composed():
    v = torch.randn(3, 4)
    assert not can_fuse(torch.rand(4, 1), v.mT)
    assert not can_fuse(torch.rand(3, 1).half(), v.half())
    assert not can_fuse(torch.rand(3, 1, device="meta"), v.to("meta"))
    assert not can_fuse(torch.rand(0, 1), v[:0])
    torch.func.vmap(lambda v: assert_not(can_fuse(v, v)))(v[None])


def assert_not(condition):
    assert not condition
    return torch.zeros(())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_magnitude_of_another_precision_is_composed(dtype):
    v = torch.randn(4, 3, dtype=torch.float64)
    g = torch.rand(4, 1, dtype=dtype)
    value = WeightNorm().forward({"magnitude": g, "direction": v}, {})
    assert_close(value, composed(g, v, 0))
