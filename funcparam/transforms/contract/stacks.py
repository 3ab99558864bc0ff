"""Where one stack of equal leaves is faster than each by itself, by kind of device.

Data, and the rule for devices that nobody measured. `python benchmarks/thresholds.py --write`
measures the device at hand, and writes its part of this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

Stacks: TypeAlias = "tuple[int, int]"
"""From how many leaves on, and up to how many entries of a value, forward and backward."""

MEASURED: Mapping[str, Mapping[str, Stacks]] = {
    # docs/bench/thresholds.md, and maps.md for more leaves; one thread of an Intel Xeon
    "cpu": {
        "AlmostOrthogonal": (4, 128 * 128),
        "DoRA": (8, 64 * 64),
        "FixedRank": (4, 256 * 256),
        "Invertible": (4, 128 * 128),
        "Isospectral": (4, 128 * 128),
        "Orthogonal": (4, 64 * 64),
        "SpecialLinear": (4, 128 * 128),
        "SpecialOrthogonal": (4, 64 * 64),
        "SpectralNorm": (4, 64 * 64),
        "Stiefel": (4, 64 * 64),
        "UnitNorm": (8, 64 * 64),
        "WeightNorm": (16, 32 * 32),
        "WeightStandardization": (8, 64 * 64),
    },
}

ELSEWHERE_UP_TO = 256 * 256
"""Where a kind of device was not measured, what pays on a CPU is stacked up to this size.

It was not measured, but reasoned. A call costs an accelerator more than a CPU, some 5 microseconds
for each kernel, and the maps that pay on a CPU have many. At 256 x 256 most of these kernels take
less than that, so that calls are what counts; to copy a stack and take it apart moves four times
256 KiB a leaf, less than a microsecond. Beyond, one leaf alone is work enough, and PyTorch's
batched factorisations are slower than those of one matrix.
"""


def measured(name: str, kind: str) -> Stacks | None:
    """Find what the transform of this name gains on a kind of device; None where nothing."""
    if kind in MEASURED:
        return MEASURED[kind].get(name)
    near = MEASURED["cpu"].get(name)
    return near and (near[0], max(near[1], ELSEWHERE_UP_TO))
