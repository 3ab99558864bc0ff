"""Transforms: pure maps from raw tensors to a weight, one family a file."""

from funcparam.transforms._base import AnyTransform, Raw, State, Transform
from funcparam.transforms._chain import Chain
from funcparam.transforms._frozen import Frozen
from funcparam.transforms._function import transform
from funcparam.transforms._interval import Interval, Positive
from funcparam.transforms._lora import LoRA
from funcparam.transforms._mask import Mask
from funcparam.transforms._norm import WeightNorm
from funcparam.transforms._orthogonal import Orthogonal, SpecialOrthogonal
from funcparam.transforms._precision import full_precision
from funcparam.transforms._spectral import SpectralNorm
from funcparam.transforms._symmetric import Skew, Symmetric

__all__ = [
    "AnyTransform",
    "Chain",
    "Frozen",
    "Interval",
    "LoRA",
    "Mask",
    "Orthogonal",
    "Positive",
    "Raw",
    "Skew",
    "SpecialOrthogonal",
    "SpectralNorm",
    "State",
    "Symmetric",
    "Transform",
    "WeightNorm",
    "full_precision",
    "transform",
]
