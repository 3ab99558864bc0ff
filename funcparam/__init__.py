"""Parametrized weights as pure functions over a parameter dictionary."""

from funcparam import checkpoint, transforms
from funcparam._functional_call import FunctionalCall, functional_call
from funcparam._module import Parametrized, fold
from funcparam._parametrization import Parametrization, parametrize
from funcparam.transforms import Transform, transform

__all__ = [
    "FunctionalCall",
    "Parametrization",
    "Parametrized",
    "Transform",
    "checkpoint",
    "fold",
    "functional_call",
    "parametrize",
    "transform",
    "transforms",
]
