"""braindecode: EEGNet, ATCNet, EEGITNet, TIDNet, MaxNormLinear, constrained convolutions"""

import torch
from braindecode import models
from braindecode.modules import Conv2dWithConstraint, MaxNormLinear
from notes import attempt, copied, train

x = torch.linspace(-1, 1, 2 * 4 * 256).reshape(2, 4, 256)
TIMES = {"n_times": 256, "sfreq": 64}
KINDS = {"EEGNet": TIMES, "ATCNet": TIMES, "EEGITNet": TIMES, "TIDNet": TIMES}
for name, options in KINDS.items():
    torch.manual_seed(0)
    model = getattr(models, name)(n_chans=4, n_outputs=3, **options)
    train(name, model, lambda m: m(x))
    copied(name, model, lambda m: m(x))
torch.manual_seed(0)
layers = {
    "linear": (MaxNormLinear(8, 4), torch.ones(2, 8)),
    "conv": (Conv2dWithConstraint(2, 3, 3, max_norm=0.5), torch.ones(1, 2, 5, 5)),
}
for name, (layer, y) in layers.items():
    train(name, layer, lambda m, y=y: m(y))
    attempt(f"{name} weight", lambda m=layer: m.weight)
