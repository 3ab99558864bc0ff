"""Putting compat in the place of torch's modules, and taking it out again."""

import os
import subprocess
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations as torch_functions
from torch.nn.utils import parametrize as torch_api
from torch.testing import assert_close

from funcparam import compat
from funcparam.compat import parametrizations, parametrize
from funcparam.compat.__main__ import main
from tests.compat.parts import Double
from tests.processes import python


def everything():
    """All names of all of torch's modules that are torch's parametrization functions."""
    names = {*torch_api.__all__, *torch_functions.__all__}
    return {
        (path, name): vars(module).get(name)
        for path, module in list(sys.modules.items())
        if path.split(".")[0] == "torch" and hasattr(module, "__dict__")
        for name in names
    }


def test_uninstalling_restores_torch_exactly():
    import torch.ao.quantization  # noqa: F401  (imports the functions by name)

    before = everything()
    modules = dict(vars(torch_api)), dict(vars(torch_functions))
    with compat.installed():
        assert torch_functions.orthogonal is parametrizations.orthogonal
        assert torch_api.cached is parametrize.cached
        quantize = sys.modules["torch.ao.quantization.quantize"]
        assert quantize.type_before_parametrizations is parametrize.type_before_parametrizations
        assert vars(torch_api).keys() == modules[0].keys()
    assert everything() == before
    assert (dict(vars(torch_api)), dict(vars(torch_functions))) == modules


def test_nested_and_failing_blocks():
    original = torch_api.register_parametrization
    compat.install()
    with pytest.raises(RuntimeError, match="inside"), compat.installed():
        raise RuntimeError("inside")
    assert torch_api.register_parametrization is parametrize.register_parametrization
    compat.uninstall()
    assert torch_api.register_parametrization is original
    with pytest.raises(RuntimeError, match="not installed"):
        compat.uninstall()


def test_an_installation_whose_warning_is_an_error_changes_nothing(monkeypatch):
    late = types.ModuleType("late")
    late.weight_norm, late.ones_ = torch_functions.weight_norm, nn.init.ones_
    monkeypatch.setitem(sys.modules, "late", late)
    before = everything()
    with pytest.raises(UserWarning, match=r"late \(weight_norm\)\."):
        compat.install()
    assert everything() == before
    with pytest.raises(RuntimeError, match="not installed"):
        compat.uninstall()


def test_modules_that_torch_parametrized_before_go_on():
    layer = torch_functions.weight_norm(nn.Linear(3, 3))
    twin = torch_functions.weight_norm(nn.Linear(3, 3))
    value, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    with compat.installed():
        assert torch_api.is_parametrized(layer, "weight")
        assert_close(layer.weight.detach(), value)
        torch_api.register_parametrization(layer, "bias", Double())
        assert_close(layer.bias.detach(), bias)
        assert_close(layer.weight.detach(), value)
        layer.weight = value + 1
        assert_close(layer.weight.detach(), value + 1)
        torch_api.remove_parametrizations(layer, "weight")
        torch_api.remove_parametrizations(layer, "bias")
        assert type(layer) is nn.Linear
        assert_close(layer.weight.detach(), value + 1)
    assert twin.weight.shape == (3, 3)


def test_torchs_functions_refuse_to_change_a_class_that_instances_share():
    layer, sibling = (parametrizations.weight_norm(nn.Linear(3, 3)) for _ in range(2))
    with pytest.raises((AttributeError, TypeError, RuntimeError), match="funcparam.compat"):
        torch_api.remove_parametrizations(layer, "weight")
    with pytest.raises((AttributeError, TypeError, RuntimeError), match="funcparam.compat"):
        torch_api.register_parametrization(layer, "bias", Double())
    assert sibling(torch.ones(1, 3)).shape == (1, 3)
    assert sibling.weight.shape == (3, 3)


SCRIPT = """
import sys
from torch.nn.utils.parametrizations import weight_norm
print(weight_norm.__module__, sys.argv[1:], __name__)
"""


def test_running_a_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    out = python("-m", "funcparam.compat", script, "a", "-b")
    assert out.split("\n")[0] == "funcparam.compat.parametrizations ['a', '-b'] __main__"


def test_usage(monkeypatch, capsys):
    for asked in ("-h", "--help"):
        monkeypatch.setattr(sys, "argv", ["compat", asked])
        main()
        assert capsys.readouterr().out.startswith("usage: ")
    for wrong in ([], ["-m"], ["-x"]):
        monkeypatch.setattr(sys, "argv", ["compat", *wrong])
        with pytest.raises(SystemExit, match="^usage: "):
            main()


@pytest.mark.parametrize("what", ["nowhere.py", "-m nowhere", "-m nowhere.train", "-m os.nowhere"])
def test_what_is_not_there(what, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compat", *what.split()])
    try:
        with pytest.raises(SystemExit) as left:
            main()
    finally:
        if "-m" in what:
            compat.uninstall()
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("funcparam.compat: error: ")
    assert what.split()[-1] in error
    assert error.count("\n") == 1


def test_running_a_module(tmp_path):
    package = tmp_path / "pkg"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "other.py").touch()
    for name in ("train", "__main__"):
        (package / f"{name}.py").write_text(f"{SCRIPT}from . import other\nprint(sys.argv[0])\n")
    for module, file in [("pkg.train", "train.py"), ("pkg", "__main__.py")]:
        out = python("-m", "funcparam.compat", "-m", module, "a", "-b", cwd=tmp_path)
        first, path = out.splitlines()
        assert first == "funcparam.compat.parametrizations ['a', '-b'] __main__"
        assert path == str(package / file)


PACKAGE = "from torch.nn.utils.parametrizations import weight_norm as norm\n"


def run_pytest(folder, *options):
    base = ["-q", "-c", "/dev/null", f"--rootdir={folder}", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *base, *options, folder]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=folder, env=environment
    )


def test_the_pytest_plugin_comes_before_conftests(tmp_path):
    (tmp_path / "package.py").write_text(PACKAGE)
    (tmp_path / "conftest.py").write_text("import package\n")
    (tmp_path / "test_legacy.py").write_text(
        "import package\n"
        "from torch.nn.utils.parametrize import cached\n"
        "def test():\n"
        "    assert cached.__module__ == 'funcparam.compat._cache'\n"
        "    assert package.norm.__module__ == 'funcparam.compat.parametrizations'\n"
    )
    plugin = "funcparam.compat.pytest_plugin"
    done = run_pytest(tmp_path, "-W", "error", "-p", plugin, "-n", "1")  # a worker's as well
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_plugin_that_a_conftest_names_says_what_it_came_too_late_for(tmp_path):
    (tmp_path / "package.py").write_text(PACKAGE)
    conftest = "import package\npytest_plugins = ['funcparam.compat.pytest_plugin']\n"
    (tmp_path / "conftest.py").write_text(conftest)
    (tmp_path / "test_legacy.py").write_text(
        "from torch.nn.utils.parametrize import cached\n"
        "def test():\n    assert cached.__module__ == 'funcparam.compat._cache'\n"
    )
    done = run_pytest(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "package (weight_norm)" in done.stderr


def test_installing_warns_of_what_was_imported_by_name_before(monkeypatch):
    early = types.ModuleType("early_bird")
    early.norm = nn.utils.parametrizations.weight_norm
    early.hook = nn.utils.spectral_norm
    monkeypatch.setitem(sys.modules, "early_bird", early)
    with pytest.warns(UserWarning, match=r"early_bird \(spectral_norm, weight_norm\)"):
        compat.install()
    with compat.installed():  # it was said
        pass
    compat.uninstall()
