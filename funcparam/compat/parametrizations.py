"""The functions of `torch.nn.utils.parametrizations`, over Orthogonal, WeightNorm, SpectralNorm."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from funcparam.compat import _private
from funcparam.compat._adapter import steps, write
from funcparam.compat._tensors import shaped
from funcparam.compat.parametrize import register_parametrization
from funcparam.parametrization.sharding import whole
from funcparam.transforms import Orthogonal, SpectralNorm, WeightNorm
from funcparam.transforms.numerics.power_iteration import power_iteration

__all__ = ["orthogonal", "spectral_norm", "weight_norm"]

_HOUSEHOLDER = _private.ORTHOGONAL_MAPS["householder"]


class _Orthogonal(_private.TorchOrthogonal):
    """Orthogonal, with raw as in torch's checkpoints: the diagonal of a raw matrix is sign only."""

    if TYPE_CHECKING:
        orthogonal_map: Enum
        shape: torch.Size
        base: Tensor | None
        signed: Orthogonal

    def __init__(
        self, weight: Tensor, orthogonal_map: Any, *, use_trivialization: bool = True
    ) -> None:
        super().__init__(weight, orthogonal_map, use_trivialization=use_trivialization)
        # takes signs, and a base point too where there is one
        vars(self)["signed"] = Orthogonal(orthogonal_map.name, trivialize=False)

    @_private.unscripted
    def forward(self, X: Tensor) -> Tensor:
        """Map raw to an orthogonal matrix."""
        raw: Tensor = whole(X)
        state: dict[str, Tensor] = {}
        base = getattr(self, "base", None)
        if base is not None:  # in a chain there is none until it is assigned to
            state["base"] = base
        if self.orthogonal_map is _HOUSEHOLDER:
            state["signs"] = signs_of(raw)
        return self.signed.forward(raw, state)

    def right_inverse(self, value: Tensor) -> Tensor:
        """Raw and base point for an orthogonal `value`; of any other, its Q factor."""
        if value.shape != self.shape:
            raise ValueError(
                f"Expected a matrix or batch of matrices of shape {self.shape}. "
                f"Got a tensor of shape {value.shape}."
            )
        value = value.detach()
        if hasattr(self, "base"):
            self.base = self._base_for(value)
            return _with_diagonal(torch.zeros_like(value), -1)
        if self.orthogonal_map is not _HOUSEHOLDER:
            raise NotImplementedError(
                "It is not possible to assign to the matrix exponential "
                "or the Cayley parametrizations when use_trivialization=False."
            )
        raw, state = self.signed.right_inverse(value)
        return _with_diagonal(raw, -state["signs"])

    def _base_for(self, value: Tensor) -> Tensor:
        """The Q factor of `value` and of a random complement, drawn as torch does."""
        tall = value.mT if value.shape[-2] < value.shape[-1] else value
        n, k = tall.shape[-2:]
        if n > k:
            complement = torch.randn(
                *tall.shape[:-2], n, n - k, dtype=value.dtype, device=value.device
            )
            tall = torch.cat([tall, complement], dim=-1)
        return Orthogonal().right_inverse(tall)[1]["base"]


def signs_of(X: Tensor) -> Tensor:
    """The column signs that the diagonal of torch's raw matrix stands for."""
    return torch.where(X.detach().diagonal(dim1=-2, dim2=-1) > 0, -1, 1).to(X.dtype)


def _with_diagonal(matrix: Tensor, entries: Any) -> Tensor:
    matrix = matrix.clone()
    matrix.diagonal(dim1=-2, dim2=-1).copy_(torch.as_tensor(entries, device=matrix.device))
    return matrix


def orthogonal(
    module: nn.Module,
    name: str = "weight",
    orthogonal_map: str | None = None,
    *,
    use_trivialization: bool = True,
) -> nn.Module:
    """Make a matrix or batch of matrices orthogonal (or unitary) and keep it so.

    Args:
        module: the module; it is changed and returned.
        name: the tensor.
        orthogonal_map: `"matrix_exp"`, `"cayley"` or `"householder"`, see
            [`Orthogonal`][funcparam.transforms.Orthogonal]. None: the first if the matrix is
            square or complex, else the last.
        use_trivialization: whether to keep a base point, in the buffer `base`.

    Raises:
        ValueError: there is no such tensor or map, or they do not fit.

    Example:
        >>> import torch
        >>> from funcparam.compat.parametrizations import orthogonal
        >>> W = orthogonal(torch.nn.Linear(3, 5)).weight
        >>> torch.allclose(W.mT @ W, torch.eye(3), atol=1e-6)
        True
    """
    weight = _find(module, name)
    if weight.ndim < 2:
        raise ValueError(
            f"Expected a matrix or batch of matrices. Got a tensor of {weight.ndim} dimensions."
        )
    if orthogonal_map is None:
        square = weight.shape[-2] == weight.shape[-1]
        orthogonal_map = "matrix_exp" if square or weight.is_complex() else "householder"
    known = _private.ORTHOGONAL_MAPS.__members__.get(orthogonal_map)
    if known is None:
        raise ValueError(
            'orthogonal_map has to be one of "matrix_exp", "cayley", "householder". '
            f"Got: {orthogonal_map}"
        )
    part = _Orthogonal(weight, known, use_trivialization=use_trivialization)
    del weight  # whoever holds it could be a tie
    return register_parametrization(module, name, part, unsafe=True)


