"""Values that several transforms take: made first, and put into the states of those."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import final

from torch import Tensor

from funcparam.parametrization.batching import Plan
from funcparam.parametrization.boundary import Entry, RawTree, StateTree
from funcparam.parametrization.names import closest
from funcparam.transforms.contract.base import AnyTransform, Raw, State
from funcparam.transforms.contract.signature import NamedSpecs, TensorSpec
from funcparam.transforms.contract.steps import rebased


@final
class SharedPlan:
    """How the transforms of a parametrization are evaluated: those first whose values others take.

    Raises:
        ValueError: what an entry takes is not there, has no rule, takes something itself, or has a
            shape that the entry cannot work with.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        chosen = [entry for entry in entries if entry.transform is not None]
        every = {e.name: e.transform.takes() for e in chosen if e.transform is not None}
        self._takes = {name: takes for name, takes in every.items() if takes}
        self._taken = tuple(dict.fromkeys(n for t in self._takes.values() for n in t.values()))
        found = {name: entry for entry in entries for name in entry.names}
        for name in self._takes:
            _expect_found(found[name], found, self._takes)
        self._transforms = {name: found[name].transform for name in self._takes}
        self._first = Plan([entry for entry in chosen if entry.name in self._taken])
        self._plan = Plan([entry for entry in chosen if entry.name not in self._taken])
        self.groups = (*self._first.groups, *self._plan.groups)

    @property
    def connected(self) -> frozenset[str]:
        """The names of all that take or give a value."""
        return frozenset((*self._takes, *self._taken))

    def evaluate(self, raw: RawTree, state: StateTree) -> dict[str, Tensor]:
        """Map raw to values; what no transform has passes through."""
        if not self._takes:
            return self._plan.evaluate(raw, state)
        taken = self._first.evaluate(self._own(raw), state)
        return self._plan.evaluate(raw, self.filled(state, taken)) | taken

    def advance(self, raw: RawTree, state: StateTree) -> tuple[dict[str, Tensor], dict[str, State]]:
        """Update the state without gradients, and evaluate with the new one."""
        if not self._takes:
            return self._plan.advance(raw, state)
        taken, between = self._first.advance(self._own(raw), state)
        values, new = self._plan.advance(raw, self.filled(between, taken))
        return values | taken, self.emptied(new, state)

    def update(self, raw: RawTree, state: StateTree) -> dict[str, State]:
        """Advance what evolves, without gradients."""
        if not self._takes:
            return self._plan.update(raw, state)
        between = self._first.update(self._own(raw), state)
        return self.emptied(self._plan.update(raw, self.given(raw, between)), state)

    def refresh(self, raw: RawTree, state: StateTree) -> dict[str, State]:
        """Make exact what state approximates, without gradients."""
        between = self._first.refresh(raw, state)
        return self.emptied(self._plan.refresh(raw, self.given(raw, between)), state)

    def rebase(
        self, transforms: Mapping[str, AnyTransform], raw: RawTree, state: StateTree
    ) -> tuple[dict[str, Raw], dict[str, State]]:
        """Move base points to the values."""
        new_raw, new_state, given = dict(raw), dict(state), self.given(raw, state)
        for name, transform in transforms.items():
            new_raw[name], own = rebased(transform, raw[name], given.get(name, {}))
            if own:
                new_state[name] = own
        return new_raw, self.emptied(new_state, state)

    def given(self, raw: RawTree, state: StateTree) -> StateTree:
        """State with the values in it that transforms take of others."""
        if not self._takes:
            return state
        return self.filled(state, self._first.evaluate(self._own(raw), state))

    def filled(self, state: StateTree, values: Mapping[str, Tensor]) -> StateTree:
        """The same, where the values are known."""
        taken = {
            name: {**state.get(name, {}), **{key: values[other] for key, other in takes.items()}}
            for name, takes in self._takes.items()
        }
        return {**state, **taken}

    def emptied(self, new: StateTree, old: StateTree) -> dict[str, State]:
        """State as entries hold it, without what they took."""
        kept = dict(new)
        for name in self._takes:
            if name in old:
                kept[name] = {key: new[name][key] for key in old[name]}
            else:
                kept.pop(name, None)
        return kept

    def settled(
        self, raw: RawTree, state: dict[str, State], inverted: Collection[str]
    ) -> dict[str, State]:
        """What right inverses made, adjusted to the values that transforms take of others."""
        new = dict(self.given(raw, state))
        for name, transform in self._transforms.items():
            if transform is not None and name in inverted:
                new[name] = transform.settled(new[name])
        return self.emptied(new, state)

    def _own(self, raw: RawTree) -> RawTree:
        return {name: raw[name] for name in self._taken}


def _expect_found(
    entry: Entry, found: Mapping[str, Entry], takes: Mapping[str, Mapping[str, str]]
) -> None:
    transform, name = entry.transform, entry.name
    assert transform is not None
    given: dict[str, TensorSpec] = {}
    for key, other in takes[name].items():
        if other not in found:
            raise ValueError(
                f"{name!r}: {transform!r} takes the value of {other!r}, which is not there;"
                f" {closest(other, [*found])}"
            )
        source = found[other]
        if source.name != other:
            raise ValueError(
                f"{name!r}: {transform!r} takes the value of {other!r}, which is tied to"
                f" {source.name!r}: name that one"
            )
        if source.transform is None:
            raise ValueError(
                f"{name!r}: {transform!r} takes the value of {other!r}, which has no rule: give it"
                " one, Identity() if nothing else"
            )
        if other in takes:
            raise ValueError(
                f"{name!r}: {transform!r} takes the value of {other!r}, which takes that of"
                f" {next(iter(takes[other].values()))!r}: what is taken may not take"
            )
        given[key] = source.signature.value
    _expect_fit(transform, entry, given)


def _expect_fit(transform: AnyTransform, entry: Entry, given: Mapping[str, TensorSpec]) -> None:
    """Raise unless `forward` works with values of these shapes."""
    spec, state = entry.signature.raw, _metas(entry.signature.state)
    raw = spec.meta() if isinstance(spec, TensorSpec) else _metas(spec)
    taken = {key: each.meta() for key, each in given.items()}
    problem = ""
    try:
        found = TensorSpec.of(transform.forward(raw, {**state, **taken}))
    except (RuntimeError, ValueError) as error:
        problem = str(error).splitlines()[0]
    else:
        if found != entry.signature.value:
            problem = f"it makes {found} of it"
    if problem:
        named = transform.takes()
        shapes = ", ".join(f"{named[key]!r} is {each}" for key, each in given.items())
        raise ValueError(
            f"{entry.name!r}: {transform!r} expects other values to take; {shapes}, and the weight"
            f" is {entry.signature.value}: {problem}"
        )


def _metas(specs: NamedSpecs) -> dict[str, Tensor]:
    return {name: spec.meta() for name, spec in specs}
