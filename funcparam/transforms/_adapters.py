from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import nan, prod, sqrt
from typing import ClassVar, cast, final

import torch
from torch import Tensor

from funcparam.transforms._lora import LoRA, uniform_factor
from funcparam.transforms._low_rank import singular_value
from funcparam.transforms.contract.arguments import (
    INTEGER,
    NUMBER,
    POSITIVE_INTEGER,
    expect_argument,
    expect_name,
)
from funcparam.transforms.contract.base import (
    AnyTransform,
    State,
    Transform,
    expect_dim,
    expect_filled,
    expect_matrix,
    expect_numbers,
    expect_real,
    largest,
)
from funcparam.transforms.contract.precision import full_precision
from funcparam.transforms.contract.roles import Role
from funcparam.transforms.numerics.linalg import linalg
from funcparam.transforms.numerics.norms import directions, norms
from funcparam.transforms.numerics.orthogonal_maps import cayley_turn


@final
@dataclass(frozen=True)
class DoRA(Transform[Mapping[str, Tensor]]):
    r"""Weight-decomposed low-rank adaptation: LoRA for the direction, a length for each output.

    $$W = m \, \frac{V}{\lVert V \rVert_2}, \qquad V = W_0 + B \operatorname{diag}(s) A$$

    For a value of shape `(m, ...)`, flattened to a matrix `(m, n)` whose rows the norm runs
    over: raw is `{"A": (rank, n), "B": (m, rank), "magnitude": (m,)}`, state `{"base": W_0,
    "scale": s}`, both as in [`LoRA`][funcparam.transforms.LoRA]. Real dtypes. At init `B = 0`
    and the magnitudes are the norms of the value's rows, so every value is kept. A row of zeros
    has no direction: it stays 0, and does not train.

    The derivative is that of the formula. The paper's section 4.3, and peft, leave the norm out
    of it to save memory, which trains a little differently.

    Args:
        rank: the inner dimension, positive.
        alpha: the numerator of the scale; None takes `rank`, hence scale 1.

    Raises:
        ValueError: `rank` is not positive; at `fp.parametrize`, if the value has fewer than two
            dimensions, is not real, or `rank` exceeds a side of its matrix.

    Example:
        >>> import torch
        >>> from funcparam.transforms import DoRA
        >>> raw, state = DoRA(rank=1).right_inverse(torch.tensor([[3.0, 4.0]]))
        >>> raw["magnitude"]
        tensor([5.])
        >>> DoRA(rank=1).forward({**raw, "magnitude": torch.tensor([10.0])}, state)
        tensor([[6., 8.]])

    Source: Liu et al., DoRA, arXiv 2402.09353, equation 5.
    """

    roles: ClassVar[Mapping[str, Role]] = {"A": "factor", "B": "factor", "magnitude": "magnitude"}

    is_adapter: ClassVar[bool] = True
    rank: int
    alpha: float | None = None

    def __post_init__(self) -> None:
        expect_argument(self, "rank", POSITIVE_INTEGER)
        expect_argument(self, "alpha", NUMBER, optional=True)

    @full_precision
    def forward(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        base = state["base"]
        delta = (raw["B"] * state["scale"]) @ raw["A"]
        direction = base.flatten(1) + delta
        unit = directions(direction, (1,))
        return (unit * raw["magnitude"].unsqueeze(1)).reshape(base.shape)

    @full_precision
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Mapping[str, Tensor], State]:
        factors, state = LoRA(self.rank, self.alpha).right_inverse(value, generator=generator)
        return {**factors, "magnitude": norms(value.flatten(1), (1,)).squeeze(1)}, state

    def violation(self, value: Tensor, state: State) -> Tensor:
        """NaN: which rows some lengths bring within low rank of the base is not measured."""
        return value.new_full((), nan)

    def check(self, value: Tensor) -> None:
        expect_real(self, value)
        LoRA(self.rank, self.alpha).check(value)


