from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor

from funcparam.transforms.contract.precision import full_precision
from funcparam.transforms.contract.roles import Role
from funcparam.transforms.contract.solve import carried, tangent_part
from funcparam.transforms.contract.stacks import Stacks, measured

Raw: TypeAlias = "Tensor | Mapping[str, Tensor]"
"""What is trained in place of a value: one tensor, or named tensors."""

State: TypeAlias = Mapping[str, Tensor]
"""What a transform carries without training it; empty for most."""

_dispatch: Any = Tensor.__torch_dispatch__  # pyright: ignore
_get_dispatch_mode: Any = torch._C._get_dispatch_mode  # pyright: ignore
_PROXY: Any = torch._C._TorchDispatchModeKey.PROXY  # pyright: ignore

_AT_HAND = ("cpu",)

R = TypeVar("R", bound=Raw)


class Transform(ABC, Generic[R]):
    """A pure map from raw tensors to the value that a network uses, with a right inverse.

    Subclasses are final frozen dataclasses. They implement [`forward`][.forward],
    [`right_inverse`][.right_inverse] and [`violation`][.violation], and override the rest where
    there is more to say. They are generic in what raw is: `Transform[Tensor]` or
    `Transform[Mapping[str, Tensor]]`.

    Five laws hold for every transform; one suite of tests crosses them with all transforms.

    1. **Static configuration only.** A transform is hashable, comparable and picklable and
       holds no tensor. Every tensor is in raw (trained) or in state (not trained), so that
       bounds, masks, base points and adapters can be swapped, stacked and saved, and swept
       with `vmap`, without touching the transform.
    2. **Pure.** No input is written to, nothing random is drawn in `forward`, no Python state
       is kept. What evolves (power iteration) evolves in `update` alone, which returns it.
    3. **Round trip.** `forward(*right_inverse(v)) == v` for every `v` that satisfies the
       constraint; any other `v` goes to the projection that the transform documents, or is
       refused with an error.
    4. **Transformable.** `vmap` equals a loop; `grad`, `jvp`, forward over reverse,
       `vmap(grad)`, double backward, `torch.compile(fullgraph=True)`, `torch.export` and meta
       tensors work. Half precision computes in float32 inside.
    5. **Right against an oracle** that shares no code with it.

    Example:
        >>> import torch
        >>> from funcparam.transforms import Symmetric
        >>> transform = Symmetric()
        >>> raw, state = transform.right_inverse(torch.tensor([[1.0, 2.0], [2.0, 3.0]]))
        >>> transform.forward(raw, state)
        tensor([[1., 2.],
                [2., 3.]])
    """

    is_adapter: ClassVar[bool] = False
    """Whether the weight itself stays in state, `"base"`, and raw is added to it. Raw of an adapter
    is trained even if the weight is frozen; any other raw takes `requires_grad` from the weight."""

    moves_entries: ClassVar[bool] = False
    """Whether all it does is to move entries, or to leave them where they are."""

    is_entrywise: ClassVar[bool] = False
    """Whether each entry of the value is a function of the entry of raw at its place, whose
    derivative [`log_derivative`][..log_derivative] has."""

    roles: ClassVar[Mapping[str, Role]] = {}
    """What each raw tensor is to an optimizer, by its key in raw, which is `""` where raw is one
    tensor; what is not named is a `"weight"`. [`role`][..role] says it where it depends on more."""

    def role(self, key: str) -> Role:
        """Say what the raw tensor under `key` is to an optimizer: see [`roles`][..roles]."""
        return self.roles.get(key, "weight")

    @abstractmethod
    def forward(self, raw: R, state: State) -> Tensor:
        """Map raw to the value."""

    def forward_stacked(self, raw: R, state: State) -> Tensor:
        """Map a stack of raw, with a stack of state, to a stack of values, along dimension 0.

        The default is `torch.func.vmap` of [`forward`][..forward].
        """
        return torch.func.vmap(self.forward)(raw, dict(state))

    def stacks(self, kind: str) -> Stacks | None:
        """Say where one stack of equal leaves is faster than each by itself, forward and backward.

        From how many leaves on, and up to how many entries of a value, on a kind of device
        (`"cpu"`, `"cuda"`); None where a stack gains nothing. The default is what was measured, and
        for transforms outside of the library None.
        """
        return measured(type(self).__name__, kind)

    @abstractmethod
    def right_inverse(
        self, value: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[R, State]:
        """Find raw and state that `forward` maps to `value`, or to its documented projection.

        Args:
            value: the tensor to represent.
            generator: where a transform has to draw raw tensors that leave the value as it is
                (LoRA's first factor), it draws them from here; None is torch's default one.

        Raises:
            NotImplementedError: the transform has none; the message says what to do instead.
        """

    def adapts(self, key: str) -> bool:
        """Whether the raw tensor of this name is an adapter's; '' names a raw that is one tensor.

        A transform with parts asks the part that the tensor belongs to.
        """
        return self.is_adapter

    def kept_weight(self, state: State) -> Tensor | None:
        """Find the weight itself in state, whose dtype values have; None where it is not there.

        An adapter has it as `"base"`; a transform with parts asks them.
        """
        return state.get("base") if self.is_adapter else None

    def takes(self) -> Mapping[str, str]:
        """Say which values of other weights `forward` works with: keys of state, and their names.

        One raw then feeds many weights, and its gradients add: rotations that a network has in
        pairs, factors that all layers have. A parametrization puts these values into state, next to
        the transform's own, wherever it hands state to a method but `right_inverse`, which makes
        the transform's own alone. A transform with parts passes on what they take.
        """
        return {}

    def settled(self, state: State) -> State:
        """Adjust a state that the right inverse has made to what it takes, which is in state now.

        A right inverse knows its own value alone; afterwards `forward` has to give that value with
        the values of others, too. The default leaves state as it is.
        """
        return state

    def undo(self, value: Tensor, state: State) -> Tensor | None:
        """Find the raw behind `value` where every tensor is a value, and of one raw alone.

        Such a transform constrains nothing: what a chain that ends in it constrains is found before
        it. None, the default, where that is not so.
        """
        raw: Any = self.right_inverse(value)[0] if self.moves_entries else None
        return raw

    def update(self, raw: R, state: State) -> State:
        """Take one step of whatever evolves outside of training; most transforms have nothing.

        What does not evolve is returned as the same tensor, so `is` tells what changed. The step is
        constant to differentiation: `p.update` and `p.advance` give it raw and state detached, so
        it needs no `detach` or `no_grad` of its own.
        """
        return state

    def update_stacked(self, raw: R, state: State) -> State:
        """Take the step of [`update`][..update] for a stack of raw and a stack of state.

        The default is `torch.func.vmap` of it.
        """
        return torch.func.vmap(self.update)(raw, dict(state))

    def refresh(self, raw: R, state: State) -> State:
        """Work out exactly what `update` only follows, and bring base points to their constraint.

        Afterwards `forward` satisfies the constraint whatever raw and state are, such as means of
        several. The default returns state as it is. As `update`, it is given both detached.
        """
        return state

    def rebase(self, raw: R, state: State) -> tuple[R, State]:
        """Move the base point to the current value, which stays.

        Where the length of raw does not matter, it becomes that of the value: it would only grow,
        and the steps of an optimizer shrink against it. The identity where there is neither. What
        does not move is returned as the same tensor. As `update`, it is given raw and state
        detached.
        """
        return raw, state

    def transport(self, raw: R, state: State, new_raw: R, new_state: State, covector: R) -> R:
        r"""Carry a gradient by `raw` over to where [`rebase`][..rebase] has moved raw and state to.

        It is `J^T g` by raw for some gradient `g` of the value, and `J_new^T g` by the new raw. The
        default takes the shortest such `g`, by conjugate gradients; what of `covector` no gradient
        by raw can be is dropped. It need not be differentiable.
        """
        return carried(
            lambda x: self.forward(x, state),
            raw,
            lambda x: self.forward(x, new_state),
            new_raw,
            covector,
        )

    def project(self, value: Tensor, state: State) -> Tensor:
        """Take any value to one that satisfies the constraint, and such a value to itself.

        The default is `forward` of the right inverse, the projection that a transform documents. A
        transform whose constraint lies in state (a mask, bounds, a radius) takes that one, and of
        an open set the point is a representable one, next to the nearest.

        Raises:
            NotImplementedError: there is no such point to be had; the message says why.
            ValueError: the right inverse refuses the value.
        """
        expect_constraint(self)
        return self.forward(*self.right_inverse(value))

    def tangent(self, value: Tensor, vector: Tensor, state: State) -> Tensor:
        r"""Project `vector` onto the directions in which `value` can move, orthogonally.

        With the Jacobian `J` of `forward` at the value's raw that is `J (J^T J)^+ J^T` of it, which
        the default solves by conjugate gradients.
        """
        expect_constraint(self)
        raw, own = self.right_inverse(value)
        return tangent_part(lambda raw: self.forward(raw, own), raw, vector)

    def karcher_mean(self, values: Tensor, weights: Tensor) -> Tensor:
        """Find the value of which the squared distances along the constraint have the least mean.

        Args:
            values: several values along dimension 0.
            weights: one for each, which sum to 1.

        Raises:
            NotImplementedError: no such mean is known here.
            ValueError: the values are too far apart to have one.
        """
        raise NotImplementedError(
            f"{self!r} has no Karcher mean, which is known of orthogonal and unitary matrices"
        )

    @abstractmethod
    def violation(self, value: Tensor, state: State) -> Tensor:
        """Measure how far `value` is from satisfying the constraint: a scalar, 0 where it does.

        NaN where nothing is measured: a 0 would say that it does.

        `state` matters only where it is part of the constraint (a mask, a frozen base).
        """

    @full_precision
    def log_abs_det_jacobian(self, raw: R, state: State) -> Tensor:
        """Compute log |det d value / d raw| over their free coordinates, as a scalar.

        The default adds up [`log_derivative`][..log_derivative] of an entrywise transform.

        Raises:
            NotImplementedError: the map has no such determinant; the message says why.
        """
        if self.is_entrywise:
            return self.log_derivative(raw, state).sum()
        raise NotImplementedError(
            f"{self!r} has no log_abs_det_jacobian: raw and value do not have equally many free"
            " coordinates, so the Jacobian has no determinant"
        )

    def log_derivative(self, raw: R, state: State) -> Tensor:
        """Compute log |d value / d raw| of each entry, where the transform is entrywise.

        An entry of a complex raw has two coordinates, and the determinant is that over both.
        """
        raise NotImplementedError(f"{self!r} has no log_derivative: it is not entrywise")

    def free_in_raw(self, raw: R, state: State) -> Tensor | None:
        """Find which entries of raw are the free coordinates of the log-determinant.

        A boolean mask of raw's shape, or None where all are. A chain asks, since there may be other
        maps before this one. Whoever overrides `log_abs_det_jacobian` says it here.
        """
        return self._every_entry()

    def free_in_value(self, value: Tensor, state: State) -> Tensor | None:
        """Find which entries of the value are: a mask of its shape, or None where all are."""
        return self._every_entry()

    def _every_entry(self) -> None:
        if not (self.moves_entries or self.is_entrywise):
            raise NotImplementedError(
                f"{self!r} does not say which entries are free, which a chain has to know for its"
                " log_abs_det_jacobian: override free_in_raw and free_in_value"
            )

    def check(self, value: Tensor) -> None:
        """Raise ValueError if no value of this shape and dtype can be served.

        Looks at shape and dtype only. The default asks for floating-point or complex.
        """
        expect_inexact(self, value)


AnyTransform: TypeAlias = Transform[Any]


def expect_constraint(transform: AnyTransform) -> None:
    """Raise NotImplementedError for an adapter, of whose weight any is a value."""
    if transform.is_adapter:
        raise NotImplementedError(
            f"{transform!r} has no projection and no tangent: it adds to a frozen weight, and is no"
            " constraint. Train its raw"
        )


def expect_inexact(transform: AnyTransform, value: Tensor) -> None:
    """Raise ValueError unless `value` is floating-point or complex."""
    if not (value.is_floating_point() or value.is_complex()):
        raise ValueError(
            f"{transform!r} expects a floating-point or complex tensor; got {value.dtype}."
            " Integers cannot be trained: leave it out of the rules, or use Frozen()"
        )


def expect_real(transform: AnyTransform, value: Tensor) -> None:
    """Raise ValueError unless `value` is real and floating-point."""
    expect_inexact(transform, value)
    if value.is_complex():
        raise ValueError(f"{transform!r} expects a real tensor; got {value.dtype}")


def expect_matrix(transform: AnyTransform, value: Tensor) -> None:
    """Raise ValueError unless `value` is a matrix or a batch of matrices."""
    if value.ndim < 2:
        raise ValueError(
            f"{transform!r} expects a matrix or batch of matrices; got shape {tuple(value.shape)}"
        )


def expect_filled(transform: AnyTransform, matrix: Tensor) -> None:
    """Raise ValueError unless a matrix, or each of a batch, has a row and a column."""
    if 0 in matrix.shape[-2:]:
        raise ValueError(
            f"{transform!r} expects a matrix with at least one row and one column;"
            f" got shape {tuple(matrix.shape)}"
        )


def expect_square(transform: AnyTransform, value: Tensor) -> None:
    """Raise ValueError unless `value` is a square matrix or a batch of them."""
    expect_matrix(transform, value)
    if value.shape[-1] != value.shape[-2]:
        raise ValueError(
            f"{transform!r} expects a square matrix or a batch of them;"
            f" got shape {tuple(value.shape)}"
        )


def expect_dim(transform: AnyTransform, value: Tensor, dim: int) -> None:
    """Raise ValueError unless `dim` is a dimension of `value`."""
    if not -value.ndim <= dim < value.ndim:
        raise ValueError(
            f"{transform!r} expects a tensor with a dimension {dim}; got shape {tuple(value.shape)}"
        )


def expect_numbers(
    transform: AnyTransform, dtype: torch.dtype, *, or_zero: bool = False, **numbers: float
) -> None:
    """Raise ValueError unless numbers, by their names, stay numbers when `dtype` holds them.

    Too large ones would be infinite, and too small ones 0, which `or_zero` lets pass: a bound that
    is rounded is one still, a factor of 0 is not.
    """
    info = torch.finfo(dtype)
    least = 0.0 if or_zero else info.tiny * info.eps
    for name, number in numbers.items():
        if number != 0 and not least <= abs(number) <= info.max:
            raise ValueError(
                f"{transform!r} expects {name} to be a number of {str(dtype)[6:]}, which are from"
                f" {info.tiny * info.eps:.2g} to {info.max:.6g} in size; got {number}. Use a wider"
                " dtype for the weight"
            )


def expect_all(transform: AnyTransform, condition: Tensor, message: str) -> None:
    """Raise ValueError unless `condition` holds everywhere, where its entries can be read.

    On meta tensors, inside `torch.func` transforms and while compiling there is nothing to read:
    the check is left out.
    """
    if readable(condition) and not bool(condition.all()):
        raise ValueError(f"{transform!r} {message}")


def expect_range(transform: AnyTransform, value: Tensor, inside: Tensor, expected: str) -> None:
    """Raise ValueError unless every entry of `value` is `inside`, where entries can be read."""
    if readable(inside) and not bool(inside.all()):
        least, most = value.aminmax()
        raise ValueError(
            f"{transform!r} expects every entry {expected}; got entries from {least.item():.6g} to"
            f" {most.item():.6g}: clamp the value first"
        )


def readable(tensor: Tensor) -> bool:
    """Whether entries can be looked at: they exist, and outside of `torch.func` transforms."""
    return has_entries(tensor) and torch.func.debug_unwrap(tensor) is tensor


def has_entries(tensor: Tensor) -> bool:
    """Whether numbers can decide, in `torch.func` transforms too: no trace, no meta or fake tensor.

    Subclasses that dispatch by themselves (fake, functional, distributed) hold their entries
    elsewhere, or have none.
    """
    if torch.compiler.is_compiling() or tensor.is_meta or _get_dispatch_mode(_PROXY) is not None:
        return False
    own: Any = type(torch.func.debug_unwrap(tensor))
    return own.__torch_dispatch__ is _dispatch


def reads_cheaply(tensor: Tensor) -> bool:
    """Whether numbers can decide, and nothing has to be waited for to see them.

    A CPU has computed them when it comes to that. A device has work before it, and who waits for
    it cannot give it more: what reads numbers in `forward`, `update` or `project` asks here first.
    """
    return tensor.device.type in _AT_HAND and has_entries(tensor)


def largest(tensor: Tensor) -> Tensor:
    """Return the largest absolute entry; 0 of an empty tensor."""
    return tensor.abs().amax() if tensor.numel() else tensor.abs().sum()
