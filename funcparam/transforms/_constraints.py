from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.distributions import constraints

from funcparam.transforms._bounds import Interval, LowerBound, UpperBound
from funcparam.transforms._cat import Cat, Stack
from funcparam.transforms._cholesky import CholeskyFactor, PositiveDefinite
from funcparam.transforms._correlation import CorrelationCholesky
from funcparam.transforms._identity import Identity
from funcparam.transforms._positive import Positive
from funcparam.transforms._simplex import Simplex
from funcparam.transforms._symmetric import Symmetric
from funcparam.transforms._triangular import Triangular
from funcparam.transforms.contract.base import AnyTransform


def from_constraint(constraint: constraints.Constraint) -> AnyTransform:
    """Find the transform whose values satisfy one of `torch.distributions.constraints`.

    | constraint | transform |
    |---|---|
    | `real`, `independent` of it | `Identity()` |
    | `positive`, `nonnegative` | `Positive()` |
    | `greater_than`, `greater_than_eq` | `LowerBound(low)` |
    | `less_than` | `UpperBound(high)` |
    | `interval`, `half_open_interval`, `unit_interval` | `Interval(low, high)` |
    | `simplex` | `Simplex()`; `Simplex("stick_breaking")` is the one with a log-determinant |
    | `lower_triangular`, `symmetric` | `Triangular()`, `Symmetric()` |
    | `lower_cholesky` | `CholeskyFactor()` |
    | `positive_definite`, `positive_semidefinite` | `PositiveDefinite()` |
    | `corr_cholesky` | `CorrelationCholesky()` |
    | `cat`, `stack` | `Cat`, `Stack` of what the parts become |
    | `independent` | what its base becomes |

    These are all that torch registers in `biject_to` and `transform_to`, and two more. Values lie
    strictly inside of closed sets, as those of torch's transforms do.

    Args:
        constraint: an instance, such as `constraints.positive` or `constraints.interval(0, 1)`.

    Raises:
        TypeError: it is not a constraint.
        NotImplementedError: no transform can satisfy it (it is discrete, or depends on other
            values), or none is known.

    Example:
        >>> from torch.distributions import Gamma, constraints
        >>> from funcparam.transforms import from_constraint
        >>> from_constraint(Gamma.arg_constraints["rate"])
        Positive(map='softplus')
        >>> from_constraint(constraints.interval(-1, 1))
        Interval(low=-1.0, high=1.0)
    """
    if not isinstance(constraint, constraints.Constraint):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            "from_constraint expects an instance from torch.distributions.constraints;"
            f" got {constraint!r}"
        )
    make = _FACTORIES.get(type(constraint))
    if make is not None:
        return make(constraint)
    name = f"from_constraint: {constraint!r}"
    if constraints.is_dependent(constraint):
        raise NotImplementedError(
            f"{name} depends on other values. Take the constraint of an instance, such as"
            " Uniform(0., 1.).support"
        )
    if constraint.is_discrete:
        raise NotImplementedError(
            f"{name} is discrete: nothing continuous is trained in its place. Use Frozen(), or"
            " train probabilities with Simplex() or Interval(0, 1)"
        )
    raise NotImplementedError(
        f"{name} has no transform. Make one with fp.transform(forward, right_inverse)"
    )


def _bound(constraint: Any, name: str) -> float:
    bound = getattr(constraint, name)
    if isinstance(bound, Tensor) and bound.numel() != 1:
        kind = type(constraint).__name__.removeprefix("_")
        raise NotImplementedError(
            f"from_constraint: {kind} has a bound of shape"
            f" {tuple(bound.shape)}, and a transform holds no tensor. Use LowerBound, UpperBound or"
            " Interval with one bound for init, and write the tensors into state"
        )
    return float(bound)


def _greater(constraint: Any) -> AnyTransform:
    low = _bound(constraint, "lower_bound")
    return Positive() if low == 0 else LowerBound(low)


def _interval(constraint: Any) -> AnyTransform:
    return Interval(_bound(constraint, "lower_bound"), _bound(constraint, "upper_bound"))


_FACTORIES: Mapping[type, Callable[[Any], AnyTransform]] = {
    type(constraints.real): lambda _: Identity(),
    constraints.independent: lambda c: from_constraint(c.base_constraint),
    constraints.greater_than: _greater,
    constraints.greater_than_eq: _greater,
    constraints.less_than: lambda c: UpperBound(_bound(c, "upper_bound")),
    constraints.interval: _interval,
    constraints.half_open_interval: _interval,
    type(constraints.simplex): lambda _: Simplex(),
    type(constraints.lower_triangular): lambda _: Triangular(),
    type(constraints.lower_cholesky): lambda _: CholeskyFactor(),
    type(constraints.corr_cholesky): lambda _: CorrelationCholesky(),
    type(constraints.symmetric): lambda _: Symmetric(),
    type(constraints.positive_definite): lambda _: PositiveDefinite(),
    type(constraints.positive_semidefinite): lambda _: PositiveDefinite(),
    constraints.cat: lambda c: Cat(map(from_constraint, c.cseq), c.lengths, c.dim),
    constraints.stack: lambda c: Stack(map(from_constraint, c.cseq), c.dim),
}
