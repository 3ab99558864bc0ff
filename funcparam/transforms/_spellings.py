"""How PyTorch stores what transforms keep in raw and state: named parts, and maps to and fro."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcparam.transforms._chain import Chain
from funcparam.transforms._identity import Identity
from funcparam.transforms._mask import Mask
from funcparam.transforms._norm import WeightNorm
from funcparam.transforms._orthogonal import Orthogonal
from funcparam.transforms._spectral import SpectralNorm
from funcparam.transforms.contract.base import AnyTransform, State, readable
from funcparam.transforms.contract.signature import NamedSpecs, Signature, TensorSpec
from funcparam.transforms.numerics.linalg import linalg

Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class Spelling:
    """Parts for raw and state, as pairs (part, key); the key of a raw that is one tensor is ''.

    In the style `"funcparam"` a part is `raw`, or `raw.KEY` and `state.KEY`; in the style
    `"torch"`, of `torch.nn.utils.parametrize`, it stands below `parametrizations.weight`; in a
    legacy style it is the ending of `weight_g`.
    """

    style: str
    raw: tuple[tuple[str, str], ...]
    state: tuple[tuple[str, str], ...] = ()

    @property
    def parts(self) -> frozenset[str]:
        """The names of all parts."""
        return frozenset(part for part, _ in (*self.raw, *self.state))

    def write(self, raw: Any, state: State) -> dict[str, Tensor]:
        """Turn raw and state into parts."""
        tensors: Parts = {"": raw} if isinstance(raw, Tensor) else raw
        return {part: tensors[key] for part, key in self.raw} | {
            part: state[key] for part, key in self.state
        }

    def read(self, parts: Parts) -> tuple[Any, State]:
        """Turn parts into raw and state."""
        raw = {key: parts[part] for part, key in self.raw}
        return raw.get("", raw), {key: parts[part] for part, key in self.state}

    def contradicted(self, parts: Parts) -> bool:
        """Whether the numbers show that another transform wrote parts of these shapes."""
        return False

    def specs(self, signature: Signature) -> dict[str, TensorSpec]:
        """What each part looks like."""
        raw = signature.raw
        metas = raw.meta() if isinstance(raw, TensorSpec) else _metas(raw)
        parts = self.write(metas, _metas(signature.state))
        return {part: TensorSpec.of(tensor) for part, tensor in parts.items()}


def spellings(transform: AnyTransform | None, signature: Signature) -> tuple[Spelling, ...]:
    """All spellings of a transform, the one to write in each style first."""
    if transform is None:
        return ()
    raw, state = signature.raw, [key for key, _ in signature.state]
    keys = [("", "raw")] if isinstance(raw, TensorSpec) else [(k, f"raw.{k}") for k, _ in raw]
    own = (
        tuple((part, key) for key, part in keys),
        tuple((f"state.{key}", key) for key in state),
    )
    if isinstance(transform, SpectralNorm) and state:
        return (
            _Vectors("funcparam", *own, dim=transform.dim),
            _Vectors("torch", (("original", ""),), (("0._u", "u"), ("0._v", "v")), transform.dim),
            _Vectors(
                "legacy spectral_norm", (("_orig", ""),), (("_u", "u"), ("_v", "v")), transform.dim
            ),
            _BeforeTorch11("legacy spectral_norm", (), dim=transform.dim),
        )
    return (Spelling("funcparam", *own), *_spellings_of_torch(transform, raw, state))


def _spellings_of_torch(
    transform: AnyTransform, raw: TensorSpec | NamedSpecs, state: list[str]
) -> tuple[Spelling, ...]:
    match transform:
        case WeightNorm():
            kind = _WholeWeightNorm if transform.dim is None else Spelling
            names = ("magnitude", "direction")
            return (
                kind("torch", tuple(zip(("original0", "original1"), names, strict=True))),
                kind("legacy weight_norm", tuple(zip(("_g", "_v"), names, strict=True))),
            )
        case Mask():
            pruned = _Pruned("legacy prune", (("_orig", ""),), (("_mask", "mask"),))
            return _as_one(raw, state), pruned
        case Orthogonal(map="householder"):
            base = (("0.base", "base"),) if transform.trivialize else ()
            kind = _BasedReflectors if transform.trivialize else _SignedReflectors
            return (kind("torch", (("original", ""),), base),)
        case Chain():
            return _as_list(transform, raw, state), _as_one(raw, state)
        case _:
            return (_as_one(raw, state),)


def _metas(specs: NamedSpecs) -> dict[str, Tensor]:
    return {key: spec.meta() for key, spec in specs}


def _raw_parts(raw: TensorSpec | NamedSpecs) -> tuple[tuple[str, str], ...]:
    if isinstance(raw, TensorSpec):
        return (("original", ""),)
    keys = [key for key, _ in raw]
    if keys and keys[0] in ("original", "original0"):  # made from PyTorch's modules: named as there
        return tuple((key, key) for key in keys)
    return tuple((f"original{i}", key) for i, key in enumerate(keys))


def _as_one(raw: TensorSpec | NamedSpecs, state: list[str]) -> Spelling:
    """One registered module that holds the state in buffers."""
    parts = _raw_parts(raw)
    if parts and parts[0][1].startswith("original"):
        return Spelling("torch", parts, tuple((key, key) for key in state))
    buffers = tuple((f"0.{key.replace('.', '_')}", key) for key in state)
    return Spelling("torch", _raw_parts(raw), buffers)


def _as_list(chain: Chain, raw: TensorSpec | NamedSpecs, state: list[str]) -> Spelling:
    """One registered module for each part of a chain."""
    power = {f"{i}" for i, part in enumerate(chain.parts) if isinstance(part, SpectralNorm)}

    def buffer(key: str) -> str:
        position, _, own = key.partition(".")
        return f"{position}.{'_' if position in power else ''}{own.replace('.', '_')}"

    return Spelling("torch", _raw_parts(raw), tuple((buffer(key), key) for key in state))


@dataclass(frozen=True)
class _Vectors(Spelling):
    """The vectors of power iteration, which have unit length, along the rows of a dimension."""

    dim: int = 0

    def read(self, parts: Parts) -> tuple[Any, State]:
        raw, state = super().read(parts)
        return raw, {key: _unit(vector) for key, vector in state.items()}

    def contradicted(self, parts: Parts) -> bool:
        raw, state = super().read(parts)
        dim = _dim_of_vectors(raw, state["u"], state["v"])
        return dim is not None and dim != self.dim % raw.ndim


@dataclass(frozen=True)
class _BeforeTorch11(_Vectors):
    """Files from before PyTorch 1.1 have the value in place of v."""

    @property
    def parts(self) -> frozenset[str]:
        return frozenset(("", "_orig", "_u"))

    def read(self, parts: Parts) -> tuple[Any, State]:
        raw, u = parts["_orig"], _unit(parts["_u"])
        X = raw.movedim(self.dim, 0).flatten(1)
        # each step ended with u = X v / |X v|, for a v among the rows of X
        v: Tensor = linalg.pinv(X) @ u if readable(X) else X.mH @ u
        return raw, {"u": u, "v": _unit(v)}

    def contradicted(self, parts: Parts) -> bool:
        return False

    def specs(self, signature: Signature) -> dict[str, TensorSpec]:
        state = dict(signature.state)
        return {"": signature.value, "_orig": signature.value, "_u": state["u"]}


def _unit(vector: Tensor) -> Tensor:
    """The vector with norm 1: as it is where it has that norm, up to rounding, or none."""
    norm: Tensor = linalg.vector_norm(vector)
    near = (norm - 1).abs() < torch.finfo(norm.dtype).eps ** 0.5
    return torch.where(near | (norm == 0), vector, vector / norm)


class _WholeWeightNorm(Spelling):
    """PyTorch's magnitude of a whole tensor has no dimension."""

    def write(self, raw: Any, state: State) -> dict[str, Tensor]:
        return super().write({**raw, "magnitude": raw["magnitude"].reshape(())}, state)

    def read(self, parts: Parts) -> tuple[Any, State]:
        raw, state = super().read(parts)
        ones = (1,) * raw["direction"].ndim
        return {**raw, "magnitude": raw["magnitude"].reshape(ones)}, state


