"""The dictionary level: transforms composed over a whole parameter dictionary."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast, final

import torch
from torch import Tensor

from funcparam.parametrization.boundary import (
    Entry,
    Expected,
    RawTree,
    StateTree,
    checked,
    explained,
)
from funcparam.parametrization.inspect import groups, overview, summary
from funcparam.parametrization.part import expect_self_contained, fitting, matching
from funcparam.parametrization.shared import SharedPlan
from funcparam.parametrization.table import Table, Tabular
from funcparam.parametrization.values import (
    by_first_name,
    fresh,
    inverted,
    log_determinant,
    log_moves,
    moves_are_logged,
    projected,
    tangents,
    violations,
)
from funcparam.transforms.contract.base import AnyTransform, Raw, State

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from funcparam.parametrization.nested import Structure

Params = TypeVar("Params")
T = TypeVar("T")


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
    _known: frozenset[str] = field(init=False, compare=False)
    _expected: Expected = field(init=False, compare=False)
    _plan: SharedPlan = field(init=False, compare=False)

    def __post_init__(self) -> None:
        chosen = [entry for entry in self.entries if entry.transform is not None]
        derived: dict[str, Any] = {
            "_transforms": {entry.name: entry.transform for entry in chosen},
            "_aliases": {alias: e.name for e in self.entries for alias in e.names[1:]},
            "_known": frozenset(name for entry in self.entries for name in entry.names),
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

    # Parts

    def select(self, pattern: str, *more: str) -> Parametrization[dict[str, Tensor]]:
        """Take a part of the network: the weights whose names match, with a rule or without.

        An inner loop that adapts a head, or training behind a frozen backbone, then evaluates only
        what changes. [`of`][..of] takes out of raw, state and values what belongs to a part, and
        dictionaries of parts are joined by `{**a, **b}`. Of a nested tree the values of a part are
        a dictionary by names; `fp.parametrize(tree, [])` makes the tree of those of all parts.

        Args:
            pattern: a name or a glob. A tied weight is taken if one of its names matches.
            *more: more of them; a weight is taken that matches any.

        Raises:
            ValueError: a pattern matches nothing; or a weight that is taken depends on one that is
                not (`RotateIn`).
        """
        patterns = (pattern, *more)
        return self._part(matching(patterns, self.entries), fitting(patterns, self.buffers))

    def split(
        self, pattern: str, *more: str
    ) -> tuple[Parametrization[dict[str, Tensor]], Parametrization[dict[str, Tensor]]]:
        """Take the network apart: the weights whose names match, and all others.

        Arguments and errors are those of [`select`][..select].

        Example:
            >>> import torch, funcparam as fp
            >>> from funcparam.transforms import Orthogonal, WeightNorm
            >>> net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
            >>> p = fp.parametrize(net, {"0.weight": Orthogonal(), "1.weight": WeightNorm()})
            >>> raw, state = p.init(net)
            >>> head, body = p.split("1.*")
            >>> fixed = body(body.of(raw), body.of(state))  # once
            >>> values = {**fixed, **head(head.of(raw), head.of(state))}  # at each step
            >>> values.keys() == p(raw, state).keys()
            True
        """
        patterns = (pattern, *more)
        names, buffers = matching(patterns, self.entries), fitting(patterns, self.buffers)
        every = {entry.name for entry in self.entries}
        return (
            self._part(names, buffers),
            self._part(every - names, {*self.buffers} - buffers),
        )

    def of(self, tensors: Mapping[str, T]) -> dict[str, T]:
        """Take what belongs to this part out of raw, state or values by name; nothing is copied."""
        return {name: own for name, own in tensors.items() if name in self._known}

    def _part(
        self, names: Collection[str], buffers: Collection[str]
    ) -> Parametrization[dict[str, Tensor]]:
        entries = tuple(entry for entry in self.entries if entry.name in names)
        expect_self_contained(entries)
        return Parametrization(entries, None, tuple(b for b in self.buffers if b in buffers))

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

    def refresh(self, raw: RawTree, state: StateTree) -> dict[str, State]:
        """Work out exactly what state only follows, and bring base points to their constraint.

        Singular vectors (`SpectralNorm`) become those of raw, and base points (`Orthogonal`) the
        nearest ones on the constraint. So values satisfy theirs afterwards, whatever raw and state
        were, such as means of several. The result carries no gradients.

        Example:
            >>> import torch, funcparam as fp
            >>> from funcparam.transforms import SpectralNorm
            >>> p = fp.parametrize({"W": torch.eye(2)}, {"W": SpectralNorm()})
            >>> _, state = p.init({"W": torch.eye(2)})
            >>> raw = {"W": torch.diag(torch.tensor([1.0, 4.0]))}
            >>> p(raw, p.refresh(raw, state))["W"].diag()
            tensor([0.2500, 1.0000])
        """
        state = self._check(raw, state)
        return explained(self.entries, self._plan.refresh, raw, state)

    def rebase(self, raw: RawTree, state: StateTree) -> tuple[dict[str, Raw], dict[str, State]]:
        """Move base points to the current values, which stay as they are.

        Where a base point moves, raw is a new tensor, detached, which requires grad if the old one
        did (not inside of a `torch.func` transform, where no tensor can be made to). An optimizer
        would go on with the old one: [`fp.move(p, p, raw, state, optimizer)`][funcparam.move] moves
        both. Source: dynamic trivializations, Lezcano-Casado, arXiv 1909.09501.
        """
        return self._plan.rebase(self._transforms, raw, self._check(raw, state))

    def log_abs_det_jacobian(self, raw: RawTree, state: StateTree | None = None) -> Tensor:
        """Sum log |det d value / d raw| over all transforms; what passes through adds 0.

        Raises:
            NotImplementedError: a transform has no such determinant; its name is said.
        """
        given = self._plan.given(raw, self._check(raw, state))
        return log_determinant(self._transforms, raw, given)

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
        given = self._values(values)
        raw, state = inverted(self._transforms, given, generator, finite=True)
        state = self._plan.settled(raw, state, self._transforms)
        if moves_are_logged():
            log_moves(self._transforms, given, self._chosen_values(raw, state))
        return fresh(raw), fresh(state)

    def right_inverse(
        self, params: Any, *, generator: torch.Generator | None = None
    ) -> tuple[dict[str, Raw], dict[str, State]]:
        """Map parameters to raw and state such that `p(raw, state)` gives them back.

        The differentiable map behind [`init`][..init]: its results may share memory with
        `params`. Errors are the same, but nothing asks whether values are finite. Through a
        singular value decomposition (`FixedRank`, `AlmostOrthogonal`) gradients are NaN where
        singular values are equal.
        """
        raw, state = inverted(self._transforms, self._values(params), generator, finite=False)
        return raw, self._plan.settled(raw, state, self._transforms)

    # Values that are trained themselves

    def project(self, params: Any, state: StateTree | None = None) -> Params:
        """Take values to their constraints: the nearest ones, or those that a transform documents.

        [`project_after`][funcparam.project_after] does it after each step. What has no rule stays.

        Args:
            params: a module, or parameters as `p` returns them.
            state: what `p.init` returned for them, where it is part of the constraint: a mask,
                bounds, a radius.

        Raises:
            NotImplementedError: a transform has no projection; its name is said.
            ValueError: a constraint lies in state that is not given, or a value is refused.
        """
        values = self._values(params)
        return self._build({**values, **projected(self._transforms, values, state)})

    def tangent(self, params: Any, grads: Any, state: StateTree | None = None) -> Params:
        """Project gradients onto the directions in which values can move, orthogonally.

        Args:
            params: values that satisfy their constraints.
            grads: a vector for each, under the same names.
            state: as for [`project`][..project].

        Raises:
            NotImplementedError: a transform has no tangent; its name is said.
            ValueError: a constraint lies in state, which is not given.
        """
        values, vectors = self._values(params), self._values(grads)
        return self._build({**vectors, **tangents(self._transforms, values, vectors, state)})

    def retract(self, params: Any, step: Any, state: StateTree | None = None) -> Params:
        r"""Take a step from values, and bring what it leads to back: $R_W(D) = P(W + D)$.

        `P` is [`project`][..project], and arguments and errors are those of [`tangent`][..tangent].
        A step along the constraint is kept to first order: it is a retraction. What has no rule
        takes the step as it is.

        Example:
            >>> import torch, funcparam as fp
            >>> from funcparam.transforms import UnitNorm
            >>> values = {"w": torch.tensor([[1.0, 0.0]])}
            >>> p = fp.parametrize(values, {"w": UnitNorm()})
            >>> p.retract(values, p.tangent(values, {"w": torch.tensor([[5.0, 0.75]])}))
            {'w': tensor([[0.8000, 0.6000]])}

        Source: Absil and Malick, SIAM J. Optim. 22 (2012) (projections are retractions).
        """
        values, steps = self._values(params), self._values(step)
        moved = {name: value + steps[name] for name, value in values.items()}
        return self._build({**moved, **projected(self._transforms, moved, state)})

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

    def plan(self, device: torch.device | str = "cpu") -> Table:
        """Show as a table which leaves a device evaluates in one call, and why not the others.

        Leaves with equal transforms, shapes and dtypes are stacked, mapped once and taken apart
        where that was measured to be faster; of a device where nothing was, the table says so.
        Values and gradients are the same to rounding. In a compiled function whatever is stacked at
        all is stacked up to 64 x 64: what is there once is compiled once.
        """
        return groups(self._plan.groups, torch.device(device).type)

    def _chosen_values(self, raw: RawTree, state: StateTree) -> dict[str, Tensor]:
        """The values that have a transform."""
        state = self._plan.given(raw, state)
        return {
            name: transform.forward(raw[name], state.get(name, {}))
            for name, transform in self._transforms.items()
        }

    def _violations(self, values: Mapping[str, Tensor], state: StateTree) -> dict[str, Tensor]:
        return violations(self._transforms, values, self._plan.filled(state, values))

    # The boundary

    def _check(self, raw: RawTree, state: StateTree | None) -> StateTree:
        return checked(self.entries, self._expected, raw, state)

    def _values(self, values: Any) -> dict[str, Tensor]:
        return by_first_name(self.entries, values)

    def _build(self, values: dict[str, Tensor]) -> Params:
        for alias, name in self._aliases.items():
            values[alias] = values[name]
        tree = values if self.structure is None else self.structure.fill(values)
        return cast("Params", tree)
