"""Moves: another raw for the same values, in the tensors that an optimizer has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from funcparam.parametrization.boundary import RawTree, StateTree
from funcparam.parametrization.parametrization import Parametrization
from funcparam.training.moments import carried_squares, moments, order
from funcparam.training.together import Together
from funcparam.transforms.contract.base import AnyTransform, Raw, State
from funcparam.transforms.contract.solve import Forward, carried, flat, unflat
from funcparam.transforms.contract.steps import detached

Moved = tuple[dict[str, Raw], dict[str, State]]
Carry = Callable[[Raw], Raw]


def move(
    p: Parametrization[Any],
    q: Parametrization[Any],
    raw: RawTree,
    state: StateTree,
    optimizer: Optimizer | None = None,
) -> Moved:
    r"""Go on with the same values under other rules, or from another base point.

    Where `p` and `q` have the same transform for a weight, it is rebased (see
    [`Parametrization.rebase`][funcparam.Parametrization.rebase]) if `q` is `p`, and left alone
    otherwise. Where they differ, raw and state are the right inverse of the value, as of
    `q.init(p(raw, state))`: an adapter is merged, a rule added, changed or removed.

    What an optimizer trains stays what it trains: new entries are written into the tensors of
    `raw` that have the same key and shape, `requires_grad` is kept, and tensors that are new take
    the place of the old ones in the optimizer's groups. The optimizer's moments come along: means
    of gradients (Adam, SGD, Lion, Muon) by the Jacobians of the two maps, `m -> J_q^T (J_p^T)^+ m`;
    means of squares by the square of the factor by which the length of the mean changed, which is
    exact where the move only scales, and raised where the next step of an entry would be longer
    than the longest before. Of a weight whose raw changes its shape they begin anew.

    Moving at every step makes any optimizer a Riemannian one; the map is its retraction. Source:
    Lezcano-Casado, arXiv 1909.09501.

    Args:
        p: the parametrization of `raw` and `state`.
        q: the one to go on with: `p` itself to rebase, or `fp.parametrize(net, {**p, name: new})`.
        raw: as `p.init` returns it. Its tensors are written to.
        state: likewise; it is read only, but that of a module (`model.raw_and_state()`) whose base
            points move, which is written to as raw is.
        optimizer: of PyTorch, or made by [`Groups.optimizer`][funcparam.Groups.optimizer]; None if
            there is none, or it is made anew.

    Returns:
        Raw and state of `q`.

    Raises:
        ValueError: the parametrizations are of different weights; `q` cannot represent a value; the
            optimizer does not have a tensor of raw, keeps what nobody can carry over, or has
            several groups, of which nothing says the one for a new tensor. Nothing was changed.

    Example:
        >>> import torch, funcparam as fp
        >>> from funcparam.transforms import Orthogonal
        >>> net = torch.nn.Linear(3, 3)
        >>> p = fp.parametrize(net, {"weight": Orthogonal()})
        >>> raw, state = p.init(net)
        >>> optimizer = torch.optim.Adam(fp.trainable(raw), lr=0.1)
        >>> p(raw, state)["weight"].sum().backward()
        >>> optimizer.step()
        >>> before = p(raw, state)["weight"]
        >>> raw, state = fp.move(p, p, raw, state, optimizer)
        >>> torch.allclose(p(raw, state)["weight"], before, atol=1e-6)
        True
    """
    _expect_same_weights(p, q)
    with torch.no_grad():
        new_raw, new_state = _moved(p, q, raw, state)
    old_given = p._plan.given(raw, state)  # pyright: ignore[reportPrivateUsage]
    new_given = q._plan.given(new_raw, new_state)  # pyright: ignore[reportPrivateUsage]
    result: dict[str, Raw] = {}
    writes: list[Callable[[], object]] = []
    for name, own in new_raw.items():
        weight = _Weight(name, flat(raw[name]), flat(own))
        result[name] = unflat(weight.result)
        if not weight.is_new:
            continue
        writes += weight.writes()
        if optimizer is not None:
            carry = _carry(p, q, name, (raw, old_given), (new_raw, new_given))
            writes += weight.optimizer_writes(optimizer, carry)
    if p == q:
        new_state = {n: _held(raw[n], state[n], own, writes) for n, own in new_state.items()}
    with torch.no_grad():
        for write in writes:
            write()
    return result, new_state


class _Weight:
    """The raw of one weight, before and after."""

    def __init__(self, name: str, old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
        self.name, self.old, self.new = name, old, new
        self.is_new = old.keys() != new.keys() or any(new[key] is not old[key] for key in new)
        trains = any(tensor.requires_grad for tensor in old.values())
        self.result = {
            key: old[key] if _alike(tensor, old.get(key)) else _fresh(tensor, trains)
            for key, tensor in new.items()
        }

    def writes(self) -> Iterator[Callable[[], object]]:
        """What brings the tensors that stay to their new entries."""
        for key, tensor in self.result.items():
            if tensor is self.old.get(key):
                yield partial(tensor.copy_, self.new[key].detach().clone())

    def optimizer_writes(
        self, optimizer: Optimizer, carry: Carry
    ) -> Iterator[Callable[[], object]]:
        """What brings the optimizer along."""
        if not any(tensor.requires_grad for tensor in self.old.values()):
            return
        homes = self._homes(optimizer)
        kept = {key: moments(optimizer, self._path(key), t) for key, t in self.old.items()}
        if self._stays():
            yield from self._carried(kept, carry)
            return
        if isinstance(optimizer, Together):
            raise ValueError(
                f"{self.name!r}: raw changes its shape, and the optimizer of fp.groups steps views."
                " Move without it, and make groups and optimizer anew"
            )
        for key, tensor in self.old.items():
            if self.result.get(key) is tensor:
                yield partial(_begin_anew, optimizer.state.get(tensor, {}))
        gone = [t for k, t in self.old.items() if self.result.get(k) is not t]
        come = [
            (self._home(key, homes), self._path(key), tensor)
            for key, tensor in self.result.items()
            if self.old.get(key) is not tensor
        ]
        yield partial(_exchange, optimizer, gone, come)

    def _stays(self) -> bool:
        return all(self.result.get(key) is tensor for key, tensor in self.old.items()) and len(
            self.old
        ) == len(self.result)

    def _carried(
        self, kept: Mapping[str, dict[str, list[Tensor]]], carry: Carry
    ) -> Iterator[Callable[[], object]]:
        whole = {
            key: {moment: _whole(views, self.old[key]) for moment, views in own.items()}
            for key, own in kept.items()
        }
        after: dict[str, dict[str, Tensor]] = {key: {} for key in whole}
        for moment in sorted({m for own in whole.values() for m in own if order(m) == 1}):
            means = {key: own.get(moment, _none_of(self.old[key])) for key, own in whole.items()}
            for key, mean in flat(carry(unflat(means))).items():
                after[key][moment] = mean
        for key, own in kept.items():
            for moment, views in own.items():
                done = (
                    after[key][moment]
                    if order(moment) == 1
                    else carried_squares(whole[key], after[key], moment)
                )
                parts = done.reshape(len(views), *views[0].shape)
                yield from (partial(v.copy_, part) for v, part in zip(views, parts, strict=True))

    def _homes(self, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
        """The group of each tensor of the old raw."""
        found: dict[int, dict[str, Any]] = {}
        for group in optimizer.param_groups:
            found |= {id(tensor): group for tensor in group["params"]}
        for key, tensor in self.old.items():
            if id(tensor) not in found:
                raise ValueError(
                    f"{self._path(key)!r}: expected an optimizer that has this tensor of raw; it is"
                    " in none of its groups. Give the optimizer that trains raw"
                )
        return {key: found[id(tensor)] for key, tensor in self.old.items()}

    def _home(self, key: str, homes: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """The group for a new tensor: of the one with its key, or the only one that there is."""
        if key in homes:
            return homes[key]
        first, *rest = homes.values()
        if "kind" in first or any(group is not first for group in rest):
            raise ValueError(
                f"{self._path(key)!r}: expected a tensor that the optimizer has, or one group for"
                f" all of {self.name!r}; it is new, and its group may be another. Move without the"
                " optimizer, and make it anew"
            )
        return first

    def _path(self, key: str) -> str:
        return f"{self.name}.{key}" if key else self.name


def _moved(
    p: Parametrization[Any], q: Parametrization[Any], raw: RawTree, state: StateTree
) -> Moved:
    if p == q:
        return p.rebase(raw, state)
    new_raw, new_state = q.init(p(raw, state))
    same = [entry.name for entry in p.entries if p.get(entry.name) == q.get(entry.name)]
    new_raw |= {name: raw[name] for name in same}
    new_state |= {name: state[name] for name in same if name in state}
    return new_raw, new_state


def _held(raw: Raw, old: State, new: State, writes: list[Callable[[], object]]) -> State:
    """Let a module, whose raw are parameters, have its new state in the tensors of the old one."""
    if not all(isinstance(tensor, nn.Parameter) for tensor in flat(raw).values()):
        return new
    moved = [key for key in new if new[key] is not old[key]]
    writes += [partial(old[key].copy_, new[key].detach().clone()) for key in moved]
    return old


def _expect_same_weights(p: Parametrization[Any], q: Parametrization[Any]) -> None:
    ours = {entry.names: entry.signature.value for entry in p.entries}
    theirs = {entry.names: entry.signature.value for entry in q.entries}
    for names in [*ours, *theirs]:
        if ours.get(names) != theirs.get(names):
            raise ValueError(
                f"{names[0]!r}: expected parametrizations of the same weights; one has"
                f" {ours.get(names, 'no such weight')}, the other"
                f" {theirs.get(names, 'no such weight')}"
            )


def _carry(
    p: Parametrization[Any],
    q: Parametrization[Any],
    name: str,
    old: tuple[RawTree, StateTree],
    new: tuple[RawTree, StateTree],
) -> Carry:
    """How a mean of gradients by the old raw of a weight becomes one by the new raw."""
    (raw, state), (new_raw, new_state) = (
        (detached(raws[name]), states.get(name, {})) for raws, states in (old, new)
    )
    if p == q:
        return partial(p[name].transport, raw, state, new_raw, new_state)
    before, after = _forward(p.get(name), state), _forward(q.get(name), new_state)
    return partial(carried, before, raw, after, new_raw)


def _forward(transform: AnyTransform | None, state: State) -> Forward:
    return lambda raw: raw if transform is None else transform.forward(raw, state)


def _alike(new: Tensor, old: Tensor | None) -> bool:
    return old is not None and (new.shape, new.dtype) == (old.shape, old.dtype)


def _fresh(tensor: Tensor, trains: bool) -> Tensor:  # noqa: FBT001
    return tensor.detach().clone().requires_grad_(trains)


def _whole(views: list[Tensor], like: Tensor) -> Tensor:
    one = views[0] if len(views) == 1 else torch.stack(views)
    return one.reshape(like.shape)


def _none_of(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, requires_grad=False)


def _begin_anew(own: Any) -> None:
    for item in own.values():
        if isinstance(item, Tensor):
            item.zero_()


def _exchange(
    optimizer: Optimizer, gone: list[Tensor], come: list[tuple[dict[str, Any], str, Tensor]]
) -> None:
    """Let tensors take the place of others, and their names where a group has names."""
    dropped = {id(tensor) for tensor in gone}
    for group in optimizer.param_groups:
        kept = [i for i, tensor in enumerate(group["params"]) if id(tensor) not in dropped]
        own = [(name, tensor) for home, name, tensor in come if home is group]
        for key in ("names", "param_names"):  # fp.groups', and PyTorch's
            if key in group:
                group[key] = [group[key][i] for i in kept] + [name for name, _ in own]
        group["params"] = [group["params"][i] for i in kept] + [tensor for _, tensor in own]
    for tensor in gone:
        optimizer.state.pop(tensor, None)
