"""adapters: LoReFT on BERT; save_adapter and load_adapter"""

import tempfile

import adapters
import torch
from adapters import LoReftConfig
from notes import copied, note, train
from transformers import BertConfig, BertModel

ids = torch.arange(12).reshape(2, 6)
torch.manual_seed(0)
model = BertModel(
    BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
)
adapters.init(model)
model.add_adapter("reft", config=LoReftConfig(r=2))
model.train_adapter("reft")
train("loreft", model, lambda m: m(ids).last_hidden_state)
copied("loreft", model, lambda m: m(ids).last_hidden_state)
with tempfile.TemporaryDirectory() as folder:
    model.save_adapter(folder, "reft")
    model.load_adapter(folder, load_as="again", set_active=True)
    note("loaded", model(ids).last_hidden_state)
