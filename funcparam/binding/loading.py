"""What `load_state_dict` of a shell takes: its own keys, older ones, and other spellings."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from funcparam.binding.dotted import paths
from funcparam.binding.shell import Shell
from funcparam.parametrization.parametrization import Parametrization
from funcparam.parametrization.parametrize import parametrize
from funcparam.parametrization.sharding import sharded_like, whole

if TYPE_CHECKING:
    from os import PathLike

    from funcparam.checkpoint import Contents


def respell(
    model: Shell, state_dict: dict[str, Any], prefix: str, metadata: Mapping[str, Any]
) -> None:
    """Give the tensors below `prefix` the keys that the shell has for them, in place.

    Those that have them already, and were written by the same transforms, keep them.

    Raises:
        RuntimeError: it cannot be read. Nothing was loaded.
    """
    given = {k.removeprefix(prefix): t for k, t in state_dict.items() if k.startswith(prefix)}
    own = model.state_dict(keep_vars=True)
    for key in own:  # a subclass may have modules beside these
        if key.partition(".")[0] not in ("net", "raw", "state"):
            given.pop(key, None)
    new = given
    if not (given.keys() <= own.keys() and _is_by(model, metadata)):
        try:
            new = _read(model, given, prefix, metadata, own)
        except (TypeError, ValueError) as error:
            where = f", at {prefix[:-1]!r}" if prefix else ""
            raise RuntimeError(f"loading into a {type(model).__name__}{where}: {error}") from error
        model.__dict__["_read_below"] = prefix
    for key in given:
        del state_dict[prefix + key]
    for key, tensor in new.items():
        held = own.get(key)
        if isinstance(held, Tensor) and isinstance(tensor, Tensor):
            tensor = sharded_like(held, tensor)
        state_dict[prefix + key] = tensor


def contents_for(
    net: nn.Module,
    file: str | PathLike[str] | Mapping[str, Any],
    p: Parametrization[dict[str, Tensor]] | None,
    known: Mapping[str, Any] | None,
) -> tuple[Contents, Parametrization[dict[str, Tensor]]]:
    """Read a file for a network, by its own transforms unless `p` is given."""
    from funcparam.checkpoint import load, parametrization, read

    given = file if isinstance(file, Mapping) else load(file)
    if p is None:
        by_file = parametrization(given, known=known)
        try:
            p = parametrize(net, dict(by_file))
        except ValueError as error:
            raise ValueError(f"the file is of another network: {error}") from error
    return read(given, p, buffers=p.buffers, known=known), p


def load_others(net: nn.Module, contents: Contents) -> None:
    """Load what is neither raw nor state, all of it, by the network's own rules.

    Raises:
        ValueError: there is more, or less, than the network has.
    """
    keys: Any = net.load_state_dict(contents.others, strict=False)
    unexpected: list[str] = keys.unexpected_keys
    absent: list[str] = keys.missing_keys
    parameters = {name for entry in contents.p.entries for name in entry.names}
    if more := [contents.keys[name] for name in unexpected]:
        raise ValueError(f"the file is of another network, which has {', '.join(map(repr, more))}")
    if missing := [repr(name) for name in absent if name not in parameters]:
        raise ValueError(
            f"the file has no {', '.join(missing)}, which the network keeps beside its parameters:"
            " save it with the network, checkpoint.write(p, raw, state, net)"
        )


def say(model: Shell, metadata: dict[str, Any]) -> None:
    """Say which transforms wrote raw and state, where a file keeps the versions of modules."""
    from funcparam.checkpoint._spec import KEY, description

    metadata[KEY] = description(model.parametrization)


def _is_by(model: Shell, metadata: Mapping[str, Any]) -> bool:
    from funcparam.checkpoint._spec import KEY, description

    return metadata.get(KEY) in (None, description(model.parametrization))


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


def _read(
    model: Shell,
    given: Mapping[str, Any],
    prefix: str,
    metadata: Mapping[str, Any],
    own: Mapping[str, Any],
) -> dict[str, Any]:
    # a third of the time to import funcparam
    from funcparam.checkpoint._read import take, warn_of_moves

    file: Any = OrderedDict(given)
    file._metadata = {"": metadata}
    buffers = {key.removeprefix("net.") for key in own if key.startswith("net.")}
    p = model.parametrization
    buffers -= {name for entry in p.entries for name in entry.names}
    beside = partial(whole, model.raw_and_state())
    found = take(file, p, buffers=buffers, strict=False, beside=beside)
    warn_of_moves(found, prefix, stacklevel=7)
    new: dict[str, Any] = {f"net.{key}": tensor for key, tensor in found.others.items()}
    for entry in (entry for entry in p.entries if entry.name in found.raw):
        raw, state = found.raw[entry.name], found.state.get(entry.name, {})
        if entry.transform is None:
            new |= {f"net.{name}": raw for name in entry.names}
        else:
            new |= {f"raw.{path}": tensor for path, tensor in paths(entry.name, raw)}
            new |= {f"state.{path}": tensor for path, tensor in paths(entry.name, state)}
    return new
