"""laplace-torch: a Laplace approximation of all weights and of the last layer"""

import torch
from laplace import Laplace
from networks import data, network
from notes import attempt, note

x, y = data()
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
for weights, structure in (("all", "diag"), ("last_layer", "kron")):
    model, label = network().eval(), f"{weights} {structure}"
    posterior = Laplace(model, "classification", weights, structure)
    if attempt(f"{label} fit", lambda p=posterior: str(p.fit(loader))) is None:
        continue
    note(f"{label} evidence", posterior.log_marginal_likelihood())
    attempt(f"{label} predicts", lambda p=posterior: p(x))
