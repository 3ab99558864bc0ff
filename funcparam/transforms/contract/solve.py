"""Least squares with the Jacobian of a map, by products with it alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.func import jvp, vjp

Tensors: TypeAlias = dict[str, Tensor]
Chart: TypeAlias = Callable[[Tensors], Tensor]
"""A map from the raw tensors of one weight, by key, to its value."""


def tangent_part(forward: Callable[[Any], Tensor], raw: Any, vector: Tensor) -> Tensor:
    """Project a vector onto the image of the Jacobian `J` of `forward` at `raw`, orthogonally."""
    own: Tensors = {"": raw} if isinstance(raw, Tensor) else dict(raw)

    def chart(x: Tensors) -> Tensor:
        return forward(x[""] if x.keys() == {""} else x)

    return push(chart, own, _solved(_gram(chart, own), pull(chart, own, vector)))


def lifted(chart: Chart, raw: Tensors, covector: Tensors) -> Tensor:
    """`J (J^T J)^+` times a covector: the shortest vector that `J^T` takes nearest to it."""
    gram = _gram(chart, raw)
    # what is not in the image of J^T is taken out first, or the iteration would go after it
    return push(chart, raw, _solved(lambda x: gram(gram(x)), gram(covector)))


def push(chart: Chart, raw: Tensors, tangent: Tensors) -> Tensor:
    """`J` times a tangent of raw."""
    return cast("Tensor", jvp(chart, (raw,), (tangent,))[1])


def pull(chart: Chart, raw: Tensors, vector: Tensor) -> Tensors:
    """`J^T` times a vector."""
    return cast("Any", vjp(chart, raw)[1])(vector)[0]


def _gram(chart: Chart, raw: Tensors) -> Callable[[Tensors], Tensors]:
    return lambda x: pull(chart, raw, push(chart, raw, x))


def _solved(matrix: Callable[[Tensors], Tensors], b: Tensors, steps: int = 100) -> Tensors:
    """Solve for a positive semidefinite matrix by conjugate gradients (Hestenes, Stiefel, 1952)."""
    x = {key: torch.zeros_like(tensor) for key, tensor in b.items()}
    r = p = b
    size = first = _inner(r, r)
    for _ in range(steps):
        if size <= 1e-24 * first:
            break
        image = matrix(p)
        curvature = _inner(p, image)
        if curvature <= 0:  # nothing of what is left can be reached
            break
        x, r = _plus(x, size / curvature, p), _plus(r, -size / curvature, image)
        size, before = _inner(r, r), size
        p = _plus(r, size / before, p)
    return x


def _plus(a: Tensors, scale: Tensor, b: Tensors) -> Tensors:
    return {key: tensor + scale * b[key] for key, tensor in a.items()}


def _inner(a: Tensors, b: Tensors) -> Tensor:
    return torch.stack([(tensor.conj() * b[key]).real.sum() for key, tensor in a.items()]).sum()
