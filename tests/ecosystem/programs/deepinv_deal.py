"""deepinv: the multi-convolutions of DEAL, whose kernels have zero mean"""

import torch
from deepinv.models.deal import MultiConv2d
from notes import copied, note, train

for color, channels in ((False, [1, 4, 8]), (True, [3, 4, 8])):
    torch.manual_seed(0)
    model = MultiConv2d(channels, [5, 5], color=color)
    x = torch.linspace(-1, 1, channels[0] * 400).reshape(1, channels[0], 20, 20)
    train(f"deal {color}", model, lambda m, x=x: m(x))
    copied(f"deal {color}", model, lambda m, x=x: m(x))
    note(f"norm {color}", model.spectral_norm())
    note(f"transposed {color}", model.transpose(model(x)))
