"""Choices for tensors of raw, by name, glob or kind."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from numbers import Real
from typing import TypeVar

from funcparam.parametrization.names import closest, inside
from funcparam.parametrization.part import fitting
from funcparam.transforms.contract.signature import describe

T = TypeVar("T")


def picked(
    chosen: Mapping[str, T] | None,
    what: str,
    names: Mapping[str, tuple[str, ...]],
    kinds: Mapping[str, str],
) -> dict[str, T]:
    """The choice for each name that one is made for, by name, glob or kind; the first counts.

    Args:
        chosen: choices by selector.
        what: the argument that they are, for errors.
        names: all names that each goes by.
        kinds: the kind of each.
    """
    found: dict[str, T] = {}
    by: dict[str, str] = {}
    for selector, choice in (chosen or {}).items():
        own = [n for n in names if fitting([selector], names[n]) or kinds[n] == selector]
        if not own:
            raise ValueError(_nothing(selector, what, names, kinds))
        if all(name in found for name in own):
            raise ValueError(
                f"{what}: {selector!r} never applies: {by[own[0]]!r} before it takes {own[0]!r} and"
                " whatever else it matches. Put the narrower one first"
            )
        left = [name for name in own if name not in found]
        found |= dict.fromkeys(left, choice)
        by |= dict.fromkeys(left, selector)
    return found


def _nothing(
    selector: str,
    what: str,
    names: Mapping[str, tuple[str, ...]],
    kinds: Mapping[str, str],
) -> str:
    every = [name for each in names.values() for name in each]
    near = inside(selector, every) or closest(selector, every)
    here = ", ".join(map(repr, dict.fromkeys(kinds.values())))
    return f"{what}: {selector!r} matches nothing; {near}, and the kinds are {here}"


def expect_multipliers(chosen: Mapping[str, float]) -> Mapping[str, float]:
    """Raise for what multiplies no learning rate."""
    for name, scale in chosen.items():
        if not isinstance(scale, Real):
            raise TypeError(f"lr_scale: {name!r}: expected a number; got {describe(scale)}")
        if not 0 <= scale < inf:
            raise ValueError(
                f"lr_scale: {name!r}: expected a finite number that is not negative; got {scale}"
            )
    return chosen
