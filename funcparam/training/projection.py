"""Weights that are trained as they are, and brought back to their constraints after each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from funcparam.parametrization.names import closest
from funcparam.parametrization.parametrization import Parametrization
from funcparam.parametrization.tree import flatten
from funcparam.parametrization.values import naming
from funcparam.training.arguments import expect_parametrization
from funcparam.transforms.contract.base import AnyTransform, State
from funcparam.transforms.contract.signature import check_named, describe
from funcparam.transforms.numerics.linalg import LinAlgError


class _Weight(NamedTuple):
    """A parameter that has a rule, and what it is projected by."""

    tensor: Tensor
    transform: AnyTransform
    state: State


@dataclass(frozen=True)
class Projected:
    """A parametrization at work behind an optimizer's steps; `remove()` ends it."""

    weights: tuple[str, ...]
    handles: tuple[RemovableHandle, ...]

    def remove(self) -> None:
        """Let the optimizer's steps be as before."""
        for handle in self.handles:
            handle.remove()


def project_after(
    optimizer: Optimizer,
    p: Parametrization[Any],
    net: nn.Module,
    *,
    state: Mapping[str, State] | None = None,
) -> Projected:
    r"""Project the weights of a plain network onto their constraints after each step.

    The other way to constrain a weight: it stays a parameter of `net`, the optimizer steps it,
    and $W \leftarrow P(W)$ follows, with the $P$ of `p.project`. With

    * `UnitNorm(dim=None, radius=None)` each weight keeps its Frobenius norm (Hyperball, arXiv
      2606.16899, with [`relative_steps`][funcparam.relative_steps]);
    * `UnitNorm(dim=-1)` rows keep length 1 (nGPT, arXiv 2410.01131; decoders of sparse
      autoencoders, with [`tangent_before`][funcparam.tangent_before]);
    * `Orthogonal()` a matrix stays on the Stiefel manifold, by its polar factor;
    * `Interval(a, b)` entries stay in a box, `Mask()` zeros stay zero.

    Args:
        optimizer: of PyTorch, or with its hooks.
        p: a parametrization of `net`. Only its rules matter.
        net: the network, whose own parameters the optimizer has.
        state: masks, bounds and radii, as `p.init` returns them; what is not given is taken from
            the rule, and what the rule does not say from the weights as they are.

    Returns:
        A handle, of which `remove()` ends it. Nothing is projected before the first step, so
        weights may be off their constraints until then. NaN stays NaN.

    Raises:
        ValueError: the optimizer does not have a weight that has a rule; state is not p's.
        NotImplementedError: a transform has no projection.

    Example:
        >>> import torch, funcparam as fp
        >>> from funcparam.transforms import UnitNorm
        >>> net = torch.nn.Linear(3, 2)
        >>> p = fp.parametrize(net, {"weight": UnitNorm()})
        >>> optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
        >>> handle = fp.project_after(optimizer, p, net)
        >>> net(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
        >>> torch.allclose(net.weight.norm(dim=1), torch.ones(2))
        True
    """
    weights = _weights(optimizer, p, net, state, "project_after(optimizer, p, net)")
    for name, weight in weights.items():
        _projected(name, weight)  # what has no projection says so now

    @torch.no_grad()
    def project(*_: Any) -> None:
        done = {name: _projected(name, weight) for name, weight in weights.items()}
        for name, value in done.items():
            weights[name].tensor.copy_(value)

    return _attached(weights, optimizer.register_step_post_hook(project))


def tangent_before(
    optimizer: Optimizer,
    p: Parametrization[Any],
    net: nn.Module,
    *,
    state: Mapping[str, State] | None = None,
) -> Projected:
    """Take out of gradients, before each step, what would lead away from the constraints.

    For momentum that does not gather what the projection takes back, as Riemannian optimizers do.
    Arguments and errors are those of [`project_after`][funcparam.project_after].

    Example:
        >>> import torch, funcparam as fp
        >>> from funcparam.transforms import Mask
        >>> net = torch.nn.Linear(3, 2)
        >>> _ = net.weight.data[0].zero_()
        >>> p = fp.parametrize(net, {"weight": Mask()})
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        >>> handle = fp.tangent_before(optimizer, p, net)
        >>> net(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
        >>> net.weight.grad[0]
        tensor([0., 0., 0.])
    """
    weights = _weights(optimizer, p, net, state, "tangent_before(optimizer, p, net)")
    for name, weight in weights.items():
        _tangent(name, weight, torch.zeros_like(weight.tensor))

    @torch.no_grad()
    def project(*_: Any) -> None:
        grads = {n: w.tensor.grad for n, w in weights.items() if w.tensor.grad is not None}
        done = {name: _tangent(name, weights[name], grad) for name, grad in grads.items()}
        for name, grad in done.items():
            grads[name].copy_(grad)

    return _attached(weights, optimizer.register_step_pre_hook(project))


