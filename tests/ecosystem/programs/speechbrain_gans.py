"""speechbrain: HiFi-GAN generator with its remove_weight_norm, MetricGAN discriminator"""

import torch
from notes import attempt, note, train
from speechbrain.lobes.models.HifiGAN import HifiganGenerator
from speechbrain.lobes.models.MetricGAN import MetricDiscriminator

torch.manual_seed(0)
model = HifiganGenerator(8, 1, "1", [[1, 3, 5]], [3], [4, 4], 16, [2, 2])
mel = torch.linspace(-1, 1, 64).reshape(1, 8, 8)
train("generator", model, lambda m: m(mel))
attempt("remove", lambda: str(model.remove_weight_norm()))
note("removed", model.state_dict())
torch.manual_seed(0)
judge = MetricDiscriminator()
x = torch.linspace(-1, 1, 2 * 2 * 40 * 40).reshape(2, 2, 40, 40)
train("judge", judge, lambda m: m(x))
