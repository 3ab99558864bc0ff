"""opacus: gradients per sample of weight_norm, orthogonal and an own module; the validator"""

import torch
from networks import data
from notes import attempt, note
from opacus import GradSampleModule
from opacus.validators import ModuleValidator
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.nn.utils.parametrize import register_parametrization


class Half(nn.Module):
    def forward(self, X):
        return X / 2


KINDS = {
    "weight_norm": weight_norm,
    "orthogonal": lambda layer: orthogonal(layer, use_trivialization=False),
    "module": lambda layer: register_parametrization(layer, "weight", Half()),
}
x, y = data()
for name, register in KINDS.items():
    for force in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(register(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 3))
        note(f"{name} valid", len(ModuleValidator.validate(model, strict=False)))
        wrapped = GradSampleModule(model, force_functorch=force)
        loss = nn.functional.cross_entropy(wrapped(x), y)
        loss.backward()
        note(f"{name} loss", loss)
        note(f"{name} samples", {n: p.grad_sample for n, p in wrapped.named_parameters()})
buffered = nn.Sequential(spectral_norm(nn.Linear(4, 3)))
attempt("layers with buffers", lambda: GradSampleModule(buffered))
