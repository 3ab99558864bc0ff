"""Rules: which transform goes to which name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeAlias, cast

from torch import Tensor, nn

from funcparam.parametrization.names import closest, inside
from funcparam.parametrization.tree import Leaf
from funcparam.transforms.contract.base import AnyTransform, Transform
from funcparam.transforms.contract.signature import describe

Selector: TypeAlias = (
    "str | type[nn.Module] | tuple[type[nn.Module], str] | Callable[[str, Tensor], bool]"
)
Rule: TypeAlias = "tuple[Any, AnyTransform]"
Rules: TypeAlias = "Mapping[Any, AnyTransform] | Sequence[tuple[Selector, AnyTransform]]"


def select(rules: Rules, leaves: Sequence[Leaf]) -> dict[str, Rule]:
    """Find the rule for each leaf that one picks, under the leaf's first name.

    Raises:
        TypeError: a rule is not a selector with a transform.
        ValueError: a rule picks nothing, or only what earlier rules took; or two rules pick one
            tie, each by a name that the other one does not pick.
    """
    pairs = _pairs(rules)
    every = {name for leaf in leaves for name in leaf.names}
    won: dict[str, _Pick] = {}
    for rule in pairs:
        selector, transform = rule
        if not isinstance(transform, Transform):
            raise TypeError(_no_transform(selector, transform))
        picks = list(_picks(rule, _matcher(selector, every), leaves))
        if not picks:
            near = _nearest(selector, leaves)
            raise ValueError(f"rule {_show(selector)} matches nothing; {near}")
        for pick in picks:
            winner = won.setdefault(pick.leaf.names[0], pick)
            if not (winner.names <= pick.names or pick.names <= winner.names):
                raise ValueError(_meet(winner, pick))
        if not any(won[pick.leaf.names[0]] is pick for pick in picks):
            raise ValueError(_never_applies(won[picks[0].leaf.names[0]], picks[0]))
    return {name: won[name].rule for leaf in leaves if (name := leaf.names[0]) in won}


class _Pick(NamedTuple):
    """A rule, and the names by which it picks a leaf."""

    rule: Rule
    leaf: Leaf
    names: frozenset[str]


def _picks(rule: Rule, matches: _Matcher, leaves: Sequence[Leaf]) -> Iterator[_Pick]:
    for leaf in leaves:
        names = frozenset(name for i, name in enumerate(leaf.names) if matches(name, leaf, i))
        if names:
            yield _Pick(rule, leaf, names)


def picked_by(selector: Any, name: str) -> str:
    """Say why a transform got this weight, which it refuses, unless the rule names it."""
    if selector == name:
        return ""
    shown = _show(selector)
    if isinstance(selector, type):
        return f". Rule {shown} picks all parameters of such a module, ({shown}, 'weight') one"
    return f". Rule {shown} picks it"


def _pairs(rules: Any) -> list[tuple[Any, Any]]:
    if isinstance(rules, Mapping):
        return list(cast("Mapping[Any, Any]", rules).items())
    if not isinstance(rules, Sequence) or isinstance(rules, str):
        raise TypeError(
            "rules: expected a mapping, or a list of pairs, from selectors to transforms;"
            f" got {describe(rules)}"
        )
    for rule in cast("Sequence[Any]", rules):
        if not isinstance(rule, tuple) or len(cast("tuple[Any, ...]", rule)) != 2:
            raise TypeError(f"rules: expected pairs (selector, transform); got {rule!r}")
    return list(cast("Sequence[tuple[Any, Any]]", rules))


_Matcher: TypeAlias = Callable[[str, Leaf, int], bool]


def _matcher(selector: Any, names: set[str]) -> _Matcher:
    """Turn a selector into a test of (name, leaf, which of the leaf's names).

    Buffers are picked by their own name only: a pattern for weights means parameters.
    """
    match selector:
        case str() if selector in names:
            return lambda name, leaf, i: name == selector
        case str():
            return lambda name, leaf, i: not leaf.is_buffer and fnmatchcase(name, selector)
        case type() if issubclass(selector, nn.Module):
            return lambda name, leaf, i: not leaf.is_buffer and _owned(leaf, i, selector, "*")
        case (type() as kind, str() as local) if issubclass(kind, nn.Module):
            return lambda name, leaf, i: (
                _owned(leaf, i, kind, local) and (not leaf.is_buffer or leaf.owners[i][1] == local)
            )
        case _ if callable(selector) and not isinstance(selector, (type, nn.Module)):
            return lambda name, leaf, i: not leaf.is_buffer and bool(selector(name, leaf.tensor))
        case _:
            raise TypeError(
                "rules: expected a name, a glob, a module type, (module type, name) or a predicate"
                f" (name, tensor) -> bool as selector; got {selector!r}"
            )


def _owned(leaf: Leaf, i: int, kind: type[nn.Module], local: str) -> bool:
    if not leaf.owners:
        return False
    owner, own_name = leaf.owners[i]
    return isinstance(owner, kind) and fnmatchcase(own_name, local)


def _no_transform(selector: Any, got: Any) -> str:
    shown, hint = describe(got), "fp.transform makes one from a function"
    if isinstance(got, type):
        shown, hint = _show(got), "Call the class"
    elif isinstance(got, Mapping):
        hint = "Join names by dots: '0.weight'"
    elif isinstance(got, nn.Module):
        hint = "fp.transform makes one from its forward and right_inverse, as functions"
    return f"rule {_show(selector)}: expected a transform; got {shown}. {hint}"


_ORIGINAL = re.compile(r"parametrizations\.(\w+)\.original\d*$")


def _nearest(selector: Any, leaves: Sequence[Leaf]) -> str:
    names = [name for leaf in leaves for name in leaf.names]
    for name in names:
        plain = _ORIGINAL.sub(r"\1", name)
        if plain != name and _would_match(selector, plain):
            return f"{plain!r} is parametrized already: see funcparam.compat.to_functional"
        plain = _hooked(name, names)
        if plain is not None and _would_match(selector, plain):
            return f"a hook computes {plain!r}: see funcparam.compat.to_functional"
    if isinstance(selector, str):
        if hint := inside(selector, names):
            return hint
        buffers = [name for name in names if fnmatchcase(name, selector)]
        if buffers:
            return f"{buffers[0]!r} is a buffer, which only its own name picks"
        if _is_regular_expression(selector, names):
            return "rules are globs, not regular expressions: '*.weight'"
    return closest(selector, names)


def _hooked(name: str, names: Sequence[str]) -> str | None:
    """What an older hook of torch computes from the parameter `name` and its companion."""
    for suffix, companion in (("_g", "_v"), ("_orig", "_u")):
        plain = name.removesuffix(suffix)
        if plain != name and plain + companion in names:
            return plain
    return None


def _would_match(selector: Any, name: str) -> bool:
    match selector:
        case str():
            return fnmatchcase(name, selector)
        case (type(), str() as local):
            return fnmatchcase(name.rpartition(".")[2], local)
        case _:
            return False


def _is_regular_expression(selector: str, names: Sequence[str]) -> bool:
    try:
        return any(re.fullmatch(selector, name) for name in names)
    except re.error:
        return False


def _meet(winner: _Pick, other: _Pick) -> str:
    names = winner.leaf.names
    return (
        f"{_tie(winner)} is one weight and can have one rule; got {_show(winner.rule[0])} and"
        f" {_show(other.rule[0])}, each for a name of its own. Leave one of them out, or put a rule"
        f" first that picks all of its names: lambda name, tensor: name in {names}"
    )


def _never_applies(winner: _Pick, other: _Pick) -> str:
    return (
        f"rule {_show(other.rule[0])} never applies: the earlier rule {_show(winner.rule[0])} takes"
        f" {_tie(winner)} and whatever else it matches. Put the narrower rule first"
    )


def _tie(pick: _Pick) -> str:
    return " = ".join(map(repr, pick.leaf.names))


def _show(selector: Any) -> str:
    if isinstance(selector, type):
        return selector.__qualname__
    if isinstance(selector, tuple):
        return f"({', '.join(map(_show, cast('tuple[Any, ...]', selector)))})"
    return repr(selector)
