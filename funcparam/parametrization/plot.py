"""Pictures of parametrized values. Imported when one is drawn, since it needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from math import isnan
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from funcparam.transforms.contract.base import AnyTransform
from funcparam.transforms.numerics.linalg import linalg

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot(
    transforms: Mapping[str, AnyTransform],
    values: Mapping[str, Tensor],
    violations: Mapping[str, Tensor],
) -> Figure:
    """Draw violations as bars beside singular values as lines."""
    names = list(transforms)
    for name in names:
        if values[name].is_meta:
            raise ValueError(
                f"{name!r}: expected a tensor with entries; got one on the meta device"
            )
    plt = _pyplot()
    height = max(3.0, 1 + 0.25 * len(names))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, height), layout="constrained")
    lengths = [violations[name].item() for name in names]
    left.barh(names, lengths)
    for i, length in enumerate(lengths):
        if isnan(length):
            left.text(0, i, " not measured", va="center", fontsize="small")
    left.invert_yaxis()
    left.set_xscale("symlog", linthresh=1e-8)  # linear around 0, which most are
    left.set_xlim(left=0)
    left.set_xlabel("violation")
    for name in names:
        value = values[name]
        if value.ndim > 1 and value.numel():
            spectrum = _singular_values(transforms[name], value)
            right.plot(torch.linspace(0, 1, len(spectrum)), spectrum, ".-", label=name)
    if 0 < len(right.lines) <= 20:  # more would hide the picture
        right.legend(fontsize="small")
    right.update_datalim([(0, 0), (1, 0)])  # margins of all of it: equal values have no range
    right.set_ylim(bottom=0)
    right.set_xlabel("rank, as a fraction")
    right.set_ylabel("singular value")
    return figure


def _singular_values(transform: AnyTransform, value: Tensor) -> Tensor:
    dim = getattr(transform, "dim", None)
    if value.ndim > 2 and isinstance(dim, int):
        value = value.movedim(dim, 0).flatten(1)
    wide = value.detach().cpu().to(torch.complex128 if value.is_complex() else torch.float64)
    found: Tensor = linalg.svdvals(wide)
    return found.flatten().sort(descending=True).values


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "plot needs the package matplotlib: pip install 'funcparam[plot]'"
        ) from error
    return plt
