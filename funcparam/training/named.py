"""The tensors of raw, each with a name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

from torch import Tensor

from funcparam.parametrization.boundary import RawTree
from funcparam.transforms.contract.signature import describe


class Part(NamedTuple):
    """One tensor of raw: of which weight, and its key there, which is '' of a raw of one tensor."""

    weight: str
    key: str
    tensor: Tensor

    @property
    def name(self) -> str:
        """`rnn.weight`, or `rnn.weight.direction` where raw has named tensors."""
        return f"{self.weight}.{self.key}" if self.key else self.weight


def named(raw: RawTree) -> dict[str, Tensor]:
    """Name the tensors of raw by their paths joined by dots, as optimizers and loggers want them.

    They are raw's own tensors, in its order. Integers and booleans, which cannot be trained, are
    left out.

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
        >>> list(fp.named(raw))
        ['weight.magnitude', 'weight.direction', 'bias']
    """
    return {part.name: part.tensor for part in parts(raw)}


def trainable(raw: RawTree) -> list[Tensor]:
    """List the tensors of raw for an optimizer, each made to require gradients.

    They are raw's own tensors, in its order: an optimizer's steps change raw in place. Integers,
    which cannot be trained, are left out; weights that were frozen, in the network or in raw, are
    not: [`fp.groups`][funcparam.groups] leaves them frozen, as does a rule with `Frozen()`.
    `raw, state = p.init(...)` makes raw; a part of it makes a group of parameters, or trains that
    part alone: `fp.trainable({name: raw[name] for name in p})` is what has a transform.

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
    return [part.tensor.requires_grad_() for part in [*parts(raw)]]


def parts(raw: RawTree) -> Iterator[Part]:
    """List what of raw can be trained; raise for what is no leaf of autograd, or no tensor."""
    for weight, own in _items(raw):
        for key, tensor in _items(own):
            where = "raw" + "".join(f"[{step!r}]" for step in (weight, key) if step)
            _expect_leaf(tensor, where)
            if tensor.is_floating_point() or tensor.is_complex():
                yield Part(weight, key, tensor)


def _items(tree: Any) -> list[tuple[str, Any]]:
    """What is under each name; one tensor is under none."""
    if isinstance(tree, Mapping):
        return list(cast("Mapping[str, Any]", tree).items())
    return [("", tree)]


def _expect_leaf(tensor: Any, where: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{where}: expected a tensor or a dict of tensors; got {describe(tensor)}."
            " raw, state = p.init(net) makes it, and model.raw_and_state() has that of a"
            " Parametrized"
        )
    if tensor.grad_fn is not None:
        raise ValueError(
            f"{where}: expected a tensor that autograd did not compute; got one of"
            f" {tensor.grad_fn.name()}. raw, state = p.init(...) makes it, and detached"
        )
