"""evox: a population of parametrized networks as flat vectors, under vmap"""

import torch
from evox.utils import ParamsAndVector
from networks import data, network
from notes import attempt, note
from torch.func import functional_call, vmap

model, (x, _) = network().eval(), data()
adapter = ParamsAndVector(dummy_model=model)
parameters = dict(model.named_parameters())
center = adapter.to_vector(parameters)
note("vector", center)
torch.manual_seed(2)
population = center + 0.1 * torch.randn(5, center.numel())
members = adapter.batched_to_params(population)
outputs = attempt("population", lambda: vmap(lambda p: functional_call(model, p, (x,)))(members))
note("members", members)
note("best", int(outputs.square().mean((1, 2)).argmin()))
