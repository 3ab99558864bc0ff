"""funcparam's own keys: `raw.*`, `state.*` and `net_buffers.*`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from funcparam.checkpoint._keys import has_own_keys, what_is_there
from funcparam.parametrization.boundary import Entry
from funcparam.transforms.contract.base import State
from funcparam.transforms.contract.signature import TensorSpec


def is_own(tensors: Mapping[str, Any], entries: Sequence[Entry]) -> bool:
    """Whether it is funcparam's own layout, complete or at least without a plain name.

    A network may have a module that is called raw: its plain keys never hold all own ones.
    """
    own = [key for entry in entries for key, _, _ in _keys(entry)]
    if own and all(key in tensors for key in own):
        return True
    plain = any(name in tensors for entry in entries for name in entry.names)
    return has_own_keys(tensors) and not plain


def read_own(
    tensors: Mapping[str, Any], entries: Sequence[Entry]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Raw, state and the network's buffers, as they stand."""
    raw: dict[str, Any] = {}
    state: dict[str, Any] = {}
    left = dict(tensors)
    for entry in entries:
        if not isinstance(entry.signature.raw, TensorSpec):
            raw[entry.name] = {}
        for key, where, name in _keys(entry):
            if key not in left:
                raise ValueError(f"{entry.name!r}: missing {key!r}; {what_is_there(tensors)}")
            tensor = left.pop(key)
            if where == "state":
                state.setdefault(entry.name, {})[name] = tensor
            elif name:
                raw[entry.name][name] = tensor
            else:
                raw[entry.name] = tensor
    prefix = "net_buffers."
    unknown = [key for key in left if not key.startswith(prefix)]
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}: the parametrization was made without it")
    return raw, state, {key.removeprefix(prefix): t for key, t in left.items()}


def write_own(entry: Entry, raw: Any, state: State) -> dict[str, Tensor]:
    """The tensors of an entry by key."""
    tensors = {"raw": {"": raw} if isinstance(raw, Tensor) else raw, "state": state}
    return {key: tensors[where][name] for key, where, name in _keys(entry)}


def _keys(entry: Entry) -> Iterator[tuple[str, str, str]]:
    """Where the tensors of an entry stand: (key, "raw" or "state", its name there or '')."""
    raw = entry.signature.raw
    for name, _ in (("", raw),) if isinstance(raw, TensorSpec) else raw:
        yield f"raw.{entry.name}" + (f".{name}" if name else ""), "raw", name
    for name, _ in entry.signature.state:
        yield f"state.{entry.name}.{name}", "state", name
