"""geotorch: every constraint on a square or tall weight, sampled, trained and assigned to"""

import geotorch
import torch
from notes import attempt, copied, note, train
from torch import nn

KINDS = {
    "orthogonal": {},
    "symmetric": {},
    "skew": {},
    "sphere": {},
    "grassmannian": {},
    "almost_orthogonal": {"lam": 0.5},
    "low_rank": {"rank": 2},
    "fixed_rank": {"rank": 2},
    "invertible": {},
    "sln": {},
    "positive_definite": {},
    "positive_semidefinite": {},
    "positive_semidefinite_low_rank": {"rank": 2},
    "positive_semidefinite_fixed_rank": {"rank": 2},
}
x = torch.linspace(-1, 1, 20).reshape(5, 4)
for name, options in KINDS.items():
    for shape in ((4, 4), (4, 6)):
        torch.manual_seed(0)
        layer, label = nn.Linear(*shape), f"{name} {shape}"
        constrain = getattr(geotorch, name)
        if attempt(label, lambda c=constrain, m=layer, o=options: str(c(m, "weight", **o))) is None:
            continue
        train(label, layer, lambda m: m(x), rate=0.1)
        copied(label, layer, lambda m: m(x))
        part = layer.parametrizations.weight[0]
        if hasattr(part, "sample"):
            torch.manual_seed(0)
            layer.weight = part.sample()
            note(f"{label} assigned", layer.weight)
