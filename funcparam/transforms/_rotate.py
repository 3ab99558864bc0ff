from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from funcparam.transforms.contract.arguments import expect_name
from funcparam.transforms.contract.base import (
    State,
    Transform,
    expect_filled,
    expect_inexact,
    expect_matrix,
)
from funcparam.transforms.contract.precision import autocast_off


@dataclass(frozen=True)
class _Turned(Transform[Mapping[str, Tensor]]):
    """A frozen value, and what is turned by that of another weight."""

    is_adapter: ClassVar[bool] = True

    rotation: str

    def __post_init__(self) -> None:
        expect_name(self, "rotation")

    @abstractmethod
    def _turned(self, base: Tensor, R: Tensor | None) -> Tensor: ...

    def takes(self) -> Mapping[str, str]:
        return {"rotation": self.rotation}

    def forward(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        return self._turned(state["base"], state.get("rotation"))

    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Mapping[str, Tensor], State]:
        return {}, {"base": value}

    def settled(self, state: State) -> State:
        return {**state, "base": self._turned(state["base"], state["rotation"].mH)}

    def violation(self, value: Tensor, state: State) -> Tensor:
        """NaN: it is not measured."""
        return value.real.new_full((), torch.nan)

    def log_abs_det_jacobian(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        """Zero: nothing is free but what other weights have."""
        return state["base"].real.new_zeros(())


@final
@dataclass(frozen=True)
class RotateIn(_Turned):
    r"""A frozen weight whose inputs are turned by the value of another weight.

    $$W = W_0 \operatorname{diag}(R, \dots, R)$$

    where `R` is the value of the weight called `rotation`, which has a rule of its own, mostly
    `Orthogonal()`, and may be taken by any number of weights: its gradients add. For a value of
    shape `(..., m, n)` and an `R` of side `r`, which divides `n`, each `r` inputs are turned. Raw
    is an empty dict, and state is `{"base": W_0}`. Real and complex. Every value is kept at init,
    whatever `R` is: `W_0` is the value turned back.

    A network computes the same for every orthogonal `R` where inputs that are turned come from
    outputs that are: `RotateOut(R)` of what makes them, `RotateIn(R)` of what takes them. What is
    quantized behind it does not: `Chain(RotateIn("R"), FakeQuantize(4, dim=0))` trains `R` to be
    good for 4 bits. Without a parametrization, which hands `R`, the map is that of the identity.

    Args:
        rotation: the name of the other weight. Of a network it is a parameter or a buffer that no
            layer needs to use: `net.register_parameter("R", nn.Parameter(torch.eye(64)))`.

    Raises:
        TypeError: `rotation` is not a string.
        ValueError: at `fp.parametrize`, if there is no such weight, it has no rule, or it is not a
            square matrix whose side divides the inputs.

    Example:
        >>> import torch, funcparam as fp
        >>> from funcparam.transforms import Orthogonal, RotateIn, RotateOut
        >>> weights = {"R": torch.eye(2), "up": torch.randn(2, 3), "down": torch.randn(4, 2)}
        >>> p = fp.parametrize(
        ...     weights, {"R": Orthogonal(), "up": RotateOut("R"), "down": RotateIn("R")}
        ... )
        >>> raw, state = p.init(weights)
        >>> raw["R"] = raw["R"] + 1
        >>> turned = p(raw, state)
        >>> product = weights["down"] @ weights["up"]
        >>> torch.allclose(turned["down"] @ turned["up"], product, atol=1e-6)
        True

    Source: Ashkboos et al., QuaRot, arXiv 2404.00456; Liu et al., SpinQuant, arXiv 2405.16406.
    """

    def _turned(self, base: Tensor, R: Tensor | None) -> Tensor:
        return _turned(base, R)

    def check(self, value: Tensor) -> None:
        super().check(value)
        expect_matrix(self, value)
        expect_filled(self, value)


@final
@dataclass(frozen=True)
class RotateOut(_Turned):
    r"""A frozen weight or bias whose outputs are turned by the value of another weight.

    $$W = \operatorname{diag}(R, \dots, R)^H W_0$$

    As [`RotateIn`][funcparam.transforms.RotateIn], which says more: `R` is the value of the weight
    called `rotation`, raw is an empty dict, and state is `{"base": W_0}`. A value with one
    dimension is a bias; any other has its outputs in the second to last dimension, as the weight of
    a `Linear`.

    Args:
        rotation: the name of the other weight.

    Raises:
        TypeError: `rotation` is not a string.
        ValueError: at `fp.parametrize`, if there is no such weight, it has no rule, or it is not a
            square matrix whose side divides the outputs.

    Example:
        >>> import torch
        >>> from funcparam.transforms import RotateOut
        >>> R = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
        >>> state = {"base": torch.tensor([[1.0], [2.0]]), "rotation": R}
        >>> RotateOut("R").forward({}, state)
        tensor([[ 2.],
                [-1.]])

    Source: as `RotateIn`.
    """

    def _turned(self, base: Tensor, R: Tensor | None) -> Tensor:
        if R is None:
            return base
        return _turned(base, R.conj()) if base.ndim == 1 else _turned(base.mT, R.conj()).mT

    def check(self, value: Tensor) -> None:
        expect_inexact(self, value)
        if value.ndim == 0 or value.numel() == 0:
            raise ValueError(
                f"{self!r} expects a weight or a bias with entries; got shape {tuple(value.shape)}"
            )


def _turned(base: Tensor, R: Tensor | None) -> Tensor:
    """The base with the blocks of its last dimension turned, computed in float32 at least."""
    if R is None:
        return base
    if R.ndim != 2 or R.shape[0] != R.shape[1] or base.shape[-1] % R.shape[0]:
        raise ValueError(
            f"a rotation has to be a square matrix whose side divides {base.shape[-1]};"
            f" got shape {tuple(R.shape)}"
        )
    with autocast_off(base):
        wide = torch.promote_types(torch.promote_types(base.dtype, R.dtype), torch.float32)
        blocks = base.reshape(*base.shape[:-1], base.shape[-1] // R.shape[0], R.shape[0])
        return (blocks.to(wide) @ R.to(wide)).reshape(base.shape).to(base.dtype)
