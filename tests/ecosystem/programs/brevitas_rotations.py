"""brevitas: parametrized rotations shared by several layers, quantized and fused again"""

import torch
import torch.nn.utils.parametrize as P
from brevitas import nn as qnn
from brevitas.graph.base import (
    ModuleInstanceRegisterParametrization,
    ModuleInstanceToModuleInstance,
)
from brevitas.graph.equalize import fuse_parametrizations
from brevitas.utils.parametrization_utils import RotationWeightParametrization
from notes import note, train
from torch import nn

torch.manual_seed(0)
model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(4, 8)
rotation = nn.Parameter(torch.linalg.qr(torch.randn(8, 8))[0])
part = RotationWeightParametrization(rotation, lambda tensor, rot, k: tensor @ rot, axis=1)
for layer in (model[0], model[2]):
    model = ModuleInstanceRegisterParametrization(layer, "weight", part).apply(model)
note("classes", [type(layer) for layer in model])
train("rotated", model, lambda m: m(x))
quantized = qnn.QuantLinear(8, 8)
model = ModuleInstanceToModuleInstance(model[0], quantized).apply(model)
note("quantized", [type(layer) for layer in model])
train("quantized", model, lambda m: m(x))
fuse_parametrizations(model)
note("fused", [P.is_parametrized(layer) for layer in model])
note("its state", model.state_dict())
note("its output", model(x))
