"""descript-audio-codec: the codec, and its discriminator by periods and resolutions"""

import torch
from dac.model import DAC, Discriminator
from notes import train

torch.manual_seed(0)
model = DAC(
    encoder_dim=4,
    encoder_rates=[2, 2],
    decoder_dim=16,
    decoder_rates=[2, 2],
    n_codebooks=2,
    codebook_size=16,
    codebook_dim=4,
)
x = torch.linspace(-1, 1, 2048).reshape(1, 1, 2048)
train("codec", model, lambda m: m(x)["audio"])
judge = Discriminator(periods=[2], fft_sizes=[256])
train("discriminator", judge, lambda m: m(x)[0])
