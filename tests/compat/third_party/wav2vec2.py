"""transformers' wav2vec2, whose positional convolution is weight-normed, from a small config."""

import torch
from transformers import Wav2Vec2Config, Wav2Vec2Model

torch.manual_seed(0)
config = Wav2Vec2Config(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    conv_dim=(8, 8),
    conv_stride=(5, 2),
    conv_kernel=(10, 3),
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=2,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    feat_proj_dropout=0.0,
    layerdrop=0.0,
    mask_time_prob=0.0,
)
model = Wav2Vec2Model(config).train()
names = [name for name, _ in model.named_parameters() if "parametrizations" in name]
assert len(names) == 2, names
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
x = torch.randn(2, 400)
for _ in range(4):
    loss = model(x).last_hidden_state.square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"{loss.item():.6f}")
