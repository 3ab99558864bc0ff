"""transformers: HuBERT, WavLM, UniSpeech, SEW, wav2vec2-conformer; save_pretrained and back"""

import tempfile

import torch
from notes import copied, fill, note, train
from transformers import (
    HubertConfig,
    HubertModel,
    SEWConfig,
    SEWModel,
    UniSpeechConfig,
    UniSpeechModel,
    Wav2Vec2ConformerConfig,
    Wav2Vec2ConformerModel,
    WavLMConfig,
    WavLMModel,
)

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": (8, 8),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
}
KINDS = [
    (HubertConfig, HubertModel),
    (WavLMConfig, WavLMModel),
    (UniSpeechConfig, UniSpeechModel),
    (SEWConfig, SEWModel),
    (Wav2Vec2ConformerConfig, Wav2Vec2ConformerModel),
]

for config, kind in KINDS:
    torch.manual_seed(0)
    model, x = fill(kind(config(**SMALL))), torch.randn(2, 800)
    name = kind.__name__
    train(name, model, lambda m, x=x: m(x).last_hidden_state)
    copied(name, model, lambda m, x=x: m(x).last_hidden_state)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = kind.from_pretrained(folder).eval()
        note(f"{name} from_pretrained", again.state_dict())
        note(f"{name} its output", again(x).last_hidden_state)
