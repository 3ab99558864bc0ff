"""Transforms: pure maps from raw tensors to a weight, one family a file."""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from funcparam.transforms.contract.base import AnyTransform, Raw, State, Transform
from funcparam.transforms.contract.function import transform
from funcparam.transforms.contract.precision import full_precision

# Making sixty dataclasses takes longer than the rest of the package together, and most programs
# use two or three: a family is imported when one of its names is first asked for.
if TYPE_CHECKING:
    from funcparam.transforms._adapters import IA3, OFT, DoRA, LoHa, VeRA
    from funcparam.transforms._almost_orthogonal import AlmostOrthogonal
    from funcparam.transforms._ball import Ball
    from funcparam.transforms._block_circulant import BlockCirculant
    from funcparam.transforms._boft import BOFT
    from funcparam.transforms._bounds import Interval, LowerBound, UpperBound
    from funcparam.transforms._cat import Cat, Stack
    from funcparam.transforms._chain import Chain
    from funcparam.transforms._cholesky import CholeskyFactor, PositiveDefinite
    from funcparam.transforms._constraints import from_constraint
    from funcparam.transforms._correlation import CorrelationCholesky
    from funcparam.transforms._delora import DeLoRA
    from funcparam.transforms._diagonal import Diagonal
    from funcparam.transforms._fixed_rank import FixedRank
    from funcparam.transforms._float_grid import FakeQuantizeFloat
    from funcparam.transforms._frozen import Frozen
    from funcparam.transforms._gain import Gain
    from funcparam.transforms._hadamard import Hadamard
    from funcparam.transforms._half_plane import LeftHalfPlane
    from funcparam.transforms._hermitian import Hermitian, SkewHermitian
    from funcparam.transforms._hra import HRA
    from funcparam.transforms._identity import Identity
    from funcparam.transforms._invertible import Invertible, SpecialLinear
    from funcparam.transforms._isospectral import Isospectral
    from funcparam.transforms._kronecker import Kronecker
    from funcparam.transforms._lipschitz import AOL, LInfLipschitz
    from funcparam.transforms._lora import LoRA
    from funcparam.transforms._low_rank import LowRank
    from funcparam.transforms._lsq import LSQ
    from funcparam.transforms._mask import Mask
    from funcparam.transforms._monarch import Monarch
    from funcparam.transforms._norm import WeightNorm
    from funcparam.transforms._operator_norm import OperatorNorm
    from funcparam.transforms._ordered import Ordered
    from funcparam.transforms._orthogonal import Orthogonal, SpecialOrthogonal, Unitary
    from funcparam.transforms._orthogonal_conv import OrthogonalConv
    from funcparam.transforms._plumbing import Affine, Permute, Reshape, Transpose
    from funcparam.transforms._positive import Positive
    from funcparam.transforms._product import Product
    from funcparam.transforms._psd_low_rank import PSDLowRank
    from funcparam.transforms._quantize import FakeQuantize, Ternary
    from funcparam.transforms._randlora import RandLoRA
    from funcparam.transforms._rotate import RotateIn, RotateOut
    from funcparam.transforms._simplex import Simplex
    from funcparam.transforms._sinkhorn import DoublyStochastic
    from funcparam.transforms._sparse import Sparse
    from funcparam.transforms._sparsity import NMSparse, TopK
    from funcparam.transforms._spectral import SpectralNorm
    from funcparam.transforms._spectral_cap import SpectralCap
    from funcparam.transforms._sphere import UnitNorm
    from funcparam.transforms._stable import StableDiagonal
    from funcparam.transforms._standardize import WeightStandardization
    from funcparam.transforms._stiefel import Grassmann, Stiefel
    from funcparam.transforms._structured import BlockDiagonal, Circulant, Toeplitz
    from funcparam.transforms._sum import Sum
    from funcparam.transforms._symmetric import Skew, Symmetric
    from funcparam.transforms._triangular import Triangular

