"""The own tests of packages, run with torch and with compat by the pytest plugin."""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.conformance import WORSE, outcomes
from tests.ecosystem.compare import Row, installed_version


@dataclass(frozen=True)
class Suite:
    """Tests of a package: which, and how they are chosen.

    Args:
        package: its name.
        paths: files or folders of tests, in its sdist or in a checkout of it.
        options: for pytest.
    """

    package: str
    paths: tuple[str, ...]
    options: tuple[str, ...] = ()


SUITES = [
    Suite("deel-torchlip", ("tests",)),
    Suite(
        "orthogonium",
        tuple(f"tests/test_{name}.py" for name in ("aol", "rko", "ortho_linear", "sll")),
    ),
    Suite(
        "peft",
        ("tests/test_custom_models.py",),
        ("-k", "nn.Parameter or MoE or Expert or target_parameters"),
    ),
    Suite("geotorch", ("test",)),
    Suite("brevitas", ("tests/brevitas/graph/test_equalization.py",), ("-k", "rotat or param")),
    Suite(
        "torchao",
        tuple(
            f"test/prototype/test_{name}.py"
            for name in ("parametrization", "sparsifier", "structured_sparsifier")
        ),
    ),
]


def run_suite(suite: Suite, checkouts: Path | None) -> Row:
    """One row of the table; `checkouts` has a folder for each package, where it has no sdist."""
    found = installed_version(suite.package, [])
    what = f"its own tests: {', '.join(suite.paths)} {' '.join(suite.options)}".strip()
    if found is None:
        return Row(suite.package, "", what, "", "", "not installed")
    with tempfile.TemporaryDirectory() as folder:
        root = _tests_of(suite, found, Path(folder), checkouts)
        if root is None:
            return Row(suite.package, found, what, "", "", "not run: its sdist has no tests")
        theirs, ours = (_run(suite, root, compat=compat) for compat in (False, True))
    worse = [name for name, kind in theirs.items() if (kind, ours.get(name)) in WORSE]
    equal = f"no: {', '.join(worse[:3])}" if worse else "yes"
    if "passed" not in theirs.values():
        equal = "no: none of them passes with torch"
    return Row(suite.package, found, what, _count(theirs), _count(ours), equal)


def _tests_of(suite: Suite, version: str, folder: Path, checkouts: Path | None) -> Path | None:
    """What has the tests, in `folder`: a copy of a checkout, or the package's sdist, unpacked."""
    if checkouts is not None and (checkouts / suite.package).exists():
        shutil.copytree(checkouts / suite.package, folder / suite.package)
    else:
        _download(f"{suite.package}=={version}", folder)
    found = [path for path in folder.iterdir() if (path / suite.paths[0]).exists()]
    for root in found:  # else `tests` would be funcparam's, of which there is a package
        (root / Path(suite.paths[0]).parts[0] / "__init__.py").touch()
    return found[0] if found else None


def _download(requirement: str, folder: Path) -> None:
    """Unpack the sdist, if there is one."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:"]
    wanted = [requirement, "--no-build-isolation", "--dest", str(folder)]
    subprocess.run([*command, *wanted], capture_output=True)
    for archive in folder.glob("*.tar.gz"):
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")


def _run(suite: Suite, root: Path, *, compat: bool) -> dict[str, str]:
    """What became of each test."""
    plugin = ["-p", "funcparam.compat.pytest_plugin"] if compat else []
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "-c", "/dev/null", f"--rootdir={root}", f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", *options, *plugin, *suite.options]
        checkout = str(Path(__file__).parents[2])
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join([str(root), checkout]),
        }
        done = subprocess.run(
            [*command, *suite.paths], cwd=root, env=environment, capture_output=True, text=True
        )
        if not report.exists():
            print(done.stdout[-3000:], done.stderr[-3000:], file=sys.stderr)
            return {}
        return dict(outcomes(report))


def _count(found: dict[str, str]) -> str:
    kinds = sorted(set(found.values()))
    return ", ".join(f"{list(found.values()).count(kind)} {kind}" for kind in kinds)
