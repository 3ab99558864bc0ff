"""The dictionary level: transforms composed over a whole parameter dictionary."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast, final

import torch
from torch import Tensor

from funcparam.parametrization.boundary import (
    Entry,
    Expected,
    RawTree,
    StateTree,
    check_raw_tree,
    check_state_tree,
    distance_moved,
    expect_finite,
    expect_finite_raw,
    expect_one_device,
    explained,
    value_of,
)
from funcparam.parametrization.inspect import groups, overview, summary
from funcparam.parametrization.names import closest
from funcparam.parametrization.shared import SharedPlan
from funcparam.parametrization.table import Table, Tabular
from funcparam.parametrization.tree import flatten
from funcparam.transforms.contract.base import AnyTransform, Raw, State
from funcparam.transforms.contract.precision import autocast_off, widened
from funcparam.transforms.contract.steps import rebased

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from funcparam.parametrization.nested import Structure

Params = TypeVar("Params")

_LOGGER = logging.getLogger("funcparam")


@final
@dataclass(frozen=True, repr=False)
class Parametrization(Tabular, Mapping[str, AnyTransform], Generic[Params]):
    """An immutable map from names to transforms, made by [`funcparam.parametrize`][].

    As a function, `p(raw, state)` maps raw and state to the parameters: for a module an ordinary
    `dict[str, Tensor]` under the module's own names, every name of a tie included; for any other
    tree a tree of the same structure (a flat mapping: a dict). Every transform is evaluated once a
    call.

    * raw maps every name, the first one where there are several, to one tensor or to a dict of
      named tensors. What no rule picks is its own raw.
    * state maps the names that have one to a dict of named tensors.

    Both are plain dictionaries, so `grad`, `vmap`, `torch.compile`, `torch.save` and optimizers
    take them as they are. A parametrization hashes, compares and pickles; it holds no tensor.

    Example:
        >>> import torch, funcparam as fp
        >>> from funcparam.transforms import WeightNorm
        >>> net = torch.nn.Linear(3, 2)
        >>> p = fp.parametrize(net, {"weight": WeightNorm()})
        >>> p
        name    transform     value           raw
        ------  ------------  --------------  ------------------------------------
        weight  WeightNorm()  float32 (2, 3)  magnitude: (2, 1), direction: (2, 3)
        >>> raw, state = p.init(net)
        >>> torch.func.functional_call(net, p(raw, state), (torch.ones(3),)).shape
        torch.Size([2])
    """

    entries: tuple[Entry, ...]
    structure: Structure | None
    buffers: tuple[str, ...] = field(default=(), compare=False)
    """The module's buffers that are none of the entries, and that its `state_dict` has."""
    _transforms: dict[str, AnyTransform] = field(init=False, compare=False)
    _aliases: dict[str, str] = field(init=False, compare=False)
    _expected: Expected = field(init=False, compare=False)
    _plan: SharedPlan = field(init=False, compare=False)

    def __post_init__(self) -> None:
        chosen = [entry for entry in self.entries if entry.transform is not None]
        derived: dict[str, Any] = {
            "_transforms": {entry.name: entry.transform for entry in chosen},
            "_aliases": {alias: e.name for e in self.entries for alias in e.names[1:]},
            "_expected": Expected(self.entries),
            "_plan": SharedPlan(self.entries),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    # The mapping

    def __getitem__(self, name: str) -> AnyTransform:
        return self._transforms[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._transforms)

    def __len__(self) -> int:
        return len(self._transforms)

    def __deepcopy__(self, memo: dict[int, Any]) -> Parametrization[Params]:
        return self

    def _table(self) -> Table:
        return overview(self.entries)

    # Raw to value

    def __call__(self, raw: RawTree, state: StateTree | None = None) -> Params:
        """Map raw and state to the parameters.

        Args:
            raw: as [`init`][..init] returns it.
            state: likewise; may be left out if no transform has any.

        Raises:
            TypeError, ValueError: a name is unknown or missing, or a shape, dtype or structure is
                not what `init` returns. Nothing was computed.
        """
        state = self._check(raw, state)
        return self._build(explained(self.entries, self._plan.evaluate, raw, state))

    def advance(
        self, raw: RawTree, state: StateTree | None = None
    ) -> tuple[Params, dict[str, State]]:
        """Take the step of [`update`][..update], and map raw to the parameters with the new state.

        What a training step does, for less than the two calls cost: raw is looked at once. The
        new state carries no gradients.

        Example:
            >>> import torch, funcparam as fp
            >>> from funcparam.transforms import SpectralNorm
            >>> p = fp.parametrize({"W": torch.eye(2)}, {"W": SpectralNorm()})
            >>> raw, state = p.init({"W": torch.eye(2)})
            >>> params, state = p.advance(raw, state)
        """
        state = self._check(raw, state)
        values, new = explained(self.entries, self._plan.advance, raw, state)
        return self._build(values), new

    def update(self, raw: RawTree, state: StateTree) -> dict[str, State]:
        """Advance what evolves outside of training by one step, and return the new state.

        Power iteration, for one. Call it once a training step. What does not evolve is the
        same tensor in the result; the rest carries no gradients.
        """
        state = self._check(raw, state)
        return explained(self.entries, self._plan.update, raw, state)

    def rebase(self, raw: RawTree, state: StateTree) -> tuple[dict[str, Raw], dict[str, State]]:
        """Move base points to the current values, which stay as they are.

        Where a base point moves, raw is a new tensor, detached, which requires grad if the old one
        did (not inside of a `torch.func` transform, where no tensor can be made to). An optimizer
        still has the old one: copy the new entries into it, under `no_grad`, and set its momentum,
        which belongs to the old ones, to zero. Source: dynamic trivializations, Lezcano-Casado,
        arXiv 1909.09501.
        """
        state = self._check(raw, state)
        new_raw, new_state, given = dict(raw), dict(state), self._plan.given(raw, state)
        for name, transform in self._transforms.items():
            own = given.get(name, {})
            new_raw[name], own = rebased(transform, raw[name], own)
            if own:
                new_state[name] = own
        return new_raw, self._plan.emptied(new_state, state)

    def log_abs_det_jacobian(self, raw: RawTree, state: StateTree | None = None) -> Tensor:
        """Sum log |det d value / d raw| over all transforms; what passes through adds 0.

        Raises:
            NotImplementedError: a transform has no such determinant; its name is said.
        """
        state = self._plan.given(raw, self._check(raw, state))
        total: Any = torch.zeros(())
        for name, transform in self._transforms.items():
            try:
                own = transform.log_abs_det_jacobian(raw[name], state.get(name, {}))
            except NotImplementedError as error:
                raise NotImplementedError(f"{name!r}: {error}") from error
            total = total + own
        return total

    # Value to raw

    def init(
        self, values: Any, *, generator: torch.Generator | None = None
    ) -> tuple[dict[str, Raw], dict[str, State]]:
        """Take raw and state from existing weights: the right inverse, detached and copied.

        Nothing in the result shares memory with `values`, so training it leaves them alone. A value
        that does not satisfy its constraint goes to its projection, as most initial weights do.
        `logging.getLogger("funcparam")` says at level INFO which ones moved, and by how much.

        Args:
            values: a module, or a tree like the one that `p` was made for.
            generator: where to draw what a transform draws (LoRA's first factor); None is
                torch's default one.

        Raises:
            TypeError, ValueError: names, shapes or dtypes are not those that `p` was made for,
                or a value is not finite or outside of what its transform can represent.
            NotImplementedError: a transform has no right inverse.
        """
        raw, state = self._invert(values, generator, finite=True)
        if not torch.compiler.is_compiling() and _LOGGER.isEnabledFor(logging.INFO):
            self._log_moves(self._values(values), raw, state)
        return _fresh(raw), _fresh(state)

    def right_inverse(
        self, params: Any, *, generator: torch.Generator | None = None
    ) -> tuple[dict[str, Raw], dict[str, State]]:
        """Map parameters to raw and state such that `p(raw, state)` gives them back.

        The differentiable map behind [`init`][..init]: its results may share memory with
        `params`. Errors are the same, but nothing asks whether values are finite. Through a
        singular value decomposition (`FixedRank`, `AlmostOrthogonal`) gradients are NaN where
        singular values are equal.
        """
        return self._invert(params, generator, finite=False)

    def _invert(
        self, values: Any, generator: torch.Generator | None, *, finite: bool
    ) -> tuple[dict[str, Raw], dict[str, State]]:
        given = self._values(values)
        raw: dict[str, Raw] = dict(given)
        state: dict[str, State] = {}
        for name, transform in self._transforms.items():
            value = given[name]
            if finite:
                expect_finite(name, value)
            try:
                raw[name], own = transform.right_inverse(value, generator=generator)
            except (NotImplementedError, ValueError) as error:
                raise type(error)(f"{name!r}: {error}") from error
            if finite:
                expect_finite_raw(name, transform, raw[name])
            if own:
                state[name] = own
        return raw, self._plan.settled(raw, state, self._transforms)

    def _log_moves(self, values: Mapping[str, Tensor], raw: RawTree, state: StateTree) -> None:
        for name, projected in self._chosen_values(raw, state).items():
            if by := distance_moved(values[name], projected):
                _LOGGER.info("%r was projected by up to %.2g, to %r", name, by, self[name])

    # Values that are trained themselves

    def project(self, params: Any, state: StateTree | None = None) -> Params:
        """Take values to their constraints: the nearest ones, or those that a transform documents.

        For weights that are trained as they are, and brought back after each step; see
        [`project_after`][funcparam.project_after]. What no rule picks stays.

        Args:
            params: a module, or parameters as `p` returns them.
            state: what `p.init` returned for them, where it is part of the constraint: a mask,
                bounds, a radius.

        Raises:
            NotImplementedError: a transform has no projection; its name is said.
        """
        values = self._values(params)
        own: StateTree = {} if state is None else state
        for name, transform in self._transforms.items():
            with self._named(name):
                values[name] = transform.project(values[name], own.get(name, {}))
        return self._build(values)

    def tangent(self, params: Any, grads: Any, state: StateTree | None = None) -> Params:
        """Project gradients onto the directions in which values can move, orthogonally.

        Args:
            params: values that satisfy their constraints.
            grads: a vector for each, under the same names.
            state: as for [`project`][..project].

        Raises:
            NotImplementedError: a transform has no tangent; its name is said.
        """
        values, vectors = self._values(params), self._values(grads)
        own: StateTree = {} if state is None else state
        for name, transform in self._transforms.items():
            with self._named(name):
                vectors[name] = transform.tangent(values[name], vectors[name], own.get(name, {}))
        return self._build(vectors)

    # Looking

    def violation(self, params: Any, state: StateTree | None = None) -> dict[str, Tensor]:
        """Measure how far each parametrized value is from its constraint; 0 is on it.

        NaN where it is not known how, as of a transform made from functions without a right
        inverse; [`summary`][..summary] says "not measured" there.

        Args:
            params: a module, or parameters as `p` returns them.
            state: needed where it is part of the constraint (a mask, a frozen base).
        """
        return self._violations(self._values(params), {} if state is None else state)

    def summary(self, raw: RawTree, state: StateTree | None = None) -> Table:
        """Describe raw and state as a table, and say how far each value is from its constraint.

        For each transform the shapes of raw, how many numbers are trained, how many there are with
        those of state (and integers, which pass through), and [`violation`][..violation]. Weights
        of which nothing is trained (`Frozen`) share a row, here and in `print(p)`.

        Returns:
            A table that prints as plain text, and that notebooks and `rich.print` draw.

        Example:
            >>> import torch, funcparam as fp
            >>> from funcparam.transforms import SpectralNorm
            >>> net = torch.nn.Linear(1, 2)
            >>> _ = torch.nn.init.eye_(net.weight)
            >>> p = fp.parametrize(net, {"weight": SpectralNorm()})
            >>> p.summary(*p.init(net))
            name             transform       raw     trained  total  violation
            ---------------  --------------  ------  -------  -----  ---------
            weight           SpectralNorm()  (2, 1)        2      5    0.0e+00
            everything else                                2      2
            total                                          4      7
        """
        state = self._check(raw, state)
        values = self._chosen_values(raw, state)
        return summary(self.entries, raw, state, values, self._violations(values, state))

    def plot(self, raw: RawTree, state: StateTree | None = None) -> Figure:
        """Draw how far each value is from its constraint, and the singular values of each matrix.

        Singular values are sorted, and those of all matrices of a batch are one line. A value with
        more than two dimensions is a matrix for a transform that has a `dim` (`SpectralNorm`): that
        dimension by the others; for any other transform it is a batch of matrices. Weights of
        which nothing is trained (`Frozen`) are left out.

        Returns:
            A figure of matplotlib.pyplot: `plt.show()` shows it, `figure.savefig(path)` saves it,
            and `plt.close(figure)` gives its memory back.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: raw is on the meta device, where there is nothing to draw.
        """
        from funcparam.parametrization.plot import plot

        state = self._check(raw, state)
        values = self._chosen_values(raw, state)
        trained = {e.name: self[e.name] for e in self.entries if e.name in self and e.signature.raw}
        return plot(trained, values, self._violations(values, state))

    def plan(self) -> Table:
        """Show as a table which leaves are evaluated in one call, and why the others are not.

        Leaves with equal transforms, shapes and dtypes are stacked, mapped once and taken apart
        where that was measured to be faster; values and gradients are the same to rounding. In a
        compiled function whatever is stacked at all is stacked up to 64 x 64: what is there once is
        compiled once.
        """
        return groups(self._plan.groups)

    def _chosen_values(self, raw: RawTree, state: StateTree) -> dict[str, Tensor]:
        """The values that have a transform."""
        state = self._plan.given(raw, state)
        return {
            name: transform.forward(raw[name], state.get(name, {}))
            for name, transform in self._transforms.items()
        }

    def _violations(self, values: Mapping[str, Tensor], state: StateTree) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        state = self._plan.filled(state, values)
        for name, transform in self._transforms.items():
            value, own = values[name], state.get(name, {})
            try:
                with autocast_off(value):
                    found[name] = transform.violation(*widened((value, own)))
            except ValueError as error:
                raise ValueError(f"{name!r}: {error}") from error
        return found

    # The boundary

    def _check(self, raw: RawTree, state: StateTree | None) -> StateTree:
        """Raise unless raw and state are what is expected, and return state: {} if left out."""
        state = {} if state is None else state
        if not self._expected.fits(raw, state):
            if self._expected.fits(state, raw):
                raise ValueError("raw, state: expected raw first, p(raw, state); got state first")
            check_raw_tree(self.entries, raw)
            check_state_tree(self.entries, state)
            expect_one_device(self.entries, raw, state)
        return state

    def _values(self, values: Any) -> dict[str, Tensor]:
        """The tensors that p was made for, under their first names."""
        leaves = flatten(values)[0]
        given = {name: leaf.tensor for leaf in leaves for name in leaf.names}
        known = {name: None for entry in self.entries for name in entry.names}
        for leaf in leaves:  # a module's buffers may stay out of p; its parameters may not
            if not leaf.is_buffer and not any(name in known for name in leaf.names):
                name = leaf.names[0]
                raise ValueError(
                    f"unknown name {name!r}: p was made without it; {closest(name, [*known])}"
                )
        return {entry.name: value_of(entry, given) for entry in self.entries}

    @contextmanager
    def _named(self, name: str) -> Generator[None]:
        """Begin the errors of a transform with the name of its weight."""
        try:
            yield
        except (NotImplementedError, ValueError) as error:
            raise type(error)(f"{name!r}: {error}") from error

    def _build(self, values: dict[str, Tensor]) -> Params:
        for alias, name in self._aliases.items():
            values[alias] = values[name]
        tree = values if self.structure is None else self.structure.fill(values)
        return cast("Params", tree)


def _fresh(tree: Mapping[str, Any]) -> dict[str, Any]:
    def copy(node: Any) -> Any:
        if not isinstance(node, Tensor):
            return _fresh(node)
        return torch.empty_like(node).copy_(node.detach())

    return {name: copy(node) for name, node in tree.items()}
