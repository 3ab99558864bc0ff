"""What `torch.nn.init` writes to a computed tensor goes to raw, while compat is installed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import init

from funcparam.compat._access import initialise
from funcparam.compat._readings import READINGS
from funcparam.compat._tensors import own_tensors

Initialise = Callable[..., Tensor]


def functions() -> Iterator[tuple[str, Initialise, Initialise]]:
    """Name, torch's function and one that writes back, of all that initialise a tensor."""
    for name, function in list(vars(init).items()):
        if inspect.isfunction(function) and name.endswith("_") and not name.startswith("_"):
            yield name, function, _writing_back(function)


def _writing_back(function: Initialise) -> Initialise:
    @functools.wraps(function)
    def write(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = function(tensor, *args, **kwargs)
        owner = None if torch.compiler.is_compiling() else READINGS.whose(tensor)
        if owner is not None and not _is_loaded(*owner):
            module, name = owner
            initialise(module, {name: tensor})
        return out

    return cast("Initialise", write)


def _is_loaded(module: nn.Module, name: str) -> bool:
    """Whether transformers read raw from a file, and has marked it as not to be initialised.

    It then initialises what has no mark, and looks for one on the computed tensor.
    """
    held = cast("Any", module).parametrizations[name]
    return any(getattr(raw, "_is_hf_initialized", False) for raw in own_tensors(held))
