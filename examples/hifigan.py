"""A small HiFi-GAN generator (Kong et al., arXiv 2010.05646), as such code was written in 2020.

With a harmonic source, as singing voices have it (Wang et al., arXiv 1904.12088). It uses the
hooks of torch.nn.utils and knows nothing of funcparam: legacy_vocoder.py runs it.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import remove_weight_norm, weight_norm

MELS, CHANNELS, SLOPE = 40, 64, 0.1


class ResBlock(nn.Module):
    def __init__(self, channels, kernel, dilations=(1, 3, 5)):
        super().__init__()
        self.convs1 = nn.ModuleList([conv(channels, channels, kernel, d) for d in dilations])
        self.convs2 = nn.ModuleList([conv(channels, channels, kernel) for _ in dilations])

    def forward(self, x):
        for c1, c2 in zip(self.convs1, self.convs2):  # noqa: B905
            x = x + c2(F.leaky_relu(c1(F.leaky_relu(x, SLOPE)), SLOPE))
        return x

    def remove_weight_norm(self):
        for layer in [*self.convs1, *self.convs2]:
            remove_weight_norm(layer)


class Generator(nn.Module):
    """From log-mel frames (batch, MELS, frames) and a source to sound, (batch, 1, 64 * frames)."""

    def __init__(self, rates=(8, 8), kernels=(3, 7)):
        super().__init__()
        self.conv_pre = conv(MELS, CHANNELS, 7)
        self.ups = nn.ModuleList()
        self.sources = nn.ModuleList([nn.Conv1d(1, 32, 16, 8, padding=4), nn.Conv1d(1, 16, 1)])
        self.resblocks = nn.ModuleList()
        for i, rate in enumerate(rates):
            wide, narrow = CHANNELS // 2**i, CHANNELS // 2 ** (i + 1)
            up = nn.ConvTranspose1d(wide, narrow, 2 * rate, rate, padding=rate // 2)
            self.ups.append(weight_norm(up))
            self.resblocks.append(nn.ModuleList([ResBlock(narrow, k) for k in kernels]))
        self.conv_post = conv(narrow, 1, 7)

    def forward(self, mel, source):
        x = self.conv_pre(mel)
        for up, inject, blocks in zip(self.ups, self.sources, self.resblocks):  # noqa: B905
            x = up(F.leaky_relu(x, SLOPE)) + inject(source)
            x = sum(block(x) for block in blocks) / len(blocks)
        return torch.tanh(self.conv_post(F.leaky_relu(x)))

    def remove_weight_norm(self):
        for layer in [self.conv_pre, *self.ups, self.conv_post]:
            remove_weight_norm(layer)
        for blocks in self.resblocks:
            for block in blocks:
                block.remove_weight_norm()


def conv(inputs, outputs, kernel, dilation=1):
    padding = dilation * (kernel - 1) // 2
    return weight_norm(nn.Conv1d(inputs, outputs, kernel, dilation=dilation, padding=padding))
