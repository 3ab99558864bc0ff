"""Recurrent layers, which keep lists of the weights of their last call."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any, cast

from torch import nn


class Recurrent:
    """Those among the owners of some places."""

    def __init__(self, owners: Iterable[nn.Module]) -> None:
        found = {id(owner): owner for owner in owners if isinstance(owner, nn.RNNBase)}
        self._layers = cast("list[Any]", list(found.values()))

    def take(self) -> list[tuple[list[Any], list[Any]]]:
        """Read their weights, and references by which they see that these have changed."""
        return [(rnn._flat_weights, rnn._flat_weight_refs) for rnn in self._layers]

    def renew(self) -> None:
        """Let the next call see that all have."""
        for rnn in self._layers:
            rnn._flat_weight_refs = [_elsewhere] * len(rnn._flat_weights)

    def put_back(self, taken: list[tuple[list[Any], list[Any]]]) -> None:
        """Write what `take` read."""
        for rnn, (weights, refs) in zip(self._layers, taken, strict=True):
            rnn._flat_weights, rnn._flat_weight_refs = weights, refs


@contextmanager
def renewed(owners: Iterable[nn.Module]) -> Generator[None]:
    """A block in which those among the owners see that their weights have changed."""
    layers = Recurrent(owners)
    taken = layers.take()
    try:
        layers.renew()
        yield
    finally:
        layers.put_back(taken)


def _elsewhere() -> None:
    """In the place of a weak reference to a weight that is no more."""
