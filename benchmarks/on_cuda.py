"""Everything that a GPU has to show, beside PyTorch's module and other libraries.

    python benchmarks/on_cuda.py [--device cpu] [--quick] [--seconds 300] [--out docs/bench]

Forward and backward of maps, training steps, a weight that is used many times, ensembles,
meta-learning, binding, peak memory and compiled steps. Rounds alternate between the sides, and CUDA
events time them. It writes `cuda.md`, and `cuda.json` with every round, the card, the driver and
the versions. The parts that take longest come last, and what there is no time for is said.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import binding
import compiled
import ensemble
import maml
import maps
import memory
import reuse
import step
import torch
from _peers import versions
from _report import Comparison, table
from _timing import interleaved, machine, ratio
from torch import nn

SIZES = [(1, 64), (32, 64), (8, 256), (64, 256), (1, 1024), (8, 1024)]
KINDS = "weight_norm", "spectral_norm", "cayley", "matrix_exp"
COMPILED = ", compiled"
MEMORY = {"weight_norm": 4096, "spectral_norm": 4096, "cayley": 1024}


def vocoder():
    """Convolutions like those of HiFi-GAN: twice as long, and three dilated ones, four times."""
    torch.manual_seed(0)
    layers, width = [nn.Conv1d(80, 256, 7, padding=3)], 256
    for _ in range(4):
        layers += [nn.LeakyReLU(0.1), nn.ConvTranspose1d(width, width // 2, 4, 2, 1)]
        width //= 2
        for dilation in (1, 3, 5):
            layers += [
                nn.LeakyReLU(0.1),
                nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation),
            ]
    return nn.Sequential(*layers, nn.Conv1d(width, 1, 7, padding=3), nn.Tanh())


NETS = {**step.NETS, "vocoder": (vocoder, "*.weight", (8, 80, 64))}


def of_maps(quick):
    for kind in maps.KINDS:
        for leaves, n in [(2, 8)] if quick else SIZES:
            yield Comparison({"map": kind, "leaves": leaves, "n": n}, maps.setting(kind, leaves, n))


def of_steps(quick):
    for which, net in {"MLP": NETS["MLP"]}.items() if quick else NETS.items():
        for kind in maps.KINDS:
            if which != "vocoder" or kind in ("weight_norm", "spectral_norm"):
                yield Comparison({"map": kind, "net": which}, step.setting(kind, net))


def eager_and_compiled(kind, which, backend):
    """Forward and backward in training mode of PyTorch's module and of the shell."""
    make, _, shape = NETS[which]
    models, x, found = compiled.pair(kind, make), torch.randn(shape), {}
    for side, name in (("PyTorch", "torch"), ("shell", "funcparam")):
        found[side] = differentiated(models[name], models[name], x)
        call = torch.compile(models[name], backend=backend)
        found[side + COMPILED] = differentiated(call, models[name], x)
    return Comparison({"map": kind, "net": which}, found)


def differentiated(call, model, x):
    parameters = list(model.parameters())
    return lambda: torch.autograd.grad(call(x).square().mean(), parameters)


def of_compiled(quick):
    nets = ("MLP",) if quick else ("MLP", "transformer")
    for which in nets:
        for kind in KINDS[:1] if quick else KINDS:
            torch._dynamo.reset()
            yield eager_and_compiled(kind, which, "aot_eager" if quick else "inductor")


def peak(device, function):
    """The most bytes that a call of `function` allocates at one time."""
    if device == "cpu":
        return memory.peak(function)
    function()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def of_memory(device, quick):
    """Peak bytes by side, in training and in evaluation."""
    for kind, n in MEMORY.items():
        n = 16 if quick else n
        x = torch.randn(memory.BATCH, n)
        for side, net in memory.networks(kind, n, memory.LAYERS).items():
            training, evaluation = memory.stepping(net, x), memory.evaluating(net, x)
            training()  # afterwards the gradients are there
            found = {"training": peak(device, training), "evaluation": peak(device, evaluation)}
            yield {"map": kind, "n": n, "side": side, "bytes": found}


def memory_table(rows):
    lines = ["| map | n | side | training, MiB | evaluation, MiB |", "| --- " * 5 + "|"]
    for row in rows:
        sizes = (f"{row['bytes'][what] / 2**20:.1f}" for what in ("training", "evaluation"))
        lines.append(f"| {row['map']} | {row['n']} | {row['side']} | {' | '.join(sizes)} |")
    return "\n".join(lines)


def whole(benchmark):
    """What a benchmark for the CPU compares, on the device."""
    return lambda quick: benchmark.comparisons(quick=quick)