_FAMILY_OF: Mapping[str, str] = {
    "DoRA": "_adapters",
    "IA3": "_adapters",
    "LoHa": "_adapters",
    "OFT": "_adapters",
    "VeRA": "_adapters",
    "AlmostOrthogonal": "_almost_orthogonal",
    "Ball": "_ball",
    "BlockCirculant": "_block_circulant",
    "BOFT": "_boft",
    "Interval": "_bounds",
    "LowerBound": "_bounds",
    "UpperBound": "_bounds",
    "Cat": "_cat",
    "Stack": "_cat",
    "Chain": "_chain",
    "CholeskyFactor": "_cholesky",
    "PositiveDefinite": "_cholesky",
    "from_constraint": "_constraints",
    "CorrelationCholesky": "_correlation",
    "DeLoRA": "_delora",
    "Diagonal": "_diagonal",
    "FixedRank": "_fixed_rank",
    "FakeQuantizeFloat": "_float_grid",
    "Frozen": "_frozen",
    "Gain": "_gain",
    "Hadamard": "_hadamard",
    "LeftHalfPlane": "_half_plane",
    "Hermitian": "_hermitian",
    "SkewHermitian": "_hermitian",
    "HRA": "_hra",
    "Identity": "_identity",
    "Invertible": "_invertible",
    "SpecialLinear": "_invertible",
    "Isospectral": "_isospectral",
    "Kronecker": "_kronecker",
    "AOL": "_lipschitz",
    "LInfLipschitz": "_lipschitz",
    "LoRA": "_lora",
    "LowRank": "_low_rank",
    "LSQ": "_lsq",
    "Mask": "_mask",
    "Monarch": "_monarch",
    "WeightNorm": "_norm",
    "OperatorNorm": "_operator_norm",
    "Ordered": "_ordered",
    "Orthogonal": "_orthogonal",
    "SpecialOrthogonal": "_orthogonal",
    "Unitary": "_orthogonal",
    "OrthogonalConv": "_orthogonal_conv",
    "Affine": "_plumbing",
    "Permute": "_plumbing",
    "Reshape": "_plumbing",
    "Transpose": "_plumbing",
    "Positive": "_positive",
    "Product": "_product",
    "PSDLowRank": "_psd_low_rank",
    "FakeQuantize": "_quantize",
    "Ternary": "_quantize",
    "RandLoRA": "_randlora",
    "RotateIn": "_rotate",
    "RotateOut": "_rotate",
    "Simplex": "_simplex",
    "DoublyStochastic": "_sinkhorn",
    "Sparse": "_sparse",
    "NMSparse": "_sparsity",
    "TopK": "_sparsity",
    "SpectralNorm": "_spectral",
    "SpectralCap": "_spectral_cap",
    "UnitNorm": "_sphere",
    "StableDiagonal": "_stable",
    "WeightStandardization": "_standardize",
    "Grassmann": "_stiefel",
    "Stiefel": "_stiefel",
    "BlockDiagonal": "_structured",
    "Circulant": "_structured",
    "Toeplitz": "_structured",
    "Sum": "_sum",
    "Skew": "_symmetric",
    "Symmetric": "_symmetric",
    "Triangular": "_triangular",
}

__all__ = [
    "AOL",
    "BOFT",
    "HRA",
    "IA3",
    "LSQ",
    "OFT",
    "Affine",
    "AlmostOrthogonal",
    "AnyTransform",
    "Ball",
    "BlockCirculant",
    "BlockDiagonal",
    "Cat",
    "Chain",
    "CholeskyFactor",
    "Circulant",
    "CorrelationCholesky",
    "DeLoRA",
    "Diagonal",
    "DoRA",
    "DoublyStochastic",
    "FakeQuantize",
    "FakeQuantizeFloat",
    "FixedRank",
    "Frozen",
    "Gain",
    "Grassmann",
    "Hadamard",
    "Hermitian",
    "Identity",
    "Interval",
    "Invertible",
    "Isospectral",
    "Kronecker",
    "LInfLipschitz",
    "LeftHalfPlane",
    "LoHa",
    "LoRA",
    "LowRank",
    "LowerBound",
    "Mask",
    "Monarch",
    "NMSparse",
    "OperatorNorm",
    "Ordered",
    "Orthogonal",
    "OrthogonalConv",
    "PSDLowRank",
    "Permute",
    "Positive",
    "PositiveDefinite",
    "Product",
    "RandLoRA",
    "Raw",
    "Reshape",
    "RotateIn",
    "RotateOut",
    "Simplex",
    "Skew",
    "SkewHermitian",
    "Sparse",
    "SpecialLinear",
    "SpecialOrthogonal",
    "SpectralCap",
    "SpectralNorm",
    "StableDiagonal",
    "Stack",
    "State",
    "Stiefel",
    "Sum",
    "Symmetric",
    "Ternary",
    "Toeplitz",
    "TopK",
    "Transform",
    "Transpose",
    "Triangular",
    "UnitNorm",
    "Unitary",
    "UpperBound",
    "VeRA",
    "WeightNorm",
    "WeightStandardization",
    "from_constraint",
    "full_precision",
    "transform",
]


if not TYPE_CHECKING:  # a type checker would take any name for one that is there

    def __getattr__(name: str) -> Any:
        if name not in _FAMILY_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(import_module(f"{__name__}.{_FAMILY_OF[name]}"), name)
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return __all__
