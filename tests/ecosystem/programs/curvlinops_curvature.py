"""curvlinops-for-pytorch: Hessian, Gauss-Newton and Fisher as operators, against the same vector"""

import torch
from curvlinops import EFLinearOperator, GGNLinearOperator, HessianLinearOperator
from networks import data
from notes import attempt, note
from torch import nn
from torch.nn.utils.parametrizations import orthogonal

torch.manual_seed(0)
model = nn.Sequential(orthogonal(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 3)).double()
x, y = data()
parameters = list(model.parameters())
size = sum(p.numel() for p in parameters)
vector = torch.linspace(-1, 1, size, dtype=torch.double)
note("size", size)
for kind in (HessianLinearOperator, GGNLinearOperator, EFLinearOperator):
    attempt(
        kind.__name__,
        lambda k=kind: (
            k(
                model,
                nn.CrossEntropyLoss(),
                parameters,
                [(x.double(), y)],
                check_deterministic=False,
            )
            @ vector
        ),
    )
