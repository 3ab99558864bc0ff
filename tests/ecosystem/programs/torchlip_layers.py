"""deel-torchlip: spectral, Björck and Frobenius layers; vanilla_export"""

import torch
from deel import torchlip
from notes import copied, note, train

torch.manual_seed(0)
model = torchlip.Sequential(
    torchlip.SpectralConv2d(2, 4, 3, padding=1),
    torchlip.GroupSort2(),
    torchlip.ScaledAvgPool2d(2),
    torch.nn.Flatten(),
    torchlip.SpectralLinear(36, 8),
    torchlip.FullSort(),
    torchlip.FrobeniusLinear(8, 1),
)
x = torch.linspace(-1, 1, 360).reshape(5, 2, 6, 6)
train("lipschitz", model, lambda m: m(x), rate=0.1)
copied("lipschitz", model, lambda m: m(x))
plain = model.vanilla_export()
note("exported", plain.state_dict())
note("its output", plain(x))
