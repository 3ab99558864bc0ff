"""Trees of tensors as flat names: the only place that knows optree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import optree
from optree import MappingEntry, NamedTupleEntry, PyTreeAccessor
from torch import Tensor, nn

from funcparam.transforms._signature import describe


@dataclass(frozen=True, eq=False)
class Leaf:
    """A tensor with all names that it goes by; more than one where it is tied."""

    tensor: Tensor
    names: tuple[str, ...]
    owners: tuple[tuple[nn.Module, str], ...] = ()
    """The modules it sits in, with its name there; empty outside of modules."""
    is_buffer: bool = False


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


def flatten(tree: Any) -> tuple[list[Leaf], Structure | None]:
    """List the leaves of a module or of a tree of tensors.

    Returns:
        The leaves in order, those at several names once, and the structure; None for a module
        and for a flat dictionary, whose tree is the dictionary of the names itself.

    Raises:
        TypeError: a leaf is not a tensor.
        ValueError: two paths give the same name.
    """
    if isinstance(tree, nn.Module):
        return [*_merge(_module_leaves(tree))], None
    leaves, structure = _tree_leaves(tree)
    seen: set[str] = set()
    for leaf in leaves:
        name = leaf.names[0]
        if not isinstance(leaf.tensor, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"{name!r}: expected a tensor; got {describe(leaf.tensor)}")
        if name in seen:
            raise ValueError(f"{name!r}: expected one leaf of this name; got two")
        seen.add(name)
    return [*_merge(leaves)], structure


def _module_leaves(module: nn.Module) -> Iterator[Leaf]:
    named = cast("Iterator[tuple[str, nn.Module]]", module.named_modules(remove_duplicate=False))
    owners = dict(named)
    parameters = module.named_parameters(remove_duplicate=False)
    buffers = module.named_buffers(remove_duplicate=False)
    for tensors, is_buffer in ((parameters, False), (buffers, True)):
        for name, tensor in tensors:
            prefix, _, local = name.rpartition(".")
            yield Leaf(tensor, (name,), ((owners[prefix], local),), is_buffer)


def _tree_leaves(tree: Any) -> tuple[list[Leaf], Structure | None]:
    if isinstance(tree, Mapping):
        items = cast("Mapping[Any, Any]", tree).items()
        if all(isinstance(key, str) and isinstance(leaf, Tensor) for key, leaf in items):
            return [Leaf(tensor, (name,)) for name, tensor in items], None
    accessors: list[PyTreeAccessor]
    tensors: list[Any]
    try:
        accessors, tensors, spec = optree.tree_flatten_with_accessor(cast("Any", tree))
    except RecursionError:
        raise ValueError("expected a tree of tensors; got one that is nested without end") from None
    names = tuple(map(_dotted, accessors))
    leaves = [Leaf(tensor, (name,)) for name, tensor in zip(names, tensors, strict=True)]
    return leaves, Structure(spec, names)


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


def _merge(leaves: Iterator[Leaf] | list[Leaf]) -> Iterator[Leaf]:
    """Join the leaves that are one tensor."""
    tied: dict[int, list[Leaf]] = {}
    for leaf in leaves:
        tied.setdefault(id(leaf.tensor), []).append(leaf)
    for group in tied.values():
        yield Leaf(
            group[0].tensor,
            tuple(name for leaf in group for name in leaf.names),
            tuple(owner for leaf in group for owner in leaf.owners),
            group[0].is_buffer,
        )
