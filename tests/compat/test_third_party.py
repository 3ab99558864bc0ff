"""Programs on libraries that use torch's parametrizations, unchanged, under the runner."""

from pathlib import Path

import pytest

from tests.processes import python

PROGRAMS = sorted((Path(__file__).parent / "third_party").glob("*.py"))


def losses(*command):
    return [float(line) for line in python(*command).splitlines()]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_it_trains_as_with_torch(program):
    expected = losses(program)
    assert len(expected) >= 4
    assert expected[-2] < expected[0]
    assert losses("-m", "funcparam.compat", program) == pytest.approx(expected, rel=1e-4, abs=1e-6)
