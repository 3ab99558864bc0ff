"""opacus: per-sample gradients of weight_norm and orthogonal; the validator"""

import torch
from networks import data
from notes import attempt, note
from opacus import GradSampleModule
from opacus.validators import ModuleValidator
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

x, y = data()
for function in (weight_norm, orthogonal, spectral_norm):
    torch.manual_seed(0)
    model, name = nn.Sequential(function(nn.Linear(4, 3))), function.__name__
    errors = ModuleValidator.validate(model, strict=False)
    note(f"{name} valid", [type(error) for error in errors])
    wrapped = attempt(f"{name} wraps", lambda m=model: str(type(GradSampleModule(m))))
    if wrapped is None:
        continue
    for force in (False, True):
        model = GradSampleModule(nn.Sequential(function(nn.Linear(4, 3))), force_functorch=force)
        note(f"{name} parameters", " ".join(n for n, _ in model.named_parameters()))
