"""Several optimizers as one, and views of tensors as the matrices that some of them ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from funcparam.training.loading import matched

MakeOptimizer: TypeAlias = Callable[[list[dict[str, Any]]], Optimizer]


@dataclass(frozen=True)
class Group:
    """Tensors that are trained alike, and what their optimizer steps in their place."""

    tensors: dict[str, Tensor]
    views: list[list[Tensor]]
    options: dict[str, Any]
    lr_scale: float


class Together(Optimizer):
    """One optimizer made of several: made by [`Groups.optimizer`][funcparam.Groups.optimizer].

    Its parameter groups are those of all, with the tensors of raw; a learning rate that is set
    there is the one of the next step. It saves and loads as any optimizer of PyTorch's.
    """

    def __init__(self, made: Sequence[tuple[MakeOptimizer, Sequence[Group]]]) -> None:
        self._inner = [(_make(make, groups), groups) for make, groups in made if groups]
        outer: list[dict[str, Any]] = []
        for optimizer, groups in self._inner:
            for own, group in zip(optimizer.param_groups, groups, strict=True):
                own["lr"] = own["lr"] * group.lr_scale
                outer.append({**own, **group.options, **_told(optimizer, group)})
        super().__init__(outer, {})
        self._made = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore
        """Take a step of each optimizer.

        Args:
            closure: computes the loss and its gradients anew, before the step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        outer = iter(self.param_groups)
        for optimizer, groups in self._inner:
            for own, group in zip(optimizer.param_groups, groups, strict=True):
                now = next(outer)
                own.update({key: now[key] for key in own if key != "params"})
                _lend_gradients(group)
            optimizer.step()
            for group in groups:
                _take_gradients_back(group)
                self.state.update(_states(optimizer, group))
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` of an optimizer over the same tensors returned, by their names.

        Raises:
            ValueError: it is of other tensors, shapes or kinds, by other optimizers, or in other
                groups; the first name that differs is said, and nothing was loaded.
        """
        super().load_state_dict(matched(state_dict, self.param_groups))
        for optimizer, groups in self._inner:
            optimizer.state.clear()
            for group in groups:
                for tensor, views in zip(group.tensors.values(), group.views, strict=True):
                    own: dict[Any, Any] = self.state.get(tensor, {})
                    for i, view in enumerate(views if own else []):
                        optimizer.state[view] = own if view is tensor else own[str(i)]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group while the optimizer is made; later there is no telling whose it would be."""
        if hasattr(self, "_made"):
            raise NotImplementedError(
                "add_param_group: the groups are those of fp.groups, and complete. What is frozen"
                " is in them, and trains when it requires gradients; other tensors need an"
                " optimizer of their own"
            )
        super().add_param_group(param_group)


def as_matrices(name: str, tensor: Tensor, batch: int) -> Tensor:
    """View a tensor as a stack of matrices: `batch` dimensions count them, the next are rows.

    Raises:
        ValueError: its memory is not laid out so.
    """
    shape = (-1, tensor.shape[batch], tensor.shape[batch + 1 :].numel())
    try:
        return tensor.detach().view(shape)
    except RuntimeError as error:
        raise ValueError(
            f"{name!r}: expected a contiguous tensor, of which matrices are views; got strides"
            f" {tensor.stride()}. Make raw contiguous before the optimizer"
        ) from error


def _told(optimizer: Optimizer, group: Group) -> dict[str, Any]:
    """The tensors of a group, and what tells them from others when they are loaded."""
    return {
        "params": [*group.tensors.values()],
        "names": [*group.tensors],
        "shapes": [[[*view.shape] for view in views] for views in group.views],
        "optimizer": type(optimizer).__qualname__,
    }


def _make(make: MakeOptimizer, groups: Sequence[Group]) -> Optimizer:
    asked: list[dict[str, Any]] = [
        {"params": [view for views in group.views for view in views], **group.options}
        for group in groups
    ]
    try:
        made = make(asked)
    except ValueError as error:
        raise ValueError(f"{_refused(make, groups)}{error}") from error
    if len(made.param_groups) != len(groups):
        raise ValueError(
            f"expected an optimizer with the {len(groups)} groups that it was given; got"
            f" {len(made.param_groups)} of {type(made).__qualname__}"
        )
    return made


def _refused(make: MakeOptimizer, groups: Sequence[Group]) -> str:
    """Name the first tensor that the optimizer refuses by itself, unless it refuses any."""
    if not _takes(make, [torch.zeros(2, 2)]):
        return ""
    each = [pair for g in groups for pair in zip(g.tensors, g.views, strict=True)]
    refused = [name for name, views in each if not _takes(make, views)]
    return f"{refused[0]!r} (kinds= of fp.groups chooses its optimizer): " if refused else ""


def _takes(make: MakeOptimizer, tensors: list[Tensor]) -> bool:
    try:
        make([{"params": tensors}])
    except ValueError:
        return False
    return True


def _lend_gradients(group: Group) -> None:
    for tensor, views in zip(group.tensors.values(), group.views, strict=True):
        if views[0] is not tensor:
            grads = [None] * len(views)
            if tensor.grad is not None:
                grads = tensor.grad.reshape(len(views), *views[0].shape).unbind()
            for view, grad in zip(views, grads, strict=True):
                view.grad = grad


def _take_gradients_back(group: Group) -> None:
    for tensor, views in zip(group.tensors.values(), group.views, strict=True):
        if views[0] is not tensor:
            for view in views:
                view.grad = None


def _states(optimizer: Optimizer, group: Group) -> dict[Any, Any]:
    """The optimizer's state of each tensor; of several views by their number."""
    found: dict[Tensor, Any] = {}
    for tensor, views in zip(group.tensors.values(), group.views, strict=True):
        if views[0] in optimizer.state:
            own = {str(i): optimizer.state[view] for i, view in enumerate(views)}
            found[tensor] = own["0"] if views[0] is tensor else own
    return found
