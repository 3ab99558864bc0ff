"""The older `torch.nn.utils.weight_norm` and `spectral_norm`: the same hooks and keys, mended.

[`install`][funcparam.compat.install] puts them in the place of torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm as SpectralNormHook
from torch.nn.utils.spectral_norm import SpectralNormLoadStateDictPreHook
from torch.nn.utils.spectral_norm import remove_spectral_norm as torch_remove_spectral_norm
from torch.nn.utils.spectral_norm import spectral_norm as torch_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm as WeightNormHook
from torch.nn.utils.weight_norm import remove_weight_norm as torch_remove_weight_norm

from funcparam.compat import _private
from funcparam.compat._torch_names import is_spectral_norm, is_weight_norm
from funcparam.compat.parametrize import is_parametrized, remove_parametrizations
from funcparam.transforms import WeightNorm as WeightNormTransform

__all__ = ["remove_spectral_norm", "remove_weight_norm", "spectral_norm", "weight_norm"]


class _Mended:
    """A hook that `deepcopy` can copy together with the weight that it computed.

    The weight stands in the module as an attribute with a history, which has no copy. A module's
    hooks are copied before its attributes: the hook names, in the memo, what to take instead.
    """

    name: str
    computed: Tensor | None = None

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        super().__call__(module, inputs)  # pyright: ignore
        self.computed = getattr(module, self.name)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Mended:
        twin = memo[id(self)] = type(self).__new__(type(self))
        vars(twin).update(vars(self))
        if self.computed is not None:
            value = torch.func.debug_unwrap(self.computed)  # it may be left over from a vmap
            twin.computed = memo[id(self.computed)] = value.detach().clone()
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        """In a file, torch's hook: what is saved here loads where funcparam is not."""
        own = {name: item for name, item in vars(self).items() if name != "computed"}
        return object.__new__, type(self).__bases__[-1:], own

    def remove(self, module: nn.Module) -> None:
        super().remove(module)  # pyright: ignore
        _forget_keys(module, self.name)


class WeightNorm(_Mended, WeightNormHook):
    def compute_weight(self, module: nn.Module) -> Tensor:
        magnitude, direction = (getattr(module, f"{self.name}_{letter}") for letter in "gv")
        if self.dim == -1:  # as torch, so that in half precision too 1 is what it starts with
            return direction * (magnitude / direction.norm())
        transform = WeightNormTransform(self.dim)
        return transform.forward({"magnitude": magnitude, "direction": direction}, {})


class SpectralNorm(_Mended, SpectralNormHook):
    pass


# code of others knows the hooks by these, since the function hides torch's module of its name
WeightNorm.__module__ = "torch.nn.utils.weight_norm"
SpectralNorm.__module__ = "torch.nn.utils.spectral_norm"


def mended(self: WeightNormHook | SpectralNormHook, state: dict[str, Any]) -> None:
    """`__setstate__` of torch's two hooks while compat is installed: out of a file come ours."""
    vars(self).update(state)
    self.__class__ = WeightNorm if isinstance(self, WeightNormHook) else SpectralNorm  # pyright: ignore


@dataclass(frozen=True)
class _NewKeys:
    """Takes the keys of the parametrization in a checkpoint for those of the hook.

    Args:
        name: the parameter.
        spelling: for each suffix of a key of the hook what the parametrization calls it.
    """

    name: str
    spelling: tuple[tuple[str, str], ...]

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        start = f"{prefix}parametrizations.{self.name}."
        if all(start + new in state_dict for _, new in self.spelling):
            for old, new in self.spelling:
                state_dict[f"{prefix}{self.name}_{old}"] = state_dict.pop(start + new)

    def __deepcopy__(self, memo: dict[int, Any]) -> _NewKeys:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """In a file, a hook of torch's that does nothing: the file loads without funcparam."""
        return partial, (nn.Identity,)


