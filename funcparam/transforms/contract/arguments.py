"""Checks of what a transform is made from. All raise one kind of message."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from sys import float_info
from typing import Any


@dataclass(frozen=True)
class Kind:
    """What an argument has to be: its type, its range, and how to say so."""

    what: str
    types: tuple[type, ...]
    fits: Callable[[float], bool]


def is_finite(number: float) -> bool:
    """Whether a number is a finite float; an integer may be too large for one."""
    return -float_info.max <= number <= float_info.max


INTEGER = Kind("an integer", (int,), lambda _: True)
POSITIVE_INTEGER = Kind("a positive integer", (int,), lambda n: n > 0)
NUMBER = Kind("a finite number", (int, float), is_finite)
POSITIVE_NUMBER = Kind("a positive finite number", (int, float), lambda x: x > 0 and is_finite(x))


def expect_argument(transform: object, name: str, kind: Kind, *, optional: bool = False) -> None:
    """Raise unless an argument, kept under `name`, is of a kind; `optional` lets None pass.

    Raises:
        TypeError: it is of another type. A bool is no number here, nor is a tensor.
        ValueError: it is out of range.
    """
    given: Any = getattr(transform, name)
    if optional and given is None:
        return
    what = f"{kind.what} or None" if optional else kind.what
    if isinstance(given, bool) or not isinstance(given, kind.types):
        raise TypeError(_message(transform, name, what, given))
    if not kind.fits(given):
        raise ValueError(_message(transform, name, what, given))


def expect_choice(transform: object, name: str, choices: Iterable[object]) -> None:
    """Raise ValueError unless an argument, kept under `name`, is one of the choices."""
    given: object = getattr(transform, name)
    if not any(given is choice or given == choice for choice in choices):
        what = f"one of {', '.join(map(repr, choices))}"
        raise ValueError(_message(transform, name, what, given))


def expect_name(transform: object, name: str, *, optional: bool = False) -> None:
    """Raise TypeError unless an argument, kept under `name`, is the name of another weight."""
    given: object = getattr(transform, name)
    if not isinstance(given, str) and not (optional and given is None):
        what = f"the name of a weight{' or None' if optional else ''}"
        raise TypeError(_message(transform, name, what, given))


def keep_integers(transform: object, name: str) -> None:
    """Turn an argument, kept under `name`, into a tuple of integers.

    Raises:
        TypeError: it is not a sequence of integers.
    """
    given: Any = getattr(transform, name)
    try:
        numbers: tuple[Any, ...] = tuple(given)
    except TypeError:
        numbers = (None,)
    if any(isinstance(number, bool) or not isinstance(number, int) for number in numbers):
        raise TypeError(_message(transform, name, "a sequence of integers", given))
    object.__setattr__(transform, name, numbers)


def _message(transform: object, name: str, what: str, given: object) -> str:
    return f"{type(transform).__name__} expects {name} to be {what}; got {given!r}"
