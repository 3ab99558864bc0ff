"""The functions of `torch.nn.utils.parametrize`, over classes that instances share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from funcparam.compat import _private, _ties
from funcparam.compat._adapter import TransformModule, as_module
from funcparam.compat._cache import cached
from funcparam.compat._classes import original_class, parametrized_class
from funcparam.compat._gate import ShowsTorchsCache
from funcparam.compat._list import ParametrizationList, like
from funcparam.compat._tensors import (
    all_or_nothing,
    own_tensors,
    put,
    register,
    shaped,
    state_kept,
    tree,
)

__all__ = [
    "ParametrizationList",
    "cached",
    "is_parametrized",
    "register_parametrization",
    "remove_parametrizations",
    "transfer_parametrizations_and_params",
    "type_before_parametrizations",
]

sys.modules[__name__].__class__ = ShowsTorchsCache


def register_parametrization(
    module: nn.Module, tensor_name: str, parametrization: Any, *, unsafe: bool = False
) -> nn.Module:
    """Parametrize a parameter or buffer of `module`; on one that already is, add to the chain.

    From then on `module.<tensor_name>` is computed from the raw tensors at
    `module.parametrizations.<tensor_name>.original`, and assigning to it sets these to the right
    inverse. If anything fails, the module is as it was before.

    Args:
        module: the module; it is changed and returned.
        tensor_name: the attribute.
        parametrization: an `nn.Module` whose `forward` maps raw to the value, with an optional
            `right_inverse`; or a funcparam transform; or a function. It gets the training mode of
            the module.
        unsafe: whether the value may differ from the tensor in dtype and shape.

    Raises:
        ValueError: there is no such tensor, or the parametrization does not fit it.

    Example:
        >>> import torch
        >>> from funcparam.compat.parametrize import register_parametrization
        >>> layer = register_parametrization(torch.nn.Linear(2, 2), "weight", torch.exp)
        >>> bool((layer.weight > 0).all())
        True
    """
    part = as_module(parametrization)
    if is_parametrized(module, tensor_name):
        with all_or_nothing(tree(_lists(module)[tensor_name], part)):
            part.train(module.training)
            _append(module, tensor_name, part, unsafe)
        return module
    may_be_tied = _ties.may_be_tied(module, tensor_name)
    original = _tensor(module, tensor_name)
    with all_or_nothing([*_concerned(module), *tree(part)], [original]):
        part.train(module.training)
        held = ParametrizationList([part], original, unsafe=unsafe)
        if may_be_tied and held.moved:
            _expect_untied(module, tensor_name, held)
        delattr(module, tensor_name)
        if not is_parametrized(module):
            module.parametrizations = nn.ModuleDict()
        lists = _lists(module)
        _set_class(module, {*lists, tensor_name})
        lists[tensor_name] = held
    return module


def _expect_untied(module: nn.Module, name: str, held: ParametrizationList) -> None:
    tensor = _tensor(module, name)
    own = ((held, raw) for raw in held.raw_names)
    other = _ties.other_owner(tensor, (module, name), *own)
    if other is not None:
        raise ValueError(
            f"'{name}' of {type(module).__name__}({module.extra_repr()}) is also {other}, which"
            " would change with it or come apart from it. To share the parametrization, delete the"
            " other attribute, register here, and call transfer_parametrizations_and_params; to"
            " untie the two, give one of them a parameter of its own first"
        )


def _append(module: nn.Module, name: str, part: nn.Module, unsafe: bool) -> None:  # noqa: FBT001
    plain = type(part) is TransformModule  # torch's own are made with the state that they need
    value: Any = None
    if plain or not unsafe:  # else nothing is read: a read may be a step of what evolves
        value = getattr(module, name)
    if plain:
        part.follow(value)
    raw_names = getattr(part, "raw_names", None)
    if raw_names:
        raise ValueError(
            f"{getattr(part, 'transform', part)} has several raw tensors ({', '.join(raw_names)}),"
            f" so it can only come first; '{name}' has a parametrization already"
        )
    if not unsafe:
        _check_addition(name, value, part)
        if plain:
            part.follow(value)  # the check has assigned to it
    held = cast("ParametrizationList", _lists(module)[name])
    held.append(part)
    held.unsafe = held.unsafe or unsafe


def _check_addition(name: str, value: Tensor, part: nn.Module) -> None:
    """Raise unless `part` and its right inverse map tensors like `value` to tensors like it."""
    out: Any = part(value)
    if not isinstance(out, Tensor):
        raise ValueError(f"A parametrization must return a tensor. Got {type(out).__name__}.")
    for what in ("dtype", "shape"):
        if getattr(out, what) != getattr(value, what):
            raise ValueError(
                f"Registering a parametrization may not change the {what} of the tensor, unless"
                " the `unsafe` flag is enabled.\n"
                f"module.{name}.{what}: {getattr(value, what)}\n"
                f"parametrization(module.{name}).{what}: {getattr(out, what)}"
            )
    if not hasattr(part, "right_inverse"):
        return
    try:
        back: Any = cast("Any", part).right_inverse(out)
    except NotImplementedError:
        return
    if not isinstance(back, Tensor):
        raise ValueError(
            f"parametrization.right_inverse must return a tensor. Got: {type(back).__name__}"
        )
    for what in ("dtype", "shape"):
        if getattr(back, what) != getattr(value, what):
            raise ValueError(
                f"The tensor returned by parametrization.right_inverse must have the same {what} "
                f"as module.{name}, unless the `unsafe` flag is enabled.\n"
                f"module.{name}.{what}: {getattr(value, what)}\n"
                f"returned {what}: {getattr(back, what)}"
            )


def _tensor(module: nn.Module, name: str) -> Tensor:
    """The plain parameter or buffer `name`."""
    parameters, buffers, _ = _private.tables(module)
    if name not in parameters and name not in buffers:
        raise ValueError(
            f"Module '{module}' does not have a parameter, a buffer, or a "
            f"parametrized element with name '{name}'"
        )
    tensor = getattr(module, name)
    if tensor is None:
        raise ValueError(
            f"'{name}' of module '{module}' is None: this module was built without it, so there is"
            " nothing to parametrize"
        )
    return shaped(module, name, tensor)


def is_parametrized(module: nn.Module, tensor_name: str | None = None) -> bool:
    """Whether `module` has a parametrization: on `tensor_name`, or on anything if that is None."""
    lists = getattr(module, "parametrizations", None)
    if not isinstance(lists, nn.ModuleDict):
        return False
    return len(lists) > 0 if tensor_name is None else tensor_name in lists


def remove_parametrizations(
    module: nn.Module,
    tensor_name: str,
    leave_parametrized: bool = True,  # noqa: FBT001
) -> nn.Module:
    """Make `tensor_name` a plain parameter or buffer again.

    If anything fails, the module is as it was before.

    Args:
        module: the module; it is changed and returned.
        tensor_name: the attribute.
        leave_parametrized: whether it becomes the value, or else the raw tensor.

    Raises:
        ValueError: it is not parametrized; or it has several raw tensors and
            `leave_parametrized` is False.

    Example:
        >>> import torch
        >>> from funcparam.compat.parametrize import (
        ...     register_parametrization, remove_parametrizations
        ... )
        >>> layer = register_parametrization(torch.nn.Linear(2, 2), "weight", torch.exp)
        >>> type(remove_parametrizations(layer, "weight"))
        <class 'torch.nn.modules.linear.Linear'>
    """
    if not is_parametrized(module, tensor_name):
        raise ValueError(f"Module {module} does not have a parametrization on {tensor_name}")
    lists = _lists(module)
    held = cast("ParametrizationList", lists[tensor_name])
    with all_or_nothing([module, lists, *tree(*held)], own_tensors(held)):
        tensor = _plain_tensor(module, tensor_name, held, leave_parametrized)
        del lists[tensor_name]
        if not lists:
            delattr(module, "parametrizations")
        _set_class(module, set(lists))
        register(module, tensor_name, tensor)
    return module


def _plain_tensor(
    module: nn.Module,
    name: str,
    held: ParametrizationList,
    keep_value: bool,  # noqa: FBT001
) -> Tensor:
    """What becomes of a tensor when its parametrizations go."""
    if not keep_value:
        if not held.is_tensor:
            raise ValueError(
                "Cannot leave unparametrized (`leave_parametrized=False`) a tensor "
                "that is parametrized in terms of a sequence of tensors."
            )
        return held.original
    with torch.no_grad():
        value = getattr(module, name)
        if not held.is_tensor:
            return _from_several(held, value.detach())
        original = held.original
        if getattr(held, "shared", False):  # raw stays what it is to the other module
            return like(original, value.clone())
        _fill(original, value)
    return original


def _from_several(held: ParametrizationList, value: Tensor) -> Tensor:
    """A parameter with the value: the one that was there before, if it is one of raw."""
    raws = _private.tables(held)[0]
    if not raws:
        return value
    if not any(raw.requires_grad for raw in raws.values()):
        return nn.Parameter(value, requires_grad=False)
    before: Any = raws.get(getattr(held, "before", ""))
    swap = torch.__future__.get_swap_module_params_on_conversion()
    if swap or getattr(held, "shared", False) or not _can_hold(before, value):
        return nn.Parameter(value)
    put(before, value)
    return before


def _can_hold(raw: Tensor | None, value: Tensor) -> bool:
    if type(raw) is not nn.Parameter or type(value) is not Tensor:
        return False
    return (raw.shape, raw.dtype, raw.device) == (value.shape, value.dtype, value.device)


def _fill(original: Tensor, value: Tensor) -> None:
    if type(original) is Tensor:
        put(original, value)
        return
    try:
        put(original, value)
    except RuntimeError as error:
        raise RuntimeError(
            "Calling remove_parametrizations() with leave_parametrized=True "
            "for a parameter that is an instance of a tensor subclass requires "
            "set_() to be implemented correctly for the tensor subclass."
            "Alternatively, one can opt into the swap_tensors path"
            "Either set leave_parametrized=False or provide a working implementation"
            "for set_() in the tensor subclass or set "
            "torch.__future__.set_swap_module_params_on_conversion(True)."
        ) from error


def type_before_parametrizations(module: nn.Module) -> type:
    """The class that `module` had before anything of it was parametrized; else its class."""
    return original_class(module) if is_parametrized(module) else type(module)


def transfer_parametrizations_and_params(
    from_module: nn.Module, to_module: nn.Module, tensor_name: str | None = None
) -> nn.Module:
    """Let `to_module` share the parametrizations of `from_module`, and their raw tensors.

    Args:
        from_module: where they are; if it has none, nothing happens.
        to_module: gets them, and the tensors themselves where it has none of that name.
        tensor_name: the one to transfer; all if None.

    Returns:
        `to_module`.
    """
    if not is_parametrized(from_module):
        return to_module
    names = [*_lists(from_module)] if tensor_name is None else [tensor_name]
    modules = [*_concerned(to_module), *tree(_lists(from_module))]
    with all_or_nothing(modules, own_tensors(to_module)):
        for name in names:
            _transfer(from_module, to_module, name)
    return to_module


def _transfer(from_module: nn.Module, to_module: nn.Module, name: str) -> None:
    source = cast("ParametrizationList", _lists(from_module)[name])
    if not hasattr(to_module, name):
        setattr(to_module, name, nn.Parameter(getattr(from_module, name)))
    with state_kept(source):  # registering takes the state that belongs to the other's value
        for part in source:
            register_parametrization(to_module, name, part)
    target = cast("ParametrizationList", _lists(to_module)[name])
    source.shared = target.shared = True
    for raw in source.raw_names:
        setattr(target, raw, getattr(source, raw))


def _concerned(module: nn.Module) -> Iterator[nn.Module]:
    """The module and everything under `module.parametrizations`."""
    yield module
    if is_parametrized(module):
        yield from tree(_lists(module))


def _lists(module: nn.Module) -> nn.ModuleDict:
    return vars(module)["_modules"]["parametrizations"]


@_private.not_compiled("a module gets another class")
def _set_class(module: nn.Module, names: set[str]) -> None:
    """Give `module` the class in which exactly `names` are parametrized."""
    cls = original_class(module) if _has_injected_class(module) else type(module)
    new = parametrized_class(cls, frozenset(names)) if names else cls
    object.__setattr__(module, "__class__", new)  # past nn.Module.__setattr__


def _has_injected_class(module: nn.Module) -> bool:
    """Whether the class is one of ours, or one that torch made for this instance alone."""
    cls = type(module)
    return cls.__module__ == "torch.nn.utils.parametrize" and cls.__name__.startswith(
        "Parametrized"
    )
