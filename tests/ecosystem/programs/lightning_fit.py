"""lightning: fit and checkpoint of a network with torch's three parametrizations; clipping, SWA"""

import lightning as L
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from networks import data, network
from notes import note
from torch.nn.functional import cross_entropy


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network()

    def training_step(self, batch, _):
        x, y = batch
        loss = cross_entropy(self.net(x), y)
        note("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


x, y = data()
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
for name, options in {
    "plain": {},
    "clipped": {"gradient_clip_val": 0.1},
    "averaged": {"callbacks": [StochasticWeightAveraging(0.05, swa_epoch_start=1)]},
}.items():
    model = Classifier()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
    trainer.fit(model, loader)
    trainer.save_checkpoint("model.ckpt")
    again = Classifier.load_from_checkpoint("model.ckpt").eval()
    note(f"{name} state", again.state_dict())
    note(f"{name} output", again.net(x))
