"""peft: target_parameters on experts, DoRA, weight-normed and orthogonal layers, two adapters"""

import copy

import torch
from notes import attempt, note, train
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, weight_norm


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 4) / 3)
        self.down = nn.Parameter(torch.randn(3, 4, 8) / 3)

    def forward(self, x):
        return sum(x @ self.down[i].mT @ self.up[i].mT for i in range(3))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.experts, self.out = nn.Linear(8, 8), Experts(), nn.Linear(8, 2)

    def forward(self, x):
        return self.out(torch.tanh(self.experts(torch.tanh(self.lin(x)))))


def normed():
    net = Net()
    weight_norm(net.lin)
    orthogonal(net.out)
    return net


CONFIGS = {
    "one": {"target_parameters": ["experts.up"]},
    "two": {"target_parameters": ["experts.up", "experts.down"]},
    "mixed": {"target_parameters": ["experts.down"], "target_modules": ["lin"]},
    "linear": {"target_parameters": ["lin.weight"]},
    "dora": {"target_modules": ["lin"], "use_dora": True},
}
x = torch.linspace(-1, 1, 40).reshape(5, 8)
for build in (Net, normed):
    for name, options in CONFIGS.items():
        torch.manual_seed(0)
        config = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, **options)
        label = f"{build.__name__} {name}"
        if label == "normed linear":  # peft looks for `original`, which weight norm has not
            continue
        model = attempt(f"{label} starts", lambda c=config, b=build: repr(get_peft_model(b(), c)))
        if model is None:
            continue
        torch.manual_seed(0)
        model = get_peft_model(build(), config)
        train(label, model, lambda m: m(x), rate=0.1)
        with torch.no_grad(), model.disable_adapter():
            note(f"{label} disabled", model(x))
        attempt(f"{label} second", lambda m=model, c=config: str(m.add_adapter("second", c)))
        attempt(f"{label} switched", lambda m=model: str(m.set_adapter("second")))
        attempt(f"{label} its output", lambda m=model: m(x))
        attempt(f"{label} copied", lambda m=model: copy.deepcopy(m)(x))
        merged = attempt(f"{label} merged", lambda m=model: m.merge_and_unload().state_dict())
        note(f"{label} is merged", merged is not None)
