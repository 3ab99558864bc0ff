"""encodec: SEANet encoder and decoder with the hooks of weight norm and spectral norm"""

import torch
from encodec.modules import SEANetDecoder, SEANetEncoder
from notes import train
from torch import nn

x = torch.linspace(-1, 1, 256).reshape(1, 1, 256)
small = {"dimension": 8, "n_filters": 2, "ratios": [4, 2], "lstm": 1}
for norm in ("weight_norm", "spectral_norm"):
    torch.manual_seed(0)
    model = nn.Sequential(SEANetEncoder(norm=norm, **small), SEANetDecoder(norm=norm, **small))
    train(norm, model, lambda m: m(x))
