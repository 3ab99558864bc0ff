"""Parametrized weights as pure functions over a parameter dictionary."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from funcparam import transforms
from funcparam._call import ParametrizedCall, recompute
from funcparam._functional_call import FunctionalCall, functional_call
from funcparam._module import Parametrized, fold
from funcparam._parametrization import Parametrization
from funcparam._parametrize import parametrize
from funcparam._trainable import trainable
from funcparam.transforms import Transform, transform

if TYPE_CHECKING:
    from funcparam import checkpoint

__all__ = [
    "FunctionalCall",
    "Parametrization",
    "Parametrized",
    "ParametrizedCall",
    "Transform",
    "checkpoint",
    "fold",
    "functional_call",
    "parametrize",
    "recompute",
    "trainable",
    "transform",
    "transforms",
]


if not TYPE_CHECKING:  # a type checker would take any name for one that is there

    def __getattr__(name: str) -> Any:
        if name == "checkpoint":  # few programs need it, and it takes a third of the import
            return import_module("funcparam.checkpoint")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
