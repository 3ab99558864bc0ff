"""Transforms: pure maps from raw tensors to a weight, one family a file."""

from funcparam.transforms._adapters import IA3, OFT, DoRA, LoHa, VeRA
from funcparam.transforms._base import AnyTransform, Raw, State, Transform
from funcparam.transforms._bounds import Interval, LowerBound, UpperBound
from funcparam.transforms._cat import Cat, Stack
from funcparam.transforms._chain import Chain
from funcparam.transforms._cholesky import CholeskyFactor, PositiveDefinite
from funcparam.transforms._constraints import from_constraint
from funcparam.transforms._correlation import CorrelationCholesky
from funcparam.transforms._frozen import Frozen
from funcparam.transforms._function import transform
from funcparam.transforms._identity import Identity
from funcparam.transforms._lipschitz import AOL, LInfLipschitz
from funcparam.transforms._lora import LoRA
from funcparam.transforms._low_rank import LowRank
from funcparam.transforms._mask import Mask
from funcparam.transforms._monarch import Monarch
from funcparam.transforms._norm import WeightNorm
from funcparam.transforms._ordered import Ordered
from funcparam.transforms._orthogonal import Orthogonal, SpecialOrthogonal
from funcparam.transforms._plumbing import Affine, Permute, Reshape, Transpose
from funcparam.transforms._positive import Positive
from funcparam.transforms._precision import full_precision
from funcparam.transforms._psd_low_rank import PSDLowRank
from funcparam.transforms._quantize import FakeQuantize, Ternary
from funcparam.transforms._simplex import Simplex
from funcparam.transforms._sinkhorn import DoublyStochastic
from funcparam.transforms._spectral import SpectralNorm
from funcparam.transforms._sphere import UnitNorm
from funcparam.transforms._stable import StableDiagonal
from funcparam.transforms._standardize import WeightStandardization
from funcparam.transforms._structured import BlockDiagonal, Circulant, Kronecker, Toeplitz
from funcparam.transforms._symmetric import Skew, Symmetric
from funcparam.transforms._triangular import Triangular

__all__ = [
    "AOL",
    "IA3",
    "OFT",
    "Affine",
    "AnyTransform",
    "BlockDiagonal",
    "Cat",
    "Chain",
    "CholeskyFactor",
    "Circulant",
    "CorrelationCholesky",
    "DoRA",
    "DoublyStochastic",
    "FakeQuantize",
    "Frozen",
    "Identity",
    "Interval",
    "Kronecker",
    "LInfLipschitz",
    "LoHa",
    "LoRA",
    "LowRank",
    "LowerBound",
    "Mask",
    "Monarch",
    "Ordered",
    "Orthogonal",
    "PSDLowRank",
    "Permute",
    "Positive",
    "PositiveDefinite",
    "Raw",
    "Reshape",
    "Simplex",
    "Skew",
    "SpecialOrthogonal",
    "SpectralNorm",
    "StableDiagonal",
    "Stack",
    "State",
    "Symmetric",
    "Ternary",
    "Toeplitz",
    "Transform",
    "Transpose",
    "Triangular",
    "UnitNorm",
    "UpperBound",
    "VeRA",
    "WeightNorm",
    "WeightStandardization",
    "from_constraint",
    "full_precision",
    "transform",
]
