"""pyreft: LoReFT and ConsReFT, whose load_state_dict writes into the base point"""

import torch
from notes import note
from pyreft.interventions import ConsreftIntervention, LoreftIntervention

x = torch.linspace(-1, 1, 40).reshape(5, 8)
for kind in (LoreftIntervention, ConsreftIntervention):
    torch.manual_seed(0)
    model = kind(embed_dim=8, low_rank_dimension=3, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        note(f"{kind.__name__} loss {step}", loss)
    note(f"{kind.__name__} rotation", model.rotate_layer.weight)
    if hasattr(model, "learned_source") and isinstance(model.learned_source, torch.nn.Module):
        saved = model.state_dict()
        note(f"{kind.__name__} state", dict(saved))
        again = kind(embed_dim=8, low_rank_dimension=3, dtype=torch.float32)
        again.load_state_dict(saved)
        note(f"{kind.__name__} loaded", again(x))
