"""Raw and state as the parameters and buffers of plain modules, at the dotted names of weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from funcparam.binding.modes import is_plain_eager
from funcparam.parametrization.boundary import Entry
from funcparam.parametrization.sharding import sharded_like
from funcparam.transforms.contract.base import Raw, State
from funcparam.transforms.contract.signature import TensorSpec

Layout: TypeAlias = "tuple[str, list[str], str, list[str] | None, list[str]]"
"""Of a leaf: its name, module and key, the keys of its raw, None for a tensor, and of its state."""


def layout(entry: Entry) -> Layout:
    """Where the tensors of one leaf are."""
    spec = entry.signature
    keys = None if isinstance(spec.raw, TensorSpec) else [key for key, _ in spec.raw]
    return entry.name, *_apart(entry.name), keys, [key for key, _ in spec.state]


def collect(
    layouts: list[Layout], raw_root: nn.Module, state_root: nn.Module
) -> tuple[dict[str, Raw], dict[str, State]]:
    """Return raw and state, the tensors themselves."""
    raw: dict[str, Raw] = {}
    state: dict[str, State] = {}
    for name, parents, key, raw_keys, state_keys in layouts:
        if raw_keys is None:
            raw[name] = _tensor(_module_at(raw_root, parents), key)
        elif raw_keys:
            raw[name] = _below(_module_at(raw_root, parents), key, raw_keys)
        else:  # which has no module
            raw[name] = {}
        if state_keys:
            state[name] = _below(_module_at(state_root, parents), key, state_keys)
    return raw, state


def paths(name: str, tensors: Raw) -> list[tuple[str, Tensor]]:
    """The tensors of one leaf with their dotted paths."""
    if isinstance(tensors, Tensor):
        return [(name, tensors)]
    return [(f"{name}.{key}", tensor) for key, tensor in tensors.items()]


class Held(nn.Module):
    """Raw or state below one name; what hangs a computation on it would have no effect."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Replace a tensor; refuse another one, which no transform would take."""
        if name in vars(self)["_parameters"]:
            super().register_parameter(name, param)
            return
        raise TypeError(
            f"{name!r}: raw and state of a Parametrized take no other tensors; nothing would read"
            " them. torch.nn.utils.prune is the transform Mask here, and torch.nn.utils.parametrize"
            " a Chain"
        )

    def register_forward_pre_hook(self, *_: Any, **__: Any) -> Any:
        """Refuse: nothing calls this module."""
        raise TypeError(
            "raw and state of a Parametrized are never called, so a hook would not run. Register it"
            " on the Parametrized, or on a module of its net"
        )


def place(root: nn.Module, path: str, tensor: Tensor) -> None:
    """Keep `tensor` at a dotted path below `root`, making modules on the way.

    In the tables, past `nn.Module`, where a key may not have the name of a method.
    """
    *parents, local = path.split(".")
    for parent in parents:
        root = vars(root)["_modules"].setdefault(parent, Held())
    table = "_parameters" if isinstance(tensor, nn.Parameter) else "_buffers"
    vars(root)[table][local] = tensor


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of a tree that have others in a new one, and these."""
    olds: list[Tensor] = []
    news: list[Tensor] = []
    for name, given in new.items():
        own = old[name]
        if isinstance(given, Tensor):
            own, given = {"": own}, {"": given}
        for key, tensor in given.items():
            if tensor is not own[key]:
                olds.append(own[key])
                news.append(tensor)
    return olds, news


def refilled(
    old: Mapping[str, State], new: Mapping[str, State], tensors: Sequence[Tensor]
) -> dict[str, State]:
    """The new tree with these tensors in the place of those that changed."""
    found = iter(tensors)
    return {
        name: {key: t if t is old[name][key] else next(found) for key, t in own.items()}
        for name, own in new.items()
    }


def overwrite(olds: Sequence[Tensor], news: Sequence[Tensor]) -> None:
    """Copy each new tensor into an old one, of which no gradient is asked."""
    if olds and is_plain_eager() and {*map(type, olds)} <= {Tensor, nn.Parameter}:
        torch._foreach_copy_(olds, news)  # pyright: ignore
    else:  # vmap has a rule for this one, and a compiler joins them itself
        for old, new in zip(olds, news, strict=True):
            old.copy_(sharded_like(old, new))


def _apart(path: str) -> tuple[list[str], str]:
    *parents, key = path.split(".")
    return parents, key


def _below(parent: nn.Module, name: str, keys: list[str]) -> dict[str, Tensor]:
    """The tensors of one leaf, whose keys may be dotted."""
    owner: Any = parent._modules[name]  # pyright: ignore[reportPrivateUsage]
    table: dict[str, Tensor] = owner._parameters or owner._buffers
    if len(table) == len(keys):
        return {key: table[key] for key in keys}
    return {key: _at(owner, key) if "." in key else _tensor(owner, key) for key in keys}


def _at(root: nn.Module, path: str) -> Tensor:
    parents, key = _apart(path)
    return _tensor(_module_at(root, parents), key)


def _module_at(root: nn.Module, path: list[str]) -> nn.Module:
    """The module below `root`; quicker than attributes, which `nn.Module` looks up in Python."""
    for name in path:
        root = cast("nn.Module", root._modules[name])  # pyright: ignore[reportPrivateUsage]
    return root


def _tensor(owner: nn.Module, key: str) -> Tensor:
    """The attribute, sooner where it is what it was registered as."""
    found = owner._parameters.get(key)  # pyright: ignore[reportPrivateUsage]
    if found is None:
        found = owner._buffers.get(key)  # pyright: ignore[reportPrivateUsage]
    return getattr(owner, key) if found is None else found
