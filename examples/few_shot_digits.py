"""MAML, ANIL and Reptile on handwritten digits, with and without a constraint on the weights.

    python examples/few_shot_digits.py [--quick] [--out few_shot.png]

A task is five classes with labels in a random order, and some examples of each. Learners are
trained on tasks from the digits 0 to 4 of scikit-learn, turned by 0, 90, 180 and 270 degrees, and
tested on tasks from the digits 5 to 9, which they never saw. Of the three

* MAML (Finn et al., arXiv 1703.03400) learns a start from which all weights adapt, and its gradient
  goes through the steps;
* ANIL (Raghu et al., arXiv 1909.09157) adapts the head alone, so the body is evaluated once a task;
* Reptile (Nichol et al., arXiv 1803.02999) adapts, and moves the start towards where that led.

All tasks of a step are one vmap. The two layers of the body are plain, or have weight norm, or are
orthogonal.
"""

import argparse
import time
from functools import partial

import matplotlib as mpl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_map
from tqdm import tqdm

import funcparam as fp
from funcparam.transforms import Orthogonal, WeightNorm

mpl.use("Agg")
import matplotlib.pyplot as plt

WAYS, QUERIES, TASKS, STEPS, RATE = 5, 10, 16, 5, 0.1
RULES = {
    "plain": {},
    "weight norm": {"body.*.weight": WeightNorm()},
    "orthogonal": {"body.*.weight": Orthogonal("cayley")},
}


