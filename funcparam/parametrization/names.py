"""Names in errors."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase


def closest(name: object, names: Sequence[str]) -> str:
    """Say which of `names` are like one that is not among them; if none is, what they are."""
    near = get_close_matches(name, names, n=3, cutoff=0.4) if isinstance(name, str) else []
    if near:
        return f"the closest names are {_some(near)}"
    return f"the names are {_some(names)}"


def inside(name: str, names: Sequence[str]) -> str:
    """Say that something is in what has this name, if it has; else nothing."""
    if any(fnmatchcase(other, f"{name}.*") for other in names):
        return f"'{name}.*' matches what is in it"
    return ""


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:6]))
    return f"{shown} and {len(names) - 6} more" if len(names) > 6 else shown or "none"
