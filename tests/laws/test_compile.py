"""Law 4: torch.compile without a graph break, values and gradients equal, one compile."""

import pytest
import torch
from torch.func import grad

from tests.cases import CASES, every_case, raw_and_state, tensors


def step(case, weights):
    def loss(raw, state):
        value = case.transform.forward(raw, state)
        return (value * weights).sum().real, (value, case.transform.update(raw, state))

    return grad(loss, has_aux=True)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@every_case
@torch._dynamo.config.patch(error_on_recompile=True)
def test_fullgraph_once(case, shape):
    weights = torch.randn(shape, dtype=torch.float64)
    compiled = torch.compile(step(case, weights), fullgraph=True, backend="aot_eager")
    for _ in range(3):  # raw changes, the graph does not
        raw, state = raw_and_state(case, shape)
        if not tensors(raw):
            return
        assert_close(compiled(raw, state), step(case, weights)(raw, state))


@pytest.mark.parametrize(
    "case",
    [
        c
        for c in CASES
        if str(c)
        in {
            "Orthogonal(map='cayley', trivialize=True)",
            "WeightNorm(dim=0)",
            "SpectralNorm(dim=0, n_power_iterations=2, eps=1e-12)",
        }
    ],
    ids=str,
)
def test_inductor(case):
    shape = case.shapes[0]
    weights = torch.randn(shape, dtype=torch.float64)
    raw, state = raw_and_state(case, shape)
    compiled = torch.compile(step(case, weights), fullgraph=True)
    assert_close(compiled(raw, state), step(case, weights)(raw, state))
