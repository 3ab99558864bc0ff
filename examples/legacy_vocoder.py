"""A vocoder of 2020 under the shim: old checkpoint in, training, an averaged copy, folded out.

    python examples/legacy_vocoder.py [--quick] [--out vocoder.png]

hifigan.py is a generator in the style of HiFi-GAN on the deprecated hooks of torch.nn.utils. It
trains under PyTorch for a while and leaves a checkpoint with weight_g and weight_v. The same file,
unchanged, is then run inside `funcparam.compat.installed()`: the checkpoint loads, training goes
on, an exponential moving average is a copy of the module, which PyTorch's hooks refuse, and the
copy is folded by the generator's own remove_weight_norm. A process without funcparam loads it.
The sound is synthesised: gliding tones with harmonics and vibrato.
"""

import argparse
import copy
import math
import runpy
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import matplotlib as mpl
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import funcparam as fp
import funcparam.compat
from funcparam import checkpoint
from funcparam.transforms import WeightNorm

mpl.use("Agg")
import matplotlib.pyplot as plt

LEGACY = Path(__file__).with_name("hifigan.py")
RATE, HOP, LENGTH, MELS = 16000, 64, 4096, 40
WINDOWS = 128, 512, 2048  # of the three spectrograms in the loss


def tones(count, generator):
    """Gliding harmonic tones with vibrato, (count, LENGTH), and what a vocoder gets to make them.

    That is log-mel frames, (count, MELS, LENGTH / HOP), and a sawtooth of the same pitch.
    """

    def between(low, high, *shape):
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    time = torch.arange(LENGTH) / RATE
    pitch = between(110, 440, 1) * 2 ** (between(-1, 1, 1) * time / time[-1])
    pitch = pitch * (1 + 0.02 * torch.sin(2 * math.pi * between(4, 8, 1) * time))
    phase = 2 * math.pi * torch.cumsum(pitch, -1) / RATE
    harmonics = torch.arange(1, 11)[:, None]
    strength = (harmonics * pitch[:, None] < RATE / 2) / harmonics
    sawtooth = (strength * torch.sin(harmonics * phase[:, None])).sum(1, keepdim=True)
    strength = strength * between(0, 1, 10, 1)
    sound = (strength * torch.sin(harmonics * phase[:, None] + between(0, 6.3, 10, 1))).sum(1)
    loudness = 0.6 + 0.4 * torch.sin(2 * math.pi * between(4, 8, 1) * time + between(0, 6.3, 1))
    sound = 0.7 * loudness * sound / sound.abs().amax(-1, keepdim=True)
    return sound, (log_mel(sound), sawtooth)


