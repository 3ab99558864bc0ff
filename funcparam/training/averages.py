"""Averages of parametrized networks that keep every constraint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor

from funcparam.parametrization.boundary import RawTree, StateTree
from funcparam.parametrization.parametrization import Parametrization
from funcparam.parametrization.values import fresh, naming
from funcparam.transforms.contract.base import AnyTransform, Raw, State
from funcparam.transforms.contract.precision import autocast_off, widened
from funcparam.transforms.contract.signature import describe

How: TypeAlias = Literal["raw", "values", "karcher"]
Point: TypeAlias = "tuple[RawTree, StateTree]"


def average(
    points: Sequence[Point],
    p: Parametrization[Any],
    how: How = "raw",
    weights: Sequence[float] | None = None,
) -> tuple[dict[str, Raw], dict[str, State]]:
    r"""Average networks of one parametrization: stochastic weight averages, soups, EMA.

    The average satisfies every constraint. What has no rule is averaged as it is. With `how`

    * `"raw"`: means of raw, and state made exact for them, as by `p.refresh`. For points of one
      run: raw means something relative to its base point, which has to be the same one;
    * `"values"`: means of values, projected onto their constraints (`p.project`), and raw and state
      of those. For points from anywhere; of a mean with several nearest points, as that of a
      rotation and a reflection, it is one of them. What has no projection goes through its right
      inverse: an adapter is merged into its weight, and a new one begins there;
    * `"karcher"`: for orthogonal and unitary matrices the Karcher mean, from which the squared
      distances along the manifold have the least sum: $\sum_i w_i \operatorname{Log}_M(W_i) = 0$.
      Of square matrices it is that of the group, of others that of the Stiefel manifold in its
      canonical metric. A rule of another kind is an error: `p.split` takes it apart.

    A running average is one of two points with the weights `decay` and `1 - decay`. Buffers of the
    network, such as BatchNorm's, are no part of it: `torch.optim.swa_utils.update_bn` renews them.

    Args:
        points: pairs of raw and state.
        p: what they belong to.
        how: what is averaged.
        weights: one for each point, not negative; they are divided by their sum. None: all alike.

    Returns:
        Raw and state, detached and new, as of `p.init`.

    Raises:
        TypeError, ValueError: there are no points, or one is not what `p` takes; weights are not
            as said; in raw, base points or what else lies in state differs; in values, the
            constraint does; of a Karcher mean, points are too far apart.
        NotImplementedError: a rule has no Karcher mean.

    Example:
        >>> import torch, funcparam as fp
        >>> from funcparam.transforms import Orthogonal
        >>> net = torch.nn.Linear(3, 3)
        >>> p = fp.parametrize(net, {"weight": Orthogonal()})
        >>> raw, state = p.init(net)
        >>> other = {**raw, "weight": raw["weight"] + 0.2}, state
        >>> mean = fp.average([(raw, state), other], p, how="karcher")
        >>> p.violation(p(*mean))["weight"] < 1e-5
        tensor(True)

    Source: Izmailov et al., arXiv 1803.05407 (averages of a run); Wortsman et al.,
    arXiv 2203.05482 (soups); Karcher, Comm. Pure Appl. Math. 30 (1977).
    """
    if how not in get_args(How):
        raise ValueError(f"how: expected one of {', '.join(get_args(How))}; got {how!r}")
    raws, states = _checked(points, p)
    shares = _shares(weights, len(raws))
    with torch.no_grad():
        if how == "raw":
            raw = {name: _mean(name, [raw[name] for raw in raws], shares) for name in raws[0]}
            return fresh(raw), fresh(_agreed_state(p, raw, states))
        evaluate = p._plan.evaluate  # pyright: ignore[reportPrivateUsage]
        found = [evaluate(raw, state) for raw, state in zip(raws, states, strict=True)]
        of_each = {name: [values[name] for values in found] for name in raws[0]}
        if how == "karcher":
            return p.init({n: _karcher(p.get(n), n, each, shares) for n, each in of_each.items()})
        means = {name: _mean(name, each, shares) for name, each in of_each.items()}
        return _by_values(p, cast("dict[str, Tensor]", means), states)


def _checked(
    points: Sequence[Point], p: Parametrization[Any]
) -> tuple[list[RawTree], list[StateTree]]:
    raws: list[RawTree] = []
    states: list[StateTree] = []
    for i, point in enumerate(points):
        if not isinstance(point, tuple) or len(point) != 2:  # pyright: ignore
            raise TypeError(f"points[{i}]: expected (raw, state); got {describe(point)}")
        try:
            state = p._check(*point)  # pyright: ignore[reportPrivateUsage]
        except (TypeError, ValueError) as error:
            raise type(error)(f"points[{i}]: {error}") from error
        raws.append(point[0])
        states.append(state)
    if not raws:
        raise ValueError("points: expected at least one pair of raw and state; got none")
    return raws, states


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    given = [1.0] * count if weights is None else [float(weight) for weight in weights]
    usable = all(isfinite(weight) and weight >= 0 for weight in given) and sum(given) > 0
    if len(given) != count or not usable:
        raise ValueError(
            f"weights: expected {count} numbers, not negative and not all 0; got {weights}"
        )
    return [weight / sum(given) for weight in given]


def _mean(name: str, each: Sequence[Raw], shares: Sequence[float]) -> Raw:
    first = each[0]
    if not isinstance(first, Tensor):
        columns = {key: [cast("Any", own)[key] for own in each] for key in first}
        return {k: cast("Tensor", _mean(f"{name}.{k}", own, shares)) for k, own in columns.items()}
    tensors = cast("Sequence[Tensor]", each)
    if not (first.is_floating_point() or first.is_complex()):
        if not all(torch.equal(first, tensor) for tensor in tensors):
            raise ValueError(
                f"{name!r}: expected equal {first.dtype} in all points, of which there"
                " is no mean; got several"
            )
        return first
    wide = [share * widened(tensor) for share, tensor in zip(shares, tensors, strict=True)]
    return torch.stack(wide).sum(0).to(first.dtype)


def _agreed_state(
    p: Parametrization[Any], raw: RawTree, states: Sequence[StateTree]
) -> Mapping[str, State]:
    """What all states come to for one raw; those that follow raw come to the same."""
    kept = p.refresh(raw, states[0])
    for i, state in enumerate(states):
        if _are_close(state, states[0]):
            continue
        other = p.refresh(raw, state)
        for name, own in kept.items():
            if not _are_close(other[name], own):
                raise ValueError(
                    f"{name!r}: expected points that share what raw is relative to; points[{i}] has"
                    f" another {_first_apart(other[name], own)!r} in state. Use how='values'"
                )
    return kept


def _by_values(
    p: Parametrization[Any], means: dict[str, Tensor], states: Sequence[StateTree]
) -> tuple[dict[str, Raw], dict[str, State]]:
    projected: dict[str, Tensor] = {}
    for name, transform in p.items():
        with naming(name, transform):
            found = _onto(transform, means[name], [state.get(name, {}) for state in states])
        if found is not None:
            means[name] = projected[name] = found
    raw, state = p.init(means)
    before = {name: own for name, own in states[0].items() if name in projected}
    evaluate = p._plan.evaluate  # pyright: ignore[reportPrivateUsage]
    kept, after = evaluate(raw, {**state, **before}), evaluate(raw, state)
    for name, value in projected.items():
        if _are_close(value, kept[name]):  # what of the constraint lies in state stays there
            state |= fresh({name: before[name]}) if name in before else {}
        elif not _are_close(value, after[name]):
            raise ValueError(
                f"{name!r}: state holds another constraint than {p[name]!r} starts with, which a"
                " new state would lose. Use how='raw'"
            )
    return raw, state


def _onto(transform: AnyTransform, value: Tensor, states: Sequence[State]) -> Tensor | None:
    """The projection, which has to be the same by all states; None where there is none."""
    others = [state for state in states if not _are_close(state, states[0])]
    try:
        first, *rest = [transform.project(value, state) for state in (states[0], *others)]
    except NotImplementedError:
        return None
    if not all(_are_close(first, other) for other in rest):
        raise ValueError(
            "expected points of one constraint; what of it lies in state (a mask, bounds, a radius)"
            " differs"
        )
    with autocast_off(value):
        violation = transform.violation(*widened((first, states[0])))
    if violation > torch.finfo(value.dtype).eps ** 0.5:
        raise ValueError(
            "expected values nearer to each other: their mean has no single nearest"
            " one that satisfies the constraint"
        )
    return first


def _karcher(
    transform: AnyTransform | None, name: str, each: Sequence[Tensor], shares: Sequence[float]
) -> Tensor:
    if transform is None:
        return cast("Tensor", _mean(name, each, shares))
    values = torch.stack(list(each))
    weights = torch.tensor(shares, dtype=widened(values).real.dtype, device=values.device)
    with naming(name, transform), autocast_off(values):
        return transform.karcher_mean(widened(values), weights).to(values.dtype)


def _are_close(a: Any, b: Any) -> bool:
    """Whether tensors, or trees of them, are equal to rounding."""
    if isinstance(a, Tensor):
        if not (a.is_floating_point() or a.is_complex()):
            return torch.equal(a, b)
        size = a.abs().amax().item() if a.numel() else 0.0
        rounding = max(2 * torch.finfo(a.dtype).eps, 128 * torch.finfo(widened(a).dtype).eps)
        return torch.allclose(a, b, rtol=0, atol=size * rounding)
    return all(_are_close(a[key], b[key]) for key in a)


def _first_apart(a: State, b: State) -> str:
    return next(key for key in a if not _are_close(a[key], b[key]))
