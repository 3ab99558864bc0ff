"""torch's switch of the cache, as bitsandbytes and axolotl turn it by hand."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize as torch_api

from funcparam.compat import installed, parametrize


class Dequantize(nn.Module):
    """Counts its calls."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return 2 * x


class TwoReads(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.weight * self.weight * x


def gated(library, switch):
    """A module whose forward has the cache on, by hooks."""
    module, part = TwoReads(), Dequantize()
    library.register_parametrization(module, "weight", part)

    def on(module, args):
        switch._cache_enabled += 1

    def off(module, args, output):
        switch._cache_enabled -= 1
        if not switch._cache_enabled:
            switch._cache = {}

    module.register_forward_pre_hook(on)
    module.register_forward_hook(off, always_call=True)
    part.calls = 0
    return module, part


@pytest.mark.parametrize(
    ("library", "switch"),
    [(torch_api, torch_api), (parametrize, torch_api), (parametrize, parametrize)],
    ids=["torch", "installed", "imported"],
)
def test_a_value_is_computed_once_while_it_is_on(library, switch):
    module, part = gated(library, switch)
    for step in range(1, 4):
        assert torch.equal(module(torch.ones(2)).detach(), module(torch.ones(2)).detach())
        assert part.calls == 2 * step
        assert (torch_api._cache_enabled, torch_api._cache) == (0, {})
    assert module.weight is not module.weight


def test_a_switch_that_is_left_on_gives_no_stale_value():
    module, _ = gated(parametrize, torch_api)
    torch_api._cache_enabled += 1
    try:
        before = module.weight
        assert module.weight is before
        with torch.no_grad():
            module.parametrizations.weight.original.add_(1)
        assert torch.equal(module.weight, torch.full((2,), 4.0))
        assert len(torch_api._cache) == 1
    finally:
        torch_api._cache_enabled, torch_api._cache = 0, {}


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # the compiler looks at it
def test_installed_code_and_a_compiled_graph():
    with installed():
        module, part = gated(torch_api, torch_api)
        compiled = torch.compile(module, backend="aot_eager")
        x = torch.ones(2)
        for _ in range(2):
            assert torch.equal(compiled(x), torch.full((2,), 4.0))
        module(x)
    assert part.calls
    assert (parametrize._cache_enabled, parametrize._cache) == (0, {})


def test_a_compiled_function_may_call_what_the_module_offers():
    layer = parametrize.register_parametrization(nn.Linear(2, 2), "weight", Dequantize())

    @torch.compile(backend="eager", fullgraph=True)
    def both(x):
        with parametrize.cached():
            return layer(x) + layer(x), parametrize.is_parametrized(layer)

    x = torch.ones(1, 2)
    assert torch.equal(both(x)[0], 2 * layer(x))
