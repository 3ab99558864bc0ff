"""torchaudio: wav2vec2, and torch.jit.script of it, which takes the weight norm off"""

import torch
from notes import attempt, copied, train
from torchaudio.models import wav2vec2_model

torch.manual_seed(0)
model = wav2vec2_model(
    extractor_mode="group_norm",
    extractor_conv_layer_config=[(8, 10, 5), (8, 3, 2)],
    extractor_conv_bias=False,
    encoder_embed_dim=16,
    encoder_projection_dropout=0.0,
    encoder_pos_conv_kernel=8,
    encoder_pos_conv_groups=2,
    encoder_num_layers=2,
    encoder_num_heads=2,
    encoder_attention_dropout=0.0,
    encoder_ff_interm_features=32,
    encoder_ff_interm_dropout=0.0,
    encoder_dropout=0.0,
    encoder_layer_norm_first=False,
    encoder_layer_drop=0.0,
    aux_num_out=None,
)
x = torch.linspace(-1, 1, 800).reshape(2, 400)
train("wav2vec2", model, lambda m: m(x)[0])
copied("wav2vec2", model, lambda m: m(x)[0])
attempt("scripted", lambda: torch.jit.script(model.eval())(x)[0])
