"""u8darts: the module of TCNModel with weight_norm, and the model's fit and predict"""

import numpy as np
import torch
from darts import TimeSeries
from darts.models import TCNModel
from notes import note, train

torch.manual_seed(0)
series = TimeSeries.from_values(np.sin(np.linspace(0, 20, 80)).astype(np.float32))
quiet = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "logger": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}
model = TCNModel(
    12,
    4,
    weight_norm=True,
    dropout=0.0,
    n_epochs=2,
    batch_size=8,
    random_state=0,
    pl_trainer_kwargs=quiet,
)
model.fit(series)
note("fitted", model.model.state_dict())
note("predicted", torch.from_numpy(model.predict(4).values().copy()))
x = torch.linspace(-1, 1, 24).reshape(2, 12, 1)
train("module", model.model, lambda m: m((x, None, None)))
