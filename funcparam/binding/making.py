"""What a shell is made of: a network without its ruled weights, their raw and their state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn

from funcparam.binding.dotted import paths, place
from funcparam.binding.fold import copy_of
from funcparam.parametrization.parametrization import Parametrization
from funcparam.parametrization.sharding import whole
from funcparam.parametrization.tree import flatten
from funcparam.transforms.contract.base import AnyTransform, Transform
from funcparam.transforms.contract.signature import describe

P: TypeAlias = "Parametrization[dict[str, Tensor]]"


class Parts(NamedTuple):
    """What a shell holds."""

    ruled: P
    """The entries that have a transform."""
    net: nn.Module
    raw: dict[str, Any]
    state: dict[str, Any]
    flags: dict[str, bool]
    """Whether the network trained each weight that has a rule."""
    buffers: set[str]
    """Which of them are buffers of the network."""

    def hold(self, raw: nn.Module, state: nn.Module) -> None:
        """Keep raw and state below two modules, what trains as parameters."""
        for entry in self.ruled.entries:
            for path, tensor in paths(entry.name, self.raw[entry.name]):
                key = path.removeprefix(entry.name).removeprefix(".")
                trains = self.flags[entry.name] or cast("Any", entry.transform).adapts(key)
                if entry.name not in self.buffers:
                    tensor = nn.Parameter(tensor, requires_grad=trains)
                place(raw, path, tensor)
            for path, tensor in paths(entry.name, self.state.get(entry.name, {})):
                place(state, path, tensor)


def parts_of(
    net: nn.Module,
    p: P,
    memo: dict[int, Any],
    given: tuple[Mapping[str, Any] | None, Mapping[str, Any] | None],
    generator: torch.Generator | None,
) -> Parts:
    """Copy a network apart, from its own weights or from raw and state that are given.

    Raises:
        TypeError, ValueError, NotImplementedError: as `p.init(net)` or `p(raw, state)`.
    """
    if not isinstance(p, Parametrization):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"expected a parametrization; got {describe(p)}. fp.parametrize(net, rules) makes one"
        )
    values = p._values(net)  # pyright: ignore[reportPrivateUsage]
    _expect_same_ties(net, p)
    ruled: P = Parametrization(tuple(e for e in p.entries if e.transform is not None), None)
    if given == (None, None):
        own = {entry.name: values[entry.name] for entry in ruled.entries}
        raw, state = ruled.init(own, generator=generator)
    else:
        raw, state = (_copied(tree or {}) for tree in given)
        p._check(raw, state)  # pyright: ignore[reportPrivateUsage]
        for name in set(raw) - set(ruled):
            flag = values[name].requires_grad
            memo[id(values[name])] = nn.Parameter(raw[name], requires_grad=flag)
    memo |= {id(values[entry.name]): None for entry in ruled.entries}
    return Parts(
        ruled,
        copy_of(net, memo),
        raw,
        state,
        {entry.name: values[entry.name].requires_grad for entry in ruled.entries},
        {name for leaf in flatten(net)[0] if leaf.is_buffer for name in leaf.names},
    )


def evolves(p: P) -> bool:
    """Whether `update` may do anything."""
    kinds = [type(cast("AnyTransform", e.transform)) for e in p.entries if e.signature.state]
    return any(kind.update is not Transform.update for kind in kinds)


def gathered(net: nn.Module) -> dict[int, Any]:
    """The sharded parameters of a network, whole, by the ids of their parts."""
    every = [own for _, own in net.named_parameters(remove_duplicate=False)]
    sharded = [own for own in every if whole(own) is not own]
    return {id(own): nn.Parameter(whole(own).detach(), own.requires_grad) for own in sharded}


def _copied(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {name: _copied(item) for name, item in cast("Mapping[str, Any]", tree).items()}
    return tree.detach().clone() if isinstance(tree, Tensor) else tree


def _expect_same_ties(net: nn.Module, p: Parametrization[dict[str, Tensor]]) -> None:
    """Raise unless every parameter of `net` is an entry of `p` under the same names."""
    expected = {entry.names for entry in p.entries}
    for leaf in flatten(net)[0]:
        if not leaf.is_buffer and leaf.names not in expected:
            raise ValueError(
                f"{leaf.names[0]!r}: expected the ties of the network that p was made for; got"
                f" {' = '.join(leaf.names)}. Make p with fp.parametrize(net, rules)"
            )
