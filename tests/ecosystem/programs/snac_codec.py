"""snac: the whole codec"""

import torch
from notes import copied, train
from snac import SNAC

torch.manual_seed(0)
model = SNAC(
    encoder_dim=4,
    encoder_rates=[2, 2],
    decoder_dim=16,
    decoder_rates=[2, 2],
    attn_window_size=None,
    codebook_size=16,
    codebook_dim=4,
    vq_strides=[2, 1],
)
x = torch.linspace(-1, 1, 256).reshape(1, 1, 256)
train("codec", model, lambda m: m(x)[0])
copied("codec", model, lambda m: m(x)[0])