@final
@dataclass(frozen=True)
class IA3(Transform[Mapping[str, Tensor]]):
    r"""A frozen weight with one trained factor for each output or input.

    $$W = s \, W_0$$

    For a value with `k` indices along `dim` raw is `{"factor": s}`, `(k,)`; state is
    `{"base": W_0}`. Real and complex. At init `s = 1`, so every value is kept exactly.

    The bias stays as it is. peft scales the outputs of the layer, and its bias with them: its layer
    equals this one for `dim=1`, and for `dim=0` without a bias. With one, give the bias a rule too.

    Args:
        dim: the dimension that has a factor for each index: 0 for outputs, 1 for inputs, which
            the paper takes in feed-forward layers.

    Raises:
        ValueError: at `fp.parametrize`, if the value has no dimension `dim`.

    Example:
        >>> import torch
        >>> from funcparam.transforms import IA3
        >>> raw, state = IA3().right_inverse(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> IA3().forward({"factor": torch.tensor([1.0, 10.0])}, state)
        tensor([[ 1.,  2.],
                [30., 40.]])

    Source: Liu et al., arXiv 2205.05638, section 3.3; peft's `IA3Config`.
    """

    roles: ClassVar[Mapping[str, Role]] = {"factor": "magnitude"}

    is_adapter: ClassVar[bool] = True

    dim: int = 0

    def __post_init__(self) -> None:
        expect_argument(self, "dim", INTEGER)

    @full_precision
    def forward(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        base = state["base"]
        scaled = base.movedim(self.dim, -1) * raw["factor"]
        return scaled.movedim(-1, self.dim)

    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Mapping[str, Tensor], State]:
        return {"factor": value.new_ones(value.shape[self.dim])}, {"base": value}

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest |entry| of `value` that no factors of `base` give. The base is the constraint."""
        if "base" not in state:
            raise ValueError(f"{self!r} expects state with a 'base', which is its constraint")
        rows = value.movedim(self.dim, 0)
        rows = rows.reshape(len(rows), prod(rows.shape[1:]))  # -1 is refused where len is 0
        base = state["base"].movedim(self.dim, 0).reshape(rows.shape)
        square = (base.conj() * base).real.sum(1)
        factors = (base.conj() * rows).sum(1) / torch.where(square == 0, 1, square)
        return largest(rows - factors.unsqueeze(1) * base)

    def check(self, value: Tensor) -> None:
        super().check(value)
        expect_dim(self, value, self.dim)


@final
@dataclass(frozen=True)
class VeRA(Transform[Mapping[str, Tensor]]):
    r"""A frozen weight plus frozen random factors, of which only scales are trained.

    $$W = W_0 + \operatorname{diag}(b) B \operatorname{diag}(d) A$$

    For a value of shape `(m, ...)`, flattened to a matrix `(m, n)`: raw is `{"b": (m,), "d":
    (rank,)}`; state is `{"base": W_0, "A": (rank, n), "B": (m, rank)}`. Real and complex. At
    init `b = 0`, so every value is kept exactly, `d = 0.1`, and `A` and `B` are drawn uniformly by
    Kaiming's rule, as in the paper and peft, with variance `2 / n` and `2 / rank`, from `generator`
    or torch's default one.

    The paper shares the factors among layers. With `A` or `B` the factor is the value of the weight
    of that name, of which as many columns or rows are taken as the value has; it has a rule of its
    own, `Frozen()`, and is no part of state here.

    Args:
        rank: the inner dimension, positive; there is nothing to gain from a small one.
        A: the name of a weight `(rank, at least n)` to take the factor from; None: one of its own.
        B: likewise, of `(at least m, rank)`.

    Raises:
        ValueError: `rank` is not positive; at `fp.parametrize`, if the value has fewer than two
            dimensions, or a factor that is taken is not there or too small.

    Example:
        >>> import torch
        >>> from funcparam.transforms import VeRA
        >>> raw, state = VeRA(rank=8).right_inverse(torch.eye(2))
        >>> VeRA(rank=8).forward(raw, state)
        tensor([[1., 0.],
                [0., 1.]])

    Source: Kopiczko et al., VeRA, arXiv 2310.11454, equation 2.
    """

    roles: ClassVar[Mapping[str, Role]] = {"b": "magnitude", "d": "magnitude"}

    is_adapter: ClassVar[bool] = True

    rank: int
    A: str | None = None
    B: str | None = None

    def __post_init__(self) -> None:
        expect_argument(self, "rank", POSITIVE_INTEGER)
        expect_name(self, "A", optional=True)
        expect_name(self, "B", optional=True)

    def takes(self) -> Mapping[str, str]:
        named = {"A": self.A, "B": self.B}
        return {key: name for key, name in named.items() if name is not None}

    @full_precision
    def forward(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        base = state["base"]
        m, n = base.flatten(1).shape
        # without a parametrization that hands a factor: what b = 0 makes of any
        A = state["A"][:, :n] if "A" in state else raw["d"].new_zeros(self.rank, n)
        B = state["B"][:m] if "B" in state else raw["b"].new_zeros(m, self.rank)
        delta = raw["b"].unsqueeze(1) * ((B * raw["d"]) @ A)
        return base + delta.reshape(base.shape)

    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Mapping[str, Tensor], State]:
        m, n = value.flatten(1).shape
        A = sqrt(6) * uniform_factor(value, self.rank, n, generator)
        B = sqrt(6) * uniform_factor(value, m, self.rank, generator)
        raw = {"b": value.new_zeros(m), "d": value.new_full((self.rank,), 0.1)}
        own = {key: X for key, X in (("A", A), ("B", B)) if key not in self.takes()}
        return raw, {"base": value, **own}

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest singular value of `value - base` beyond `rank`, which is necessary only."""
        return _beyond(self, value, state, self.rank)

    def check(self, value: Tensor) -> None:
        super().check(value)
        expect_matrix(self, value)
        expect_filled(self, value.flatten(1))


