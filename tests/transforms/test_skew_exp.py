"""The exponential of skew matrices is at least as exact as PyTorch's, at any norm."""

import pytest
import torch
from torch.func import grad, hessian, vmap
from torch.testing import assert_close

from funcparam.transforms.numerics.skew_exp import skew_exp

NORMS = [0.0, 1e-8, 1e-3, 0.1, 0.5, 1.0, 3.0, 10.0, 100.0, 1e3, 1e4]


def skew(n, norm, dtype=torch.double, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, n, generator=generator, dtype=torch.double).tril(-1)
    A = X - X.mT
    return (A / torch.linalg.matrix_norm(A, 2) * norm).to(dtype)


def exact(A):
    values, vectors = torch.linalg.eigh(-1j * A.to(torch.complex128))
    return ((vectors * torch.exp(1j * values)) @ vectors.mH).real


def errors(Q, A):
    Q = Q.double()
    return (Q - exact(A)).abs().max(), (Q.mT @ Q - torch.eye(len(Q)).double()).abs().max()


@pytest.fixture(params=["at hand", "far away"])
def entries(request):
    """On a CPU a norm is read; far away, on a device, there are as many squarings as ever."""
    if request.param == "far away":
        request.getfixturevalue("entries_are_far")


@pytest.mark.usefixtures("entries")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [2, 16, 65])
@pytest.mark.parametrize("norm", NORMS)
def test_no_worse_than_torchs(n, norm, dtype):
    A = skew(n, norm, dtype)
    eps = torch.finfo(dtype).eps
    value, orthogonality = errors(skew_exp(A), A)
    their_value, their_orthogonality = errors(torch.linalg.matrix_exp(A), A)
    # an angle is known to a rounding of itself, and whose luck is better depends on the processor
    assert value <= their_value + max(16, norm / 2) * eps
    assert orthogonality <= their_orthogonality + 16 * eps


@pytest.mark.usefixtures("entries")
@pytest.mark.parametrize("norm", NORMS)
def test_complex_matrices(norm):
    H = torch.randn(6, 6, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    H = H + H.mH
    A = 1j * H / torch.linalg.matrix_norm(H, 2) * norm
    values, vectors = torch.linalg.eigh(-1j * A)
    expected = (vectors * torch.exp(1j * values)) @ vectors.mH
    assert_close(skew_exp(A), expected, atol=1e-11, rtol=0)


@pytest.mark.usefixtures("entries")
@pytest.mark.parametrize("norm", [0.0, 1e-3, 0.5, 10.0])
def test_derivatives(norm):
    A = skew(4, norm)

    def f(exp):
        return lambda X: (exp(X.tril(-1) - X.tril(-1).mT) ** 3).sum()

    ours, theirs = f(skew_exp), f(torch.linalg.matrix_exp)
    assert_close(grad(ours)(A), grad(theirs)(A), atol=1e-11, rtol=1e-9)
    assert_close(hessian(ours)(A), hessian(theirs)(A), atol=1e-10, rtol=1e-8)


@pytest.mark.usefixtures("entries")
def test_a_batch_of_all_norms_is_a_loop():
    A = torch.stack([skew(5, norm, torch.float32) for norm in NORMS])
    loop = torch.stack([skew_exp(a) for a in A])
    for batch in (skew_exp(A), vmap(skew_exp)(A), vmap(vmap(skew_exp))(A[None])[0]):
        for norm, Q, expected in zip(NORMS, batch, loop, strict=True):
            assert_close(Q, expected, rtol=0, atol=max(1e-6, norm * torch.finfo(Q.dtype).eps))


@pytest.mark.usefixtures("entries")
@pytest.mark.parametrize("norms", [(1.0, 1.9), (1e-4, 0.6), (1e-4, 3.0)])
def test_members_of_a_batch_are_no_worse_than_torchs(norms):
    A = torch.stack([skew(16, norm, torch.float32) for norm in norms])
    for ours, a in zip(skew_exp(A), A, strict=True):
        value, orthogonality = errors(ours, a)
        their_value, their_orthogonality = errors(torch.linalg.matrix_exp(a), a)
        assert value <= their_value + 4 * torch.finfo(torch.float32).eps
        assert orthogonality <= their_orthogonality + 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("n", [2, 5, 33])
@pytest.mark.parametrize("size", [1e3, 1e4, 1e5, 1e6, 1e7])
def test_orthogonal_at_large_entries(size, n):
    generator = torch.Generator().manual_seed(0)
    X = size * torch.randn(8, n, n, generator=generator, dtype=torch.float32)
    Q = skew_exp(X - X.mT).double()
    assert (Q.mT @ Q - torch.eye(n).double()).abs().amax() < 2e-6


def test_what_has_no_norm_to_read():
    A = skew(4, 3.0, torch.float32)
    assert skew_exp(A.to("meta")).shape == (4, 4)
    assert skew_exp(A[:0, :0]).shape == (0, 0)
    compiled = torch.compile(skew_exp, backend="aot_eager", fullgraph=True)(A)
    assert_close(compiled, skew_exp(A), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("entries_are_far")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_what_takes_more_squarings_than_there_are_is_nan(dtype):
    A = torch.stack([skew(4, norm).to(dtype) for norm in (1.0, 1e4, 1e5, 1e30)])
    assert skew_exp(A).isnan().any(-1).all(-1).tolist() == [False, False, True, True]
    assert not skew_exp(A[:2]).isnan().any()


@pytest.mark.usefixtures("entries")
def test_nan_and_infinity_show():
    assert skew_exp(torch.full((2, 2), torch.nan)).isnan().all()
    assert not skew_exp(torch.full((2, 2), torch.inf)).isfinite().all()


def test_a_traced_graph_does_not_depend_on_entries():
    from torch.fx.experimental.proxy_tensor import make_fx

    A = torch.randn(4, 4, dtype=torch.float64)
    A = A - A.mT
    assert_close(make_fx(skew_exp)(A)(9 * A), torch.linalg.matrix_exp(9 * A))
