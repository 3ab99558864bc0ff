"""Least squares with the Jacobian of a map, by products with it alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.func import vjp

Tensors: TypeAlias = dict[str, Tensor]
Chart: TypeAlias = Callable[[Tensors], Tensor]
"""A map from the raw tensors of one weight, by key, to its value."""
Linear: TypeAlias = Callable[[Tensors], Tensors]


def tangent_part(forward: Callable[[Any], Tensor], raw: Any, vector: Tensor) -> Tensor:
    """Project a vector onto the image of the Jacobian `J` of `forward` at `raw`, orthogonally."""
    own: Tensors = {"": raw} if isinstance(raw, Tensor) else dict(raw)

    def chart(x: Tensors) -> Tensor:
        return forward(x[""] if x.keys() == {""} else x)

    J, J_T = _jacobian(chart, own)
    return J(_shortest(J, J_T, {"": vector}))[""]


def lifted(chart: Chart, raw: Tensors, covector: Tensors) -> Tensor:
    """`J (J^T J)^+` times a covector: the shortest vector that `J^T` takes nearest to it."""
    J, J_T = _jacobian(chart, raw)
    return _shortest(J_T, J, covector)[""]


def pull(chart: Chart, raw: Tensors, vector: Tensor) -> Tensors:
    """`J^T` times a vector."""
    return cast("Callable[[Tensor], tuple[Tensors]]", vjp(chart, raw)[1])(vector)[0]


def _jacobian(chart: Chart, raw: Tensors) -> tuple[Linear, Linear]:
    """Products with the Jacobian and with its adjoint; the value's one tensor has the key "".

    That with the Jacobian is the adjoint's adjoint, which evaluates the map once for all products
    and takes a fraction of the time of forward mode.
    """
    value, adjoint = cast("tuple[Tensor, Callable[[Tensor], tuple[Tensors]]]", vjp(chart, raw))
    along = cast("Callable[[Tensors], tuple[Tensor]]", vjp(partial(pull, chart, raw), value)[1])
    return lambda tangent: {"": along(tangent)[0]}, lambda vector: adjoint(vector[""])[0]


def _shortest(A: Linear, A_T: Linear, b: Tensors, steps: int = 100) -> Tensors:
    """The shortest x for which `A x` comes closest to b, by conjugate gradients.

    It ends where the residual, or what of it `A` can reach, is down to rounding. Sources: Hestenes
    and Stiefel, J. Res. Natl. Bur. Stand. 49 (1952), section 10; the criteria of Paige and
    Saunders, LSQR, ACM Trans. Math. Softw. 8 (1982), section 6.
    """
    scale = _largest(b)
    if scale == 0:
        return A_T(b)
    b = {key: tensor / scale for key, tensor in b.items()}  # squares do not vanish
    rounding = (10 * max(torch.finfo(tensor.dtype).eps for tensor in b.values())) ** 2
    rest, p = b, A_T(b)
    x = {key: torch.zeros_like(tensor) for key, tensor in p.items()}
    first, size = _square(b), _square(p)
    norm = size / first  # of A, squared, from below
    for _ in range(steps):
        left = _square(rest)
        if left <= rounding * first or size <= rounding * norm * left:
            break
        image = A(p)
        stretched = _square(image)
        norm = torch.maximum(norm, stretched / _square(p))
        x, rest = _plus(x, size / stretched, p), _plus(rest, -size / stretched, image)
        s = A_T(rest)
        size, before = _square(s), size
        p = _plus(s, size / before, p)
    return {key: tensor * scale for key, tensor in x.items()}


def _plus(a: Tensors, scale: Tensor, b: Tensors) -> Tensors:
    return {key: tensor + scale * b[key] for key, tensor in a.items()}


def _square(a: Tensors) -> Tensor:
    return torch.stack([(tensor.conj() * tensor).real.sum() for tensor in a.values()]).sum()


def _largest(a: Tensors) -> Tensor:
    entries = [tensor.abs().amax() for tensor in a.values() if tensor.numel()]
    return torch.stack(entries).max() if entries else torch.zeros(())
