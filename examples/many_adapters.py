"""Many adapters over one frozen encoder: an id for each sentence, ranks of their own, all at once.

    python examples/many_adapters.py [--quick] [--out many_adapters.png]

The encoder is all-MiniLM-L6-v2. Each task asks of sentences something that it hardly minds: were
their words shuffled, those of each pair exchanged, or reversed? Adapters stand in one stack of
raws, with a slot for each. A batch has sentences of all tasks in any order, with an id for each,
and one vmap picks their adapters. Ranks differ: scales in state switch off what is beyond. Trained
together, adapters become what each becomes by itself. Then one more, for halves that were
exchanged, takes the free slot, while the others go on.
"""

import argparse
import copy
import time

import matplotlib as mpl
import optree
import torch
import torch.nn.functional as F
from minilm import ADAPTED, Classifier, data, disordered, fit_heads
from torch.func import functional_call, vmap
from tqdm import tqdm

import funcparam as fp
from funcparam.transforms import Frozen, Identity, LoRA

mpl.use("Agg")
import matplotlib.pyplot as plt

RANKS = {"shuffled": 2, "pairs exchanged": 4, "reversed": 8, "halves exchanged": 4}
FIRST, LATER = [0, 1, 2], 3
TOP, ALPHA, EACH = 8, 16, 8


def altered(sentence, task, chance):
    words = sentence.split()
    half = len(words) // 2
    if task == "reversed":
        return " ".join(words[::-1])
    if task == "halves exchanged":
        return " ".join(words[half:] + words[:half])
    return disordered(sentence, task, chance)


# --8<-- [start:scales]
def scales_of(ranks):
    """The scale of each rank of each adapter: alpha / rank, and 0 for what is beyond."""
    ranks = torch.tensor(ranks)[:, None]
    return torch.where(torch.arange(TOP) < ranks, ALPHA / ranks.clamp(min=1), 0)


# --8<-- [end:scales]


class Adapters:
    """Slots for adapters of one network."""

    # --8<-- [start:adapters]
    def __init__(self, net, heads, slots):
        rules = {ADAPTED.format(name): LoRA(TOP) for name in ("query", "value")}
        p = fp.parametrize(net, {**rules, "head.*": Identity(), "*": Frozen()})
        pairs = [p.init(net) for _ in range(slots)]
        state = pairs[0][1]  # the frozen encoder, once
        self.raws = optree.tree_map(lambda *ts: torch.stack(ts), *[raw for raw, _ in pairs])
        self.raws["head.weight"], self.raws["head.bias"] = (head.clone() for head in heads)

        def one(raw, scale, ids, mask):
            own = {n: {**s, "scale": scale} if "scale" in s else s for n, s in state.items()}
            return functional_call(net, p(raw, own), (ids[None], mask[None]))[0]

        self.each = vmap(one)  # over samples: an adapter, its scales, and a sentence for each

    def __call__(self, which, scales, ids, mask):
        """Logits of sentences, each by the adapter in the slot that `which` says."""
        picked = optree.tree_map(lambda stack: stack[which], self.raws)
        return self.each(picked, scales[which], ids, mask)

    # --8<-- [end:adapters]


def batches(steps, tasks, ids, mask, labels, seed):
    """For each step, EACH sentences of each task in a random order: slots, ids, mask, labels."""
    found = []
    for step in range(steps):
        rows = []
        for task in tasks:  # drawn for each task by itself, so that other tasks change nothing
            chance = torch.Generator().manual_seed(1000 * seed + 10 * step + task)
            rows += [(task, i) for i in torch.randint(labels.shape[1], (EACH,), generator=chance)]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(step))
        which, at = torch.tensor(rows)[order].unbind(1)
        found.append((which, ids[which, at], mask[which, at], labels[which, at]))
    return found


# --8<-- [start:train]
def train(adapters, scales, drawn, optimizer, label):
    """Steps on all adapters at once; the loss of each step and task."""
    history = []
    for which, ids, mask, labels in tqdm(drawn, desc=label, disable=None):
        optimizer.zero_grad()
        logits = adapters(which, scales, ids, mask)
        losses = F.cross_entropy(logits, labels, reduction="none")
        (losses.sum() / EACH).backward()  # the sum of the means of all tasks
        optimizer.step()
        history.append([losses[which == task].mean().item() for task in range(len(scales))])
    return torch.tensor(history)


# --8<-- [end:train]


@torch.no_grad()
def logits_of(adapters, scales, task, ids, mask):
    pairs = zip(ids[task].split(40), mask[task].split(40), strict=True)
    return torch.cat([adapters(torch.full((len(i),), task), scales, i, m) for i, m in pairs])


