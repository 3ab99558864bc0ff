"""lightly: DINOProjectionHead, whose last layer has the hook of weight norm, and its freezing"""

import torch
from lightly.models.modules.heads import DINOProjectionHead
from notes import note, train

x = torch.linspace(-1, 1, 40).reshape(5, 8)
for normed in (False, True):
    torch.manual_seed(0)
    model = DINOProjectionHead(8, 16, 6, 12, norm_last_layer=normed, freeze_last_layer=1)
    train(f"head {normed}", model, lambda m: m(x), rate=0.1)
    model.cancel_last_layer_gradients(current_epoch=0)
    note("cancelled", " ".join(n for n, p in model.named_parameters() if p.grad is None))
