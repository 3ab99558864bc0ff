"""bitsandbytes: replace_parameter_4bit in nf4 and fp4, its hooks on the cache, checkpointing"""

import torch
import torch.nn.utils.parametrize as P
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from notes import attempt, copied, note
from torch import nn
from torch.utils.checkpoint import checkpoint


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 64, 64) / 8)
        self.gain = nn.Parameter(torch.ones(64))

    def forward(self, x):
        first = self.weight
        assert first is self.weight  # the hooks have the cache on
        return torch.tanh(x @ first[0]) @ self.weight[1] * self.gain


x = torch.linspace(-1, 1, 128).reshape(2, 64)
for kind in ("nf4", "fp4"):
    for compressed in (False, True):
        torch.manual_seed(0)
        model, label = Experts(), f"{kind} {compressed}"
        replace_parameter_4bit(
            model, "weight", compress_statistics=compressed, quant_type=kind, blocksize=64
        )
        note(f"{label} state", {k: v for k, v in model.state_dict().items() if v.numel() > 1})
        for forward in (model, lambda x, m=model: checkpoint(m, x, use_reentrant=False)):
            model.zero_grad()
            loss = forward(x).square().mean()
            loss.backward()
            note(f"{label} loss", loss)
            note(f"{label} gradient", model.gain.grad)
            note(f"{label} switch", [P._cache_enabled, len(P._cache)])
        copied(label, model, lambda m: m(x))
        attempt(f"{label} removed", lambda m=model: P.remove_parametrizations(m, "weight").weight)
