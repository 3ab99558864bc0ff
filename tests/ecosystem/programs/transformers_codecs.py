"""transformers: EnCodec, DAC, SpeechT5-HiFiGAN, UnivNet, VITS, with their apply_weight_norm"""

import torch
from notes import attempt, copied, fill, note, train
from transformers import (
    DacConfig,
    DacModel,
    EncodecConfig,
    EncodecModel,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    UnivNetConfig,
    UnivNetModel,
    VitsConfig,
    VitsModel,
)


def weight_norm(label, model, run):
    """Put weight norm on by the model's own function, which goes by what torch offers."""
    attempt(f"{label} apply", lambda: str(model.apply_weight_norm()))
    train(f"{label} normed", model, run)


torch.manual_seed(0)
model, x = (
    EncodecModel(
        EncodecConfig(
            num_filters=4,
            hidden_size=8,
            codebook_size=16,
            codebook_dim=8,
            num_residual_layers=1,
            num_lstm_layers=1,
            upsampling_ratios=[4, 2],
        )
    ),
    torch.randn(1, 1, 256),
)
fill(model)
train("encodec", model, lambda m: m.decoder(m.encoder(x)))
copied("encodec", model, lambda m: m.decoder(m.encoder(x)))

torch.manual_seed(0)
model = DacModel(
    DacConfig(
        encoder_hidden_size=4,
        downsampling_ratios=[2, 2],
        decoder_hidden_size=16,
        n_codebooks=2,
        codebook_size=16,
        codebook_dim=4,
    )
)
fill(model)
train("dac", model, lambda m: m.decoder(m.encoder(x)))
weight_norm("dac", model, lambda m: m.decoder(m.encoder(x)))

torch.manual_seed(0)
model, mel = (
    SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=8,
            upsample_initial_channel=16,
            upsample_rates=[2, 2],
            upsample_kernel_sizes=[4, 4],
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1, 3]],
        )
    ),
    torch.randn(1, 12, 8),
)
fill(model)
train("hifigan", model, lambda m: m(mel))
weight_norm("hifigan", model, lambda m: m(mel))

torch.manual_seed(0)
model = UnivNetModel(
    UnivNetConfig(
        model_in_channels=4,
        model_hidden_channels=4,
        num_mel_bins=8,
        resblock_kernel_sizes=[3],
        resblock_stride_sizes=[4],
        resblock_dilation_sizes=[[1, 3]],
        kernel_predictor_hidden_channels=4,
    )
)
mel = torch.randn(1, 6, 8)
fill(model)
train("univnet", model, lambda m: m(mel).waveforms)
weight_norm("univnet", model, lambda m: m(mel).waveforms)

torch.manual_seed(0)
model = VitsModel(
    VitsConfig(
        vocab_size=12,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=16,
        flow_size=8,
        spectrogram_bins=9,
        upsample_initial_channel=16,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
        prior_encoder_num_flows=1,
        prior_encoder_num_wavenet_layers=1,
        posterior_encoder_num_wavenet_layers=1,
        duration_predictor_num_flows=1,
        duration_predictor_filter_channels=8,
        layerdrop=0.0,
    )
)
tokens = torch.randint(0, 12, (1, 6))
fill(model)
train("vits", model.flow, lambda m: m(torch.ones(1, 8, 5), torch.ones(1, 1, 5)))
train("vits decoder", model.decoder, lambda m: m(torch.ones(1, 8, 5)))
weight_norm("vits decoder", model.decoder, lambda m: m(torch.ones(1, 8, 5)))
note("vits waveform", model.eval()(tokens).waveform.shape)
