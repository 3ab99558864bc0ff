"""The older `torch.nn.utils.weight_norm` and `spectral_norm`: the same hooks and keys, mended.

[`install`][funcparam.compat.install] puts them in the place of torch's. What removes torch's
hooks, `remove_weight_norm` and `remove_spectral_norm`, removes these.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm as SpectralNormHook
from torch.nn.utils.spectral_norm import spectral_norm as torch_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm as WeightNormHook

from funcparam.compat import _private
from funcparam.transforms import WeightNorm

__all__ = ["spectral_norm", "weight_norm"]


class _Copyable:
    """A hook that `deepcopy` can copy together with the weight that it computed.

    The weight stands in the module as an attribute with a history, which has no copy. A module's
    hooks are copied before its attributes: the hook names, in the memo, what to take instead.
    """

    name: str
    computed: Tensor | None = None

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        super().__call__(module, inputs)  # pyright: ignore
        self.computed = getattr(module, self.name)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Copyable:
        twin = memo[id(self)] = type(self).__new__(type(self))
        vars(twin).update(vars(self))
        if self.computed is not None:
            value = torch.func.debug_unwrap(self.computed)  # it may be left over from a vmap
            twin.computed = memo[id(self.computed)] = value.detach().clone()
        return twin


class _WeightNorm(_Copyable, WeightNormHook):
    def compute_weight(self, module: nn.Module) -> Tensor:
        transform = WeightNorm(None if self.dim == -1 else self.dim)
        magnitude, direction = (getattr(module, f"{self.name}_{letter}") for letter in "gv")
        return transform.forward({"magnitude": magnitude, "direction": direction}, {})


class _SpectralNorm(_Copyable, SpectralNormHook):
    pass


def weight_norm(module: nn.Module, name: str = "weight", dim: int | None = 0) -> nn.Module:
    """Train the length and the direction of a weight separately, by a hook before the forward.

    As `torch.nn.utils.weight_norm`, but second derivatives and `vmap` are right, the module can
    be copied, nothing is deprecated, and `weight_v` is the parameter that was there before.

    Args:
        module: the module; it is changed and returned. It gets the parameters `weight_g` and
            `weight_v`, from which `weight` is computed before each forward.
        name: the parameter.
        dim: the dimension with a magnitude for each index; None or -1: one for the whole tensor.

    Raises:
        RuntimeError: the parameter has such a hook already.
        ValueError: there is no such parameter, or it has no shape yet.

    Example:
        >>> import copy, torch
        >>> from funcparam.compat.hooks import weight_norm
        >>> layer = copy.deepcopy(weight_norm(torch.nn.Linear(3, 5)))
        >>> list(layer.state_dict())
        ['bias', 'weight_g', 'weight_v']
    """
    for hook in vars(module)["_forward_pre_hooks"].values():
        if isinstance(hook, WeightNormHook) and hook.name == name:
            raise RuntimeError(
                f"Cannot register two weight_norm hooks on the same parameter {name}"
            )
    weight = _private.tables(module)[0].get(name)
    if weight is None:
        raise ValueError(f"Module '{module}' has no parameter with name '{name}'")
    if torch.nn.parameter.is_lazy(weight):
        raise ValueError(
            "The module passed to `WeightNorm` can't have uninitialized parameters. "
            "Make sure to run the dummy forward before applying weight normalization"
        )
    hook = _WeightNorm(name, -1 if dim is None else dim)
    magnitude = torch.norm_except_dim(weight.detach(), 2, hook.dim)
    delattr(module, name)
    module.register_parameter(f"{name}_g", nn.Parameter(magnitude, weight.requires_grad))
    module.register_parameter(f"{name}_v", weight)
    hook(module, None)
    module.register_forward_pre_hook(hook)
    return module


def spectral_norm(
    module: nn.Module,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
) -> nn.Module:
    """Divide a weight by its largest singular value, by a hook before the forward.

    As `torch.nn.utils.spectral_norm`, arguments, keys and errors too, but the module can be
    copied after a forward.

    Example:
        >>> import copy, torch
        >>> from funcparam.compat.hooks import spectral_norm
        >>> layer = spectral_norm(torch.nn.Linear(3, 5))
        >>> _ = layer(torch.ones(1, 3))
        >>> list(copy.deepcopy(layer).state_dict())
        ['bias', 'weight_orig', 'weight_u', 'weight_v']
    """
    torch_spectral_norm(module, name, n_power_iterations, eps, dim)
    for hook in vars(module)["_forward_pre_hooks"].values():
        if type(hook) is SpectralNormHook and hook.name == name:
            hook.__class__ = _SpectralNorm
    return module