class Classifier(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        layers = nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        self.body, self.head = nn.Sequential(*layers), nn.Linear(width, WAYS)

    def forward(self, x):
        return self.head(self.body(x))


def classes():
    """Images of each class: 20 to train on, and 5 that are held out."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32) / 16 - 0.3
    digits = [images[torch.tensor(found.target) == digit] for digit in range(10)]
    turned = [digit.rot90(k, (1, 2)) for digit in digits[:5] for k in range(4)]
    return [c.flatten(1) for c in turned], [c.flatten(1) for c in digits[5:]]


def draw(pool, tasks, shots, generator):
    """Support and query images of tasks, with labels in the order in which classes were drawn."""
    rows = []
    for _ in range(tasks):
        for c in torch.randperm(len(pool), generator=generator)[:WAYS]:
            picked = torch.randperm(len(pool[c]), generator=generator)[: shots + QUERIES]
            rows.append(pool[c][picked])
    images = torch.stack(rows).view(tasks, WAYS, shots + QUERIES, 64)
    labels = torch.arange(WAYS)[:, None].expand(tasks, WAYS, shots + QUERIES)
    support, query = slice(None, shots), slice(shots, None)
    return [t[:, :, part].flatten(1, 2) for part in (support, query) for t in (images, labels)]


# --8<-- [start:adapt]
def descend(loss, raw, steps):
    for _ in range(steps):
        raw = tree_map(lambda w, g: w - RATE * g, raw, grad(loss)(raw))
    return raw


# --8<-- [end:adapt]


class Learner:
    """A network with its parametrization, and how it takes to a task."""

    def __init__(self, rules):
        torch.manual_seed(0)
        self.net = Classifier()
        self.p = fp.parametrize(self.net, rules)
        self.raw, self.state = self.p.init(self.net)
        self.head, self.body = self.p.split("head.*")
        fp.trainable(self.raw)

    # --8<-- [start:whole]
    def adapted(self, raw, x, y, steps=STEPS):
        def loss(raw):
            return F.cross_entropy(functional_call(self.net, self.p(raw, self.state), (x,)), y)

        return descend(loss, raw, steps)

    def whole(self, raw, x, y, x_query, steps=STEPS):
        """Logits after all weights adapted."""
        raw = self.adapted(raw, x, y, steps)
        return functional_call(self.net, self.p(raw, self.state), (x_query,))

    # --8<-- [end:whole]

    # --8<-- [start:head]
    def head_only(self, raw, x, y, x_query, steps=STEPS):
        """Logits after the head adapted. The body is evaluated once, its rules with it."""
        body, head = self.body, self.head
        fixed = body(body.of(raw), body.of(self.state))
        own = {name.removeprefix("body."): value for name, value in fixed.items()}
        embed = partial(functional_call, self.net.body, own)
        features, queries = embed((x,)), embed((x_query,))

        def logits(raw, features):
            values = head(raw, head.of(self.state))
            return F.linear(features, values["head.weight"], values["head.bias"])

        raw = descend(lambda raw: F.cross_entropy(logits(raw, features), y), head.of(raw), steps)
        return logits(raw, queries)

    # --8<-- [end:head]


# A method takes a learner and tasks, and leaves gradients in the learner's raw.


# --8<-- [start:methods]
def through_the_steps(logits, learner, x, y, x_query, y_query):
    """MAML and ANIL: the loss after adaptation, differentiated."""
    found = vmap(partial(logits, learner), in_dims=(None, 0, 0, 0))(learner.raw, x, y, x_query)
    F.cross_entropy(found.flatten(0, 1), y_query.flatten()).backward()


def reptile(learner, x, y, x_query, y_query):
    """From the start to where all examples of a task lead, the mean over tasks."""
    x, y = torch.cat([x, x_query], 1), torch.cat([y, y_query], 1)
    with torch.no_grad():
        led = vmap(learner.adapted, in_dims=(None, 0, 0))(learner.raw, x, y)

    def pull(start, ends):
        start.grad = start.detach() - ends.mean(0)

    tree_map(pull, learner.raw, led)


METHODS = {
    "MAML": (partial(through_the_steps, Learner.whole), Learner.whole),
    "ANIL": (partial(through_the_steps, Learner.head_only), Learner.head_only),
    "Reptile": (reptile, Learner.whole),
}
# --8<-- [end:methods]


@torch.no_grad()
def accuracy(logits, learner, tasks, steps):
    x, y, x_query, y_query = tasks
    one = partial(logits, learner, steps=steps)
    found = vmap(one, in_dims=(None, 0, 0, 0))(learner.raw, x, y, x_query)
    return (found.argmax(-1) == y_query).float().mean().item()


def train(learner, method, logits, iterations, pool, shots, tests, label):
    """Accuracies on held-out tasks along the way, and milliseconds an iteration."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(fp.trainable(learner.raw), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.1, iterations)
    curve, seconds = [], 0.0
    for i in tqdm(range(iterations), label, disable=None):
        tasks = draw(pool, TASKS, shots, generator)
        started = time.process_time()
        optimizer.zero_grad()
        method(learner, *tasks)
        optimizer.step()
        schedule.step()
        seconds += time.process_time() - started
        if (i + 1) % max(1, iterations // 10) == 0:
            curve.append((i + 1, accuracy(logits, learner, tests, STEPS)))
    return curve, 1e3 * seconds / iterations


def centroids(tasks, shots):
    """Accuracy of the class whose mean image is nearest: nothing is learned."""
    x, _, x_query, y_query = tasks
    means = x.view(len(x), WAYS, shots, -1).mean(2)
    return (torch.cdist(x_query, means).argmin(-1) == y_query).float().mean().item()


def plot(curves, reference, path):
    figure, axes = plt.subplots(
        1, len(METHODS), figsize=(10, 3.2), sharey=True, layout="constrained"
    )
    for ax, method in zip(axes, METHODS, strict=True):
        for rules in RULES:
            ax.plot(*zip(*curves[method, rules], strict=True), ".-", label=rules)
        ax.axhline(reference, color="0.6", ls=":", label="nearest mean image")
        ax.set(title=method, xlabel="iteration")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("accuracy on digits held out")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few iterations, for a test")
    parser.add_argument("--out", default="few_shot.png", help="where the picture goes")
    parser.add_argument("--shots", type=int, default=1, help="examples of each class to adapt to")
    options = parser.parse_args()
    iterations, count = (10, 20) if options.quick else (300, 200)

    torch.set_num_threads(1)  # matrices are small
    pool, held_out = classes()
    tests = draw(held_out, count, options.shots, torch.Generator().manual_seed(9))
    print(f"\naccuracy on {count} tasks from digits held out, {options.shots} of each to adapt to")
    print(
        "                       at the start  no steps  1 step  5 steps  20 steps  ms an iteration"
    )
    curves = {}
    for name, (method, logits) in METHODS.items():
        for label, rules in RULES.items():
            learner = Learner(rules)
            before = accuracy(logits, learner, tests, STEPS)
            curves[name, label], milliseconds = train(
                learner, method, logits, iterations, pool, options.shots, tests, f"{name}, {label}"
            )
            after = [accuracy(logits, learner, tests, steps) for steps in (0, 1, STEPS, 4 * STEPS)]
            print(
                f"{name:8} {label:14} {before:12.3f} {after[0]:9.3f} {after[1]:7.3f}"
                f" {after[2]:8.3f} {after[3]:9.3f} {milliseconds:16.1f}",
                flush=True,
            )
    reference = centroids(tests, options.shots)
    print(f"the nearest mean image, nothing learned: {reference:.3f}")
    plot(curves, reference, options.out)
    print(f"\npicture: {options.out}")


if __name__ == "__main__":
    main()