# --8<-- [start:join]
@torch.no_grad()
def join(adapters, optimizer, slot, fresh):
    """Put an adapter into a slot of the stacks that the optimizer has, without a past."""

    def write(stack, new):
        stack[slot] = new
        for moment in optimizer.state[stack].values():
            if moment.shape == stack.shape:
                moment[slot] = 0

    optree.tree_map(write, adapters.raws, fresh)


# --8<-- [end:join]


def plot(together, alone, path):
    figure, axes = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
    window = max(1, len(together) // 10)
    for task, name in enumerate(RANKS):
        mean = together[:, task].unfold(0, window, 1).mean(-1)
        label = f"{name}, rank {RANKS[name]}"
        axes.plot(range(window, len(together) + 1), mean, f"C{task}", label=label)
    if len(alone) >= window:
        for history in alone.mT:
            mean = history.unfold(0, window, 1).mean(-1)
            axes.plot(range(window, len(history) + 1), mean, "k:", lw=1)
    axes.set(xlabel="step", ylabel="loss", title="together; dotted: each by itself")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps and sentences, for a test")
    parser.add_argument("--out", default="many_adapters.png", help="where the picture goes")
    options = parser.parse_args()
    steps, size = (2, (16, 8)) if options.quick else (50, (480, 160))

    torch.manual_seed(0)
    net = Classifier().eval().requires_grad_(False)
    training, test = data(*size, RANKS, altered)
    heads = fit_heads(net, *training)
    ranks = [*RANKS.values()]
    scales = scales_of([ranks[task] if task in FIRST else 0 for task in range(len(ranks))])

    start = Adapters(net, heads, len(ranks))

    def made():
        adapters = copy.copy(start)
        adapters.raws = optree.tree_map(torch.clone, start.raws)
        return adapters

    def logits(adapters, scales, task):
        return logits_of(adapters, scales, task, *test[:2])

    def right(found, task):
        return (found.argmax(-1) == test[2][task]).float().mean().item()

    before = [right(logits(start, scales, task), task) for task in range(len(ranks))]
    together = made()
    optimizer = torch.optim.Adam(fp.trainable(together.raws), lr=1e-3)
    started = time.process_time()
    history = train(together, scales, batches(steps, FIRST, *training, 1), optimizer, "together")
    seconds = [time.process_time() - started, 0.0]

    print("\ntest accuracy    rank   numbers  head only  by itself  together  logits differ by")
    own_histories = []
    for task in FIRST:
        alone = made()
        own = torch.optim.Adam(fp.trainable(alone.raws), lr=1e-3)
        started = time.process_time()
        drawn = batches(steps, [task], *training, 1)
        own_histories.append(train(alone, scales, drawn, own, f"task {task}")[:, task])
        seconds[1] += time.process_time() - started
        one, all_at_once = logits(alone, scales, task), logits(together, scales, task)
        name = [*RANKS][task]
        numbers = 770 + ranks[task] * 12 * 2 * 384  # a head, and two factors for 12 weights
        print(
            f"{name:16} {ranks[task]:4} {numbers:9} {before[task]:10.3f} {right(one, task):10.3f}"
            f" {right(all_at_once, task):9.3f} {(one - all_at_once).abs().max():17.1e}"
        )
    print(f"processor time: {seconds[0]:.0f} s together, {seconds[1]:.0f} s one after another")

    few = [tensor[:, :8] for tensor in test[:2]]

    def others():
        return torch.stack([logits_of(together, scales, task, *few) for task in FIRST])

    before_it = others()
    # --8<-- [start:later]
    fresh = optree.tree_map(lambda stack: stack[LATER], start.raws)
    join(together, optimizer, LATER, fresh)
    scales = scales_of(ranks)
    # --8<-- [end:later]
    change = (others() - before_it).abs().max()
    print(f"\nan adapter joins: logits of the others change by {change:.0e}")
    drawn = batches(max(1, steps // 2), range(len(ranks)), *training, 2)
    later = train(together, scales, drawn, optimizer, "four together")
    after = [right(logits(together, scales, task), task) for task in range(len(ranks))]
    print(f"{[*RANKS][LATER]}: {before[LATER]:.3f} with its head only, {after[LATER]:.3f} adapted")
    print(f"the others: {', '.join(f'{after[task]:.3f}' for task in FIRST)}")

    with_it = others()
    scales[LATER] = 0  # the slot is free
    change = (others() - with_it).abs().max()
    print(f"it leaves: logits of the others change by {change:.0e}")
    plot(torch.cat([history, later]), torch.stack(own_histories, 1), options.out)
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
