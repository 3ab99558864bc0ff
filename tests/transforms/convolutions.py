"""Convolution kernels by numpy and scipy: what the transforms of kernels are checked against.

Kernels have the shape (out, in, *taps).
"""

import numpy as np
import scipy.linalg
import torch
from torch import Tensor
from torch.nn import functional as F


def operator(kernel: Tensor, sides: tuple[int, ...], groups: int = 1) -> Tensor:
    """The matrix of the convolution with circular padding, one basis image for each column."""
    channels = groups * kernel.shape[1]
    size = channels * int(np.prod(sides))
    basis = torch.eye(size, dtype=kernel.dtype).reshape(size, channels, *sides)
    for axis, taps in enumerate(kernel.shape[2:], 2):
        basis = torch.cat([basis, basis.narrow(axis, 0, taps - 1)], dim=axis)  # wrapped around
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(sides) - 1]
    return convolve(basis, kernel, groups=groups).flatten(1).T


def orthogonal_kernel(x: Tensor, rank: int | None = None) -> Tensor:
    """An orthogonal kernel of x's shape, drawn with x as the seed; its projectors' rank too."""
    seed = x.to(torch.complex128).contiguous().numpy().view(np.uint64)
    rng = np.random.default_rng(seed.ravel())
    out, inputs, *taps = x.shape
    kernel = _kernel(rng, min(out, inputs), max(out, inputs), taps, x.is_complex(), rank)
    kernel = kernel.swapaxes(0, 1) if out > inputs else kernel
    return torch.from_numpy(np.ascontiguousarray(kernel)).to(x.dtype)


def _kernel(rng, short, long, taps, is_complex, rank):
    """A unitary matrix, times two-tap factors along the first axis, the second, and so on."""
    kernel = _unitary(rng, long, is_complex)[:short].reshape(short, long, *[1] * len(taps))
    for axis, size in enumerate(taps):
        for _ in range(size - 1):
            r = rng.integers(0, long + 1) if rank is None else rank
            vectors = _unitary(rng, long, is_complex)[:, :r]
            P = vectors @ vectors.conj().T
            kept = np.einsum("oi...,ij->oj...", kernel, P)
            end = [(0, 0)] * kernel.ndim
            end[axis + 2] = (0, 1)
            kernel = np.pad(kept, end) + np.pad(kernel - kept, [pair[::-1] for pair in end])
    return kernel


def _unitary(rng, n, is_complex):
    m = rng.standard_normal((n, n))
    if is_complex:
        m = m + 1j * rng.standard_normal((n, n))
    return scipy.linalg.polar(m)[0]


def peeled(x: Tensor) -> Tensor:
    """The documented projection onto orthogonal kernels, by matrix signs and polar factors."""
    if len(x) > x.shape[1]:
        return peeled(x.transpose(0, 1)).transpose(0, 1)
    rest, factors = x.numpy(), []
    for axis in reversed(range(2, x.ndim)):
        while rest.shape[axis] > 1:
            first, last = (
                scipy.linalg.polar(rest.take(end, axis).swapaxes(0, 1).reshape(x.shape[1], -1).T)[1]
                for end in (0, -1)
            )
            P = (np.eye(len(first)) + scipy.linalg.signm(first - last)) / 2
            ends = np.delete(rest, -1, axis), np.delete(rest, 0, axis)
            rest = np.einsum("oi...,ij->oj...", ends[0], P) + np.einsum(
                "oi...,ij->oj...", ends[1], np.eye(len(P)) - P
            )
            factors.append((axis, P))
    out = _q_factor(rest.reshape(rest.shape[:2])).reshape(rest.shape)
    for axis, P in reversed(factors):
        kept = np.einsum("oi...,ij->oj...", out, P)
        end = [(0, 0)] * x.ndim
        end[axis] = (0, 1)
        out = np.pad(kept, end) + np.pad(out - kept, [pair[::-1] for pair in end])
    return torch.from_numpy(out)


def _q_factor(m):
    if m.shape[0] < m.shape[1]:
        return _q_factor(m.T).T
    q, r = scipy.linalg.qr(m, mode="economic")
    return q * np.sign(r.diagonal())


def _lag_sums(kernel):
    """For each two inputs the sum over lags of |autocorrelation|, by an FFT without aliases."""
    sides = [2 * taps - 1 for taps in kernel.shape[2:]]
    axes = range(2, kernel.ndim)
    spectrum = np.fft.fftn(kernel, sides, axes)
    gram = np.einsum("oi...,oj...->ij...", spectrum.conj(), spectrum)
    return abs(np.fft.ifftn(gram, axes=axes)).sum(tuple(axes))


def almost_orthogonal_kernel(groups: int = 1):
    """Every input divided by the root of its sum."""
    return _by_group(groups, lambda x: _scaled(x, np.sqrt(_lag_sums(x).sum(1))))


def perron_kernel(groups: int = 1):
    """The whole kernel divided by the root of the largest eigenvalue."""
    return _by_group(groups, lambda x: x / np.sqrt(np.linalg.eigvalsh(_lag_sums(x))[-1]))


def _by_group(groups, function):
    def apply(x: Tensor) -> Tensor:
        parts = np.split(x.numpy(), groups)
        return torch.from_numpy(np.concatenate([function(part) for part in parts]))

    return apply


def _scaled(x, lengths):
    return x / lengths.reshape(-1, *[1] * (x.ndim - 2))
