"""Moves: another raw for the same values, in the tensors that an optimizer has."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from funcparam.parametrization.boundary import RawTree, StateTree, distance_moved
from funcparam.parametrization.parametrization import Parametrization
from funcparam.parametrization.values import said_moves
from funcparam.training.arguments import expect_parametrization
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
    the place of the old ones in the optimizer's groups. What a rule froze (`Frozen`, or the weight
    of an adapter) is trained where the new rule trains it. Moments of the optimizer come along:
    means of gradients (Adam, SGD, Lion, Muon) by the Jacobians of the two maps,
    `m -> J_q^T (J_p^T)^+ m`; means of squares by the square of the factor by which the length of
    the mean changed, which is exact where the move only scales, and raised where the next step of
    an entry would be longer than the longest before. Of a weight whose raw changes its shape they
    begin anew.

    A [`Parametrized`][funcparam.Parametrized] keeps its parametrization, so of its tensors only
    base points are moved; for other rules make another one of `model.fold()`.

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
        TypeError: `p` or `q` is no parametrization.
        ValueError: the parametrizations are of different weights; a value lies outside of what `q`
            takes (a negative one for `Positive`); the optimizer does not have a tensor of raw,
            keeps what nobody can carry over, has several groups, of which nothing says the one for
            a new tensor, or groups of another kind than the tensor is from now on. Nothing was
            changed.

    Warns:
        UserWarning: a value does not satisfy its new constraint and was projected.

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
    for given in (p, q):
        expect_parametrization(given, "fp.move(p, q, raw, state)")
    _expect_same_weights(p, q)
    with torch.no_grad():
        new_raw, new_state, by = _moved(p, q, raw, state)
    old_given = p._plan.given(raw, state)  # pyright: ignore[reportPrivateUsage]
    new_given = q._plan.given(new_raw, new_state)  # pyright: ignore[reportPrivateUsage]
    result: dict[str, Raw] = {}
    writes: list[Callable[[], object]] = []
    tensors = {name: [*flat(own).values()] for name, own in raw.items()}
    is_training = optimizer is not None or any(
        t.requires_grad for own in tensors.values() for t in own
    )
    for name, own in new_raw.items():
        tensors.pop(name)
        rules = p.get(name), q.get(name)
        weight = _Weight(name, rules, flat(raw[name]), flat(own), is_training)
        result[name] = unflat(weight.result)
        if not weight.is_new:
            continue
        writes += weight.writes()
        if optimizer is not None:
            carry = _carry(p, q, name, (raw, old_given), (new_raw, new_given))
            later = [tensor for own in tensors.values() for tensor in own]
            writes += weight.optimizer_writes(optimizer, carry, later)
    if p == q:
        new_state = {n: _held(raw[n], state[n], own, writes) for n, own in new_state.items()}
    with torch.no_grad():
        for write in writes:
            write()
    if by:
        warnings.warn(
            f"values do not satisfy their new constraints and were projected: {said_moves(q, by)}",
            stacklevel=2,
        )
    return result, new_state


class _Weight:
    """The raw of one weight, before and after."""

    def __init__(
        self,
        name: str,
        rules: tuple[AnyTransform | None, AnyTransform | None],
        old: dict[str, Tensor],
        new: dict[str, Tensor],
        is_training: bool,  # noqa: FBT001
    ) -> None:
        self.name, self.rules, self.old, self.new = name, rules, old, new
        self.is_new = old.keys() != new.keys() or any(new[key] is not old[key] for key in new)
        trained = any(tensor.requires_grad for tensor in old.values())
        self.result = {
            key: old[key]
            if _alike(tensor, old.get(key))
            else _fresh(tensor, trained or (is_training and (not old or self._adapts(key))))
            for key, tensor in new.items()
        }

    def writes(self) -> Iterator[Callable[[], object]]:
        """What brings the tensors that stay to their new entries."""
        for key, tensor in self.result.items():
            if tensor is self.old.get(key):
                yield partial(_rewrite, tensor, self.new[key].detach().clone())

    def optimizer_writes(
        self, optimizer: Optimizer, carry: Carry, later: Sequence[Tensor]
    ) -> Iterator[Callable[[], object]]:
        """What brings the optimizer along; in its groups the weight is before `later` ones."""
        homes = self._homes(optimizer)
        if self.old and not homes and not any(t.requires_grad for t in self.result.values()):
            return  # it is frozen, and the optimizer's none
        self._expect_same_kinds(homes)
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
        come = [
            (self._home(key, homes, optimizer), self._path(key), tensor)
            for key, tensor in self.result.items()
        ]
        yield partial(_exchange, optimizer, [*self.old.values()], come, later)

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
        """The group of each tensor of the old raw that is in one."""
        found: dict[int, dict[str, Any]] = {}
        for group in optimizer.param_groups:
            found |= {id(tensor): group for tensor in group["params"]}
        for key, tensor in self.old.items():
            if tensor.requires_grad and id(tensor) not in found:
                raise ValueError(
                    f"{self._path(key)!r}: expected an optimizer that has this tensor of raw; it is"
                    " in none of its groups. Give the optimizer that trains raw"
                )
        return {key: found[id(t)] for key, t in self.old.items() if id(t) in found}

    def _home(
        self, key: str, homes: Mapping[str, dict[str, Any]], optimizer: Optimizer
    ) -> dict[str, Any]:
        """The group for a tensor: of the one with its key, or the only one that there is."""
        if key in homes:
            return homes[key]
        first, *rest = homes.values() if homes else optimizer.param_groups
        if "kind" in first or any(group is not first for group in rest):
            raise ValueError(
                f"{self._path(key)!r}: expected a tensor that the optimizer has, or one group for"
                f" all of {self.name!r}; it is new, and its group may be another. Move without the"
                " optimizer, and make it anew"
            )
        return first

    def _expect_same_kinds(self, homes: Mapping[str, dict[str, Any]]) -> None:
        """Raise where a group of fp.groups has a tensor that is of another kind from now on."""
        for key in (key for key in self.result if "kind" in homes.get(key, ())):
            before, after = ("weight" if t is None else t.role(key) for t in self.rules)
            if before != after:
                raise ValueError(
                    f"{self._path(key)!r}: the optimizer has it as {before!r}, and under its new"
                    f" rule it is {after!r}, which fp.groups trains in another way. Move without"
                    " the optimizer, and make groups and optimizer anew"
                )

    def _adapts(self, key: str) -> bool:
        rule = self.rules[1]
        return rule is not None and rule.adapts(key)

    def _path(self, key: str) -> str:
        return f"{self.name}.{key}" if key else self.name


def _moved(
    p: Parametrization[Any], q: Parametrization[Any], raw: RawTree, state: StateTree
) -> tuple[dict[str, Raw], dict[str, State], dict[str, float]]:
    """Raw and state of q, and by how much a value had to be projected."""
    if p == q:
        new_raw, new_state = p.rebase(raw, state)
        return new_raw, new_state, {}
    values = p(raw, state)
    new_raw, new_state = q.init(values)
    now = q(new_raw, new_state)
    same = {entry.name for entry in p.entries if p.get(entry.name) == q.get(entry.name)}
    by = {name: distance_moved(values[name], now[name]) for name in q if name not in same}
    new_raw |= {name: raw[name] for name in same}
    new_state |= {name: state[name] for name in same if name in state}
    return new_raw, new_state, {name: far for name, far in by.items() if far}


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


def _rewrite(tensor: Tensor, new: Tensor) -> None:
    tensor.copy_(new)
    tensor.grad = None  # that of the old entries


def _begin_anew(own: Any) -> None:
    for item in own.values():
        if isinstance(item, Tensor):
            item.zero_()


def _exchange(
    optimizer: Optimizer,
    old: Sequence[Tensor],
    new: Sequence[tuple[dict[str, Any], str, Tensor]],
    later: Sequence[Tensor],
) -> None:
    """Let tensors stand where others were, else before later ones, their names likewise.

    So the order is that of `fp.trainable`, by which PyTorch's optimizers load their state.
    """
    gone, after = set(map(id, old)), set(map(id, later))
    for group in optimizer.param_groups:
        params: list[Tensor] = group["params"]
        own = [(name, tensor) for home, name, tensor in new if home is group]
        places = [i for i, t in enumerate(params) if id(t) in gone]
        places += [i for i, t in enumerate(params) if id(t) in after] + [len(params)]
        kept = [i for i, t in enumerate(params) if id(t) not in gone]
        at = sum(i < places[0] for i in kept)
        lists = {key: [name for name, _ in own] for key in ("names", "param_names") if key in group}
        for key, added in {**lists, "params": [tensor for _, tensor in own]}.items():
            stay = [group[key][i] for i in kept]
            group[key] = [*stay[:at], *added, *stay[at:]]
    for tensor in old:
        if not any(tensor is t for _, _, t in new):
            optimizer.state.pop(tensor, None)
