"""kornia: DINOHead"""

import torch
from kornia.feature.dedode.transformer.layers.dino_head import DINOHead
from notes import copied, train

torch.manual_seed(0)
model, x = DINOHead(8, 12, hidden_dim=16, bottleneck_dim=6), torch.linspace(-1, 1, 40).reshape(5, 8)
train("head", model, lambda m: m(x), rate=0.1)
copied("head", model, lambda m: m(x))
