"""Between modules that hold parametrizations and the functional form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm as SpectralNormHook
from torch.nn.utils.weight_norm import WeightNorm as WeightNormHook

import funcparam as fp
from funcparam.compat import _private
from funcparam.compat._legacy import Legacy, Specs
from funcparam.compat._tensors import raw_tensors, register
from funcparam.compat._torch_names import from_hook, from_torch_names, with_torch_names
from funcparam.compat.hooks import remove_spectral_norm, remove_weight_norm
from funcparam.compat.parametrize import (
    is_parametrized,
    register_parametrization,
    remove_parametrizations,
)
from funcparam.transforms import AnyTransform

Hook = WeightNormHook | SpectralNormHook


class _Found(NamedTuple):
    """One parametrized tensor of a module, as a transform with its raw and state."""

    transform: AnyTransform
    raw: Any
    state: dict[str, Tensor]


def to_functional(
    module: nn.Module, *, native: bool = True
) -> tuple[nn.Module, fp.Parametrization[dict[str, Tensor]], dict[str, Any], dict[str, Any]]:
    """Take the parametrizations of a module apart: a plain network, and how to parametrize it.

    `p(raw, state)` are the values that `module` computes in evaluation mode. What funcparam's
    transforms parametrize becomes these transforms, and so do torch's own `weight_norm`,
    `spectral_norm` and `orthogonal`, the older hooks included: values are equal to rounding, and
    the second derivatives are right. Any other module becomes a transform that calls it, with its
    parameters in raw and its buffers in state; values are equal bit for bit.

    Args:
        module: a module parametrized by `torch.nn.utils.parametrize`, by `funcparam.compat` or by
            the hooks `torch.nn.utils.weight_norm` and `spectral_norm`, at any depth. It stays as
            it is.
        native: whether torch's own parametrizations become transforms. If not, they are called
            like any other module: equal bit for bit, the wrong second derivatives of torch's
            `weight_norm` too. A hook is no module, and becomes a transform in any case.

    Returns:
        `(net, p, raw, state)`: a copy of `module` without parametrizations, its parametrization,
        and detached copies of the tensors.

    Raises:
        TypeError: an older hook of `spectral_norm` computes a vector.

    Example:
        >>> import torch
        >>> from funcparam.compat import parametrizations, to_functional
        >>> layer = parametrizations.weight_norm(torch.nn.Linear(3, 2))
        >>> net, p, raw, state = to_functional(layer)
        >>> type(net), list(p), torch.equal(p(raw, state)["weight"], layer.weight)
        (<class 'torch.nn.modules.linear.Linear'>, ['weight'], True)
    """
    found = {path: _take(held, native=native) for path, held in _lists(module)}
    for path, owner, hook in _hooks(module):
        found[path] = _Found(*from_hook(hook, owner))
    net = _plain(module)
    p = fp.parametrize(net, {path: item.transform for path, item in found.items()})
    given = {name: t for name, t in _named_tensors(net) if name not in p}
    raw = {e.name: found[e.name].raw if e.name in found else given[e.name] for e in p.entries}
    state = {path: item.state for path, item in found.items() if item.state}
    return net, p, _copy(raw), _copy(state)


def to_stateful(
    net: nn.Module,
    p: fp.Parametrization[dict[str, Tensor]],
    raw: Mapping[str, Any],
    state: Mapping[str, Any],
) -> nn.Module:
    """Put a functional parametrization into a module: the way back from `to_functional`.

    Args:
        net: the plain network that `p` was made for. It stays as it is.
        p: its parametrization.
        raw: as `p.init` or [`to_functional`][funcparam.compat.to_functional] returns it.
        state: likewise.

    Returns:
        A copy of `net`, parametrized by `funcparam.compat`, that computes the same values.
        Tied weights stay tied: they share one parametrization.

    Raises:
        TypeError, ValueError: raw or state are not those of `p`.

    Example:
        >>> import torch, funcparam as fp
        >>> from funcparam.compat import to_stateful
        >>> from funcparam.transforms import SpectralNorm
        >>> net = torch.nn.Linear(3, 2)
        >>> p = fp.parametrize(net, {"weight": SpectralNorm()})
        >>> list(to_stateful(net, p, *p.init(net)).state_dict())[1]
        'parametrizations.weight.original'
    """
    for name, transform in p.items():
        if transform.takes():
            raise ValueError(
                f"{name!r}: {transform!r} takes the value of another weight, which a module that is"
                " parametrized in place cannot hand it. Keep it functional, or fold it"
            )
    module = fp.fold(net, p(raw, state))
    for entry in p.entries:
        if entry.transform is None:
            continue
        name = entry.name
        parts, raws = _modules(entry.transform, raw[name], state.get(name, {}))
        held = _register(module, name, [part.train(module.training) for part in parts], raws)
        for alias in entry.names[1:]:
            _register(module, alias, parts, raws)
            cast("Any", held).shared = True
            owner, _, local = alias.rpartition(".")
            cast("Any", module.get_submodule(owner).parametrizations)[local] = held
    return module


def _hooks(module: nn.Module) -> Iterator[tuple[str, nn.Module, Hook]]:
    """Every older hook below `module`, by the path of the tensor that it computes."""
    for prefix, owner in cast("Iterator[tuple[str, nn.Module]]", module.named_modules()):
        for hook in vars(owner)["_forward_pre_hooks"].values():
            if isinstance(hook, Hook):
                yield f"{prefix}." * bool(prefix) + hook.name, owner, hook


def _lists(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every parametrized tensor below `module`, by path, with its ParametrizationList."""
    for prefix, owner in cast("Iterator[tuple[str, nn.Module]]", module.named_modules()):
        if is_parametrized(owner):
            for name, held in cast("nn.ModuleDict", owner.parametrizations).items():
                yield (f"{prefix}." if prefix else "") + name, held


