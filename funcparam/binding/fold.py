"""A network with other tensors in the place of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn

from funcparam.parametrization.names import closest
from funcparam.parametrization.tree import flatten
from funcparam.transforms.contract.signature import describe


def fold(net: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """Return a plain copy of `net` with `values` written into it.

    Args:
        net: any module; it stays as it is. Its tensors that `values` does not name are copied.
        values: tensors by name, such as `p(raw, state)` returns. One name of a tie is enough.

    Returns:
        A module with the classes, names, order and `requires_grad` of `net`, which shares no
        memory with `net` or `values` and does not need funcparam.

    Raises:
        TypeError: `values` is not a mapping.
        ValueError: a name is not one of the module's, or a shape differs.

    Example:
        >>> import torch, funcparam as fp
        >>> from funcparam.transforms import Orthogonal
        >>> net = torch.nn.Linear(2, 2)
        >>> p = fp.parametrize(net, {"weight": Orthogonal()})
        >>> plain = fp.fold(net, p(*p.init(net)))
        >>> list(plain.state_dict())
        ['weight', 'bias']
    """
    if not isinstance(values, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"values: expected a dict of tensors; got {describe(values)}")
    every = flatten(net)[0]
    leaves = {name: leaf for leaf in every for name in leaf.names}
    chosen: dict[int, Tensor] = {}
    for name, value in values.items():
        if not isinstance(value, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"values[{name!r}]: expected a tensor; got {describe(value)}. fold takes values,"
                " p(raw, state), not raw"
            )
        if name not in leaves:
            raise ValueError(f"values: unknown name {name!r}; {closest(name, [*leaves])}")
        old = leaves[name].tensor
        if old.shape != value.shape:
            raise ValueError(
                f"values[{name!r}]: expected shape {tuple(old.shape)}; got {tuple(value.shape)}"
            )
        if chosen.setdefault(id(old), value) is not value:
            raise ValueError(f"values: {name!r} is tied; got two different tensors for its tie")

    memo: dict[int, Any] = {}
    for leaf in every:
        old = leaf.tensor
        value = chosen.get(id(old))
        if value is not None:
            own = copied(value, old)
            memo[id(old)] = own if leaf.is_buffer else nn.Parameter(own, old.requires_grad)
    return copy_of(net, memo)


def copied(value: Tensor, like: Tensor) -> Tensor:
    """A value for good, laid out as the tensor whose place it takes."""
    own = torch.empty_like(like, dtype=value.dtype, device=value.device)
    return own.copy_(value.detach())


def copy_of(net: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Copy `net`, with `memo[id(t)]` in the place of each of its tensors `t`, if it is there.

    By deepcopy, so that ties stay ties, what shares memory shares memory, and lists of weights that
    modules keep beside their parameters (RNNs do) hold the new ones too.
    """
    for buffer in net.buffers():
        if not buffer.is_leaf:  # what the network wrote there came with a graph
            memo.setdefault(id(buffer), buffer.detach().clone())
    try:
        return deepcopy(net, memo)
    except RuntimeError as error:
        for prefix, part in cast("Iterator[tuple[str, nn.Module]]", net.named_modules()):
            for name, item in vars(part).items():
                if isinstance(item, Tensor) and not item.is_leaf:
                    path = f"{prefix}." * bool(prefix) + name
                    raise RuntimeError(
                        f"{path!r}: expected a weight that can be copied; got one that a hook"
                        " computed. Remove the hook first (remove_weight_norm,"
                        " remove_spectral_norm), or make it under funcparam.compat.installed()"
                    ) from error
        raise
