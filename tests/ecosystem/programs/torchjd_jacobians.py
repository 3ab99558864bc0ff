"""torchjd: Jacobian descent of three losses through torch's three parametrizations"""

import torch
from networks import data, network
from notes import note
from torchjd.aggregation import MGDA
from torchjd.autojac import backward, jac_to_grad

model, (x, y) = network(), data()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(3):
    out = model(x)
    losses = [out[:4].square().mean(), out[4:8].square().mean(), (out[8:] - 1).square().mean()]
    optimizer.zero_grad()
    backward(losses, parallel_chunk_size=1)
    jac_to_grad(model.parameters(), MGDA())
    optimizer.step()
    note(f"losses {step}", losses)
note("trained", model.state_dict())
