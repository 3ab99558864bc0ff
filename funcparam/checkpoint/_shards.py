"""Checkpoints in several files: an index that says which tensor is in which."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def files_of(path: Path) -> tuple[list[Path], dict[str, str]]:
    """The files of a checkpoint, and, where an index says it, the name of that of each tensor.

    Raises:
        ValueError: a folder has none or several checkpoints, or an index is not one.
        OSError: there is no such file.
    """
    if path.is_dir():
        path = _only_one(path)
    if not path.name.endswith(".index.json"):
        return [path], {}
    try:
        index: Any = json.loads(path.read_text(encoding="utf-8"))
        places = cast("dict[str, str]", index["weight_map"])
        names = sorted(set(places.values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError(names)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{str(path)!r}: expected an index, JSON with a 'weight_map' from the name of each"
            " tensor to that of a file beside the index"
        ) from error
    return [path.parent / name for name in names], places


def split(groups: Sequence[tuple[Sequence[str], int]], size: float) -> list[list[str]]:
    """Names in parts of at most `size` bytes, in order; the names of a group stay together."""
    parts: list[list[str]] = [[]]
    filled = 0
    for names, own in groups:
        if parts[-1] and filled + own > size:
            parts.append([])
            filled = 0
        parts[-1] += names
        filled += own
    return parts


def write_index(folder: Path, files: Mapping[str, Sequence[str]], size: int) -> None:
    """Write which tensors are in which file, for all who load models in several."""
    places = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": size}, "weight_map": places}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index, indent=2), encoding="utf-8")


def _only_one(folder: Path) -> Path:
    """The one checkpoint of a folder: an index comes before the files that it names."""
    found = sorted(file for file in folder.iterdir() if file.name.endswith(".index.json"))
    found = found or sorted(file for file in folder.iterdir() if file.suffix in _ENDINGS)
    if len(found) != 1:
        names = [file.name for file in found]
        raise ValueError(
            f"{str(folder)!r}: expected one checkpoint, an index or a file that ends in"
            f" {', '.join(_ENDINGS)}; got {names or 'none'}"
        )
    return found[0]
