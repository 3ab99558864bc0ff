"""Where in a file each tensor of a network is."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from funcparam.checkpoint._keys import (
    Stored,
    as_in_the_network,
    half_legacy,
    scan,
    scan_own,
    splits,
)
from funcparam.parametrization.boundary import Entry


@dataclass(frozen=True)
class Located:
    """What is stored for each entry, under each of its names that is there."""

    entries: tuple[tuple[Entry, tuple[Stored, ...]], ...]
    missing: tuple[str, ...]
    others: dict[str, str]
    """Names in the network of what else is there: its key."""


def locate(
    keys: Collection[str], entries: Sequence[Entry], buffers: Collection[str], *, strict: bool
) -> Located:
    """Ask for each name of the entries in every spelling; what is left is others.

    Raises:
        ValueError: a name is there twice or in part; or it is missing, or funcparam's own keys
            have one that no entry has, and `strict` is set.
    """
    names = {name for entry in entries for name in entry.names}
    stored = _stored(keys, entries, names, buffers)
    found = [(e, tuple(stored[n] for n in e.names if n in stored)) for e in entries]
    used = {key for _, items in found for item in items for _, key in item.keys}
    heads = {s.head for _, items in found for s in items if s.style == "funcparam"} or {""}
    missing = {entry.name: entry.names for entry, items in found if not items}
    absent = {name for aliases in missing.values() for name in aliases}
    others: dict[str, str] = {}
    for key in keys:
        if key in used:
            continue
        if name := half_legacy(key, absent):
            raise ValueError(f"{key!r}: part of {name!r}, of which the other parts are missing")
        name = as_in_the_network(key, heads)
        if strict and name == key and key not in buffers and _is_own(key, heads, stored):
            raise ValueError(f"unknown key {key!r}: the parametrization was made without it")
        others[name] = key
    if missing and strict:
        raise ValueError(f"missing {next(iter(missing))!r}; {what_is_there(keys)}")
    return Located(tuple((e, i) for e, i in found if i), tuple(missing), others)


def what_is_there(keys: Collection[str]) -> str:
    """The first keys of a file, in an error."""
    first = list(keys)[:4]
    return f"got the keys {first}{' and more' if len(keys) > 4 else ''}"


def _stored(
    keys: Collection[str],
    entries: Sequence[Entry],
    names: Collection[str],
    buffers: Collection[str],
) -> dict[str, Stored]:
    """What is stored for each name: all in funcparam's own keys if all is there in them."""
    own = _by_name(scan_own(keys, names), names)
    if all(any(name in own for name in entry.names) for entry in entries):
        used = {key for items in own.values() for item in items for _, key in item.keys}
        for name in own:
            if name in keys and name not in used:
                raise ValueError(_twice(name, [*own[name], Stored(name, "plain", (("", name),))]))
        return {name: _only(items) for name, items in own.items()}
    scanned = _by_name(scan(keys, names, buffers), names)
    return {name: _only(scanned.get(name) or own[name]) for name in {**own, **scanned}}


def _by_name(found: Sequence[Stored], names: Collection[str]) -> dict[str, list[Stored]]:
    by_name: dict[str, list[Stored]] = {}
    for item in found:
        if item.name in names:
            by_name.setdefault(item.name, []).append(item)
    return by_name


def _only(found: Sequence[Stored]) -> Stored:
    if len(found) > 1:
        raise ValueError(_twice(found[0].name, found))
    return found[0]


def _twice(name: str, found: Sequence[Stored]) -> str:
    keys = [key for item in found for _, key in item.keys]
    return f"{name!r} is there twice, as {keys}: leave one of them out"


def _is_own(key: str, heads: Collection[str], stored: Mapping[str, Stored]) -> bool:
    """Whether a key has a word of funcparam's where other keys of the file have it."""
    own = any(item.style == "funcparam" for item in stored.values())
    return own and any(head in heads and word in ("raw", "state") for head, word, _ in splits(key))
