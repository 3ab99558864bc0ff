"""CUDA for the tests that need it, and what stands for it on a CPU.

Where there is a device every row of the table is a test of its own; where there is none, all of
them are one that is skipped, and a few rows are tried on the CPU.
"""

from contextlib import contextmanager, nullcontext

import pytest
import torch

import funcparam.transforms.contract.base as base
from tests.cases import CASES
from tests.waiting import Waits

IS_HERE = torch.cuda.is_available()
_MARKS = [pytest.mark.cuda, pytest.mark.skipif(not IS_HERE, reason="no CUDA device here")]
CUDA = pytest.param("cuda", marks=_MARKS)


def on_devices(cases=CASES, *, few=12):
    """Parametrize a test by `device` and `case`: all on CUDA, a few on a CPU."""
    near = [pytest.param("cpu", case, id=f"cpu-{case}") for case in cases[:: len(cases) // few]]
    far = [pytest.param("cuda", case, marks=_MARKS, id=f"cuda-{case}") for case in cases]
    none = [pytest.param("cuda", None, marks=_MARKS, id="cuda")]
    return pytest.mark.parametrize(("device", "case"), near + (far if IS_HERE else none))


@contextmanager
def nothing_waits(device):
    """A block in which it is an error to wait for the device."""
    if device == "cpu":
        with pytest.MonkeyPatch.context() as patch, Waits() as waits:
            patch.setattr(base, "_AT_HAND", ())
            yield
        assert waits.found == set()
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(device, function):
    """The function as one CUDA graph, of which a call is a replay; as it is on a CPU."""
    if device == "cpu":
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function()

    def replay():
        graph.replay()
        return out

    return replay


def side_stream(device):
    """A block on another stream."""
    return nullcontext() if device == "cpu" else torch.cuda.stream(torch.cuda.Stream())


def finished(device):
    """Wait for all streams."""
    if device != "cpu":
        torch.cuda.synchronize()
