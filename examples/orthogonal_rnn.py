"""Long memory: an orthogonal recurrent network with a moving base point, against an LSTM.

    python examples/orthogonal_rnn.py [--quick] [--out orthogonal_rnn.png]

Two tasks of Arjovsky et al., Unitary Evolution Recurrent Neural Networks, arXiv 1511.06464, section
4: to repeat ten symbols after a long blank, and to add two marked numbers of a long sequence. A
recurrent weight that is orthogonal neither stretches nor shrinks what it carries. It is described
by the way to it from a base point, which `rebase` moves to the current weight now and then: dynamic
trivializations, Lezcano-Casado, arXiv 1909.09501. All seeds of the orthogonal network are one vmap.
The dashed line in the picture is the best that a network without memory can do.
"""

import argparse
import math
import time
from dataclasses import dataclass

import matplotlib as mpl
import optree
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vmap
from tqdm import tqdm

import funcparam as fp
from funcparam.transforms import Orthogonal

mpl.use("Agg")
import matplotlib.pyplot as plt

SEEDS, BATCH, REBASE = 2, 64, 100
COLORS = {"orthogonal": "C0", "base kept": "C2", "LSTM": "C1"}


@dataclass(frozen=True)
class Copying:
    """Ten symbols of eight kinds, a blank of length `blank`, a signal; then the ten again."""

    blank: int = 100
    name, inputs, outputs = "copying", 10, 9
    hidden, hidden_lstm = 128, 64
    rates, rate_lstm = (1e-3, 1e-4), 1e-2

    def __str__(self):
        return f"{self.name} over a blank of {self.blank}"

    def draw(self, generator):
        length = self.blank + 20
        symbols = torch.randint(8, (10, BATCH), generator=generator)
        x = torch.full((length, BATCH), 8)
        x[:10], x[-11] = symbols, 9
        y = torch.full((length, BATCH), 8)
        y[-10:] = symbols
        return F.one_hot(x, self.inputs).float(), y

    def loss(self, out, y):
        return F.cross_entropy(out.flatten(0, 1), y.flatten())

    def memoryless(self):
        """The blanks are known, the ten symbols guessed."""
        return 10 * math.log(8) / (self.blank + 20)


@dataclass(frozen=True)
class Adding:
    """Numbers between 0 and 1, one marked in each half; their sum is to be given at the end."""

    length: int = 50
    name, inputs, outputs = "adding", 2, 1
    hidden, hidden_lstm = 64, 64
    rates, rate_lstm = (1e-2, 5e-3), 1e-2

    def __str__(self):
        return f"{self.name} two of {self.length} numbers"

    def draw(self, generator):
        numbers = torch.rand(self.length, BATCH, generator=generator)
        half = self.length // 2
        marked = torch.randint(half, (2, BATCH), generator=generator)
        marks = F.one_hot(marked + torch.tensor([[0], [half]]), self.length).sum(0).mT.float()
        return torch.stack([numbers, marks], -1), (numbers * marks).sum(0)

    def loss(self, out, y):
        return F.mse_loss(out[-1, :, 0], y)

    def memoryless(self):
        """The variance of the sum: 1 is guessed."""
        return 1 / 6


