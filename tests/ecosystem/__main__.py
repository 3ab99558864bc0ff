"""Run real packages with torch's parametrizations and with compat's, and compare.

    python -m tests.ecosystem [--out docs/ecosystem.md] [--checkouts FOLDER] [NAME ...]

NAME picks programs of `programs/` and packages whose own tests run; the page then takes the other
rows from the last run. FOLDER has checkouts of packages, each under the package's name, for those
whose sdist has no tests.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from tests.ecosystem.compare import OVERLAY, PROGRAMS, Row, run_program
from tests.ecosystem.suites import SUITES, run_suite

HELPERS = {"notes", "networks"}
PAGE = Path(__file__).parent / "page.md"
LAST = Path("build/ecosystem.json")


def runs(overlay: Path, checkouts: Path | None) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Everything that can run, by name."""
    programs = [*PROGRAMS.glob("*.py"), *(PROGRAMS / OVERLAY).glob("*.py")]
    for path in sorted(programs, key=lambda path: path.stem):
        if path.stem not in HELPERS:
            yield path.stem, partial(run_program, path, overlay)
    for suite in SUITES:
        yield suite.package, partial(run_suite, suite, checkouts)


def table(found: list[Row]) -> str:
    """The rows in markdown."""
    lines = [
        "| package | version | what ran | torch | compat | equal |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(found, key=lambda row: (row.package.lower(), row.what)):
        cells = (row.package, row.version, row.what, row.torch, row.compat, row.equal)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def page(found: list[Row]) -> str:
    """The page of the documentation."""
    ran = [row for row in found if not row.equal.startswith("not ")]
    counts = f"{len(ran)} runs of {len({row.package for row in ran})} packages"
    return PAGE.read_text().format(counts=counts, torch=torch.__version__, table=table(found))


def kept() -> dict[str, Row]:
    """The rows of the last run."""
    if not LAST.exists():
        return {}
    return {name: Row(**row) for name, row in json.loads(LAST.read_text()).items()}


def keep(name: str, row: Row) -> None:
    """Add a row to those of the last run, or replace it there."""
    rows = {**kept(), name: row}
    LAST.parent.mkdir(exist_ok=True)
    LAST.write_text(json.dumps({name: asdict(row) for name, row in rows.items()}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.ecosystem",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*")
    parser.add_argument("--out", type=Path, help="the page to write")
    parser.add_argument("--overlay", type=Path, default=Path(sys.prefix) / OVERLAY)
    parser.add_argument("--checkouts", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    everything = dict(runs(arguments.overlay, arguments.checkouts))
    if unknown := set(arguments.names) - set(everything):
        parser.error(f"no such program or package: {sorted(unknown)}; got {sorted(everything)}")
    names = arguments.names or list(everything)
    if not arguments.names:
        LAST.unlink(missing_ok=True)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for name, row in zip(names, pool.map(lambda name: everything[name](), names), strict=True):
            print(f"{name}: {row.package} {row.version}: {row.equal}", flush=True)
            keep(name, row)
    found = {name: row for name, row in kept().items() if name in everything}
    if arguments.out:
        arguments.out.write_text(page(list(found.values())))
    if any(found[name].failed for name in names):
        sys.exit("torch and compat differ: see above")


if __name__ == "__main__":
    main()