@final
@dataclass(frozen=True)
class LoHa(Transform[Mapping[str, Tensor]]):
    r"""A frozen weight plus the entrywise product of two of low rank.

    $$W = W_0 + s \, (B_1 A_1) \odot (B_2 A_2)$$

    For a value of shape `(m, ...)`, flattened to a matrix `(m, n)`: raw is `{"A1", "A2"}`,
    `(rank, n)`, and `{"B1", "B2"}`, `(m, rank)`; state is `{"base": W_0, "scale": s}` with a
    scalar `s` that init sets to `alpha / rank`. The product has a rank of up to `rank^2`. Real
    and complex. At init `B2 = 0`, so every value is kept exactly; the others are drawn from
    normal distributions, `B1` of deviation 0.1 and the rest 1 as in the reference code, with
    `generator` or torch's default one.

    Args:
        rank: the inner dimension, positive.
        alpha: the numerator of the scale; None takes `rank`, hence scale 1.

    Raises:
        ValueError: `rank` is not positive; at `fp.parametrize`, if the value has fewer than two
            dimensions, or its dtype has no such scale.

    Example:
        >>> import torch
        >>> from funcparam.transforms import LoHa
        >>> raw, state = LoHa(rank=2).right_inverse(torch.eye(2))
        >>> LoHa(rank=2).forward(raw, state)
        tensor([[1., 0.],
                [0., 1.]])

    Source: Hyeon-Woo et al., FedPara, arXiv 2108.06098, proposition 1; peft's `LoHaConfig`.
    """

    roles: ClassVar[Mapping[str, Role]] = {
        "A1": "factor",
        "B1": "factor",
        "A2": "factor",
        "B2": "factor",
    }

    is_adapter: ClassVar[bool] = True

    rank: int
    alpha: float | None = None

    def __post_init__(self) -> None:
        expect_argument(self, "rank", POSITIVE_INTEGER)
        expect_argument(self, "alpha", NUMBER, optional=True)

    @full_precision
    def forward(self, raw: Mapping[str, Tensor], state: State) -> Tensor:
        base = state["base"]
        delta = (raw["B1"] @ raw["A1"]) * (raw["B2"] @ raw["A2"]) * state["scale"]
        return base + delta.reshape(base.shape)

    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Mapping[str, Tensor], State]:
        m, n = value.flatten(1).shape

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=value.dtype, device=value.device)

        raw = {
            "A1": normal(self.rank, n),
            "B1": 0.1 * normal(m, self.rank),
            "A2": normal(self.rank, n),
            "B2": value.new_zeros(m, self.rank),
        }
        return raw, {"base": value, "scale": value.new_full((), self._scale())}

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest singular value of `value - base` beyond `rank**2`, which is necessary only."""
        return _beyond(self, value, state, self.rank**2)

    def check(self, value: Tensor) -> None:
        super().check(value)
        expect_matrix(self, value)
        expect_filled(self, value.flatten(1))
        expect_numbers(self, value.dtype, scale=self._scale())

    def _scale(self) -> float:
        return (self.rank if self.alpha is None else self.alpha) / self.rank


def _beyond(transform: AnyTransform, value: Tensor, state: State, rank: int) -> Tensor:
    if "base" not in state:
        raise ValueError(f"{transform!r} expects state with a 'base', which is its constraint")
    delta = (value - state["base"]).flatten(1)
    return singular_value(delta, min(rank, *delta.shape))


@final
@dataclass(frozen=True)
class OFT(Transform[Tensor]):
    r"""Orthogonal finetuning: a frozen weight whose inputs are turned, block by block.

    $$W = W_0 \operatorname{diag}(Q_1, \dots, Q_k)^T, \qquad
    Q_j = (I - A_j/2)^{-1} (I + A_j/2), \qquad A_j = \operatorname{tril}(X_j) -
    \operatorname{tril}(X_j)^H$$

    For a value of shape `(m, ...)`, flattened to a matrix `(m, n)`: raw is `X`, `(blocks,
    n / blocks, n / blocks)`; state is `{"base": W_0}`. Real (orthogonal) and complex (unitary).
    At init `X = 0`, so every value is kept. `rebase` moves the base to the current value. All the
    blocks together are one orthogonal matrix: the angles between the outputs, and their lengths,
    stay as they are for any number of blocks, `W W^T = W_0 W_0^T`.

    Args:
        blocks: the number of blocks, positive.

    Raises:
        ValueError: `blocks` is not positive; at `fp.parametrize`, if the value has fewer than
            two dimensions or `blocks` does not divide the number of inputs.

    Example:
        >>> import torch
        >>> from funcparam.transforms import OFT
        >>> raw, state = OFT(blocks=1).right_inverse(torch.tensor([[3.0, 4.0]]))
        >>> OFT(blocks=1).forward(raw + 1, state).norm()
        tensor(5.)

    Source: Qiu et al., Controlling text-to-image diffusion by orthogonal finetuning,
    arXiv 2306.07280, section 3.
    """

    roles: ClassVar[Mapping[str, Role]] = {"": "relative"}

    is_adapter: ClassVar[bool] = True

    blocks: int

    def __post_init__(self) -> None:
        expect_argument(self, "blocks", POSITIVE_INTEGER)

    @full_precision
    def forward(self, raw: Tensor, state: State) -> Tensor:
        base = state["base"]
        turned = self._parts(base) @ cayley_turn(raw).mT
        return turned.transpose(0, 1).reshape(base.shape)

    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        side = value.flatten(1).shape[1] // self.blocks
        return value.new_zeros(self.blocks, side, side), {"base": value}

    @full_precision
    def rebase(self, raw: Tensor, state: State) -> tuple[Tensor, State]:
        return self.right_inverse(self.forward(raw, state))

    @full_precision
    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest distance of an entry from the nearest turned base, which is the constraint."""
        if "base" not in state:
            raise ValueError(f"{self!r} expects state with a 'base', which is its constraint")
        new, old = self._parts(value), self._parts(state["base"])
        U, _, Vh = cast("tuple[Tensor, Tensor, Tensor]", linalg.svd(old.mH @ new))
        return largest(new - old @ (U @ Vh))

    def check(self, value: Tensor) -> None:
        super().check(value)
        expect_matrix(self, value)
        expect_filled(self, value.flatten(1))
        if value.flatten(1).shape[1] % self.blocks:
            raise ValueError(
                f"{self!r} expects a number of inputs that {self.blocks} divides;"
                f" got shape {tuple(value.shape)}, as a matrix {tuple(value.flatten(1).shape)}"
            )

    def _parts(self, value: Tensor) -> Tensor:
        """The columns that belong to each block: (blocks, m, n / blocks)."""
        return value.reshape(value.shape[0], self.blocks, -1).transpose(0, 1)
