"""The benchmark for GPUs runs, tiny, on a CPU."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from tests.effort import thorough

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SLOW = {"maml", "compiled", "ensemble"}


@pytest.fixture(scope="module")
def benchmark():
    before, threads = set(sys.modules), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("on_cuda")
    torch.set_num_threads(threads)
    for path in BENCHMARKS.glob("*.py"):
        if path.stem not in before:
            sys.modules.pop(path.stem, None)


def test_it_runs_and_writes(benchmark, tmp_path):
    parts = [name for name in benchmark.PARTS if thorough() or name not in SLOW]
    arguments = ["--device", "cpu", "--quick", "--out", str(tmp_path), "--only", *parts]
    assert not benchmark.main(arguments)
    page = (tmp_path / "cuda.md").read_text(encoding="utf-8")
    assert f"torch {torch.__version__}" in page
    for name in parts:
        assert f"**{benchmark.PARTS[name][0]}**" in page
    figures = json.loads((tmp_path / "cuda.json").read_text(encoding="utf-8"))
    assert figures["parts"].keys() == set(parts)
    assert figures["cut"] == []
    for row in figures["parts"]["step"]:
        assert all(len(rounds) == 2 for rounds in row["seconds"].values())


def test_what_there_is_no_time_for_is_said(benchmark, tmp_path):
    benchmark.main(["--device", "cpu", "--quick", "--seconds", "0", "--out", str(tmp_path)])
    page = (tmp_path / "cuda.md").read_text(encoding="utf-8")
    titles = ", ".join(title for title, *_ in benchmark.PARTS.values())
    assert f"Cut short, since the time was up: {titles}." in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_device_it_says_so(benchmark, tmp_path, capsys):
    assert not benchmark.main(["--out", str(tmp_path / "none")])
    assert "No CUDA device here" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_what_fails_is_told_and_the_others_are_measured(benchmark, tmp_path, monkeypatch):
    def failing(quick):
        raise RuntimeError("no kernel image\nfor the device")

    monkeypatch.setitem(benchmark.PARTS, "maps", ("Maps", failing, []))
    arguments = ["--device", "cpu", "--quick", "--out", str(tmp_path), "--only", "maps", "binding"]
    assert benchmark.main(arguments)
    page = (tmp_path / "cuda.md").read_text(encoding="utf-8")
    assert "Maps ended with an error: `RuntimeError: no kernel image`." in page
    assert "**Binding**" in page


def test_losses_are_told(benchmark):
    run = benchmark.Run("cpu", quick=True, seconds=0)
    times = {"PyTorch": [1.0, 1.0], "funcparam": [2.0, 2.0], "shell": [0.5, 0.5]}
    run.figures["maps"] = [{"case": {"map": "cayley", "n": 8}, "seconds": times}]
    assert list(benchmark.losses(run)) == ["maps, cayley, 8: PyTorch / funcparam is 0.50"]
