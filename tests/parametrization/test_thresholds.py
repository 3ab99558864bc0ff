"""What is kept of a measurement of stacks, by benchmarks/thresholds.py."""

import importlib
import sys
from pathlib import Path

import pytest

import funcparam.transforms
from funcparam.transforms.contract.stacks import MEASURED

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def thresholds():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("thresholds")
    for name in ("thresholds", "_timing"):
        sys.modules.pop(name, None)


def rows(gains, name="WeightNorm"):
    """Gains of 4, 8 and 16 leaves for each size."""
    return [
        {"transform": name, "n": n, "leaves": leaves, "gain": gain}
        for n, own in gains.items()
        for leaves, gain in zip((4, 8, 16), own, strict=True)
    ]


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ({16: (1.9, 3.0, 4.2), 32: (1.0, 1.2, 1.3), 64: (1.0, 1.0, 0.9)}, (4, 32 * 32)),
        ({16: (0.7, 1.0, 1.3), 32: (0.7, 1.1, 1.2), 64: (0.6, 0.8, 0.9)}, (8, 32 * 32)),
        ({16: (0.4, 0.6, 1.5), 32: (0.4, 0.6, 0.9)}, (16, 16 * 16)),
        ({16: (0.4, 0.6, 0.8), 32: (2.0, 2.0, 2.0)}, None),
    ],
)
def test_decided(thresholds, gains, expected):
    assert thresholds.decided(rows(gains)) == expected


def test_a_device_is_written_and_the_others_stay(thresholds):
    source = thresholds.KEPT.read_text(encoding="utf-8")
    found = rows({16: (2.0, 3.0, 4.0), 32: (0.5, 0.5, 0.5)})
    found += rows({16: (9.0, 9.0, 9.0)}, "WeightNorm(dim=1)")
    found += rows({16: (0.1, 0.1, 0.1)}, "Mask")
    for device, others in (("cuda", {"cpu"}), ("cpu", set())):
        space = {}
        exec(thresholds.written(source, found, device, "a card"), space)
        assert space["MEASURED"][device] == {"WeightNorm": (4, 16 * 16)}
        assert set(space["MEASURED"]) == {device} | others
    space = {}
    twice = thresholds.written(source, found, "cuda", "a card")
    exec(thresholds.written(twice, found, "cuda", "a card"), space)
    assert space["MEASURED"] == {**MEASURED, "cuda": {"WeightNorm": (4, 16 * 16)}}


def test_what_was_measured_is_there():
    names = {name for own in MEASURED.values() for name in own}
    assert names <= set(funcparam.transforms.__all__)


def test_a_measurement(thresholds):
    thresholds.SIZES = {"cpu": (4, 8)}
    figures, table = thresholds.report(("WeightNorm",), quick=True)
    assert len(figures) == 6
    assert "| `WeightNorm` |" in table
    assert "from 16, to 32 x 32" in table
