"""orthogonium: orthogonal convolutions and linear layers, AOL and SLL"""

import torch
from notes import attempt, copied, train
from orthogonium import layers
from torch import nn

x = torch.linspace(-1, 1, 512).reshape(2, 4, 8, 8)
BUILD = {
    "AdaptiveOrthoConv2d": lambda kind: kind(4, 8, 3, padding=1, stride=2),
    "AdaptiveOrthoConvTranspose2d": lambda kind: kind(4, 4, 2, stride=2),
    "OrthoLinear": lambda kind: nn.Sequential(nn.Flatten(), kind(256, 8)),
    "AOLConv2D": lambda kind: kind(4, 4, 3, padding=1),
    "SDPBasedLipschitzConv": lambda kind: kind(4, 4, 3),
}
for name, build in BUILD.items():
    torch.manual_seed(0)
    kind = getattr(layers, name, None)
    if kind is None:
        continue
    model = build(kind)
    train(name, model, lambda m: m(x), rate=0.1)
    attempt(f"{name} singular values", lambda m=model: m.singular_values())
    copied(name, model, lambda m: m(x))