COMPARED = ("PyTorch, compiled", "shell, compiled"), ("PyTorch", "shell, compiled")
PARTS = {
    "maps": ("Maps, forward and backward", of_maps, maps.RATIOS),
    "reuse": ("A weight that is used many times", whole(reuse), reuse.RATIOS),
    "ensemble": ("Ensembles", whole(ensemble), ensemble.RATIOS),
    "binding": ("Binding", whole(binding), binding.RATIOS),
    "step": ("A training step", of_steps, step.RATIOS[:2]),
    "memory": ("Peak memory", None, None),
    "maml": ("Meta-learning", whole(maml), maml.RATIOS),
    "compiled": ("Compiled", of_compiled, COMPARED),
}


class Run:
    """Measures until its time is up."""

    def __init__(self, device, quick, seconds):
        self.device, self.quick = device, quick
        self.ends = time.monotonic() + seconds
        self.figures, self.cut, self.failed = {}, [], {}

    def part(self, name, make):
        """The figures of a part, as far as there is time, and nothing fails."""
        rows = self.figures.setdefault(name, [])
        try:
            self._measure(name, make, rows)
        except Exception as error:  # the others are to be measured all the same
            self.failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]

    def _measure(self, name, make, rows):
        with torch.device(self.device):
            made = of_memory(self.device, self.quick) if make is None else make(self.quick)
        while True:
            if time.monotonic() > self.ends:
                self.cut.append(name)
                return
            with torch.device(self.device):  # for what is made, not for what is timed
                found = next(made, None)
            if found is None:
                return
            rows.append(found if isinstance(found, dict) else self.measured(found))
            if self.quick:
                return

    def measured(self, comparison):
        functions = {k: f for k, f in comparison.functions.items() if k != "by hand"}
        case = dict(comparison.case)
        for name, function in functions.items():
            if name.endswith(COMPILED):
                start = time.perf_counter()
                function()
                cold = time.perf_counter() - start
                case[f"{name.removesuffix(COMPILED)}, s to compile"] = f"{cold:.1f}"
        rounds, seconds = (2, 0.0) if self.quick else (7, 0.02)
        times = interleaved(functions, rounds, seconds, self.device)
        return {"case": case, "seconds": times}


def page(run, conditions):
    """The tables, and what is missing of them."""
    lines = [f"{conditions}.", ""]
    for name, rows in run.figures.items():
        title, make, ratios = PARTS[name]
        if rows:
            own = memory_table(rows) if make is None else table(rows, _known(rows, ratios))
            lines += [f"**{title}**", "", own, ""]
    if run.cut:
        titles = ", ".join(PARTS[name][0] for name in run.cut)
        lines += [f"Cut short, since the time was up: {titles}.", ""]
    lines += [f"{PARTS[name][0]} ended with an error: `{e}`.\n" for name, e in run.failed.items()]
    return "\n".join(lines).rstrip() + "\n"


def _known(rows, ratios):
    """The ratios of sides that were there: a library may not be installed."""
    known = {side for row in rows for side in row["seconds"]}
    return [pair for pair in ratios if known.issuperset(pair)]


def losses(run):
    """What took longer than PyTorch's module, as lines."""
    for name, rows in run.figures.items():
        for row in rows:
            for ours in ("funcparam", "shell", "funcparam, one vmap"):
                for theirs in ("PyTorch", "PyTorch, a loop"):
                    if {ours, theirs} <= row.get("seconds", {}).keys():
                        gain = ratio(row["seconds"], theirs, ours)[0]
                        if gain < 0.95:
                            what = ", ".join(map(str, row["case"].values()))
                            yield f"{name}, {what}: {theirs} / {ours} is {gain:.2f}"


def write(run, conditions, out):
    (out / "cuda.md").write_text(page(run, conditions), encoding="utf-8")
    figures = {"conditions": conditions, "cut": run.cut, "failed": run.failed, "parts": run.figures}
    (out / "cuda.json").write_text(json.dumps(figures), encoding="utf-8")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny cases, to see that it runs")
    parser.add_argument("--seconds", type=float, default=300, help="when to begin nothing more")
    parser.add_argument("--out", type=Path, default=Path("docs/bench"), help="where it goes")
    parser.add_argument("--only", nargs="*", default=list(PARTS), help="these parts alone")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("No CUDA device here: nothing was measured. --device cpu --quick tries the program.")
        return False
    torch.set_num_threads(1)
    run = Run(given.device, given.quick, given.seconds)
    others = ", ".join(f"{name} {number}" for name, number in versions().items())
    conditions = f"{machine(given.device)}, Python {platform.python_version()}; {others}"
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.only:
        run.part(name, PARTS[name][1])
        print(f"{name}: {len(run.figures[name])} rows", file=sys.stderr, flush=True)
        write(run, conditions, given.out)  # each time, should the next not end
    print("\n".join(["Slower than PyTorch's module:", *losses(run)]))
    return bool(run.failed)


if __name__ == "__main__":
    sys.exit(main())
