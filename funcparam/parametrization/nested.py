"""Nested trees of tensors as flat names: the only place that knows optree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import optree
from optree import MappingEntry, NamedTupleEntry, PyTreeAccessor
from torch import Tensor

from funcparam.transforms.contract.signature import describe


@dataclass(frozen=True)
class Structure:
    """How to put a flat dictionary of leaves back into a tree."""

    spec: optree.PyTreeSpec
    names: tuple[str, ...]
    _root: _Node | str | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Compilers cannot trace what optree does in C++, but can what it calls for each container.
        object.__setattr__(self, "_root", _node(optree.tree_unflatten(self.spec, self.names)))

    def __reduce__(self) -> Any:
        return Structure, (self.spec, self.names)

    def fill(self, values: Mapping[str, Any]) -> Any:
        """Build the tree with `values[name]` at each name."""
        return _filled(self._root, values)


class _Node(NamedTuple):
    """A container: what makes it of its children, each another container or the name of a leaf."""

    make: Callable[[Any, list[Any]], Any]
    metadata: Any
    children: list[Any]


def _node(tree: Any) -> _Node | str | None:
    if tree is None or isinstance(tree, str):
        return tree
    if type(tree) is dict:  # optree's own way to make one is more than compilers can trace
        items = cast("dict[Any, Any]", tree)
        return _Node(_as_dict, list(items), [_node(child) for child in items.values()])
    children, metadata, _, make = optree.tree_flatten_one_level(tree)
    return _Node(cast("Any", make), metadata, [_node(child) for child in children])


def _as_dict(keys: list[Any], values: list[Any]) -> dict[Any, Any]:
    return dict(zip(keys, values, strict=True))


def _filled(node: _Node | str | None, values: Mapping[str, Any]) -> Any:
    if node is None:
        return None
    if isinstance(node, str):
        return values[node]
    return node.make(node.metadata, [_filled(child, values) for child in node.children])


def flatten_nested(tree: Any) -> tuple[dict[str, Tensor], Structure]:
    """The leaves of a tree by their paths, and its structure; errors are those of `flatten`."""
    accessors: list[PyTreeAccessor]
    leaves: list[Any]
    try:
        accessors, leaves, spec = optree.tree_flatten_with_accessor(tree)
    except RecursionError:
        raise ValueError("expected a tree of tensors; got one that is nested without end") from None
    named: dict[str, Tensor] = {}
    for name, leaf in zip(map(_dotted, accessors), leaves, strict=True):
        if not name and not isinstance(leaf, Tensor):
            raise TypeError(f"expected a module or a tree of tensors; got {type(leaf).__name__}")
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{name!r}: expected a tensor; got {describe(leaf)}")
        if name in named:
            raise ValueError(f"{name!r}: expected one leaf of this name; got two")
        named[name] = leaf
    return named, Structure(spec, tuple(named))


def _dotted(accessor: PyTreeAccessor) -> str:
    parts: list[str] = []
    for entry in accessor:
        if isinstance(entry, NamedTupleEntry):
            parts.append(entry.field)
        elif isinstance(entry, MappingEntry):
            parts.append(str(cast("object", entry.key)))
        else:
            parts.append(str(entry.entry))
    return ".".join(parts)
