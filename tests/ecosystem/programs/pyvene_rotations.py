"""pyvene: the four interventions in a rotated space"""

import torch
from notes import copied, train
from pyvene.models import interventions

torch.manual_seed(0)
base, source = torch.randn(5, 8), torch.randn(5, 8)
KINDS = {
    "RotatedSpaceIntervention": {},
    "BoundlessRotatedSpaceIntervention": {},
    "SigmoidMaskRotatedSpaceIntervention": {},
    "LowRankRotatedSpaceIntervention": {"low_rank_dimension": 3},
}
for name, options in KINDS.items():
    torch.manual_seed(0)
    model = getattr(interventions, name)(embed_dim=8, **options)
    model.set_interchange_dim(4)
    train(name, model, lambda m: m(base, source))
    copied(name, model, lambda m: m(base, source))