def weight_norm(module: nn.Module, name: str = "weight", dim: int | None = 0) -> nn.Module:
    """Train the length and the direction of a weight separately, by a hook before the forward.

    As `torch.nn.utils.weight_norm`, but second derivatives and `vmap` are right, the module can
    be copied, nothing is deprecated, and `weight_v` is the parameter that was there before.
    Checkpoints of the newer `parametrizations.weight_norm` load too.

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
    hook = WeightNorm(name, -1 if dim is None else dim)
    magnitude = torch.norm_except_dim(weight.detach(), 2, hook.dim)
    delattr(module, name)
    module.register_parameter(f"{name}_g", nn.Parameter(magnitude, weight.requires_grad))
    module.register_parameter(f"{name}_v", weight)
    hook(module, None)
    module.register_forward_pre_hook(hook)
    keys = _NewKeys(name, (("g", "original0"), ("v", "original1")))
    module.register_load_state_dict_pre_hook(keys)
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
    copied after a forward, and checkpoints of the newer `parametrizations.spectral_norm` load too.

    Example:
        >>> import copy, torch
        >>> from funcparam.compat.hooks import spectral_norm
        >>> layer = spectral_norm(torch.nn.Linear(3, 5))
        >>> _ = layer(torch.ones(1, 3))
        >>> list(copy.deepcopy(layer).state_dict())
        ['bias', 'weight_orig', 'weight_u', 'weight_v']
    """
    keys = _NewKeys(name, (("orig", "original"), ("u", "0._u"), ("v", "0._v")))
    before_torchs = module.register_load_state_dict_pre_hook(keys)
    try:
        torch_spectral_norm(module, name, n_power_iterations, eps, dim)
    except BaseException:
        before_torchs.remove()
        raise
    for hook in vars(module)["_forward_pre_hooks"].values():
        if type(hook) is SpectralNormHook and hook.name == name:
            hook.__class__ = SpectralNorm
    return module


def remove_weight_norm(module: nn.Module, name: str = "weight") -> nn.Module:
    """Make a plain parameter of a weight that `weight_norm` computes, the hook or the newer one.

    Raises:
        ValueError: there is neither on the parameter.

    Example:
        >>> import torch
        >>> from funcparam.compat import hooks, parametrizations
        >>> layer = parametrizations.weight_norm(torch.nn.Linear(3, 5))
        >>> list(hooks.remove_weight_norm(layer).state_dict())
        ['bias', 'weight']
    """
    return _remove(module, name, is_weight_norm, torch_remove_weight_norm)


def remove_spectral_norm(module: nn.Module, name: str = "weight") -> nn.Module:
    """Make a plain parameter of a weight that `spectral_norm` computes, the hook or the newer one.

    Raises:
        ValueError: there is neither on the parameter.
    """
    return _remove(module, name, is_spectral_norm, torch_remove_spectral_norm)


def _remove(
    module: nn.Module,
    name: str,
    is_newer: Callable[[nn.Module], bool],
    remove_hook: Callable[[nn.Module, str], nn.Module],
) -> nn.Module:
    if is_parametrized(module, name):
        parts = list(cast("nn.ModuleList", cast("Any", module.parametrizations)[name]))
        if len(parts) == 1 and is_newer(parts[0]):
            return remove_parametrizations(module, name)
    remove_hook(module, name)
    _forget_keys(module, name)
    return module


def _forget_keys(module: nn.Module, name: str) -> None:
    """Take off what renames keys before loading; torch leaves its own, and no plain key loads."""
    loading = vars(module)["_load_state_dict_pre_hooks"]
    for key, wrapped in list(loading.items()):
        hook = getattr(wrapped, "hook", wrapped)
        if isinstance(hook, SpectralNormLoadStateDictPreHook):
            hook = cast("SpectralNormHook", hook.fn)
        if isinstance(hook, (_NewKeys, SpectralNormHook)) and hook.name == name:
            del loading[key]
