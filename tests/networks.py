"""Networks that the tests parametrize."""

import torch
import torch.nn.functional as F
from torch import nn

import funcparam as fp
from funcparam.transforms import LoRA, Orthogonal, SpectralNorm, WeightNorm


class Classifier(nn.Module):
    """A recurrent classifier of sequences, with a fused LSTM and a BatchNorm."""

    def __init__(self, inputs=3, hidden=8, classes=4):
        super().__init__()
        self.rnn = nn.LSTM(inputs, hidden, batch_first=True)
        self.norm = nn.BatchNorm1d(hidden)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x):
        return self.head(self.norm(self.rnn(x)[0][:, -1]))


class Tied(nn.Module):
    """An autoencoder whose decoder is its encoder's weight."""

    def __init__(self, n=5):
        super().__init__()
        self.encoder = nn.Linear(n, n)
        self.decoder = nn.Linear(n, n)
        self.decoder.weight = self.encoder.weight

    def forward(self, x):
        return self.decoder(torch.tanh(self.encoder(x)))


def mlp(width=6, depth=3, dtype=torch.float64):
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(*layers).to(dtype)


def mixed(net=None):
    """A network with every kind of leaf: plain, named raw, with and without state."""
    net = net or mlp()
    rules = {
        "0.weight": Orthogonal(),
        "2.weight": WeightNorm(),
        "4.weight": SpectralNorm(),
        "4.bias": WeightNorm(dim=None),
    }
    return net, fp.parametrize(net, rules)


def loss_of(net, p):
    def loss(raw, state, x, y):
        out = torch.func.functional_call(net, p(raw, state), (x,))
        return F.mse_loss(out, y)

    return loss


LORA = LoRA(rank=2)
