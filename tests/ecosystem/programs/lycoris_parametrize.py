"""lycoris-lora: parametrize of LoCon, LoHa, LoKr and the other algorithms on Linear and Conv2d"""

import torch
import torch.nn.utils.parametrize as P
from lycoris import modules
from notes import attempt, copied, note, train
from torch import nn

KINDS = sorted(
    name
    for name, kind in vars(modules).items()
    if isinstance(kind, type) and hasattr(kind, "parametrize") and name != "LycorisBaseModule"
)
note("kinds", KINDS)


def taken_off(layer):
    """The weight without the parametrization."""
    return P.remove_parametrizations(layer, "weight").weight


LAYERS = {
    "linear": (lambda: nn.Linear(8, 8), torch.linspace(-1, 1, 16).reshape(2, 8)),
    "conv": (lambda: nn.Conv2d(8, 8, 3), torch.linspace(-1, 1, 400).reshape(2, 8, 5, 5)),
}
for name in KINDS:
    for layer, (build, x) in LAYERS.items():
        torch.manual_seed(0)
        model, label = build(), f"{name} {layer}"
        kind = getattr(modules, name)
        attempt(label, lambda k=kind, m=model: str(type(k.parametrize(m, "weight", 1.0, 2, 1))))
        if P.is_parametrized(model):
            train(label, model, lambda m, x=x: m(x))
            copied(label, model, lambda m, x=x: m(x))
            attempt(f"{label} taken off", lambda m=model: taken_off(m))
