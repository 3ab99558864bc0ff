"""Steps outside of training: no gradients go back through them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from funcparam.transforms.contract.base import AnyTransform, Raw, State

_transforms_active: Any = torch._C._are_functorch_transforms_active  # pyright: ignore


def updated(transform: AnyTransform, raw: Raw, state: State) -> State:
    """State after one step of what evolves; what does not is the same tensor."""
    given = detached(state)
    return _kept(state, given, transform.update(detached(raw), given))


def refreshed(transform: AnyTransform, raw: Raw, state: State) -> State:
    """State made exact; what stays is the same tensor."""
    given = detached(state)
    return _kept(state, given, transform.refresh(detached(raw), given))


def rebased(transform: AnyTransform, raw: Raw, state: State) -> tuple[Raw, State]:
    """Raw and state with the base point moved to the value; what does not move is the same tensor.

    New raw is a leaf that requires grad where the old one did. Inside of `torch.func` transforms
    and traces no tensor can be made such a leaf.
    """
    given, own = detached(raw), detached(state)
    new, base = transform.rebase(given, own)
    base = _kept(state, own, base)
    if new is given:
        return raw, base
    if isinstance(raw, Tensor):
        return _trained_like(raw, new), base
    moved = _kept(raw, given, new)
    return {k: t if t is raw[k] else _trained_like(raw[k], t) for k, t in moved.items()}, base


def detached(tree: Any) -> Any:
    """The tensor or tensors without what they were computed from.

    A `no_grad` block would not do: it leaves forward mode on, and an outer `torch.func.grad`; and
    where a compiled graph is cut inside of it (DistributedDataParallel cuts at its buckets), the
    part that ends it is another one than the part that begins it, and gradients stay off.
    """
    if isinstance(tree, Tensor):
        return tree.detach()
    return {name: tensor.detach() for name, tensor in tree.items()}


def _kept(
    old: Mapping[str, Tensor], given: Mapping[str, Tensor], new: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """`new`, with the old tensor wherever it is the one that was given."""
    return {key: old[key] if t is given.get(key) else t for key, t in new.items()}


def _trained_like(old: Tensor, new: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or _transforms_active():
        return new
    return new.requires_grad_(old.requires_grad)
