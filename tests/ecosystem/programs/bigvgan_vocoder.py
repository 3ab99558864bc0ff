"""bigvgan: the generator with its remove_weight_norm, period discriminators with both norms"""

import torch
from bigvgan.bigvgan import BigVGAN
from bigvgan.discriminators import MultiPeriodDiscriminator
from bigvgan.env import AttrDict
from notes import attempt, note, train

config = AttrDict(
    num_mels=8,
    upsample_initial_channel=16,
    upsample_rates=[2, 2],
    upsample_kernel_sizes=[4, 4],
    resblock="1",
    resblock_kernel_sizes=[3],
    resblock_dilation_sizes=[[1, 3, 5]],
    activation="snakebeta",
    snake_logscale=True,
    use_bias_at_final=False,
    use_tanh_at_final=False,
    mpd_reshapes=[2, 3],
    discriminator_channel_mult=0.05,
    use_spectral_norm=False,
)
torch.manual_seed(0)
model, mel = BigVGAN(config), torch.linspace(-1, 1, 64).reshape(1, 8, 8)
train("generator", model, lambda m: m(mel))
attempt("remove", lambda: str(model.remove_weight_norm()))
note("removed", model.state_dict())
x = torch.linspace(-1, 1, 512).reshape(1, 1, 512)
for spectral in (False, True):
    torch.manual_seed(0)
    config.use_spectral_norm = spectral
    judge = MultiPeriodDiscriminator(config)
    train(f"discriminator {spectral}", judge, lambda m: m(x, x)[0])
