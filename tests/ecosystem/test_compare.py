"""That the run of real packages would see a difference, and pins what it runs."""

import re
from pathlib import Path

import pytest
import torch

from tests.ecosystem.__main__ import HELPERS, page, runs
from tests.ecosystem.compare import PROGRAMS, Row, difference

ONE = torch.ones(2)
FOLDER = Path(__file__).parent


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        ([("loss", ONE), ("keys", "a b")], "yes, exactly"),
        ([("loss", ONE * (1 + 1e-6)), ("keys", "a b")], "yes, to 1e-06"),
        ([("loss", ONE * 1.01), ("keys", "a b")], "no: loss differs by 1.0e-02"),
        ([("loss", ONE.double()), ("keys", "a b")], "no: loss differs by inf"),
        ([("loss", ONE[:1]), ("keys", "a b")], "no: loss differs by inf"),
        ([("loss", torch.nan * ONE), ("keys", "a b")], "no: loss differs by nan"),
        ([("loss", ONE), ("keys", "b a")], "no: keys: 'a b' against 'b a'"),
        ([("loss raises", "an error"), ("keys", "a b")], "no: 'loss' against 'loss raises'"),
        ([("loss", ONE)], "no: 2 values against 1"),
        ("ValueError: it fails", "no: it fails"),
    ],
)
def test_a_difference_is_seen(ours, said):
    assert difference([("loss", ONE), ("keys", "a b")], ours) == said
    assert Row("p", "1", "", "", "", said).failed == said.startswith("no")


def test_a_program_that_fails_on_both_sides_is_no_success():
    assert difference("ValueError: a", "ValueError: a") == "no: it fails"


def pinned():
    files = (FOLDER / f"{name}.txt" for name in ("constraints", "transformers4"))
    return {
        re.split("==", line)[0].lower().replace("_", "-")
        for file in files
        for line in file.read_text().splitlines()
    }


def test_what_runs_is_pinned():
    programs = [path for path in PROGRAMS.rglob("*.py") if path.stem not in HELPERS]
    packages = {path.read_text().split('"""')[1].partition(": ")[0] for path in programs}
    assert len(packages) >= 25
    assert packages <= pinned()
    names = {name for name, _ in runs(FOLDER, None)}
    assert {path.stem for path in programs} <= names
    assert names - {path.stem for path in programs} <= pinned()


def test_the_page():
    row = Row("pip", "1.0", "a | b", "3 values", "3 values", "yes, exactly")
    missing = Row("pep", "", "c", "", "", "not installed")
    text = page([row, missing])
    assert "1 runs of 1 packages" in text
    assert "| pip | 1.0 | a \\| b | 3 values | 3 values | yes, exactly |" in text
    assert text.index("| pep |") < text.index("| pip |")
