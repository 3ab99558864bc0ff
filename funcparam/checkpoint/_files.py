"""Files of tensors: no code is run when they are read."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from funcparam.checkpoint._keys import flat
from funcparam.transforms.contract.signature import describe

Path: TypeAlias = "str | os.PathLike[str]"


def save(tensors: Mapping[str, Any], path: Path) -> None:
    """Save tensors, so that `torch.load(weights_only=True)` or safetensors reads them.

    Tied tensors are written once and are tied when [`load`][funcparam.checkpoint.load] reads them;
    of a view only its own entries are written.

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
        ...     raw2, state2, _ = fp.checkpoint.read(fp.checkpoint.load(path), p)
        >>> torch.equal(p(raw2, state2)["weight"], p(raw, state)["weight"])
        True
    """
    compact: dict[Any, Any] = {}
    keys: dict[str, Any] = {}
    for key, item in flat(tensors).items():
        keys[key] = _identity(item)
        compact.setdefault(keys[key], _compact(item))
    if not _is_safetensors(path):
        torch.save({key: compact[one] for key, one in keys.items()}, path)
        return
    first: dict[Any, str] = {}
    for key, one in keys.items():
        if not isinstance(compact[one], Tensor):
            raise TypeError(f"{key!r}: safetensors hold tensors only; got {describe(compact[one])}")
        first.setdefault(one, key)
    once = {key: compact[one].contiguous() for one, key in first.items()}
    aliases = {key: first[one] for key, one in keys.items() if first[one] != key}
    # the metadata that safetensors.torch.save_model writes, so that its load_model reads this
    _safetensors().save_file(once, path, metadata={**aliases, "format": "pt"})


def load(path: Path, *, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read tensors from a file of safetensors or of PyTorch, without running code from it.

    Args:
        path: the file; taken for one of safetensors if it ends in `.safetensors`.
        device: where the tensors are to be.

    Raises:
        pickle.UnpicklingError: the file holds more than tensors and plain containers; PyTorch's
            message says what.
        ValueError: the file is broken, or of another kind.
        OSError: there is no such file, or it cannot be read.
        ImportError: safetensors is not installed.
    """
    try:
        return _load_safetensors(path, device) if _is_safetensors(path) else _load(path, device)
    except (OSError, ImportError, pickle.UnpicklingError):
        raise
    except Exception as error:  # what a broken file can lead to is long, and has no common type
        raise ValueError(
            f"{os.fspath(path)!r}: expected a file that checkpoint.save, torch.save or safetensors"
            f" wrote; reading it gave {type(error).__name__}: {error}"
        ) from error


def _load(path: Path, device: str | torch.device) -> dict[str, Any]:
    return cast("dict[str, Any]", torch.load(path, map_location=device, weights_only=True))


def _load_safetensors(path: Path, device: str | torch.device) -> dict[str, Any]:
    with _safetensors().safe_open(path, framework="pt", device=str(device)) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        aliases = cast("dict[str, str]", file.metadata() or {})
    return tensors | {key: tensors[kept] for key, kept in aliases.items() if kept in tensors}


def _is_safetensors(path: Path) -> bool:
    return os.fspath(path).endswith(".safetensors")


def _identity(item: Any) -> Any:
    """Equal for two views of the same entries of one memory."""
    if not isinstance(item, Tensor) or item.numel() == 0 or item.is_meta:
        return id(item)
    return item.data_ptr(), item.device, item.dtype, tuple(item.shape), item.stride()


def _compact(item: Any) -> Any:
    """The tensor itself, or a copy if it is a view of a larger memory."""
    if not isinstance(item, Tensor):
        return item
    tensor = item.detach()
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
