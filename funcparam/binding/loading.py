"""What `load_state_dict` of a shell takes: its own keys, older ones, and other spellings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from funcparam.binding.dotted import paths
from funcparam.binding.sharding import sharded_like

if TYPE_CHECKING:
    from funcparam.binding.module import Parametrized


def respell(model: Parametrized, state_dict: dict[str, Any], prefix: str) -> None:
    """Give the tensors below `prefix` the keys that the shell has for them, in place.

    Raises:
        RuntimeError: it cannot be read. Nothing was loaded.
    """
    given = {k.removeprefix(prefix): t for k, t in state_dict.items() if k.startswith(prefix)}
    own = model.state_dict(keep_vars=True)
    new = _renewed(model, given)
    if given and own.keys().isdisjoint(new):
        try:
            new = _read(model, given)
        except (TypeError, ValueError) as error:
            raise RuntimeError(
                f"{error} (loading a state_dict into {type(model).__name__}"
                + (f" at {prefix[:-1]!r})" if prefix else ")")
            ) from error
        model.__dict__["_read_below"] = prefix
    for key in given:
        del state_dict[prefix + key]
    for key, tensor in new.items():
        held = own.get(key)
        both = isinstance(held, Tensor) and isinstance(tensor, Tensor)
        state_dict[prefix + key] = sharded_like(held, tensor) if both else tensor


def in_words_of_the_file(model: Any, keys: Any) -> None:
    """Name what is missing, or not expected, as the file that was read names its tensors."""
    prefix = model.__dict__.pop("_read_below", None)
    if prefix is None:
        return
    names = [entry.name for entry in model.parametrization.entries]
    for found in (keys.missing_keys, keys.unexpected_keys):
        found[:] = dict.fromkeys(_plain(key, prefix, names) for key in found)


def _plain(key: str, prefix: str, names: list[str]) -> str:
    own = key.removeprefix(prefix)
    root, _, rest = own.partition(".")
    if not key.startswith(prefix) or root not in ("net", "raw", "state"):
        return key
    if root == "net":
        return prefix + rest
    return prefix + next(n for n in names if rest == n or rest.startswith(f"{n}."))


def _renewed(model: Parametrized, given: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of before the network was a child: `raw` of what has no rule, and `net_buffers`."""
    entries = [entry for entry in model.parametrization.entries if entry.transform is None]
    ties = {f"raw.{entry.name}": entry.names for entry in entries}
    new: dict[str, Any] = {}
    for key, tensor in given.items():
        if key in ties:
            new |= {f"net.{name}": tensor for name in ties[key]}
        elif key.startswith("net_buffers."):
            new[key.replace("net_buffers.", "net.", 1)] = tensor
        else:
            new[key] = tensor
    return new


def _read(model: Parametrized, given: Mapping[str, Any]) -> dict[str, Any]:
    from funcparam.checkpoint import read  # a third of the time to import funcparam

    raw, state, others = read(given, model.parametrization)
    new: dict[str, Any] = {f"net.{key}": tensor for key, tensor in others.items()}
    for entry in model.parametrization.entries:
        if entry.transform is None:
            new |= {f"net.{name}": raw[entry.name] for name in entry.names}
            continue
        for path, tensor in paths(entry.name, raw[entry.name]):
            new[f"raw.{path}"] = tensor
        for path, tensor in paths(entry.name, state.get(entry.name, {})):
            new[f"state.{path}"] = tensor
    return new