class _Pruned(Spelling):
    """PyTorch's masks are numbers."""

    def write(self, raw: Any, state: State) -> dict[str, Tensor]:
        return super().write(raw, {"mask": state["mask"].to(raw.dtype)})

    def read(self, parts: Parts) -> tuple[Any, State]:
        mask = parts["_mask"]
        if readable(mask) and not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("expected a mask of zeros and ones; got other numbers")
        return parts["_orig"], {"mask": mask != 0}


class _SignedReflectors(Spelling):
    """PyTorch keeps minus the signs of the columns on the diagonal of raw."""

    def write(self, raw: Any, state: State) -> dict[str, Tensor]:
        return {"original": _with_diagonal(raw, -state["signs"])}

    def read(self, parts: Parts) -> tuple[Any, State]:
        return parts["original"], {"signs": _signs(parts["original"])}


class _BasedReflectors(Spelling):
    """As above, where the signs are all 1 unless someone wrote to the diagonal."""

    def write(self, raw: Any, state: State) -> dict[str, Tensor]:
        diagonal = raw.diagonal(dim1=-2, dim2=-1)
        return super().write(_with_diagonal(raw, torch.full_like(diagonal, -1)), state)

    def read(self, parts: Parts) -> tuple[Any, State]:
        raw, state = super().read(parts)
        signs = _signs(raw)
        if not readable(signs) or bool((signs > 0).all()):
            return raw, state
        orthogonal = Orthogonal("householder")
        wide = raw.shape[-2] < raw.shape[-1]
        turned = orthogonal.forward(raw, {"base": state["base"].to(raw.dtype)}) * signs.unsqueeze(
            -1 if wide else -2
        )
        return orthogonal.right_inverse(turned)


