"""What two checkpoints have in common: tensors by name, however each is stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from funcparam.parametrization.table import Table, Tabular


@dataclass(frozen=True, repr=False)
class Difference(Tabular):
    """The tensors that are not alike; none if the checkpoints hold the same values."""

    rows: tuple[tuple[str, str, str], ...]

    def _table(self) -> Table:
        return Table(("name", "difference", "largest entry"), self.rows)


def difference(
    first: Mapping[str, Any], second: Mapping[str, Any], *, tolerance: float = 0.0
) -> Difference:
    """Compare plain tensors by name; entries that differ by no more than `tolerance` are equal."""
    rows = [row for name in {**first, **second} if (row := _row(name, first, second, tolerance))]
    return Difference(tuple(rows))


def _row(
    name: str, first: Mapping[str, Any], second: Mapping[str, Any], tolerance: float
) -> tuple[str, str, str] | None:
    for one, where in ((first, "second"), (second, "first")):
        if name not in one:
            return name, f"only in the {where}", ""
    a, b = first[name], second[name]
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return None if _same(a, b) else (name, "no tensors, and not equal", "")
    if a.shape != b.shape:
        return name, f"shapes {tuple(a.shape)} and {tuple(b.shape)}", ""
    if a.is_meta or b.is_meta:
        return name, "on the meta device, without entries", ""
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float64)
    a, b = a.to(wide), b.to(wide)
    unlike = ~((a == b) | (a.isnan() & b.isnan()))
    if not bool(unlike.any()):
        return None
    by = (a - b)[unlike].abs().max()
    if bool(by <= tolerance):
        return None
    return name, f"by up to {float(by):.2e}", f"{float(a.abs().max()):.2e}"


def _same(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except (RuntimeError, ValueError, TypeError):  # tensors in it have no one truth
        return False
