"""Parametrized weights as pure functions over a parameter dictionary."""

from funcparam import transforms
from funcparam._module import Parametrized, fold
from funcparam._parametrization import Parametrization, parametrize
from funcparam.transforms import Transform, transform

__all__ = [
    "Parametrization",
    "Parametrized",
    "Transform",
    "fold",
    "parametrize",
    "transform",
    "transforms",
]