def _signs(raw: Tensor) -> Tensor:
    return torch.where(raw.diagonal(dim1=-2, dim2=-1) > 0, -1, 1).to(raw.dtype)


def _with_diagonal(matrix: Tensor, diagonal: Tensor) -> Tensor:
    matrix = matrix.clone()
    matrix.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
    return matrix


class Inferred(NamedTuple):
    """A transform that parts stand for, with its raw and state."""

    transform: AnyTransform
    raw: Any
    state: State


def infer(style: str, parts: Parts) -> Inferred | None:
    """The transform whose parts these are, where they leave no doubt about the value."""
    if len({part.dtype for part in parts.values() if part.dtype != torch.bool}) > 1:
        return None
    inexact = all(part.is_floating_point() or part.is_complex() for part in parts.values())
    match style, sorted(parts):
        case ("legacy weight_norm", ["_g", "_v"]) if inexact:
            return _infer_weight_norm(parts["_g"], parts["_v"])
        case ("funcparam", ["raw.direction", "raw.magnitude"]) if inexact:
            return _infer_weight_norm(parts["raw.magnitude"], parts["raw.direction"])
        case ("legacy prune", ["_mask", "_orig"]) if parts["_mask"].shape == parts["_orig"].shape:
            return Inferred(Mask(), *_Pruned(style, (), ()).read(parts))
        case ("legacy spectral_norm", ["", "_orig", "_u"]):
            return Inferred(Identity(), parts[""], {})
        case ("legacy spectral_norm", ["_orig", "_u", "_v"]) if inexact:
            return _infer_spectral_norm(parts["_orig"], parts["_u"], parts["_v"])
        case ("torch", ["0._u", "0._v", "original"]) if inexact:
            return _infer_spectral_norm(parts["original"], parts["0._u"], parts["0._v"])
        case ("funcparam", ["raw", "state.u", "state.v"]) if inexact:
            return _infer_spectral_norm(parts["raw"], parts["state.u"], parts["state.v"])
        case _:
            return None


def _infer_weight_norm(magnitude: Tensor, direction: Tensor) -> Inferred | None:
    # The norm runs over every dimension where the magnitude has size 1: one of size 1 in the
    # direction too may be either, which is the same norm.
    if direction.is_complex():
        return None
    shape = (1,) * direction.ndim if magnitude.numel() == 1 else tuple(magnitude.shape)
    kept = [i for i, size in enumerate(shape) if size != 1]
    dim = kept[0] if kept else None
    expected = tuple(n if i == dim else 1 for i, n in enumerate(direction.shape))
    if shape != expected:
        return None
    raw = {"magnitude": magnitude.reshape(shape), "direction": direction}
    return Inferred(WeightNorm(dim), raw, {})


def _infer_spectral_norm(raw: Tensor, u: Tensor, v: Tensor) -> Inferred | None:
    dim = _dim_of_vectors(raw, u, v)
    return None if dim is None else Inferred(SpectralNorm(dim), raw, {"u": _unit(u), "v": _unit(v)})


def _dim_of_vectors(raw: Tensor, u: Tensor, v: Tensor) -> int | None:
    """The dimension whose rows u and v belong to: by their lengths, else by their numbers."""
    if u.ndim != 1 or v.ndim != 1 or raw.ndim < 2 or math.prod(raw.shape) != len(u) * len(v):
        return None
    dims = [i for i, size in enumerate(raw.shape) if size == len(u)]
    if len(dims) <= 1:
        return dims[0] if dims else None
    if not all(map(readable, (raw, u, v))):
        return None
    # A step ends with v = X^H u / |X^H u|. One step of an optimizer later their cosine was still
    # above 0.98 along the right dimension, and at most 0.4 along any other.
    found = {dim: _cosine(raw.movedim(dim, 0).flatten(1), u, v) for dim in dims}
    best = max(found, key=found.__getitem__)
    others = [cosine for dim, cosine in found.items() if dim != best]
    return best if found[best] > 0.9 and max(others) < 0.7 else None


def _cosine(X: Tensor, u: Tensor, v: Tensor) -> float:
    image = X.mH @ u
    norms: Tensor = linalg.vector_norm(image) * linalg.vector_norm(v)
    return float(torch.vdot(v, image).real / norms) if norms else 0.0
