"""coqui-tts: HiFi-GAN and MelGAN generators with removal, their discriminators, WaveNet layers"""

import torch
from notes import attempt, note, train
from TTS.tts.layers.generic.wavenet import WN
from TTS.vocoder.models.hifigan_discriminator import DiscriminatorP, DiscriminatorS
from TTS.vocoder.models.hifigan_generator import HifiganGenerator
from TTS.vocoder.models.melgan_generator import MelganGenerator

torch.manual_seed(0)
mel = torch.linspace(-1, 1, 64).reshape(1, 8, 8)
models = {
    "hifigan": HifiganGenerator(8, 1, "1", [[1, 3, 5]], [3], [4, 4], 16, [2, 2]),
    "melgan": MelganGenerator(8, base_channels=16, upsample_factors=(2, 2), num_res_blocks=1),
}
for name, model in models.items():
    train(name, model, lambda m: m(mel))
    attempt(f"{name} remove", lambda m=model: str(m.remove_weight_norm()))
    note(f"{name} removed", model.state_dict())
x = torch.linspace(-1, 1, 512).reshape(1, 1, 512)
for spectral in (False, True):
    torch.manual_seed(0)
    train(f"period {spectral}", DiscriminatorP(3, use_spectral_norm=spectral), lambda m: m(x)[0])
torch.manual_seed(0)
train("scale", DiscriminatorS(), lambda m: m(x)[0])
torch.manual_seed(0)
layers = WN(8, 8, 3, 1, 2)
train("wavenet", layers, lambda m: m(torch.ones(1, 8, 6), torch.ones(1, 1, 6)))
attempt("wavenet remove", lambda: str(layers.remove_weight_norm()))
note("wavenet removed", layers.state_dict())
