"""Files of tensors: no code is run when they are read."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from funcparam.checkpoint._flat import flat, metadata_of
from funcparam.checkpoint._shards import files_of, split, write_index
from funcparam.checkpoint._spec import in_header, of_header
from funcparam.transforms.contract.signature import describe

PathLike: TypeAlias = "str | os.PathLike[str]"

_ALIASES = "funcparam.aliases"


def save(tensors: Mapping[str, Any], path: PathLike) -> None:
    """Save tensors, so that `torch.load(weights_only=True)` or safetensors reads them.

    Tied tensors are written once and are tied when [`load`][funcparam.checkpoint.load] reads them;
    of a view only its own entries are written. What `tensors` says of itself is written too.

    Args:
        tensors: by key; nested dictionaries get dotted keys.
        path: written in the format of safetensors if it ends in `.safetensors`, which needs that
            package; in PyTorch's own otherwise.

    Raises:
        TypeError: something in `tensors` is not a tensor.
        ImportError: safetensors is not installed.

    Example:
        >>> import tempfile, torch, funcparam as fp
        >>> from pathlib import Path
        >>> from funcparam.transforms import WeightNorm
        >>> net = torch.nn.Linear(3, 2)
        >>> p = fp.parametrize(net, {"weight": WeightNorm()})
        >>> raw, state = p.init(net)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "model.safetensors"
        ...     fp.checkpoint.save(fp.checkpoint.write(p, raw, state), path)
        ...     raw2, state2, _ = fp.checkpoint.read(fp.checkpoint.load(path))  # the file knows p
        >>> torch.equal(p(raw2, state2)["weight"], p(raw, state)["weight"])
        True
    """
    compact: dict[Any, Any] = {}
    keys: dict[str, Any] = {}
    for key, item in flat(tensors).items():
        keys[key] = _identity(item)
        compact.setdefault(keys[key], _compact(item))
    metadata = metadata_of(tensors)
    if not _is_safetensors(path):
        written = OrderedDict((key, compact[one]) for key, one in keys.items())
        if metadata:
            cast("Any", written)._metadata = joined(metadata)
        torch.save(written, path)
        return
    first: dict[Any, str] = {}
    for key, one in keys.items():
        if not isinstance(compact[one], Tensor):
            raise TypeError(f"{key!r}: safetensors hold tensors only; got {describe(compact[one])}")
        first.setdefault(one, key)
    once = {key: compact[one].contiguous() for one, key in first.items()}
    aliases = {key: first[one] for key, one in keys.items() if first[one] != key}
    header = {"format": "pt", **in_header(joined(metadata))}
    if aliases:
        header[_ALIASES] = json.dumps(aliases)
    _safetensors().save_file(once, path, metadata=header)


def load(path: PathLike, *, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read tensors from files of safetensors or of PyTorch, without running code from them.

    Args:
        path: a file, taken for one of safetensors if it ends in `.safetensors`; the index of
            several, which ends in `.index.json`; or a folder that has one of either.
        device: where the tensors are to be.

    Returns:
        The tensors, with what the file says of itself.

    Raises:
        pickle.UnpicklingError: the file holds more than tensors and plain containers.
        ValueError: the file is broken, or of another kind.
        OSError: there is no such file, or it cannot be read.
        ImportError: safetensors is not installed.
    """
    return load_telling(path, device, lambda _: None)


