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
            assert layer == "_nested.py", "optree stays behind _nested.py"
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


def fresh(code):
    """Run code in a new interpreter."""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_is_light():
    fresh(
        "import sys, torch\n"
        "loaded = set(sys.modules)\n"
        "import funcparam\n"
        "new = set(sys.modules) - loaded\n"
        "first = {m.split('.')[0] for m in new}\n"
        "assert first <= {'funcparam', 'typing_extensions'}, first\n"
        "own = {m for m in new if m.startswith('funcparam')}\n"
        "funcparam.parametrize(torch.nn.Linear(1, 1), [])\n"
        "assert loaded | new >= {m for m in sys.modules if m.startswith('optree')}\n"
        "assert not [m for m in own if 'compat' in m or 'checkpoint' in m], own\n"
        "files = {'_base', '_function', '_linalg', '_precision', '_signature'}\n"
        "transforms = {m.split('.')[2] for m in own if m.startswith('funcparam.transforms.')}\n"
        "assert transforms <= files, transforms\n"
    )


def test_import_leaves_torch_alone():
    fresh(
        "import random, torch\n"
        "from torch.nn.utils import parametrizations, parametrize\n"
        "def state():\n"
        "    return [\n"
        "        *(dict(vars(x)) for x in (parametrize, parametrizations, torch.nn.Module)),\n"
        "        torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(),\n"
        "        torch.get_rng_state().tolist(), random.getstate(),\n"
        "        torch.are_deterministic_algorithms_enabled(), torch.get_num_threads(),\n"
        "        torch.get_num_interop_threads(), torch.get_float32_matmul_precision(),\n"
        "        torch.is_anomaly_enabled(), torch.is_inference_mode_enabled(),\n"
        "        torch.is_autocast_enabled('cpu'), torch._C._get_flash_sdp_enabled(),\n"
        "        torch.backends.mkldnn.enabled, torch.multiprocessing.get_sharing_strategy(),\n"
        "    ]\n"
        "before = state()\n"
        "import funcparam, funcparam.compat\n"
        "from funcparam.transforms import *\n"
        "funcparam.checkpoint.explain({})\n"
        "assert state() == before\n"
    )


def test_names_that_are_imported_late_are_what_they_say():
    for name in funcparam.transforms.__all__:
        found = getattr(funcparam.transforms, name)
        assert getattr(found, "__name__", name) in (name, "Union", "Mapping", "Transform"), name
    assert set(dir(funcparam.transforms)) == set(funcparam.transforms.__all__)
    for module in (funcparam, funcparam.transforms):
        with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute"):
            _ = module.Orthagonal


def test_everything_is_reached_from_the_package():
    fresh(
        "import funcparam as fp\n"
        "with fp.compat.installed(): pass\n"
        "assert fp.checkpoint.read\n"
        "assert fp.__version__ == '0.1.0'\n"
        "assert dir(fp) == sorted([*fp.__all__, '__version__']), dir(fp)\n"
        "from funcparam import *\n"
        "assert compat is fp.compat\n"
    )


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
