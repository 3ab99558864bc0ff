"""The classes that modules get while they are parametrized: one for each class and set of names."""

from __future__ import annotations

import types
from collections.abc import Callable
from copy import deepcopy
from threading import RLock
from typing import Any, cast
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn

from funcparam.compat import _access, _private

# The one cache of the library. Values are weak: a subclass holds its base, the key.
_CLASSES: WeakKeyDictionary[type, WeakValueDictionary[frozenset[str], type]] = WeakKeyDictionary()
_LOCK = RLock()


def parametrized_class(cls: type, names: frozenset[str]) -> type:
    """The class for instances of `cls` whose tensors `names` are parametrized.

    Instances of one class with the same names share it, so that equal modules have equal types
    and a copy can go its own way.
    """
    with _LOCK:
        made = _CLASSES.setdefault(cls, WeakValueDictionary())
        found = made.get(names)
        if found is None:
            found = made[names] = _make(cls, names)
        return found


def original_class(module: nn.Module) -> type:
    """The class that the module had before anything was parametrized."""
    return type(module).__bases__[0]


def _make(cls: type, names: frozenset[str]) -> type:
    members: dict[str, Any] = {
        "__module__": "torch.nn.utils.parametrize",  # torch.compile looks into such classes
        "__getstate__": _refuse_pickle,
        **{name: _tensor_property(name) for name in sorted(names)},
    }
    if not hasattr(cls, "__deepcopy__"):
        members["__deepcopy__"] = _deepcopy
    meta = type("SharedType", (_Shared, type(cls)), {})
    made = types.new_class(
        f"Parametrized{cls.__name__}",
        (cls,),
        {"metaclass": meta},
        lambda namespace: namespace.update(members),
    )
    made.__qualname__ = made.__name__
    type.__setattr__(made, "__setattr__", _setting(made, names))
    for name in ("reset_parameters", "_reset_parameters"):
        if callable(getattr(cls, name, None)):
            type.__setattr__(made, name, _writing_back(made, name))
    type.__setattr__(made, "_load_from_state_dict", _loading(made))
    return made


class _Shared(type):
    """Refuses what torch's own functions would do to a class that instances share."""

    def __setattr__(cls, name: str, value: Any) -> None:
        if isinstance(value, property):  # what torch's registration would set
            raise _refuse_change(name)
        super().__setattr__(name, value)

    def __delattr__(cls, name: str) -> None:
        if isinstance(vars(cls).get(name), property):
            raise _refuse_change(name)
        super().__delattr__(name)


def _refuse_change(name: str) -> RuntimeError:
    return RuntimeError(
        f"'{name}' belongs to a module that funcparam.compat parametrized, whose class other"
        " modules share: use the functions of funcparam.compat.parametrize, or"
        " funcparam.compat.install()"
    )


def _tensor_property(name: str) -> property:
    def get(self: nn.Module) -> Tensor:
        if torch.jit.is_scripting():  # pyright: ignore[reportPrivateImportUsage]
            raise RuntimeError("Parametrization is not working with scripting.")
        return _access.read(self, name)

    def put(self: nn.Module, value: Tensor) -> None:
        if torch.jit.is_scripting():  # pyright: ignore[reportPrivateImportUsage]
            raise RuntimeError("Parametrization is not working with scripting.")
        _access.assign(self, name, value)

    # a compiler that traces one read, and nothing around it, could not see what was written since
    _private.run_eagerly_alone(cast("types.FunctionType", get))
    return property(get, put)


def _setting(cls: type, names: frozenset[str]) -> Callable[..., None]:
    """Assignment in which a parameter is a value like any other, and not a new one."""

    def __setattr__(self: nn.Module, name: str, value: Any) -> None:  # noqa: N807
        if name in names and isinstance(value, nn.Parameter):
            getattr(type(self), name).__set__(self, value)
        else:
            super(cls, self).__setattr__(name, value)  # pyright: ignore

    return __setattr__


def _refuse_pickle(self: nn.Module) -> Any:
    raise RuntimeError(
        "Serialization of parametrized modules is only "
        "supported through state_dict(). See:\n"
        "https://pytorch.org/tutorials/beginner/saving_loading_models.html"
        "#saving-loading-a-general-checkpoint-for-inference-and-or-resuming-training"
    )


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """What `copy.deepcopy` does without `__getstate__`, which refuses."""
    cls = type(self)
    twin = memo[id(self)] = cls.__new__(cls)
    own = {name: item for name, item in vars(self).items() if name not in _access.PASSING}
    twin.__dict__ = deepcopy(own, memo)
    for slot in _private.slot_names(cls):
        if hasattr(self, slot):
            setattr(twin, slot, deepcopy(getattr(self, slot), memo))
    return twin


def _writing_back(cls: type, name: str) -> Callable[..., Any]:
    """The class's own initialisation, on the values; what it wrote to them goes to raw."""

    def reset(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _access.writing_back(self):
            return getattr(cast("Any", super(cls, self)), name)(*args, **kwargs)

    reset.__name__ = name
    return reset


def _loading(cls: type) -> Callable[..., None]:
    """Loading from a state_dict, in which parametrizations may know older names."""

    def load(self: nn.Module, *args: Any) -> None:
        # a hook, so that it comes after those of users, which may rename to the older names
        handle = self.register_load_state_dict_pre_hook(_rename_legacy_keys)
        try:
            super(cls, self)._load_from_state_dict(*args)  # pyright: ignore
        finally:
            handle.remove()

    load.__name__ = "_load_from_state_dict"
    return load


def _rename_legacy_keys(module: nn.Module, state_dict: Any, prefix: str, *_: Any) -> None:
    for name, parts in cast("nn.ModuleDict", module.parametrizations).items():
        for part in cast("nn.ModuleList", parts):
            rename = getattr(part, "rename_legacy_keys", None)
            if rename is not None:
                rename(state_dict, prefix, name)
