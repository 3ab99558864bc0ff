"""A failure at each call that an operation makes leaves everything as it was."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import init

import funcparam.compat
from funcparam.compat import _ties
from funcparam.transforms import SpectralNorm
from tests.compat.parts import Double, Scaled, Sum, Symmetric, api, functions

TORCH = Path(torch.__file__).parent
WATCHED = tuple(
    map(
        str,
        (
            Path(funcparam.compat.__file__).parent,
            TORCH / "nn" / "modules" / "module.py",
            TORCH / "nn" / "modules" / "container.py",
            TORCH / "nn" / "parameter.py",
            TORCH / "nn" / "init.py",
            TORCH / "utils" / "__init__.py",
        ),
    )
)


def snapshot(module):
    tables = {
        key: dict(value) if isinstance(value, dict) else copy.copy(value)
        for key, value in vars(module).items()
    }
    values = {
        name: (id(t), t.detach().clone()) for name, t in module.state_dict(keep_vars=True).items()
    }
    children = {name: list(vars(m)) for name, m in module.named_modules()}
    return type(module), tables, values, children


def assert_unchanged(module, before):
    cls, tables, values, children = snapshot(module)
    assert cls is before[0]
    assert tables == before[1]
    assert children == before[3]
    assert values.keys() == before[2].keys()
    for name, (identity, value) in values.items():
        assert identity == before[2][name][0]
        assert torch.equal(value, before[2][name][1])


class BrokenError(Exception):
    pass


# Python itself runs these when something is deleted, and passes over what they raise.
UNRAISABLE = {"forget"}


def fails_anew(sites, operation):
    """Run an operation in which a call raises that is not among `sites`, to which it is added.

    Returns:
        Whether there was one.
    """
    outer = sys.gettrace()

    def trace(frame, event, _):
        code = frame.f_code
        site = code, frame.f_back.f_code, frame.f_back.f_lineno
        watched = event == "call" and code.co_filename.startswith(WATCHED)
        if watched and site not in sites and code.co_name not in UNRAISABLE:
            sites.add(site)
            raise BrokenError

    sys.settrace(trace)
    try:
        operation()
    except BrokenError:
        return True
    finally:
        sys.settrace(outer)
    return False


def plain():
    layer = nn.Linear(3, 3)
    layer(torch.ones(1, 3)).sum().backward()
    return layer


def with_parts(*parts):
    layer = plain()
    for part in parts:
        if isinstance(part, str):
            getattr(functions, part)(layer)
        else:
            api.register_parametrization(layer, "weight", part())
    return layer


def tied():
    layer, twin = plain(), nn.Linear(3, 3)
    twin.weight = layer.weight
    layer.known = [twin]  # kept alive, and not a child
    return layer


def shared():
    source, target = with_parts("orthogonal"), nn.Linear(3, 3)
    api.transfer_parametrizations_and_params(source, target)
    target.known = [source]
    return target


def target():
    layer = plain()
    layer.known = [with_parts("orthogonal")]
    return layer


def with_buffer():
    layer = plain()
    layer.register_buffer("buffer", torch.ones(3, 3))
    return layer


def register(name, part, **options):
    return lambda layer: api.register_parametrization(layer, name, part(), **options)


def remove(*, keep=True):
    return lambda layer: api.remove_parametrizations(layer, "weight", leave_parametrized=keep)


def assign(layer):
    layer.weight = torch.full((3, 3), 0.5)


OPERATIONS = {
    "register": (plain, register("weight", Double)),
    "register several": (plain, register("weight", Sum)),
    "register a buffer": (with_buffer, register("buffer", Double)),
    "register a transform": (plain, register("weight", SpectralNorm)),
    "register a function": (plain, register("bias", lambda: torch.tanh)),
    "register on one of two": (tied, register("weight", Symmetric)),
    "register beside": (lambda: with_parts("spectral_norm"), register("bias", Double)),
    "append": (lambda: with_parts(Double), register("weight", Scaled, unsafe=True)),
    "append a transform": (lambda: with_parts("spectral_norm"), register("weight", SpectralNorm)),
    "orthogonal": (plain, functions.orthogonal),
    "weight_norm": (plain, functions.weight_norm),
    "spectral_norm": (plain, functions.spectral_norm),
    "remove": (lambda: with_parts(Double, "spectral_norm"), remove()),
    "remove the value": (lambda: with_parts(Double), remove(keep=False)),
    "remove several": (lambda: with_parts("weight_norm"), remove()),
    "remove of two": (shared, remove()),
    "assign": (lambda: with_parts("orthogonal"), assign),
    "assign several": (lambda: with_parts(Sum), assign),
    "reset": (lambda: with_parts("orthogonal"), lambda layer: layer.reset_parameters()),
    "initialise": (
        lambda: with_parts("orthogonal", "spectral_norm"),
        lambda layer: init.ones_(layer.weight),
    ),
    "transfer": (
        target,
        lambda layer: api.transfer_parametrizations_and_params(layer.known[0], layer),
    ),
}


@pytest.mark.parametrize("swap", [False, True], ids=["set", "swap"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_failure_at_any_call_leaves_everything_as_it_was(name, swap, monkeypatch):
    make, operation = OPERATIONS[name]
    monkeypatch.setattr(_ties, "_owners", lambda _: iter(()))  # looks through all objects
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        with funcparam.compat.installed():
            torch.manual_seed(0)
            layer = make()
            others = getattr(layer, "known", [])
            gradients = {path: p.grad for path, p in layer.named_parameters()}
            before = [snapshot(module) for module in (layer, *others)]
            sites = set()
            while fails_anew(sites, lambda: operation(layer)):
                for module, one in zip((layer, *others), before, strict=True):
                    assert_unchanged(module, one)
                assert all(p.grad is gradients[path] for path, p in layer.named_parameters())
            assert len(sites) > 5
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_a_load_that_fails_leaves_class_and_hooks_as_they_were():
    layer = with_parts("weight_norm")
    old = {"weight_g": torch.ones(3, 1), "weight_v": torch.eye(3), "bias": torch.zeros(3)}
    cls, hooks = type(layer), dict(layer._load_state_dict_pre_hooks)
    for bad in ({"weight_g": torch.ones(4, 1)}, {"nothing": torch.ones(1)}):
        with pytest.raises(RuntimeError, match=r"loading state_dict for ParametrizedLinear"):
            layer.load_state_dict({**old, **bad})
        assert type(layer) is cls
        assert layer._load_state_dict_pre_hooks == hooks
    layer.load_state_dict(dict(old))
    assert torch.equal(layer.weight.detach(), torch.eye(3))
