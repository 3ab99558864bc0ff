"""The layers: who may import whom."""

import ast
import subprocess
import sys

import pytest

import funcparam
import funcparam.transforms
from tests.processes import python
from tests.rooms import FILES, ROOMS, ROOT, imports, module_of, picture, room

NAMED = set(funcparam.transforms.__all__) - {
    "Transform",
    "State",
    "Raw",
    "AnyTransform",
    "transform",
}


def ids(path):
    return str(path.relative_to(ROOT))


# Who may import whom. A room may always import itself, and `compat`, the top, everything.
CORE = {"transforms", "transforms.contract", "transforms.numerics"}
MAY_IMPORT = {
    "transforms.contract": set(),
    "transforms.numerics": {"transforms.contract"},
    "transforms": {"transforms.contract", "transforms.numerics"},
    "parametrization": CORE,
    "checkpoint": {*CORE, "parametrization"},
    "binding": {*CORE, "parametrization", "checkpoint"},
    "training": {*CORE, "parametrization"},
    "compat": {*CORE, "parametrization", "checkpoint", "binding"},
}


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_rooms(path):
    own = room(module_of(path))
    for module, name in imports(path):
        if module.split(".")[0] == "optree":
            assert path.name == "nested.py", "optree stays behind nested.py"
        if own is None or not module.startswith("funcparam"):
            continue
        other = room(f"{module}.{name}") or room(module)
        assert other or own == "compat", f"{own} imports the public face"
        assert other in {own, None} | MAY_IMPORT[own], f"{own} imports {other}"
        if own.split(".")[0] not in ("transforms", "compat"):
            assert name not in NAMED, "the core knows no named transform"


def test_each_room_says_what_lives_there():
    assert ROOMS.keys() == MAY_IMPORT.keys()
    for path in ROOMS.values():
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_the_picture_of_the_rooms_is_that_of_the_code():
    drawn = (ROOT.parent / "docs" / "rooms.svg").read_text(encoding="utf-8")
    assert drawn == picture(), "`make rooms` draws it anew"


def test_no_circles():
    """Not even of imports for type checkers only."""
    files = {module_of(path): path for path in FILES if path.name != "__init__.py"}
    left = {
        module: {m for pair in imports(path) for m in (pair[0], ".".join(pair)) if m in files}
        for module, path in files.items()
    }
    while done := [module for module, needs in left.items() if not needs & set(left)]:
        for module in done:
            del left[module]
    assert left == {}


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_no_mutable_module_state(path):
    """A table at module level is a `Mapping`, which type checkers let nobody write to."""
    if path.name == "_classes.py":  # the one cache of compat
        return
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and not ast.unparse(node.targets[0]).startswith("__"):
            assert not isinstance(node.value, MUTABLE), ast.unparse(node)
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, MUTABLE):
            assert ast.unparse(node.annotation).startswith("Mapping["), ast.unparse(node)


MUTABLE = ast.Dict | ast.List | ast.Set | ast.DictComp | ast.ListComp | ast.SetComp


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_public_dataclasses_are_frozen(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for decorator in map(ast.unparse, node.decorator_list):
                assert "dataclass" not in decorator or "frozen=True" in decorator, node.name


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_compilers_can_read_what_is_read_in_a_call(path):
    """Once a graph wrote to any dict they read no mapping proxy, nor what `x.__class__` is."""
    for node in ast.walk(ast.parse(path.read_text())):
        assert "MappingProxyType" not in (getattr(node, "id", ""), getattr(node, "attr", ""))
        if isinstance(node, ast.Compare):
            assert ".__class__" not in ast.unparse(node), ast.unparse(node)


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_files_hold_one_idea(path):
    assert len(path.read_text().splitlines()) <= 450


def test_import_is_light():
    code = (
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
        "families = {m for m in own if m.startswith('funcparam.transforms._')}\n"
        "assert not families, families\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_leaves_torch_alone():
    python(
        "-c",
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
        "assert state() == before\n",
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
    python(
        "-c",
        "import funcparam as fp\n"
        "with fp.compat.installed(): pass\n"
        "assert fp.checkpoint.read\n"
        "assert fp.__version__ == '0.1.0'\n"
        "assert dir(fp) == sorted([*fp.__all__, '__version__']), dir(fp)\n"
        "from funcparam import *\n"
        "assert compat is fp.compat\n",
    )


def test_every_transform_is_a_row_of_the_table():
    from tests.cases import CASES, TAKING

    def kinds(transform):
        yield type(transform).__name__
        for part in getattr(transform, "parts", ()):
            yield from kinds(part)

    covered = {kind for case in (*CASES, *TAKING) for kind in kinds(case.transform)}
    public = {
        name
        for name in funcparam.transforms.__all__
        if isinstance(getattr(funcparam.transforms, name), type)
        and issubclass(getattr(funcparam.transforms, name), funcparam.Transform)
    }
    assert public - covered == {"Transform"}
