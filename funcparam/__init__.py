"""Parametrized weights as pure functions over a parameter dictionary."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from funcparam import transforms
from funcparam.binding.call import ParametrizedCall, recompute
from funcparam.binding.fold import fold
from funcparam.binding.functional_call import FunctionalCall, bound, functional_call
from funcparam.binding.module import Parametrized
from funcparam.binding.shells import shells, unshelled
from funcparam.parametrization.parametrization import Parametrization
from funcparam.parametrization.parametrize import parametrize
from funcparam.training.averages import average
from funcparam.training.groups import Groups, groups
from funcparam.training.moves import move
from funcparam.training.named import named, trainable
from funcparam.training.projection import project_after, relative_steps, tangent_before
from funcparam.transforms import Transform, transform

if TYPE_CHECKING:
    from funcparam import checkpoint, compat

    __version__: str

__all__ = [
    "FunctionalCall",
    "Groups",
    "Parametrization",
    "Parametrized",
    "ParametrizedCall",
    "Transform",
    "average",
    "bound",
    "checkpoint",
    "compat",
    "fold",
    "functional_call",
    "groups",
    "move",
    "named",
    "parametrize",
    "project_after",
    "recompute",
    "relative_steps",
    "shells",
    "tangent_before",
    "trainable",
    "transform",
    "transforms",
    "unshelled",
]


if not TYPE_CHECKING:  # a type checker would take any name for one that is there

    def __getattr__(name: str) -> Any:
        if name in ("checkpoint", "compat"):  # few programs need them, and they take their time
            return import_module(f"funcparam.{name}")
        if name == "__version__":
            return import_module("importlib.metadata").version("funcparam")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
