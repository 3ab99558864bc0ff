"""What a call of this room was given, checked before anything else."""

from __future__ import annotations

from funcparam.parametrization.parametrization import Parametrization
from funcparam.transforms.contract.signature import describe


def expect_parametrization(p: object, call: str) -> None:
    """Raise for rules, a network or anything else in the place of a parametrization."""
    if not isinstance(p, Parametrization):
        raise TypeError(
            f"p: expected a parametrization, in {call}; got {describe(p)}. fp.parametrize(net,"
            " rules) makes one"
        )
