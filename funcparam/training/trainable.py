"""From raw to an optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import Tensor

from funcparam.parametrization.boundary import RawTree
from funcparam.transforms.contract.signature import describe


def trainable(raw: RawTree) -> list[Tensor]:
    """List the tensors of raw for an optimizer, each made to require gradients.

    They are raw's own tensors, in its order: an optimizer's steps change raw in place. Integers,
    which cannot be trained, are left out; weights that were frozen in the network are not: use
    `Frozen()`, or a part of raw. `raw, state = p.init(...)` makes raw; a part of it makes
    a group of parameters, or trains that part alone:
    `fp.trainable({name: raw[name] for name in p})` is what has a transform.

    Args:
        raw: one tensor or a dict of named tensors by name.

    Raises:
        TypeError: something in `raw` is not a tensor.
        ValueError: a tensor is a result of autograd, which an optimizer cannot step.

    Example:
        >>> import torch, funcparam as fp
        >>> from funcparam.transforms import WeightNorm
        >>> net = torch.nn.Linear(3, 2)
        >>> p = fp.parametrize(net, {"weight": WeightNorm()})
        >>> raw, state = p.init(net)
        >>> optimizer = torch.optim.SGD(fp.trainable(raw), lr=0.1)
        >>> torch.func.functional_call(net, p(raw, state), (torch.ones(1, 3),)).sum().backward()
        >>> optimizer.step()
    """
    return [tensor.requires_grad_() for tensor in [*_leaves(raw, "raw")]]


def _leaves(tree: Any, where: str) -> Iterator[Tensor]:
    if isinstance(tree, Mapping):
        for name, item in cast("Mapping[str, Any]", tree).items():
            yield from _leaves(item, f"{where}[{name!r}]")
    elif not isinstance(tree, Tensor):
        raise TypeError(
            f"{where}: expected a tensor or a dict of tensors; got {describe(tree)}."
            " raw, state = p.init(...) makes it"
        )
    elif tree.grad_fn is not None:
        raise ValueError(
            f"{where}: expected a tensor that autograd did not compute; got one of"
            f" {tree.grad_fn.name()}. raw, state = p.init(...) makes it, and detached"
        )
    elif tree.is_floating_point() or tree.is_complex():
        yield tree