def _take(held: nn.Module, *, native: bool) -> _Found:
    parts = list(cast("nn.ModuleList", held))
    raws = raw_tensors(held)
    if len(parts) == 1 and (native or type(parts[0]) not in _private.TORCHS_PARTS):
        direct = from_torch_names(parts[0], raws)
        if direct is not None:
            return _Found(*direct)
    return _legacy(parts, raws, cast("Any", held))


def _legacy(parts: list[nn.Module], raws: tuple[Tensor, ...], held: nn.Module) -> _Found:
    names = ["original"] if len(raws) == 1 else [f"original{i}" for i in range(len(raws))]
    raw, state = dict(zip(names, raws, strict=True)), dict[str, Tensor]()
    for i, part in enumerate(parts):
        raw |= {f"{i}.{name}": t for name, t in part.named_parameters()}
        state |= {f"{i}.{name}": t for name, t in part.named_buffers()}
    with torch.no_grad():
        value = cast("Tensor", deepcopy(held).eval()())
    shells = tuple(deepcopy(part).to("meta") for part in parts)
    transform = Legacy(shells, (tuple(value.shape), value.dtype), _specs(raw), _specs(state))
    return _Found(transform, raw, state)


def _specs(tensors: Mapping[str, Tensor]) -> Specs:
    return tuple((name, tuple(t.shape), t.dtype) for name, t in tensors.items())


def _plain(module: nn.Module) -> nn.Module:
    """A copy without parametrizations, in the same training mode."""
    net = deepcopy(module, cast("dict[int, Any]", _memo(module)))
    parts = list(net.modules())
    modes = [part.training for part in parts]
    net.eval()  # so that taking the values does not advance anything
    for part in parts:
        if is_parametrized(part):
            for name in list(cast("nn.ModuleDict", part.parametrizations)):
                remove_parametrizations(part, name)
        for hook in list(vars(part)["_forward_pre_hooks"].values()):
            if isinstance(hook, WeightNormHook):
                remove_weight_norm(part, hook.name)
            elif isinstance(hook, SpectralNormHook):
                remove_spectral_norm(part, hook.name)
    for part, mode in zip(parts, modes, strict=True):
        part.training = mode
    return net


def _memo(module: nn.Module) -> dict[int, Tensor]:
    """For `deepcopy`: what hooks left in the modules has a history, and so no copy of its own."""
    values = [vars(owner)[hook.name] for _, owner, hook in _hooks(module)]
    return {id(x): torch.func.debug_unwrap(x).detach().clone() for x in values}


class _Given(nn.Module):
    """Stands in at registration, so that raw becomes exactly the given tensors."""

    def __init__(self, raws: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.raws = raws

    def forward(self, *raws: Tensor) -> Tensor:
        return raws[0]

    def right_inverse(self, value: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.raws[0] if len(self.raws) == 1 else self.raws


def _register(
    module: nn.Module, path: str, parts: list[nn.Module], raws: tuple[Tensor, ...]
) -> nn.Module:
    prefix, _, name = path.rpartition(".")
    owner = module.get_submodule(prefix)
    _untie(owner, name)
    register_parametrization(owner, name, _Given(raws), unsafe=True)
    held = cast("nn.ModuleList", cast("Any", owner.parametrizations)[name])
    held[0] = parts[0]
    held.extend(parts[1:])
    return held


def _untie(owner: nn.Module, name: str) -> None:
    """Let a tensor be another one of the same shape and kind; raw and value are given."""
    tensor = getattr(owner, name)
    other = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    delattr(owner, name)
    register(owner, name, nn.Parameter(other) if isinstance(tensor, nn.Parameter) else other)


def _modules(
    transform: AnyTransform, raw: Any, state: Mapping[str, Tensor]
) -> tuple[list[nn.Module], tuple[Tensor, ...]]:
    """Modules that do what `transform` does, with the state in them, and the raw for them."""
    raw, own = _copy(raw), dict[str, Tensor](_copy(state))
    if isinstance(transform, Legacy):
        parts = [_revived(i, shell, raw, own) for i, shell in enumerate(transform.parts)]
        return parts, tuple(t for name, t in raw.items() if "." not in name)
    part, raws = with_torch_names(transform, raw, own)
    return [part], raws


def _revived(i: int, shell: nn.Module, raw: Any, state: Any) -> nn.Module:
    """A legacy module with its parameters and buffers back."""
    part = deepcopy(shell)
    for path, tensor in {**raw, **state}.items():
        position, _, name = path.partition(".")
        if position == str(i) and name:
            prefix, _, local = name.rpartition(".")
            tables = _private.tables(part.get_submodule(prefix))
            if path in raw:
                grad = tables[0][local].requires_grad
                tables[0][local] = nn.Parameter(tensor, requires_grad=grad)
            else:
                tables[1][local] = tensor
    return part


def _named_tensors(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from net.named_parameters(remove_duplicate=False)
    yield from net.named_buffers(remove_duplicate=False)


def _copy(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    return {name: _copy(item) for name, item in tree.items()}
