"""Modules and trees of tensors as flat names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

if TYPE_CHECKING:
    from funcparam.parametrization.nested import Structure


@dataclass(frozen=True, eq=False)
class Leaf:
    """A tensor with all names that it goes by; more than one where it is tied."""

    tensor: Tensor
    names: tuple[str, ...]
    owners: tuple[tuple[nn.Module, str], ...] = ()
    """The modules it sits in, with its name there; empty outside of modules."""
    is_buffer: bool = False


def flatten(tree: Any, *, ties: bool = False) -> tuple[list[Leaf], Structure | None]:
    """List the leaves of a module or of a tree of tensors.

    Returns:
        The leaves in order, and the structure; None for a module and for a flat dictionary, whose
        tree is the dictionary of the names itself. What a module has at several names is one
        leaf; what another tree has at several, only if `ties`.

    Raises:
        TypeError: a leaf is not a tensor.
        ValueError: two paths give the same name.
    """
    if isinstance(tree, nn.Module):
        return [*_merge(_module_leaves(tree))], None
    merge = _merge if ties else iter
    if _is_flat(tree):
        return [*merge(_named(tree))], None
    from funcparam.parametrization.nested import flatten_nested  # optree is a third of the import

    named, structure = flatten_nested(tree)
    return [*merge(_named(named))], structure


def _module_leaves(module: nn.Module) -> Iterator[Leaf]:
    named = cast("Iterator[tuple[str, nn.Module]]", module.named_modules(remove_duplicate=False))
    owners = dict(named)
    parameters = module.named_parameters(remove_duplicate=False)
    buffers = module.named_buffers(remove_duplicate=False)
    for tensors, is_buffer in ((parameters, False), (buffers, True)):
        for name, tensor in tensors:
            prefix, _, local = name.rpartition(".")
            yield Leaf(tensor, (name,), ((owners[prefix], local),), is_buffer)


def _is_flat(tree: Any) -> bool:
    if not isinstance(tree, Mapping):
        return False
    items = cast("Mapping[Any, Any]", tree).items()
    return all(isinstance(key, str) and isinstance(leaf, Tensor) for key, leaf in items)


def _named(tensors: Mapping[str, Tensor]) -> Iterator[Leaf]:
    for name, tensor in tensors.items():
        yield Leaf(tensor, (name,))


def _merge(leaves: Iterator[Leaf]) -> Iterator[Leaf]:
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
