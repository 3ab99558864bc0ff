from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from funcparam.transforms.contract.arguments import POSITIVE_INTEGER, expect_argument
from funcparam.transforms.contract.base import State, Transform, largest


@final
@dataclass(frozen=True)
class Sparse(Transform[Tensor]):
    """A tensor that is zero but for some entries, of which raw has no more than these.

    Raw is a vector, `(entries,)`; state `{"mask"}` is a boolean tensor of the value's shape with as
    many entries that are True, which raw fills row by row. [`Mask`][funcparam.transforms.Mask] is
    the same map with a raw of the value's size. Real and complex.

    Init chooses the entries that are largest, and among equal ones draws from `generator` or
    torch's default one: of zeros all. Write another mask into the state to choose yourself. A
    value with at most so many nonzero entries is kept exactly, and any other goes to the nearest
    one. The log-determinant is 0 over the entries kept.

    Args:
        entries: how many entries are trained, positive.

    Raises:
        ValueError: `entries` is not positive; at `fp.parametrize`, if the value has fewer.

    Example:
        >>> import torch
        >>> from funcparam.transforms import Sparse
        >>> raw, state = Sparse(2).right_inverse(torch.tensor([[1.0, 0.0], [-3.0, 2.0]]))
        >>> Sparse(2).forward(raw + 1, state)
        tensor([[ 0.,  0.],
                [-2.,  3.]])

    Source: Bhardwaj et al., Sparse high rank adapters, arXiv 2406.13175 (behind a frozen weight).
    """

    entries: int

    def __post_init__(self) -> None:
        expect_argument(self, "entries", POSITIVE_INTEGER)

    def forward(self, raw: Tensor, state: State) -> Tensor:
        mask = state["mask"] != 0  # a cast of all buffers makes numbers of it
        numbers = (mask.flatten().cumsum(0) - 1).clamp_min(0)
        return torch.where(mask, raw.gather(0, numbers).reshape(mask.shape), 0)

    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        flat = value.flatten()
        noise = torch.rand(flat.shape, generator=generator, device=value.device)
        drawn = noise.argsort()
        order = flat.detach().abs().gather(0, drawn).argsort(descending=True, stable=True)
        chosen = drawn.gather(0, order[: self.entries]).sort().values
        mask = torch.zeros(flat.shape, dtype=torch.bool, device=value.device)
        mask = mask.scatter(0, chosen, torch.ones_like(chosen, dtype=torch.bool))
        return flat.gather(0, chosen), {"mask": mask.reshape(value.shape)}

    def project(self, value: Tensor, state: State) -> Tensor:
        return torch.where(state["mask"], value, 0)

    def tangent(self, value: Tensor, vector: Tensor, state: State) -> Tensor:
        return torch.where(state["mask"], vector, 0)

    def violation(self, value: Tensor, state: State) -> Tensor:
        """Largest |entry| where the mask is False; without one, the largest but `entries`."""
        if "mask" not in state:
            _, state = self.right_inverse(value)
        return largest(torch.where(state["mask"] != 0, 0, value))

    def log_abs_det_jacobian(self, raw: Tensor, state: State) -> Tensor:
        """Zero: entries are kept as they are."""
        return raw.real.new_zeros(())

    def free_in_raw(self, raw: Tensor, state: State) -> Tensor | None:
        return None

    def free_in_value(self, value: Tensor, state: State) -> Tensor | None:
        return state["mask"]

    def check(self, value: Tensor) -> None:
        super().check(value)
        if value.numel() < self.entries:
            raise ValueError(
                f"{self!r} expects a tensor with at least {self.entries} entries;"
                f" got shape {tuple(value.shape)}"
            )
