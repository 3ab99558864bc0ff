"""Means of orthonormal frames along the manifold that they lie on."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from funcparam.transforms.numerics.linalg import linalg
from funcparam.transforms.numerics.orthogonal_maps import complete_q_factor, identity_like
from funcparam.transforms.numerics.polar import nearest_orthogonal, polar_factor
from funcparam.transforms.numerics.skew_exp import skew_exp

_ROOTS = 2
_ORDER = 45  # of the series: tan(pi / 8) to its power is below rounding
_STEPS = 200


def karcher_mean(points: Tensor, weights: Tensor) -> Tensor:
    r"""The frame `M` for which the weighted sum of `Log_M` of all points is 0.

    Of square matrices the distances are those of the group; of tall ones those of the Stiefel
    manifold in its canonical metric; wide ones are transposed. Each step goes along the mean of
    the logarithms. That of a tall matrix is the logarithm of a square one, whose other columns are
    turned, a step at a time, until its lower right block is 0. The mean is unique where each point
    is less than a quarter turn away.

    Args:
        points: frames along dimension 0, in full precision.
        weights: one for each, which sum to 1.

    Raises:
        ValueError: no such mean was found: points are further apart.

    Source: Karcher, Comm. Pure Appl. Math. 30 (1977); Manton, ICARCV (2004) (groups);
    Zimmermann, SIAM J. Matrix Anal. Appl. 38 (2017), algorithm 3.1 (Stiefel logarithm).
    """
    if points.shape[-2] < points.shape[-1]:
        return karcher_mean(points.mH, weights).mH
    shares, k = weights.reshape(-1, *[1] * (points.ndim - 1)), points.shape[-1]
    mean = complete_q_factor(polar_factor((shares * points).sum(0)))
    every = complete_q_factor(points)
    every = _turned(every, k, nearest_orthogonal((mean.mH @ every)[..., k:, k:]).mH)
    for _ in range(_STEPS):
        logs = _log(mean.mH @ every)
        turns = logs[..., k:, k:].clone()
        logs[..., k:, k:] = 0
        step = (shares * logs).sum(0)
        if _is_rounding(step) and _is_rounding(turns):
            if linalg.matrix_norm(logs, 2).amax() < torch.pi / 2:
                return mean[..., :k]
            break
        if not step.isfinite().all():
            break
        mean = nearest_orthogonal(mean @ skew_exp(step))
        every = _turned(every, k, skew_exp(-turns))
    raise ValueError(
        "expected matrices that are less than a quarter turn from their mean; got some that are"
        " further apart, where it is not unique"
    )


def _turned(frames: Tensor, k: int, turns: Tensor) -> Tensor:
    """Frames with all columns but the first k turned among themselves."""
    return torch.cat([frames[..., :k], frames[..., k:] @ turns], -1)


def _log(Q: Tensor) -> Tensor:
    """The principal logarithm of unitary matrices; infinite where an eigenvalue is next to -1.

    A root is the polar factor of I + Q. After some, `2 atanh` of the Cayley transform is a short
    series.
    """
    identity = identity_like(Q)
    root = polar_factor(identity + Q)
    exists = ((root.mH @ root - identity).abs().amax((-2, -1), keepdim=True)) < 1e-3
    for _ in range(_ROOTS - 1):
        root = polar_factor(identity + root)
    C = cast("Tensor", linalg.solve(identity + root, root - identity))
    C = (C - C.mH) / 2
    square, term, total = C @ C, C, C
    for order in range(3, _ORDER, 2):
        term = term @ square
        total = total + term / order
    return torch.where(exists, 2 ** (_ROOTS + 1) * total, torch.inf)


def _is_rounding(X: Tensor) -> bool:
    size = 2 ** (_ROOTS + 3) * X.shape[-1] ** 0.5 * torch.finfo(X.dtype).eps
    return X.numel() == 0 or bool(X.abs().amax() <= size)
