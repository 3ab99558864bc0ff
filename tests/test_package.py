"""What is built: the wheel and the sdist, what is in them, and that the wheel works by itself."""

import email
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    for kind in ("sdist", "wheel"):
        code = f"import hatchling.build, sys; hatchling.build.build_{kind}(sys.argv[1])"
        subprocess.run([sys.executable, "-c", code, out], cwd=ROOT, check=True)
    return out


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    info = "funcparam-0.1.0.dist-info/"
    assert {name.split("/")[0] + "/" for name in names} == {"funcparam/", info}
    assert {"funcparam/py.typed", f"{info}licenses/LICENSE"} <= set(names)
    source = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "funcparam").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if name.startswith("funcparam/")} == source


def test_the_wheel_asks_for_two_libraries(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata = email.message_from_bytes(archive.read("funcparam-0.1.0.dist-info/METADATA"))
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    names = {re.match(r"[\w-]+", line)[0] for line in required}
    assert names == {"torch", "optree", "typing-extensions"}
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert metadata["Requires-Python"] == ">=3.10"
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert {"safetensors", "rich", "plot"} <= set(metadata.get_all("Provides-Extra"))


def test_the_wheel_works_without_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import torch, funcparam as fp\n"
        "from funcparam import compat\n"
        "from funcparam.transforms import Orthogonal\n"
        "net = torch.nn.Linear(4, 4)\n"
        "p = fp.parametrize(net, {'weight': Orthogonal()})\n"
        "assert p.violation(p(*p.init(net)))['weight'] < 1e-5\n"
        "print(fp.__file__)\n"
    )
    # -P: what stands in the working directory is not on the path
    command = [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, 'site')\n{code}"]
    run = subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, text=True)
    assert Path(run.stdout.strip()).is_relative_to("site") or str(tmp_path) in run.stdout


def test_the_sdist_can_be_tested_and_documented(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert {
        "pyproject.toml",
        "LICENSE",
        "README.md",
        "Makefile",
        "constraints.txt",
        "mkdocs.yml",
        "noxfile.py",
        "tests/cases.py",
        "docs/index.md",
        "examples/quickstart.py",
        "funcparam/py.typed",
    } <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith(".venv")]
