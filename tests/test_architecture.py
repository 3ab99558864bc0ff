"""The layers: who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import funcparam
import funcparam.transforms

ROOT = Path(funcparam.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
NAMED = set(funcparam.transforms.__all__) - {
    "Transform",
    "State",
    "Raw",
    "AnyTransform",
    "transform",
}


def imports(path):
    """The (module, name) pairs that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)


def ids(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_layers(path):
    layer = path.relative_to(ROOT).parts[0]
    for module, name in imports(path):
        if module.split(".")[0] == "optree":
            assert layer == "_tree.py", "optree stays behind _tree.py"
        if not module.startswith("funcparam"):
            continue
        if layer == "transforms":
            assert module.startswith("funcparam.transforms"), "transforms know no dictionary"
        if layer != "compat":
            assert not module.startswith("funcparam.compat"), "the core does not know compat"
        if layer not in ("transforms", "compat", "__init__.py"):
            assert name not in NAMED, "the core knows no named transform"


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_no_mutable_module_state(path):
    if path.name == "_classes.py":  # the one cache of compat
        return
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and not ast.unparse(node.targets[0]).startswith("__"):
            assert not isinstance(node.value, ast.Dict | ast.List | ast.Set | ast.DictComp)


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_files_hold_one_idea(path):
    assert len(path.read_text().splitlines()) <= 450


def test_import_is_light_and_leaves_torch_alone():
    code = (
        "import sys, torch\n"
        "from torch.nn.utils import parametrize\n"
        "before = dict(vars(parametrize)), torch.get_default_dtype(), torch.is_grad_enabled()\n"
        "loaded = set(sys.modules)\n"
        "import funcparam\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - loaded}\n"
        "assert before == (dict(vars(parametrize)), torch.get_default_dtype(), True)\n"
        "assert not new & {'scipy', 'sklearn', 'matplotlib', 'tqdm', 'rich'}, new\n"
        "assert 'torch._dynamo' not in sys.modules or 'torch._dynamo' in loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_transform_is_a_row_of_the_table():
    from tests.cases import CASES

    def kinds(transform):
        yield type(transform).__name__
        for part in getattr(transform, "parts", ()):
            yield from kinds(part)

    covered = {kind for case in CASES for kind in kinds(case.transform)}
    public = {
        name
        for name in funcparam.transforms.__all__
        if isinstance(getattr(funcparam.transforms, name), type)
        and issubclass(getattr(funcparam.transforms, name), funcparam.Transform)
    }
    assert public - covered == {"Transform"}