class Recurrent(nn.Module):
    """Rotations by random angles at first, as of Henaff et al., arXiv 1602.06662."""

    def __init__(self, inputs, hidden, outputs, nonlinearity):
        super().__init__()
        self.input = nn.Linear(inputs, hidden)
        self.recurrent = nn.Linear(hidden, hidden, bias=False)
        self.threshold = nn.Parameter(torch.zeros(hidden))
        self.head = nn.Linear(hidden, outputs)
        self.nonlinearity = nonlinearity
        angles = math.pi * (2 * torch.rand(hidden // 2) - 1)
        turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
        with torch.no_grad():
            self.recurrent.weight.copy_(
                torch.block_diag(*[a.cos() * torch.eye(2) + a.sin() * turn for a in angles])
            )

    def forward(self, x):
        h = x.new_zeros(x.shape[1], len(self.threshold))
        states = []
        for z in self.input(x).unbind(0):
            h = self.nonlinearity(torch.addmm(z, h, self.recurrent.weight.mT), self.threshold)
            states.append(h)
        return self.head(torch.stack(states))


def mod_relu(z, threshold):
    return z.sign() * F.relu(z.abs() + threshold)


def shifted_relu(z, threshold):
    return F.relu(z + threshold)


class LSTM(nn.Module):
    def __init__(self, inputs, hidden, outputs):
        super().__init__()
        self.rnn = nn.LSTM(inputs, hidden)
        self.head = nn.Linear(hidden, outputs)
        with torch.no_grad():
            self.rnn.bias_ih_l0[hidden : 2 * hidden] = 1  # gates that remember at first

    def forward(self, x):
        return self.head(self.rnn(x)[0])


@dataclass(frozen=True)
class Run:
    """Losses of every iteration and seed, and what else is printed."""

    losses: torch.Tensor
    seconds: float
    numbers: int
    note: str = ""


def seeded(seed, make):
    torch.manual_seed(seed)
    return make()


def train_orthogonal(task, iterations, every=REBASE):
    """All seeds at once. The base point moves every so many iterations; 0 leaves it where it is."""
    nonlinearity = mod_relu if task.name == "copying" else shifted_relu
    nets = [
        seeded(s, lambda: Recurrent(task.inputs, task.hidden, task.outputs, nonlinearity))
        for s in range(SEEDS)
    ]
    # --8<-- [start:setup]
    net = nets[0]
    p = fp.parametrize(net, {"recurrent.weight": Orthogonal()})
    raws, states = optree.tree_map(lambda *ts: torch.stack(ts), *[p.init(net) for net in nets])

    def loss(raw, state, x, y):
        return task.loss(functional_call(net, p(raw, state), (x,)), y)

    # --8<-- [end:setup]
    recurrent = raws["recurrent.weight"]
    others = [tensor for tensor in fp.trainable(raws) if tensor is not recurrent]
    optimizer = torch.optim.Adam(
        [
            {"params": others, "lr": task.rates[0]},
            {"params": [recurrent], "lr": task.rates[1]},
        ]
    )
    generators = [torch.Generator().manual_seed(seed) for seed in range(SEEDS)]
    history, moved, longest = [], 0.0, 0.0
    start = time.perf_counter()
    for i in tqdm(range(1, iterations + 1), desc=f"{task.name}, orthogonal", disable=None):
        x, y = (torch.stack(ts) for ts in zip(*map(task.draw, generators), strict=True))
        # --8<-- [start:step]
        losses = vmap(loss)(raws, states, x, y)
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        # --8<-- [end:step]
        history.append(losses.detach())
        longest = max(longest, torch.linalg.matrix_norm(recurrent.detach()).max().item())
        if every and i % every == 0:
            before = vmap(p)(raws, states)["recurrent.weight"].detach()
            # --8<-- [start:rebase]
            with torch.no_grad():
                new_raws, states = vmap(p.rebase)(raws, states)
                recurrent.copy_(new_raws["recurrent.weight"])  # in place: the optimizer holds it
            optimizer.state[recurrent]["exp_avg"].zero_()  # momentum belongs to the old raw
            # --8<-- [end:rebase]
            after = vmap(p)(raws, states)["recurrent.weight"].detach()
            moved = max(moved, (after - before).abs().max().item())
    seconds = time.perf_counter() - start
    weights = vmap(p)(raws, states)["recurrent.weight"].detach()
    violation = vmap(lambda w: Orthogonal().violation(w, {}))(weights).max().item()
    note = f"|W'W - I| {violation:.0e}; raw up to {longest:.2f} long"
    if every:
        note += f"; rebase changed the weight by {moved:.0e}"
    return Run(torch.stack(history), seconds, count(net), note)


def train_lstm(task, iterations):
    """One seed after another: PyTorch's fused LSTM has no vmap."""
    histories = []
    start = time.perf_counter()
    for seed in range(SEEDS):
        net = seeded(seed, lambda: LSTM(task.inputs, task.hidden_lstm, task.outputs))
        optimizer = torch.optim.Adam(net.parameters(), lr=task.rate_lstm)
        generator = torch.Generator().manual_seed(seed)
        history = []
        for _ in tqdm(range(iterations), desc=f"{task.name}, LSTM {seed}", disable=None):
            x, y = task.draw(generator)
            loss = task.loss(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            history.append(loss.detach())
        histories.append(torch.stack(history))
    return Run(torch.stack(histories, -1), time.perf_counter() - start, count(net))


def count(net):
    return sum(parameter.numel() for parameter in net.parameters())


def report(task, runs, iterations):
    """Print a table; the losses are means over the last twentieth of the iterations up to there."""
    marks = [iterations // 8, iterations // 4, iterations // 2, iterations]
    window = max(1, iterations // 20)
    print(f"{task}; loss without memory {task.memoryless():.4f}")
    print(
        "network      numbers  seed"
        + "".join(f"  after {mark:4}" for mark in marks)
        + "  a tenth of that  seconds"
    )
    for name, run in runs.items():
        for seed, losses in enumerate(run.losses.T):
            means = torch.stack([losses[max(0, m - window) : m].mean() for m in marks])
            below = (losses < task.memoryless() / 10).nonzero().flatten()
            first = f"iteration {below[0] + 1}" if len(below) else "never"
            print(
                f"{name:11}  {run.numbers:7}  {seed:4}"
                + "".join(f"  {loss:10.4f}" for loss in means)
                + f"  {first:>15}"
                + (f"  {run.seconds:7.0f}" if seed == 0 else "")
            )
    for name, run in runs.items():
        if run.note:
            print(f"{name}: {run.note}")
    print()


def picture(results, path):
    figure, panels = plt.subplots(1, len(results), figsize=(10, 4), layout="constrained")
    for axes, (task, runs) in zip(panels, results.items(), strict=True):
        for name, run in runs.items():
            window = max(1, len(run.losses) // 50)
            for seed, losses in enumerate(run.losses.T):
                style = COLORS[name] + ("-", ":")[seed % 2]
                means = losses.unfold(0, window, 1).mean(-1)
                axes.plot(
                    range(window, len(losses) + 1), means, style, label=f"{name}, seed {seed}"
                )
        axes.axhline(task.memoryless(), color="0.4", linestyle="--", label="without memory")
        axes.set(xlabel="iteration", yscale="log")
        axes.set_title(str(task), fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("loss")
    handles, labels = panels[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few iterations, to see that it runs")
    parser.add_argument("--out", default="orthogonal_rnn.png", help="where the picture goes")
    options = parser.parse_args()
    tasks = {Copying(): 400, Adding(): 1200}
    if options.quick:
        tasks = {Copying(blank=40): 100, Adding(length=10): 100}
    results = {}
    for task, iterations in tasks.items():
        runs = {"orthogonal": train_orthogonal(task, iterations)}
        if task.name == "adding":
            runs["base kept"] = train_orthogonal(task, iterations, every=0)
        runs["LSTM"] = train_lstm(task, iterations)
        results[task] = runs
        report(task, runs, iterations)
    picture(results, options.out)
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
