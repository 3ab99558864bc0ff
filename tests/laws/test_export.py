"""Law 4: torch.export takes a map, and its program gives the same values."""

import torch
from torch import nn

from tests.cases import every_case, raw_and_state


class Map(nn.Module):
    def __init__(self, transform):
        super().__init__()
        self.transform = transform

    def forward(self, raw, state):
        return self.transform.forward(raw, state)


@every_case
def test_export(case, shape):
    raw, state = raw_and_state(case, shape)
    program = torch.export.export(Map(case.transform), (raw, state))
    torch.testing.assert_close(program.module()(raw, state), case.transform.forward(raw, state))
