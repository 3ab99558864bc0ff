"""A part of a parametrization: the weights whose names match."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from funcparam.parametrization.boundary import Entry
from funcparam.parametrization.names import closest, inside
from funcparam.transforms.contract.signature import describe


def matching(patterns: Sequence[str], entries: Sequence[Entry]) -> frozenset[str]:
    """The first names of the entries of which a name fits one of the patterns.

    Raises:
        TypeError: a pattern is no text.
        ValueError: a pattern matches nothing.
    """
    found: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"expected names or globs, one by one; got {describe(pattern)}")
        own = {entry.name for entry in entries if fitting([pattern], entry.names)}
        if not own:
            names = [name for entry in entries for name in entry.names]
            near = inside(pattern, names) or closest(pattern, names)
            raise ValueError(f"{pattern!r} matches nothing; {near}")
        found |= own
    return frozenset(found)


def fitting(patterns: Iterable[str], names: Iterable[str]) -> frozenset[str]:
    """The names that fit one of the patterns."""
    return frozenset(n for n in names if any(fnmatchcase(n, pattern) for pattern in patterns))


def expect_self_contained(part: Sequence[Entry]) -> None:
    """Raise for a transform that takes the value of a weight which is not in the same part."""
    names = {entry.name for entry in part}
    for entry in part:
        if entry.transform is None:
            continue
        for other in entry.transform.takes().values():
            if other not in names:
                raise ValueError(
                    f"{entry.name!r}: {entry.transform!r} takes the value of {other!r}, which is"
                    " not in the same part. Pick both"
                )
