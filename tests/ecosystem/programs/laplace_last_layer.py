"""laplace-torch: a Laplace approximation of all weights and of the last layer"""

import torch
from laplace import Laplace
from networks import data, network
from notes import note

x, y = data()
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
for weights, structure in (("all", "diag"), ("last_layer", "kron"), ("last_layer", "full")):
    model, label = torch.nn.Sequential(network(), torch.nn.Linear(3, 3)), f"{weights} {structure}"
    posterior = Laplace(model.eval(), "classification", weights, structure)
    posterior.fit(loader)
    note(f"{label} evidence", posterior.log_marginal_likelihood())
    note(f"{label} predicts", posterior(x))
