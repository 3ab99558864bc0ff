"""What wrappers put before or into the names of a network, and where in a file the network is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from funcparam.checkpoint._keys import scan, splits
from funcparam.parametrization.boundary import Entry

# Anywhere in a name: DataParallel, DDP, AveragedModel and DeepSpeed; torch.compile; FSDP 1;
# activation checkpointing; fabric; opacus.
_TRANSPARENT = frozenset(
    (
        "module",
        "_orig_mod",
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
        "_forward_module",
        "_module",
    )
)
# At the front only: entries of training checkpoints, and the network inside a LightningModule.
_LEADING = frozenset(("state_dict", "model_state_dict", "model"))


@dataclass(frozen=True)
class View:
    """The keys of a file in the names of a network that was wrapped otherwise, or not at all."""

    keys: dict[str, str]
    """Each key as the network would have it: the file's own."""
    entries: tuple[Entry, ...]
    buffers: dict[str, str]
    names: dict[str, str]
    """Names in the view: the network's own."""
    place: str | None = None
    """What stands before all keys, the words of wrappers left out; None if names are as they
    stand in the file."""


def view(keys: Sequence[str], entries: Sequence[Entry], buffers: Sequence[str]) -> View:
    """Find the names of a network in a file.

    As they stand, if all do; else with the words of wrappers left out on both sides.

    Raises:
        ValueError: all names are there, but at more than one place, or behind another word than
            those of wrappers.
    """
    as_it_is = View(
        {key: key for key in keys},
        tuple(entries),
        {name: name for name in buffers},
        {name: name for entry in entries for name in entry.names},
    )
    found = len(_places(keys, entries).get("", ()))
    if found == len(entries):
        return as_it_is
    keys = [key for key in keys if not _is_count(key, keys)]
    bare = {bare_name(key): key for key in keys}
    names = {bare_name(name): name for name in (*as_it_is.names, *as_it_is.buffers)}
    if len(bare) < len(keys) or len(names) < len(as_it_is.names) + len(as_it_is.buffers):
        return as_it_is  # two keys or names would become one
    renamed = tuple(replace(e, names=tuple(map(bare_name, e.names))) for e in entries)
    place = _place(list(bare), renamed, found)
    if place is None:
        return as_it_is
    return View(
        {k.removeprefix(place): old for k, old in bare.items() if k.startswith(place)},
        renamed,
        {bare_name(name): name for name in buffers},
        names,
        place,
    )


def bare_name(name: str) -> str:
    """A name or key without what wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in _TRANSPARENT)


def unwrapped(keys: Sequence[str]) -> dict[str, str]:
    """Each key without what wrappers and training checkpoints put there: the file's own."""
    inner = [key for key in keys if key.startswith(("state_dict.", "model_state_dict."))]
    place = f"{inner[0].partition('.')[0]}." if inner else ""
    kept = [key for key in keys if key.startswith(place) and not _is_count(key, keys)]
    bare = {bare_name(key.removeprefix(place)): key for key in kept}
    return bare if len(bare) == len(kept) else {key: key for key in keys}


def _is_count(key: str, keys: Sequence[str]) -> bool:
    """Whether it is what AveragedModel has beside its module."""
    head = key.removesuffix("n_averaged")
    return head != key and any(other.startswith(f"{head}module.") for other in keys)


def _place(keys: Sequence[str], entries: Sequence[Entry], found: int) -> str | None:
    """The one prefix below which there are more names than the `found` ones without any."""
    places = _places(keys, entries)
    most = max(map(len, places.values()), default=0)
    if most <= found:
        return None
    best = sorted(
        (place for place, names in places.items() if len(names) == most),
        key=lambda place: (len(place), place),
    )
    best = [p for i, p in enumerate(best) if not any(_inside(p, q) for q in best[:i])]
    if len(best) == 1 and set(best[0].split(".")[:-1]) <= _LEADING:
        return best[0]
    if most < len(entries):
        return None
    if len(best) > 1:
        where = ", ".join(map(repr, best))
        raise ValueError(
            f"all names are there several times, below {where}: pass one of these parts, without"
            " that prefix"
        )
    raise ValueError(
        f"all names are there, but below {best[0]!r}: pass that part, without the prefix"
    )


def _places(keys: Sequence[str], entries: Sequence[Entry]) -> dict[str, set[str]]:
    """Each prefix, and the first names of the entries that are there below it."""
    first = {name: entry.name for entry in entries for name in entry.names}
    places: dict[str, set[str]] = {}
    for one in _spelt(keys):
        at = 0
        while True:
            if one[at:] in first:
                places.setdefault(one[:at], set()).add(first[one[at:]])
            dot = one.find(".", at)
            if dot < 0:
                break
            at = dot + 1
    return places


def _inside(place: str, other: str) -> bool:
    """Whether a place is another one with a word of funcparam's behind it."""
    return place.startswith(other) and place[len(other) :] in ("raw.", "state.", "net.")


def _spelt(keys: Sequence[str]) -> frozenset[str]:
    """All names that the keys could stand for."""
    scanned = (stored.name for stored in scan(frozenset(keys)))
    return frozenset((*keys, *scanned, *_own_names(keys)))


def _own_names(keys: Sequence[str]) -> Iterator[str]:
    for key in keys:
        for head, word, rest in splits(key):
            if word in ("raw", "state", "net"):
                name = head + rest
                while len(name) > len(head):
                    yield name
                    name = name.rpartition(".")[0]