def relative_steps(optimizer: Optimizer, p: Parametrization[Any], net: nn.Module) -> Projected:
    r"""Give each step of a weight the length `lr` times the length of the weight.

    $$W \leftarrow W + \eta \lVert W \rVert \frac{D}{\lVert D \rVert}$$

    for the step `D` that the optimizer took, of which only the direction is left, and the learning
    rate of its group. With `project_after` and `UnitNorm(dim=None, radius=None)`, in any order, it
    is Hyperball (arXiv 2606.16899) behind any optimizer, Muon for one. A step of 0 stays 0.

    Args:
        optimizer: of PyTorch, or with its hooks.
        p: a parametrization of `net`. Weights that have a rule are meant, whatever it is.
        net: the network, whose own parameters the optimizer has.

    Raises:
        ValueError: the optimizer does not have a weight that has a rule.
    """
    weights = _held(optimizer, p, net, "relative_steps(optimizer, p, net)")
    before: dict[str, Tensor] = {}

    @torch.no_grad()
    def remember(*_: Any) -> None:
        before.update({name: weight.clone() for name, weight in weights.items()})

    @torch.no_grad()
    def scale(*_: Any) -> None:
        rates = {id(t): group["lr"] for group in optimizer.param_groups for t in group["params"]}
        for name, weight in weights.items():
            old = before.pop(name)
            step = weight - old
            length = _length(step)
            factor = rates[id(weight)] * _length(old) / torch.where(length == 0, 1, length)
            weight.copy_(old + factor * step)

    pre, post = optimizer.register_step_pre_hook(remember), optimizer.register_step_post_hook(scale)
    # The step is the optimizer's own, so it is scaled before any projection follows.
    optimizer._optimizer_step_post_hooks.move_to_end(post.id, last=False)  # pyright: ignore
    return Projected(tuple(weights), (pre, post))


def _length(tensor: Tensor) -> Tensor:
    return tensor.square().sum().sqrt()


def _attached(weights: Mapping[str, _Weight], handle: RemovableHandle) -> Projected:
    return Projected(tuple(weights), (handle,))


def _held(optimizer: Any, p: Any, net: nn.Module, call: str) -> dict[str, Tensor]:
    """The weights that have a rule, which the optimizer must have."""
    expect_parametrization(p, call)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: expected one, in {call}; got {describe(optimizer)}")
    leaves = {name: leaf.tensor for leaf in flatten(net)[0] for name in leaf.names}
    held = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
    for name in p:
        if name not in leaves:
            raise ValueError(f"{name!r}: p has a rule for it, but the network has no such weight")
        if id(leaves[name]) not in held:
            raise ValueError(
                f"{name!r}: expected an optimizer that has this weight; it is in none of its"
                " groups. Give it net.parameters(), or leave the rule out"
            )
    return {name: leaves[name] for name in p}


def _weights(
    optimizer: Optimizer,
    p: Parametrization[Any],
    net: nn.Module,
    state: Mapping[str, State] | None,
    call: str,
) -> dict[str, _Weight]:
    held, given = _held(optimizer, p, net, call), state or {}
    expected = {entry.name: entry.signature.state for entry in p.entries if entry.name in held}
    for name, own in given.items():
        if name not in expected:
            raise ValueError(f"state: unknown name {name!r}; {closest(name, [*expected])}")
        check_named(expected[name], own, f"state[{name!r}]")
    return {
        name: _Weight(held[name], t, given[name] if name in given else _said(name, t, held[name]))
        for name, t in p.items()
    }


def _said(name: str, transform: AnyTransform, value: Tensor) -> State:
    """Nothing where the rule says the whole constraint, else what the weight says of it."""
    with naming(name, transform), torch.no_grad():
        try:
            transform.project(value, {})
        except KeyError:
            return transform.right_inverse(value)[1]
        return {}


def _projected(name: str, weight: _Weight) -> Tensor:
    return _mapped(name, weight, weight.transform.project)


def _tangent(name: str, weight: _Weight, grad: Tensor) -> Tensor:
    return _mapped(name, weight, weight.transform.tangent, grad)


def _mapped(name: str, weight: _Weight, method: Callable[..., Tensor], *vectors: Tensor) -> Tensor:
    given = (weight.tensor.detach(), *vectors)
    try:
        with naming(name, weight.transform):
            return method(*given, weight.state)
    except LinAlgError:
        if all(bool(tensor.isfinite().all()) for tensor in given):
            raise
        return torch.full_like(given[0], torch.nan)  # as where no decomposition is in the way
