"""A parametrization for a file that does not say what it is, from its keys and rules."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor

from funcparam.checkpoint._explain import stored_in
from funcparam.checkpoint._keys import Stored, heads_of, splits
from funcparam.checkpoint._spec import class_called
from funcparam.checkpoint._wrappers import unwrapped
from funcparam.parametrization.boundary import Entry
from funcparam.parametrization.parametrization import Parametrization
from funcparam.transforms._spellings import infer, spellings
from funcparam.transforms.contract.base import AnyTransform
from funcparam.transforms.contract.signature import TensorSpec, signature

Rules = Sequence[tuple[str, AnyTransform]]


def parametrization_by(tensors: Mapping[str, Any], rules: Rules = ()) -> Parametrization[Any]:
    """Make the parametrization that the keys leave no doubt about, with rules for the rest.

    Raises:
        ValueError: neither the keys nor a rule say which transform a tensor is stored for.
    """
    keys = unwrapped(list(tensors))
    entries: list[Entry] = []
    used: set[str] = set()
    for item in stored_in(keys, _names(keys, [selector for selector, _ in rules])):
        parts = {part: tensors[keys[key]] for part, key in item.keys}
        if not all(isinstance(part, Tensor) for part in parts.values()):
            continue
        if item.is_plain:
            entries.append(_made(item, None, next(iter(parts.values()))))
            continue
        rule = next((rule for rule in rules if fnmatchcase(item.name, rule[0])), None)
        used |= {rule[0]} if rule else set()
        entries.append(_ruled(item, parts, rule[1]) if rule else _inferred(item, parts))
    for selector, _ in rules:
        if selector not in used:
            raise ValueError(f"rule {selector!r} matches no tensor that is stored in parts")
    return Parametrization(tuple(entries), None)


def _names(keys: Collection[str], selectors: Sequence[str]) -> set[str]:
    """The names of which funcparam's own keys hold parts, as far as a rule picks one."""
    heads = heads_of(keys)
    found: set[str] = set()
    for key in keys:
        for head, word, rest in splits(key):
            if head in heads and word in ("raw", "state"):
                names = [head + rest, *(head + rest[:i] for i, c in enumerate(rest) if c == ".")]
                picked = [n for n in names if any(fnmatchcase(n, s) for s in selectors)]
                found.update(picked[-1:])
    return found


def transform_of(text: str) -> AnyTransform:
    """The transform that a text calls, as `WeightNorm(dim=0)`: funcparam's names and plain values.

    Raises:
        ValueError: it is anything else. Nothing is evaluated.
    """
    try:
        return cast("AnyTransform", _called(ast.parse(text, mode="eval").body))
    except (SyntaxError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"expected the call of a transform, as \"Orthogonal('cayley')\"; got {text!r}: {error}"
        ) from error


def _called(node: ast.expr, *, argument: bool = False) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        kind = class_called(node.func.id)
        if kind is None:
            raise ValueError(f"{node.func.id!r} is no transform of funcparam's")
        return kind(
            *(_called(own, argument=True) for own in node.args),
            **{str(own.arg): _called(own.value, argument=True) for own in node.keywords},
        )
    if not argument:
        raise ValueError("it calls nothing")
    return ast.literal_eval(node)


def _ruled(item: Stored, parts: Mapping[str, Tensor], transform: AnyTransform) -> Entry:
    for entry in _candidates(item, transform, parts.values()):
        for spelling in spellings(transform, entry.signature):
            if spelling.style == item.style and set(spelling.parts) == set(parts):
                specs = spelling.specs(entry.signature)
                if all(spec.admits(parts[part]) for part, spec in specs.items()):
                    return entry
    raise ValueError(
        f"{item.name!r}: {transform!r} is not stored as {[key for _, key in item.keys]}"
    )


def _inferred(item: Stored, parts: Mapping[str, Tensor]) -> Entry:
    if item.style == "funcparam" and set(parts) == {"raw"}:
        raise ValueError(
            f"{item.keys[0][1]!r} is raw, and the file does not say which transforms it was made"
            " with: give a rule for each weight, as 'weight' 'Positive()', and '*' 'Identity()' for"
            " those that had none. What checkpoint.write(p, raw, state) returns says it in the file"
        )
    inferred = infer(item.style, parts)
    if inferred is None:
        raise ValueError(
            f"{item.name!r} is stored as {[key for _, key in item.keys]}, which does not say its"
            " transform: give a rule for it"
        )
    with torch.no_grad():
        value = inferred.transform.forward(inferred.raw, inferred.state)
    return _made(item, inferred.transform, value)


def _candidates(item: Stored, transform: AnyTransform, parts: Iterable[Tensor]) -> Iterable[Entry]:
    """An entry for each shape that a part has: one of them is that of the value."""
    for part in parts:
        try:
            yield _made(item, transform, part)
        except (TypeError, ValueError):
            continue


def _made(item: Stored, transform: AnyTransform | None, value: Tensor) -> Entry:
    return Entry((item.name,), signature(transform, TensorSpec.of(value)), transform)
