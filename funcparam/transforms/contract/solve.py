"""Least squares with the Jacobian of a map, by products with it alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.func import vjp

Forward: TypeAlias = Callable[[Any], Tensor]
"""A map from the raw of one weight to its value."""
Tensors: TypeAlias = dict[str, Tensor]
Chart: TypeAlias = Callable[[Tensors], Tensors]
"""The same on tensors by key; the value's one tensor has the key ""."""
Linear: TypeAlias = Callable[[Tensors], Tensors]


def tangent_part(forward: Forward, raw: Any, vector: Tensor) -> Tensor:
    """Project a vector onto the image of the Jacobian `J` of `forward` at `raw`, orthogonally."""
    J, J_T = _jacobian(_chart(forward), flat(raw))
    return J(_shortest(J, J_T, {"": vector}))[""]


def carried(old: Forward, raw: Any, new: Forward, new_raw: Any, covector: Any) -> Any:
    r"""Carry a gradient by `raw` over to `new_raw`, where `old(raw) == new(new_raw)`.

    A gradient is `c = J_old^T g` for a gradient `g` of the value. This finds the shortest `g` that
    comes closest, `g = J_old (J_old^T J_old)^+ c`, and returns `J_new^T g`. What of `c` no gradient
    by `raw` can be is dropped. Not inside of `torch.func` transforms.
    """
    J, J_T = _recorded_jacobian(_chart(old), flat(raw))
    g = _shortest(J_T, J, flat(covector))
    value, y = _recorded(_chart(new), flat(new_raw))
    return unflat(_gradients(value, y, g))


def flat(raw: Any) -> Tensors:
    """The tensors of a raw by key, which is `""` where it is one tensor."""
    return {"": raw} if isinstance(raw, Tensor) else dict(raw)


def unflat(tensors: Tensors) -> Any:
    """The raw of which these are the tensors."""
    return tensors[""] if tensors.keys() == {""} else tensors


def _chart(forward: Forward) -> Chart:
    return lambda tensors: {"": forward(unflat(tensors))}


def _jacobian(chart: Chart, raw: Tensors) -> tuple[Linear, Linear]:
    """Products with the Jacobian and with its adjoint.

    That with the Jacobian is the adjoint's adjoint, which evaluates the map once for all products
    and takes a fraction of the time of forward mode.
    """
    value, adjoint = cast("tuple[Tensors, Callable[[Tensors], tuple[Tensors]]]", vjp(chart, raw))

    def pull(vector: Tensors) -> Tensors:
        return cast("Callable[[Tensors], tuple[Tensors]]", vjp(chart, raw)[1])(vector)[0]

    along = cast("Callable[[Tensors], tuple[Tensors]]", vjp(pull, value)[1])
    return lambda tangent: along(tangent)[0], lambda vector: adjoint(vector)[0]


def _recorded_jacobian(chart: Chart, raw: Tensors) -> tuple[Linear, Linear]:
    """The same in half the time, by graphs that autograd keeps."""
    value, x = _recorded(chart, raw)
    some = {"": torch.zeros_like(value[""]).requires_grad_()}
    adjoint = _gradients(value, x, some, create_graph=True)
    return partial(_gradients, adjoint, some), partial(_gradients, value, x)


def _recorded(chart: Chart, raw: Tensors) -> tuple[Tensors, Tensors]:
    with torch.enable_grad():
        x = {key: tensor.detach().requires_grad_() for key, tensor in raw.items()}
        return chart(x), x


def _gradients(out: Tensors, x: Tensors, vector: Tensors, *, create_graph: bool = False) -> Tensors:
    used = [key for key, tensor in out.items() if tensor.requires_grad]
    found = torch.autograd.grad(
        [out[key] for key in used],
        [*x.values()],
        [vector[key] for key in used],
        create_graph=create_graph,
        retain_graph=True,
        materialize_grads=True,
    )
    return dict(zip(x, found, strict=True))


def _shortest(A: Linear, A_T: Linear, b: Tensors, steps: int = 100) -> Tensors:
    """The shortest x for which `A x` comes closest to b, by conjugate gradients.

    It ends where the residual, or what of it `A` can reach, is down to rounding; beyond it would
    run away along what A takes to nearly 0. Sources: Hestenes and Stiefel, J. Res. Natl. Bur.
    Stand. 49 (1952), section 10; the criteria of Paige and Saunders, LSQR, ACM Trans. Math. Softw.
    8 (1982), section 6.
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
    left = before = torch.full_like(first, torch.inf)
    for _ in range(steps):
        last, left = left, _square(rest)
        if _ends(left, last, rounding * first) or _ends(size, before, rounding * norm * left):
            break
        image = A(p)
        stretched = _square(image)
        norm = torch.maximum(norm, stretched / _square(p))
        x, rest = _plus(x, size / stretched, p), _plus(rest, -size / stretched, image)
        s = A_T(rest)
        size, before = _square(s), size
        p = _plus(s, size / before, p)
    return {key: tensor * scale for key, tensor in x.items()}


def _ends(now: Tensor, before: Tensor, rounding: Tensor) -> bool:
    """Whether a square is down to rounding, or is near to it and falls no more."""
    return bool(now <= rounding) or bool((now <= 1e4 * rounding) & (now > before / 4))


def _plus(a: Tensors, scale: Tensor, b: Tensors) -> Tensors:
    return {key: tensor + scale * b[key] for key, tensor in a.items()}


def _square(a: Tensors) -> Tensor:
    return torch.stack([(tensor.conj() * tensor).real.sum() for tensor in a.values()]).sum()


def _largest(a: Tensors) -> Tensor:
    entries = [tensor.abs().amax() for tensor in a.values() if tensor.numel()]
    return torch.stack(entries).max() if entries else torch.zeros(())
