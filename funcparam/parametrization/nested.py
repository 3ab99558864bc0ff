"""Nested trees of tensors as flat names: the only place that knows optree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import optree
from optree import MappingEntry, NamedTupleEntry, PyTreeAccessor
from torch import Tensor

from funcparam.transforms.contract.signature import describe


@dataclass(frozen=True)
class Structure:
    """How to put a flat dictionary of leaves back into a tree."""

    spec: optree.PyTreeSpec
    names: tuple[str, ...]
    _template: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # A spec made outside a torch.compile trace cannot be used inside it; a tree of names can.
        object.__setattr__(self, "_template", optree.tree_unflatten(self.spec, self.names))

    def fill(self, values: Mapping[str, Any]) -> Any:
        """Build the tree with `values[name]` at each name."""
        return optree.tree_map(values.__getitem__, self._template)


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
