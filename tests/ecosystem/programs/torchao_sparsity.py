"""torchao: the weight-norm sparsifier by parametrization, squash_mask"""

import torch
from notes import attempt, note, train
from torch import nn
from torchao.prototype.sparsity import WeightNormSparsifier

torch.manual_seed(0)
model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(5, 8)
sparsifier = WeightNormSparsifier(sparsity_level=0.5, sparse_block_shape=(1, 4))
sparsifier.prepare(model, config=[{"tensor_fqn": "0.weight"}, {"tensor_fqn": "2.weight"}])
for step in range(2):
    train(f"step {step}", model, lambda m: m(x), rate=0.1)
    sparsifier.step()
    note(f"masks {step}", dict(model.named_buffers()))
sparsifier.squash_mask()
note("classes", [type(layer) for layer in model])
note("squashed", model.state_dict())
attempt("output", lambda: model(x))
