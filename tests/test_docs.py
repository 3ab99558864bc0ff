"""Every Python block of the README and the documentation runs, and prints what stands below it."""

import contextlib
import inspect
import io
import re
import sys
import types
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import funcparam as fp
from funcparam import compat

ROOT = Path(__file__).parent.parent

# A Python block, with the text block right below it, which is what it prints.
BLOCK = re.compile(
    r"^```python(?P<title>[^\n]*)\n(?P<code>.*?)^```$(?:\s*^```text\n(?P<printed>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)

PAGES = [
    page
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if BLOCK.search(page.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    text = page.read_text(encoding="utf-8")
    main = types.ModuleType("__main__")  # where the compiler looks for the names of a page
    monkeypatch.setitem(sys.modules, "__main__", main)
    for block in BLOCK.finditer(text):
        first = text.count("\n", 0, block.start("code"))
        code = compile("\n" * first + block["code"], str(page), "exec")
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            _run(code, vars(main), re.findall(r'title="pip install (.*)"', block["title"]))
        if block["printed"] is not None:
            where = f"{page.name}, the block at line {first + 1}"
            assert out.getvalue().rstrip() == block["printed"].rstrip(), where


def _run(code, names, installed):
    """Run a block; one that says what to install, where that is, and without its warnings."""
    packages = " ".join(installed).split()
    if all(map(find_spec, packages)):
        with warnings.catch_warnings():
            if packages:
                warnings.simplefilter("ignore")
            exec(code, names)


def test_pages_are_found():
    assert {"README.md", "index.md", "concepts.md", "gotchas.md"} <= {page.name for page in PAGES}


def test_readme_shows_what_the_quickstart_printed():
    printed = (ROOT / "docs" / "quickstart.txt").read_text(encoding="utf-8")
    assert printed.rstrip() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_public_name_is_documented():
    text = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md"))
    documented = re.findall(r"^::: funcparam\.((?:\w+\.)*\w+)$", text, re.MULTILINE)
    public = {
        *fp.__all__,
        *(f"transforms.{name}" for name in fp.transforms.__all__),
        *(f"checkpoint.{name}" for name in fp.checkpoint.__all__),
        *(f"compat.{name}" for name in compat.__all__),
        *(f"compat.hooks.{name}" for name in compat.hooks.__all__),
        *(f"compat.parametrize.{name}" for name in compat.parametrize.__all__),
        *(f"compat.parametrizations.{name}" for name in compat.parametrizations.__all__),
    }
    modules = {"transforms", "checkpoint", "compat"}
    modules |= {"compat.hooks", "compat.parametrize", "compat.parametrizations"}
    other_names = {"Transform", "transforms.transform"}  # each is documented under one of its two
    assert sorted(documented) == sorted(public - modules - other_names)


def test_the_readme_names_tests_that_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    cells = re.findall(r"\[`(\w+)`\]\((tests/\S+\.py)\)", readme)
    assert len(cells) > 15
    for name, path in cells:
        assert f"def test_{name}" in (ROOT / path).read_text(encoding="utf-8"), (name, path)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    """Those of the documentation are checked when it is built."""
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


# Each call in the table of transforms, with its row.
CALL = re.compile(r"^\| \[`(?P<call>(?P<name>\w+)\(.*?\))`\].*$", re.MULTILINE)
CALLS = list(CALL.finditer((ROOT / "docs" / "transforms.md").read_text(encoding="utf-8")))


def test_every_transform_is_in_the_tables():
    others = {"AnyTransform", "Raw", "State", "Transform", "full_precision"}
    public = sorted(set(fp.transforms.__all__) - others)
    assert sorted(row["name"] for row in CALLS) == public
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    box = readme[readme.index("## What is in the box") :]
    assert [name for name in public if f"`{name}`" not in box.replace("`fp.", "`")] == []


@pytest.mark.parametrize("row", CALLS, ids=lambda row: row["name"])
def test_calls_of_transforms_are_their_signatures(row):
    parameters = inspect.signature(getattr(fp.transforms, row["name"])).parameters
    bare = [parameter.replace(annotation=parameter.empty) for parameter in parameters.values()]
    signature = ", ".join(map(str, bare)).replace("'", '"')
    assert row["call"] == f"{row['name']}({signature})"
    if "map" in parameters:
        choices = re.findall(r"'(\w+)'", parameters["map"].annotation)
        assert choices
        assert all(f'"{choice}"' in row[0] for choice in choices)


@pytest.mark.parametrize("row", CALLS, ids=lambda row: row["name"])
def test_calls_of_transforms_construct(row):
    arguments = {
        "rank": 2,
        "blocks": 2,
        "lam": 0.5,
        "low": 0,
        "high": 1,
        "left": (2, 2),
        "dims": (1, 0),
        "in_shape": (4,),
        "out_shape": (2, 2),
        "parts": [fp.transforms.Identity(), fp.transforms.Identity()],
        "part": fp.transforms.Identity(),
        "size": 2,
        "block_size": 2,
        "entries": 2,
        "cap": 1.0,
        "rotation": "R",
        "fraction": 0.5,
        "format": "float8_e5m2",
        "forward": torch.exp,
        "constraint": torch.distributions.constraints.positive,
    }
    names = {name: getattr(fp.transforms, name) for name in fp.transforms.__all__}  # made lazily
    made = eval(row["call"], {**names, **arguments})
    assert isinstance(made, fp.Transform)
