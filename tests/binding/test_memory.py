"""How many bytes a step takes, beside PyTorch's module: counted, not timed."""

import importlib
from pathlib import Path

import pytest
import torch

N, BATCH = 384, 16


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("memory")


@pytest.mark.parametrize(
    ("kind", "layers", "most"),
    [("weight_norm", 12, 0.3), ("spectral_norm", 12, 0.45), ("cayley", 4, 0.4)],
)
def test_peak_beside_torch(memory, kind, layers, most):
    rows = memory.measure(kind, N, layers, BATCH)
    theirs, plain, recomputed = rows
    assert [row["side"] for row in rows] == ["torch", "funcparam", "recompute"]
    assert recomputed["training"] <= most * theirs["training"]
    for ours in (plain, recomputed):
        assert ours["evaluation"] <= 1.01 * theirs["evaluation"]
        assert ours["raw"] == theirs["raw"]
    assert plain["training"] <= 1.1 * theirs["training"]


def test_peak_counts_what_lives_at_one_time(memory):
    def function():
        a = torch.ones(100)
        b = a + 1
        del a
        (b.view(10, 10) * 2).sum()

    assert memory.peak(function) == 804
