"""geotorch's Stiefel-constrained recurrent kernel on a copying task."""

import geotorch
import torch
from torch import nn

torch.manual_seed(0)
cell, head = nn.RNNCell(4, 16), nn.Linear(16, 4)
geotorch.orthogonal(cell, "weight_hh")
geotorch.sphere(head, "bias")
geotorch.low_rank(head, "weight", rank=2)
parameters = [*cell.parameters(), *head.parameters()]
optimizer = torch.optim.SGD(parameters, lr=0.05)
x = torch.randn(10, 8, 4)
for _ in range(8):
    h = torch.zeros(8, 16)
    for step in x:
        h = cell(step, h)
    loss = (head(h) - x[0]).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"{loss.item():.6f}")
W = cell.weight_hh
assert (W.mT @ W - torch.eye(16)).abs().max() < 1e-5
