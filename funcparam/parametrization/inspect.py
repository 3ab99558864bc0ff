"""Parametrizations as tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from inspect import signature
from math import isnan
from typing import Any, TypeAlias, cast

from torch import Tensor

from funcparam.parametrization.batching import Group
from funcparam.parametrization.boundary import Entry, RawTree, StateTree
from funcparam.parametrization.table import Table
from funcparam.transforms.contract.base import AnyTransform, Transform
from funcparam.transforms.contract.signature import NamedSpecs, TensorSpec
from funcparam.transforms.contract.stacks import MEASURED

Leaves: TypeAlias = "Iterable[Tensor | Mapping[str, Tensor]]"


def overview(entries: Sequence[Entry]) -> Table:
    """What is parametrized by what: one row for each weight, and one for all that are frozen."""
    head = ("name", "transform", "value", "raw", "state")
    rows = [
        (
            _names(group),
            spelt(transform),
            _common(str(entry.signature.value) for entry in group),
            _shapes(group[0].signature.raw) or "nothing",
            _common(_shapes(entry.signature.state) for entry in group),
        )
        for transform, group in _rows(entries)
    ]
    if not any(row[-1] for row in rows):
        return Table(head[:-1], tuple(row[:-1] for row in rows))
    return Table(head, tuple(rows))


def summary(
    entries: Sequence[Entry],
    raw: RawTree,
    state: StateTree,
    values: Mapping[str, Tensor],
    violations: Mapping[str, Tensor],
) -> Table:
    """How many numbers are trained and held, and how far each value is from its constraint."""
    rows = [
        (
            _names(group),
            spelt(transform),
            _shapes(group[0].signature.raw) or "nothing",
            *_counts([raw[e.name] for e in group], [state.get(e.name, {}) for e in group]),
            _largest([(values[e.name], violations[e.name]) for e in group]),
        )
        for transform, group in _rows(entries)
    ]
    plain = [raw[entry.name] for entry in entries if entry.transform is None]
    if plain:
        rows.append(("everything else", "", "", *_counts(plain, []), ""))
    rows.append(("total", "", "", *_counts(raw.values(), state.values()), ""))
    head = ("name", "transform", "raw", "trained", "total", "violation")
    return Table(head, tuple(rows), right=(3, 4, 5))


def groups(found: Sequence[Group], kind: str) -> Table:
    """Which leaves a kind of device evaluates in one call, and why not the others."""
    rows = [
        (
            spelt(group.transform),
            str(group.entries[0].signature.value),
            str(len(group.entries)),
            f"one by one: {obstacle}" if (obstacle := group.obstacle(kind)) else "in one call",
            _name(group.entries[0]) + (", …" if len(group.entries) > 1 else ""),
        )
        for group in found
    ]
    on = f"on {kind}" if kind in MEASURED else f"on {kind}, not measured"
    head = ("transform", "value", "leaves", on, "names")
    return Table(head, tuple(rows), right=(2,))


def spelt(transform: AnyTransform) -> str:
    """Its repr without the arguments that are defaults; a repr of its own is kept."""
    kind = type(transform)
    every: list[str] = []
    told: list[str] = []
    for name, parameter in signature(kind).parameters.items():
        value: Any = getattr(transform, name, parameter.empty)
        if parameter.kind is parameter.VAR_POSITIONAL:
            every += map(repr, value)
            told += map(_spelt, value)
        else:
            every.append(f"{name}={value!r}")
            told += [f"{name}={_spelt(value)}"] * (value != parameter.default)
    is_call = repr(transform) == f"{kind.__qualname__}({', '.join(every)})"
    return f"{kind.__qualname__}({', '.join(told)})" if is_call else repr(transform)


def _spelt(argument: Any) -> str:
    if isinstance(argument, tuple):
        parts = cast("tuple[Any, ...]", argument)
        return f"({', '.join(map(_spelt, parts))}{',' * (len(parts) == 1)})"
    return (
        spelt(cast("AnyTransform", argument)) if isinstance(argument, Transform) else repr(argument)
    )


def _rows(entries: Sequence[Entry]) -> list[tuple[AnyTransform, list[Entry]]]:
    """The weights that have a transform; those without raw, of which there may be many, as one."""
    found: dict[Any, list[Entry]] = {}
    for entry in entries:
        if entry.transform is not None:
            trained = entry.name if entry.signature.raw else None
            found.setdefault((entry.transform, trained), []).append(entry)
    return [(transform, group) for (transform, _), group in found.items()]


def _names(group: Sequence[Entry]) -> str:
    first, others = _name(group[0]), len(group) - 1
    return f"{first} and {others} more" if others else first


def _name(entry: Entry) -> str:
    return " = ".join(entry.names)


def _common(texts: Iterable[str]) -> str:
    """What all say, or that they differ."""
    first, *others = set(texts)
    return "…" if others else first


def _shapes(specs: TensorSpec | NamedSpecs) -> str:
    if isinstance(specs, TensorSpec):
        return str(specs.shape)
    return ", ".join(f"{name}: {spec.shape}" for name, spec in specs)


def _largest(measured: Sequence[tuple[Tensor, Tensor]]) -> str:
    """The largest violation of these values; NaN of a finite one says that it is not measured."""
    if any(violation.is_meta for _, violation in measured):
        return "meta"
    found = [(value, violation.item()) for value, violation in measured]
    value, violation = max(found, key=lambda pair: (isnan(pair[1]), pair[1]))
    if isnan(violation) and bool(value.isfinite().all()):
        return "not measured"
    return f"{violation:.1e}"


def _counts(raw: Leaves, state: Leaves) -> tuple[str, str]:
    """How many numbers are trained, and how many there are."""
    held = [*_tensors(raw)]
    trained = sum(t.numel() for t in held if t.is_floating_point() or t.is_complex())
    total = sum(t.numel() for t in [*held, *_tensors(state)])
    return f"{trained:,}", f"{total:,}"


def _tensors(leaves: Leaves) -> Iterable[Tensor]:
    for leaf in leaves:
        yield from [leaf] if isinstance(leaf, Tensor) else leaf.values()
