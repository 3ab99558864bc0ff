"""One program, run as it is and with compat installed, and what differs in its notes."""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

PROGRAMS = Path(__file__).parent / "programs"
OVERLAY = "transformers4"  # a folder of programs, and what is laid over the environment for them
CLOSE = 1e-3  # relative to the largest entry; training amplifies the rounding of the two sides


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    package: str
    version: str
    what: str
    torch: str
    compat: str
    equal: str

    @property
    def failed(self) -> bool:
        return not self.equal.startswith(("yes", "not "))


def run_program(path: Path, overlay: Path) -> Row:
    package, _, what = path.read_text().split('"""')[1].replace("\n", " ").partition(": ")
    search = [str(overlay)] if path.parent.name == OVERLAY else []
    found = installed_version(package, search)
    if found is None:
        return Row(package, "", what, "", "", "not installed")
    sides = [_notes(path, search, start) for start in ([], ["-m", "funcparam.compat"])]
    words = [_count(notes) for notes in sides]
    return Row(package, found, what, *words, difference(*sides))


def _count(notes: list | str) -> str:
    if isinstance(notes, str):
        return notes
    errors = sum(label.endswith(" raises") for label, _ in notes)
    return f"{len(notes) - errors} values" + f", {errors} errors" * bool(errors)


def installed_version(package: str, search: list[str]) -> str | None:
    """The version of a package, looked for in `search` first."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=_environment(search)
    )
    return done.stdout.strip() if done.returncode == 0 else None


def _environment(search: list[str]) -> dict[str, str]:
    """No network, one thread, and the checkout's funcparam."""
    root = str(PROGRAMS.parents[2])
    paths = [*search, root, str(PROGRAMS), *filter(None, [os.environ.get("PYTHONPATH")])]
    quiet = {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **quiet, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def _notes(path: Path, search: list[str], start: list[str]) -> list | str:
    """What the program noted down, or the last line of its error."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "notes.pt"
        done = subprocess.run(
            [sys.executable, *start, str(path)],
            cwd=folder,
            env={**_environment(search), "ECOSYSTEM_NOTES": str(file)},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            print(f"{path.stem}:\n{done.stderr[-3000:]}", file=sys.stderr, flush=True)
            return (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        kept = torch.load(file)
        assert kept["by"] == ("funcparam" if start else "torch"), kept["by"]
        return kept["notes"]


def difference(theirs: list | str, ours: list | str) -> str:
    if isinstance(theirs, str) or isinstance(ours, str):
        return "no: it fails"
    largest = 0.0
    for (label, expected), (other, value) in zip(theirs, ours, strict=False):
        if label != other or type(expected) is not type(value):
            return f"no: {label!r} against {other!r}"
        if isinstance(expected, str):
            if expected != value:
                return f"no: {label}: {expected!r} against {value!r}"
        else:
            apart = _relative(torch.as_tensor(expected), torch.as_tensor(value))
            if not apart <= CLOSE:
                return f"no: {label} differs by {apart:.1e}"
            largest = max(largest, apart)
    if len(theirs) != len(ours):
        return f"no: {len(theirs)} values against {len(ours)}"
    return f"yes, to {largest:.0e}" if largest else "yes, exactly"


def _relative(expected: torch.Tensor, value: torch.Tensor) -> float:
    if expected.shape != value.shape or expected.dtype != value.dtype:
        return float("inf")
    if torch.equal(expected, value) or expected.numel() == 0:
        return 0.0
    a, b = (x.to(torch.complex128 if x.is_complex() else torch.double) for x in (expected, value))
    both = a.isnan() & b.isnan()
    a, b = a.masked_fill(both, 0), b.masked_fill(both, 0)
    return ((a - b).abs().max() / a.abs().max().clamp(min=1e-6)).item()
