"""Run the contract suite as a report: the matrix transform x law, as Markdown.

    python -m tests.certificate docs/certificate.md

A cell counts the tests that passed, over shapes and dtypes. A law that a transform does not have
says why; anything that fails is named, and the exit code is 1.
"""

import argparse
import sys
from collections import Counter, defaultdict
from pathlib import Path

import optree
import pytest
import torch

from funcparam.parametrization.inspect import spelt
from tests.cases import CASES, raw_and_state

LAWS = Path(__file__).parent / "laws"
TITLES = {
    "test_static": "static",
    "test_purity": "pure",
    "test_round_trip": "round trip",
    "test_vmap": "vmap",
    "test_grad": "derivatives",
    "test_log_det": "log-det",
    "test_compile": "compile",
    "test_export": "export",
    "test_meta": "meta",
    "test_dtypes": "dtypes",
    "test_sync": "no waiting",
    "test_project": "projection",
    "test_refresh": "refresh",
    "test_transport": "transport",
    "test_average": "averages",
}


NOT_RUN = "**not run**"


class Counting:
    """A pytest plugin that counts outcomes by transform and law; see laws/conftest.py."""

    def __init__(self):
        self.outcomes = defaultdict(Counter)

    def pytest_runtest_logreport(self, report):
        row = dict(report.user_properties).get("row")
        if report.when == "call" and row:
            self.outcomes[row, Path(report.fspath).stem][report.outcome] += 1


def cell(outcomes):
    if set(outcomes) - {"passed"}:
        return f"**{outcomes['failed']} fail**"
    return str(outcomes["passed"]) if outcomes else NOT_RUN


def why_no_log_det(case):
    """The reason that the transform itself gives, or None if it has a determinant."""
    raw, state = raw_and_state(case, case.shapes[0])
    try:
        case.transform.log_abs_det_jacobian(raw, state)
    except NotImplementedError as error:
        return "no: " + str(error).split("log_abs_det_jacobian: ")[-1]
    return None


def why_no_complex(case):
    """The reason that complex values are refused, or None."""
    try:
        case.transform.check(torch.ones(case.shapes[0], dtype=torch.complex128))
    except ValueError:
        return "no: real values only"
    return None


def title(case):
    """The transform as one would write it, without arguments that are defaults."""
    return case.name or spelt(case.transform)


def matrix(outcomes):
    head = ["transform", *TITLES.values(), "complex"]
    yield "| " + " | ".join(head) + " |"
    yield "|---" * len(head) + "|"
    for case in CASES:
        cells = {stem: cell(outcomes[str(case), stem]) for stem in TITLES}
        cells["test_log_det"] = why_no_log_det(case) or cells["test_log_det"]
        row = [f"`{title(case)}`", *cells.values(), why_no_complex(case) or "yes"]
        yield f"| {' | '.join(row)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    counting = Counting()
    code = pytest.main(["-q", "--no-header", "-n", "auto", str(LAWS)], plugins=[counting])
    total = sum(sum(each.values()) for each in counting.outcomes.values())
    out.write_text(
        "---\nhide: [navigation, toc]\n---\n\n"
        "# The certificate\n\n"
        "Every transform against every law of the contract (see [concepts](concepts.md)): how many"
        " tests passed, over shapes and dtypes. `make certificate` writes this page. A law that a"
        " transform does not have says why. What waits for a device all the same is on"
        " [another page](devices.md).\n\n"
        f"{total} tests, torch {torch.__version__.split('+')[0]}, optree {optree.__version__}.\n\n"
        + "\n".join(matrix(counting.outcomes))
        + "\n"
    )
    return int(code) or int(NOT_RUN in out.read_text())


if __name__ == "__main__":
    sys.exit(main())
