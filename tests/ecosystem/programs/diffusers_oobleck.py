"""diffusers: AutoencoderOobleck; save_pretrained and back"""

import tempfile

import torch
from diffusers import AutoencoderOobleck
from notes import copied, note, train

torch.manual_seed(0)
model = AutoencoderOobleck(
    encoder_hidden_size=4,
    downsampling_ratios=[2, 2],
    channel_multiples=[1, 2],
    decoder_channels=4,
    decoder_input_channels=2,
    audio_channels=1,
)
x = torch.linspace(-1, 1, 64).reshape(1, 1, 64)
train("oobleck", model, lambda m: m(x).sample)
copied("oobleck", model, lambda m: m(x).sample)
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    again = AutoencoderOobleck.from_pretrained(folder).eval()
    note("from_pretrained", again.state_dict())
    note("its output", again(x).sample)
