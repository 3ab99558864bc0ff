"""The committed certificate: a row for every transform, every cell a count, yes, or a reason."""

from pathlib import Path

import pytest

from tests.cases import CASES
from tests.certificate import LAWS, NOT_RUN, TITLES, cell, title

PAGE = Path(__file__).parent.parent / "docs" / "certificate.md"
HEAD, _, *ROWS = [
    [part.strip() for part in line.strip("|\n").split(" | ")]
    for line in PAGE.read_text().splitlines()
    if line.startswith("|")
]


def test_it_has_a_row_for_every_case_and_a_column_for_every_law():
    missing = {f"`{title(case)}`" for case in CASES} - {name for name, *_ in ROWS}
    assert not missing, "`make certificate` writes the page anew"
    assert ["transform", *TITLES.values(), "complex"] == HEAD


def test_every_file_of_laws_has_a_column():
    assert {path.stem for path in LAWS.glob("test_*.py")} == TITLES.keys()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_no_cell_is_empty_or_a_failure(row):
    _, *cells = row
    assert len(cells) == len(HEAD) - 1
    for text in cells:
        says_why = text.startswith("no: ") and len(text) > 8
        assert says_why or text == "yes" or int(text) > 0


def test_a_law_that_did_not_run_is_a_failure():
    assert cell({}) == NOT_RUN
    assert cell({"passed": 3}) == "3"
    assert cell({"passed": 3, "failed": 1}) == "**1 fail**"