class _WeightNorm(_private.TorchWeightNorm):
    """WeightNorm, with a magnitude of no dimension where there is one for the whole tensor."""

    raw_names = ("magnitude", "direction")

    if TYPE_CHECKING:
        dim: int
        transform: WeightNorm

    def __init__(self, dim: int | None = 0) -> None:
        super().__init__(dim)
        vars(self)["transform"] = WeightNorm(None if self.dim == -1 else self.dim)

    @_private.unscripted
    def forward(self, weight_g: Tensor, weight_v: Tensor) -> Tensor:
        """Map magnitude and direction to the value."""
        magnitude, direction = whole(weight_g), whole(weight_v)
        if direction.dtype in (torch.bfloat16, torch.float16):
            # as in torch the norm is rounded as the magnitude was, which so gives its value back
            return direction * (magnitude / torch.norm_except_dim(direction, 2, self.dim))
        return self.transform.forward({"magnitude": magnitude, "direction": direction}, {})

    def rename_legacy_keys(self, state_dict: dict[str, Any], prefix: str, name: str) -> None:
        """Take `weight_g` and `weight_v` of a checkpoint for `original0` and `original1`."""
        old = [f"{prefix}{name}_{letter}" for letter in "gv"]
        if all(key in state_dict for key in old):
            for i, key in enumerate(old):
                state_dict[f"{prefix}parametrizations.{name}.original{i}"] = state_dict.pop(key)


def weight_norm(module: nn.Module, name: str = "weight", dim: int | None = 0) -> nn.Module:
    """Train the length and the direction of a weight separately.

    Args:
        module: the module; it is changed and returned. The direction, `original1`, is the
            parameter that was there before, so an optimizer built earlier goes on training it.
        name: the tensor.
        dim: the dimension with a magnitude for each index; None or -1: one for the whole tensor.

    Example:
        >>> import torch
        >>> from funcparam.compat.parametrizations import weight_norm
        >>> weight_norm(torch.nn.Linear(3, 5)).parametrizations.weight.original0.shape
        torch.Size([5, 1])
    """
    ndim = _find(module, name).ndim
    if dim is not None and not -ndim <= dim < ndim:
        raise IndexError(
            "Dimension out of range (expected to be in range of "
            f"[-{ndim}, {ndim - 1}], but got {dim})"
        )
    return register_parametrization(module, name, _WeightNorm(dim), unsafe=True)


class _SpectralNorm(_private.TorchSpectralNorm):
    """SpectralNorm, started as torch does: random vectors and fifteen iterations.

    A subclass may have a `_power_method` of its own, which writes to `_u` and `_v` as torch's.
    """

    if TYPE_CHECKING:
        dim: int
        eps: float
        n_power_iterations: int
        _u: Tensor
        _v: Tensor

        def _reshape_weight_to_matrix(self, weight: Tensor) -> Tensor: ...

    @_private.unscripted
    def forward(self, weight: Tensor) -> Tensor:
        """Divide by the largest singular value, after one step of what evolves if training."""
        weight = whole(weight)
        if weight.ndim == 1:
            return SpectralNorm(eps=self.eps).forward(weight, {})
        matrix = self._reshape_weight_to_matrix(weight)
        vectors = self._power_method(matrix, self.n_power_iterations) if steps(self) else None
        # clones, since backward keeps them and the next step writes to the buffers
        u, v = vectors or (self._u.clone(), self._v.clone())
        sigma = torch.vdot(u, torch.mv(matrix, v))
        return weight / (sigma + (sigma == 0))  # zero stays zero

    def _power_method(
        self, weight_mat: Tensor, n_power_iterations: int
    ) -> tuple[Tensor, Tensor] | None:
        """Iterate, write the vectors to the buffers, and return them."""
        old = self._u, self._v
        new = power_iteration(weight_mat.detach(), *old, n_power_iterations, self.eps)
        for buffer, vector in zip(old, new, strict=True):
            write(buffer, vector)
        return new

    def restart(self, weight: Tensor) -> None:
        """Take the exact singular vectors of `weight`."""
        if weight.ndim > 1:
            _, new = SpectralNorm(self.dim, eps=self.eps).right_inverse(weight)
            write(self._u, new["u"])
            write(self._v, new["v"])


# Under their names in torch they are private; to the rest of compat they are not.
OrthogonalModule = _Orthogonal
WeightNormModule = _WeightNorm
SpectralNormModule = _SpectralNorm


def spectral_norm(
    module: nn.Module,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
) -> nn.Module:
    """Divide a weight by its largest singular value, which power iteration tracks.

    In training mode the iteration takes a step at each read of the weight, as in torch; within
    [`cached`][funcparam.compat.parametrize.cached] the weight is read once.

    Args:
        module: the module; it is changed and returned.
        name: the tensor.
        n_power_iterations: iterations in one step.
        eps: lower bound of norms.
        dim: the dimension of outputs. None: 1 for ConvTranspose1d to 3d, else 0.

    Raises:
        ValueError: there is no such tensor, or `n_power_iterations` is not positive.
        IndexError: the tensor has no dimension `dim`.

    Example:
        >>> import torch
        >>> from funcparam.compat.parametrizations import spectral_norm
        >>> layer = spectral_norm(torch.nn.Linear(3, 5))
        >>> bool(torch.linalg.matrix_norm(layer.weight, 2) < 1.1)
        True
    """
    weight = _find(module, name)
    if dim is None:
        transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        dim = 1 if isinstance(module, transposed) else 0
    part = _SpectralNorm(weight, n_power_iterations, dim, eps)
    return register_parametrization(module, name, part)


def _find(module: nn.Module, name: str) -> Tensor:
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        built_without = hasattr(module, name) and weight is None
        raise ValueError(
            f"Module '{module}' has no parameter or buffer with name '{name}'"
            + (": it is None, this module was built without it" if built_without else "")
        )
    return shaped(module, name, weight)
