"""vocos: period and resolution discriminators, ResBlock1 with its remove_weight_norm"""

import torch
from notes import note, train
from vocos.discriminators import DiscriminatorP, DiscriminatorR
from vocos.modules import ResBlock1

torch.manual_seed(0)
x = torch.linspace(-1, 1, 512).reshape(1, 512)
train("period", DiscriminatorP(3), lambda m: m(x)[0])
train("resolution", DiscriminatorR(64, channels=4), lambda m: m(x)[0])
block = ResBlock1(4)
train("block", block, lambda m: m(torch.ones(1, 4, 16)))
block.remove_weight_norm()
note("removed", block.state_dict())