def load_telling(
    path: PathLike, device: str | torch.device, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Load, and tell before each tensor, or each file of those that are read at once."""
    files, expected = files_of(Path(path))
    if not expected:
        return _load(files[0], device, tell)
    found: OrderedDict[str, Any] = OrderedDict()
    metadata: dict[str, Any] = {}
    for file in files:
        part = _load(file, device, tell)
        found |= {key: part[key] for key in part if expected.get(key) == file.name}
        metadata |= getattr(part, "_metadata", {})
    if missing := expected.keys() - found.keys():
        first = min(missing)
        raise ValueError(
            f"{os.fspath(path)!r}: {first!r} is to be in {expected[first]!r}, where it is not"
        )
    if metadata:
        cast("Any", found)._metadata = metadata
    return found


def save_shards(tensors: Mapping[str, Any], folder: Path, size: float) -> None:
    """Save files of at most `size` bytes each, or of one tensor, and their index."""
    given, alike = flat(tensors), dict[Any, list[str]]()
    for key, item in given.items():
        alike.setdefault(_identity(item), []).append(key)
    sizes = {keys[0]: given[keys[0]].nbytes for keys in alike.values()}
    parts = split([(keys, sizes[keys[0]]) for keys in alike.values()], size)
    names = [f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    for name, keys in zip(names, parts, strict=True):
        part = OrderedDict((key, given[key]) for key in keys)
        if name == names[0]:  # for all
            cast("Any", part)._metadata = joined(metadata_of(tensors))
        save(part, folder / name)
    write_index(folder, dict(zip(names, parts, strict=True)), sum(sizes.values()))


def joined(metadata: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What nested state_dicts say of themselves, by the path of each module in all."""
    return {
        f"{nested}{path}".removesuffix("." if not path else ""): own
        for nested, of_modules in metadata.items()
        for path, own in of_modules.items()
    }


def _load(path: Path, device: str | torch.device, tell: Callable[[str], None]) -> dict[str, Any]:
    tell(f"reading {path}")
    try:
        if _is_safetensors(path):
            return _load_safetensors(path, device, tell)
        return cast("dict[str, Any]", torch.load(path, map_location=device, weights_only=True))
    except pickle.UnpicklingError as error:  # PyTorch's advice is to run code from the file
        raise pickle.UnpicklingError(
            f"{os.fspath(path)!r}: expected tensors and plain containers alone, which need no code"
            f" from the file to be run; reading it gave {_reason(error)}"
        ) from error
    except Exception as error:  # what a broken file can lead to is long, and has no common type
        is_seek = getattr(error, "errno", None) == errno.EINVAL  # in a file that was cut off
        if isinstance(error, (OSError, ImportError)) and not is_seek:
            raise
        raise ValueError(
            f"{os.fspath(path)!r}: expected a file that checkpoint.save, torch.save or safetensors"
            f" wrote; reading it gave {type(error).__name__}: {error}"
        ) from error


def _reason(error: Exception) -> str:
    """What PyTorch's reader of plain files met, without what it advises."""
    found = re.search(r"WeightsUnpickler error:\s*(.*?)(?:\. |\n|$)", str(error), re.DOTALL)
    return found[1] if found else str(error).splitlines()[0]


def _load_safetensors(
    path: Path, device: str | torch.device, tell: Callable[[str], None]
) -> dict[str, Any]:
    found: OrderedDict[str, Any] = OrderedDict()
    with _safetensors().safe_open(path, framework="pt", device=str(device)) as file:
        for key in (keys := list(file.keys())):
            tell(f"reading {path}, tensor {len(found) + 1} of {len(keys)}")
            found[key] = file.get_tensor(key)
        header = cast("dict[str, str]", file.metadata() or {})
    for key, kept in _aliases(header, found).items():
        found.setdefault(key, found[kept])
    if metadata := of_header(header):
        cast("Any", found)._metadata = metadata
    return found


def _aliases(header: Mapping[str, str], found: Mapping[str, Any]) -> dict[str, str]:
    """Names of tied tensors: in a key of their own, or, where nothing else is there, one each."""
    if _ALIASES in header:
        aliases = json.loads(header[_ALIASES])
    else:  # as safetensors.torch.save_model writes them
        aliases = {key: kept for key, kept in header.items() if key != "format"}
        if any(key in found or kept not in found for key, kept in aliases.items()):
            return {}
    told = cast("dict[str, str]", aliases)
    if not isinstance(aliases, dict) or any(kept not in found for kept in told.values()):
        raise ValueError(f"{_ALIASES}: expected names of tensors that are there; got {aliases!r}")
    return told


def _is_safetensors(path: PathLike) -> bool:
    return os.fspath(path).endswith(".safetensors")


def _identity(item: Any) -> Any:
    """Equal for two views of the same entries of one memory."""
    usual = isinstance(item, Tensor) and item.layout is torch.strided and not item.is_meta
    if not usual or item.numel() == 0:
        return id(item)
    bits = item.is_conj(), item.is_neg()
    return item.data_ptr(), item.device, item.dtype, tuple(item.shape), item.stride(), bits


def _compact(item: Any) -> Any:
    """The tensor itself, or a copy if it is a view of a larger memory or not yet conjugated."""
    if not isinstance(item, Tensor):
        return item
    tensor = item.detach()
    if tensor.layout is not torch.strided:
        return tensor
    tensor = tensor.resolve_conj().resolve_neg()
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone()


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "files that end in .safetensors need the package safetensors: pip install safetensors"
        ) from error
    return safetensors.torch
