"""What compat reads waits for no device."""

import pytest
import torch
from torch import nn

from funcparam.compat import parametrizations, parametrize
from tests.waiting import Waits

pytestmark = pytest.mark.usefixtures("entries_are_far")

KINDS = {
    "matrix_exp": lambda layer: parametrizations.orthogonal(layer, orthogonal_map="matrix_exp"),
    "cayley": lambda layer: parametrizations.orthogonal(layer, orthogonal_map="cayley"),
    "householder": lambda layer: parametrizations.orthogonal(layer, orthogonal_map="householder"),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
}


@pytest.mark.parametrize("kind", KINDS)
def test_reads(kind):
    layer = KINDS[kind](nn.Linear(6, 6, dtype=torch.float64))
    x = torch.ones(2, 6, dtype=torch.float64)
    with Waits() as waits:
        for _ in range(2):
            layer(x).sum().backward()
            with parametrize.cached():
                assert layer.weight is layer.weight
        layer.eval()
        layer(x)
    assert waits.found == set()
