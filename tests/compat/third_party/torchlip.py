"""deel-torchlip's 1-Lipschitz layers: spectral norm, then Björck orthogonalisation."""

import torch
from deel import torchlip

torch.manual_seed(0)
model = torchlip.Sequential(
    torchlip.SpectralLinear(6, 8), torchlip.GroupSort2(), torchlip.FrobeniusLinear(8, 1)
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
x = torch.randn(16, 6)
for _ in range(4):
    loss = (model(x) - x[:, :1]).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"{loss.item():.6f}")
plain = model.eval().vanilla_export()
print(f"{(plain(x) - model(x)).abs().max().item():.1e}")
