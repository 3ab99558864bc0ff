"""The functions of `torch.nn.utils.parametrizations`, over Orthogonal, WeightNorm, SpectralNorm."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from funcparam.compat._adapter import TransformModule
from funcparam.compat.parametrize import register_parametrization
from funcparam.transforms import Orthogonal, SpectralNorm, WeightNorm

__all__ = ["orthogonal", "spectral_norm", "weight_norm"]

_MAPS = ("matrix_exp", "cayley", "householder")


class OrthogonalModule(TransformModule):
    """Orthogonal, with raw as in torch's checkpoints: the diagonal of a raw matrix is sign only."""

    base: Tensor | None

    def __init__(self, transform: Orthogonal, shape: torch.Size) -> None:
        super().__init__(transform, {"base": "base"} if transform.trivialize else None)
        self.shape = shape
        self.householder = transform.map == "householder"
        self.trivialized = transform.trivialize
        self.register_buffer("base", None)

    def forward(self, *raw: Tensor) -> Tensor:
        """Map raw to an orthogonal matrix."""
        (X,) = raw
        if not self.householder:
            return self._map().forward(X, self.state())
        signs = self.signs(X)
        if self.base is None:
            return self._map().forward(X, {"signs": signs})
        Q = self.transform.forward(X, self.state())
        wide = X.shape[-2] < X.shape[-1]
        return Q * signs.unsqueeze(-1 if wide else -2)

    again = forward

    def _map(self) -> Orthogonal:
        """Without a base point as long as nothing was assigned: added to a chain, for example."""
        transform = cast("Orthogonal", self.transform)
        return transform if self.base is not None else Orthogonal(transform.map, trivialize=False)

    @property
    def orthogonal_map(self) -> str:
        return cast("Orthogonal", self.transform).map

    @staticmethod
    def signs(X: Tensor) -> Tensor:
        """The column signs that the diagonal of torch's raw matrix stands for."""
        return torch.where(X.detach().diagonal(dim1=-2, dim2=-1) > 0, -1, 1).to(X.dtype)

    def right_inverse(self, value: Tensor) -> Tensor:
        """Raw and base point for an orthogonal `value`; of any other, its Q factor."""
        if value.shape != self.shape:
            raise ValueError(
                f"Expected a matrix or batch of matrices of shape {self.shape}. "
                f"Got a tensor of shape {value.shape}."
            )
        value = value.detach()
        if self.trivialized:
            self.base = self._base_for(value)
            return _with_diagonal(torch.zeros_like(value), -1)
        if not self.householder:
            raise NotImplementedError(
                "It is not possible to assign to the matrix exponential "
                "or the Cayley parametrizations when use_trivialization=False."
            )
        raw, state = self.transform.right_inverse(value)
        return _with_diagonal(cast("Tensor", raw), -state["signs"])

    def _base_for(self, value: Tensor) -> Tensor:
        """The Q factor of `value` and of a random complement, drawn as torch does."""
        tall = value.mT if value.shape[-2] < value.shape[-1] else value
        n, k = tall.shape[-2:]
        if n > k:
            complement = torch.randn(
                *tall.shape[:-2], n, n - k, dtype=value.dtype, device=value.device
            )
            tall = torch.cat([tall, complement], dim=-1)
        return self.transform.right_inverse(tall)[1]["base"]


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
    if orthogonal_map not in _MAPS:
        raise ValueError(
            'orthogonal_map has to be one of "matrix_exp", "cayley", "householder". '
            f"Got: {orthogonal_map}"
        )
    if weight.is_complex() and orthogonal_map == "householder":
        raise ValueError("The householder parametrization does not support complex tensors.")
    part = OrthogonalModule(Orthogonal(orthogonal_map, use_trivialization), weight.shape)
    return register_parametrization(module, name, part, unsafe=True)


class WeightNormModule(TransformModule):
    """WeightNorm, with a magnitude of no dimension where there is one for the whole tensor."""

    def __init__(self, dim: int | None) -> None:
        super().__init__(WeightNorm(dim), raw_names=("magnitude", "direction"))

    def forward(self, *raw: Tensor) -> Tensor:
        """Map magnitude and direction to the value."""
        magnitude, direction = raw
        return self.transform.forward({"magnitude": magnitude, "direction": direction}, {})

    @property
    def dim(self) -> int:
        dim = cast("WeightNorm", self.transform).dim
        return -1 if dim is None else dim

    def right_inverse(self, value: Tensor) -> tuple[Tensor, ...]:
        """Magnitude and direction; the direction is `value` itself where it has one."""
        magnitude = cast("Any", self.transform).right_inverse(value.detach())[0]["magnitude"]
        scalar = cast("WeightNorm", self.transform).dim is None
        return magnitude.reshape(()) if scalar else magnitude, value

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
    part = WeightNormModule(None if dim == -1 else dim)
    return register_parametrization(module, name, part, unsafe=True)


class _SpectralNorm(TransformModule):
    """SpectralNorm, started as torch does: random vectors and fifteen iterations."""

    def __init__(self, weight: Tensor, transform: SpectralNorm) -> None:
        super().__init__(transform, {"u": "_u", "v": "_v"} if weight.ndim > 1 else None)
        if weight.ndim > 1:
            matrix = weight.detach().movedim(transform.dim, 0).flatten(1)
            # drawn like torch's, so that a seed gives the same numbers
            state = {
                key: normalize(matrix.new_empty(size).normal_(), dim=0, eps=transform.eps)
                for key, size in zip("uv", matrix.shape, strict=True)
            }
            warm_up = SpectralNorm(transform.dim, 15, transform.eps)
            self._replace(warm_up.update(weight.detach(), state))

    @property
    def n_power_iterations(self) -> int:
        return cast("Any", self.transform).n_power_iterations

    @property
    def eps(self) -> float:
        return cast("Any", self.transform).eps

    @property
    def dim(self) -> int:
        return cast("Any", self.transform).dim

    def right_inverse(self, value: Tensor) -> Tensor:
        """The identity: `value` is taken to satisfy the constraint."""
        return value


def spectral_norm(
    module: nn.Module,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
) -> nn.Module:
    """Divide a weight by its largest singular value, which power iteration tracks.

    In training mode the iteration takes a step when the weight is first read after its raw
    tensor changed; further reads use the same vectors.

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
    if not -weight.ndim <= dim < weight.ndim:
        raise IndexError(
            "Dimension out of range (expected to be in range of "
            f"[-{weight.ndim}, {weight.ndim - 1}] but got {dim})"
        )
    if n_power_iterations <= 0:
        raise ValueError(
            "Expected n_power_iterations to be positive, but "
            f"got n_power_iterations={n_power_iterations}"
        )
    part = _SpectralNorm(weight, SpectralNorm(dim % weight.ndim, n_power_iterations, eps))
    return register_parametrization(module, name, part)


def _find(module: nn.Module, name: str) -> Tensor:
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        built_without = hasattr(module, name) and weight is None
        raise ValueError(
            f"Module '{module}' has no parameter or buffer with name '{name}'"
            + (": it is None, this module was built without it" if built_without else "")
        )
    if torch.nn.parameter.is_lazy(weight):
        raise ValueError(
            f"'{name}' of module '{module}' has no shape yet: run a batch through the lazy module"
            " first, then parametrize it"
        )
    return weight
