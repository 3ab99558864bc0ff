"""orthogonium's orthogonal convolution and linear layers."""

import torch
from orthogonium.layers import AdaptiveOrthoConv2d, OrthoLinear
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(AdaptiveOrthoConv2d(2, 4, 3, padding=1), nn.Flatten(), OrthoLinear(64, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
x = torch.randn(5, 2, 4, 4)
for _ in range(4):
    loss = (model(x) - 1).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"{loss.item():.6f}")
