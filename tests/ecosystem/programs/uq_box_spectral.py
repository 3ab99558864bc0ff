"""lightning-uq-box: its subclasses of torch's SpectralNorm hook on Linear, Conv2d and BatchNorm"""

import torch
from lightning_uq_box.uq_methods.spectral_normalized_layers import (
    collect_input_sizes,
    spectral_normalize_model_layers,
)
from notes import attempt, train
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))
sizes = collect_input_sizes(model, 6)
spectral_normalize_model_layers(model, 2, sizes)
x = torch.linspace(-1, 1, 360).reshape(5, 2, 6, 6)
train("normalized", model, lambda m: m(x))
attempt("removed", lambda: nn.utils.remove_spectral_norm(model[3]).weight)