def spectrum(sound, window, hop=None):
    """Magnitudes, (batch, window / 2 + 1, frames)."""
    taper = torch.hann_window(window)
    spectrum = torch.stft(sound, window, hop or window // 4, window=taper, return_complex=True)
    return spectrum.abs().clamp_min(1e-2)


def log_mel(sound):
    """Logarithms of MELS bands, (batch, MELS, LENGTH / HOP)."""
    frequencies = torch.linspace(0, RATE / 2, 257)
    mels = 2595 * torch.log10(1 + frequencies / 700)
    centres = torch.linspace(0, mels[-1], MELS + 2)
    bands = (1 - (mels - centres[1:-1, None]).abs() / centres[1]).clamp_min(0)
    return (bands @ spectrum(sound, 512, HOP)[..., : LENGTH // HOP]).log()


def loss_of(sound, target):
    """Spectral convergence and log magnitudes at three resolutions (Yamamoto, arXiv 1910.11480)."""
    total = 0
    for window in WINDOWS:
        ours, theirs = spectrum(sound, window), spectrum(target, window)
        total += (ours - theirs).norm() / theirs.norm() + F.l1_loss(ours.log(), theirs.log())
    return total / len(WINDOWS)


def optimizer_of(generator):
    return torch.optim.AdamW(generator.parameters(), lr=2e-3, betas=(0.8, 0.99))


def train(generator, optimizer, steps, seed, label, average=None):
    """Some steps on fresh tones; the loss of each."""
    draw = torch.Generator().manual_seed(seed)
    losses = []
    for _ in tqdm(range(steps), desc=label, disable=None):
        target, given = tones(8, draw)
        loss = loss_of(generator(*given).squeeze(1), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if average is not None:
            average.update_parameters(generator)
    return losses


def legacy_generator():
    """A generator by whichever weight_norm an import finds in torch.nn.utils now."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch's own is deprecated
        return runpy.run_path(str(LEGACY))["Generator"]()


def apart(sound, other):
    return f"{(sound - other).abs().max():.1e}"


def attempt_to_copy(generator):
    try:
        copy.deepcopy(generator)
    except RuntimeError as error:
        return f"raise {type(error).__name__}"
    return "works"


WITHOUT_FUNCPARAM = """
import sys, torch
from hifigan import Generator
generator = Generator()
generator.remove_weight_norm()
generator.load_state_dict(torch.load(sys.argv[1]))
torch.save(generator(*torch.load(sys.argv[2])).detach(), sys.argv[3])
assert "funcparam" not in sys.modules
"""


def run_without_funcparam(state_dict, given):
    """What the plain generator of another process computes from a folded checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("folded.pt", "given.pt", "sound.pt")]
        torch.save(state_dict, paths[0])
        torch.save(given, paths[1])
        command = [sys.executable, "-W", "ignore", "-c", WITHOUT_FUNCPARAM, *paths]
        subprocess.run(command, check=True, cwd=LEGACY.parent)
        return torch.load(paths[2])


def plot(sounds, losses, start, path):
    figure, axes = plt.subplots(1, 4, figsize=(11, 2.9), layout="constrained")
    for ax, (label, sound) in zip(axes, sounds.items(), strict=False):
        picture = 20 * spectrum(sound, 512, HOP)[0].log10()
        extent = 0, LENGTH / RATE, 0, RATE / 2000
        ax.imshow(picture, origin="lower", aspect="auto", extent=extent, vmin=-40, vmax=40)
        ax.set(title=label, xlabel="seconds", ylim=(0, 5))
    axes[0].set_ylabel("kHz")
    axes[3].plot(range(start), losses[:start], lw=0.8, label="torch's hooks")
    axes[3].plot(range(start, len(losses)), losses[start:], lw=0.8, label="funcparam")
    axes[3].set(title="spectral loss", xlabel="step", yscale="log")
    axes[3].set_yticks([1, 2, 3, 4], "1234")
    axes[3].minorticks_off()
    axes[3].legend(frameon=False)
    axes[3].spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps, for a test")
    parser.add_argument("--out", default="vocoder.png", help="where the picture goes")
    options = parser.parse_args()
    before, after = (10, 20) if options.quick else (50, 300)
    target, given = tones(16, torch.Generator().manual_seed(9))

    # 2020: PyTorch's own hooks
    torch.manual_seed(0)
    theirs = legacy_generator()
    optimizer = optimizer_of(theirs)
    losses = train(theirs, optimizer, before, 1, "torch's hooks")
    old = copy.deepcopy({"generator": theirs.state_dict(), "optimizer": optimizer.state_dict()})

    # today: the same file under the shim
    # --8<-- [start:shim]
    with funcparam.compat.installed():
        ours = legacy_generator()
    print(ours.load_state_dict(old["generator"]))
    # --8<-- [end:shim]
    print(f"old checkpoint loaded: outputs differ by {apart(ours(*given), theirs(*given))}")
    print(f"deepcopy: torch's hooks {attempt_to_copy(theirs)}, here {attempt_to_copy(ours)}")
    start = copy.deepcopy(ours)
    there = train(theirs, optimizer, 5, 2, "torch's hooks, five more")
    # --8<-- [start:average]
    optimizer = optimizer_of(ours)
    optimizer.load_state_dict(old["optimizer"])
    average = AveragedModel(ours, multi_avg_fn=get_ema_multi_avg_fn(0.98))
    here = train(ours, optimizer, after, 2, "funcparam", average)
    averaged = average.module
    # --8<-- [end:average]
    drift = max(abs(a - b) / b for a, b in zip(here, there, strict=False))
    print(f"the next five steps on both: losses differ by {drift:.1e}, relative")

    print("\ngenerator               steps  spectral loss  log-mel error, on 16 new tones")
    for label, generator, steps in (
        ("old checkpoint", start, before),
        ("trained on", ours, before + after),
        ("moving average of it", averaged, before + after),
    ):
        with torch.no_grad():
            sound = generator(*given).squeeze(1)
            error = F.l1_loss(log_mel(sound), given[0])
            print(f"{label:22}  {steps:5}  {loss_of(sound, target):13.3f}  {error:13.3f}")

    with torch.no_grad():
        kept, sound = ours(*given), averaged(*given)
        # --8<-- [start:fold]
        averaged.remove_weight_norm()
        plain = run_without_funcparam(averaged.state_dict(), given)
        # --8<-- [end:fold]
        moved = apart(ours(*given), kept)
    print(f"\nthe copy folded: outputs of the trained generator move by {moved}")
    print(f"folded, in a process without funcparam: outputs differ by {apart(plain, sound)}")

    # --8<-- [start:functional]
    p = fp.parametrize(averaged, {"*.weight": WeightNorm()})
    raw, state, _ = checkpoint.read(old["generator"], p)
    # --8<-- [end:functional]
    with torch.no_grad():
        first = start(*given)
        functional = torch.func.functional_call(averaged, p(raw, state), given)
    off = apart(functional, first)
    print(f"old checkpoint read into {len(p)} WeightNorms: outputs differ by {off}")

    sounds = {
        "target": target,
        f"after {before} steps": first.squeeze(1),
        f"after {before + after}, averaged": plain.squeeze(1),
    }
    plot(sounds, losses + here, before, options.out)
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
