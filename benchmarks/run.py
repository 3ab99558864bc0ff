"""Measure everything, side by side in one process, and write what the documentation shows.

    python benchmarks/run.py [--quick] [--only NAME ...] [--out DIRECTORY]

Writes a table of each benchmark, `figures.json` with every round of every candidate, and a picture
of the ratios. One thread. --quick takes fewer cases and rounds, and less than three minutes.
"""

import argparse
import json
import platform
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import matplotlib as mpl
import torch
from _report import measure, table
from _timing import ratio

mpl.use("Agg")
import matplotlib.pyplot as plt

TIMED = (
    "maps",
    "step",
    "reuse",
    "ensemble",
    "maml",
    "part",
    "binding",
    "evaluation",
    "compat",
    "manifold",
)
WHOLE = "memory", "compiled", "thresholds", "accuracy"
BY_MAP = "maps", "step", "reuse", "ensemble", "manifold"
OURS = "shell", "functional", "trivialized", "rebased", "projected"
PEERS = "torch", "geotorch", "geoopt", "higher", "torchopt", "tensordict"


def processor():
    """The processor's name, where the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((x.split(": ")[1] for x in lines if x.startswith("model name")), platform.machine())


def conditions():
    versions = ", ".join(f"{name} {version(name)}" for name in PEERS)
    return f"{processor()}, one thread, Python {platform.python_version()}; {versions}"


def timed(name, *, quick):
    benchmark = import_module(name)
    figures = measure(benchmark.comparisons(quick=quick), rounds=5 if quick else 11)
    return figures, table(figures, benchmark.RATIOS), benchmark.RATIOS


def picture(groups, path):
    """A line for each group, and on it the median ratio of each of its comparisons."""
    figure, axis = plt.subplots(figsize=(7, 0.24 * len(groups) + 0.8), layout="constrained")
    for y, ratios in enumerate(reversed(groups.values())):
        for gain in ratios:
            axis.plot(gain, y, "o", color="tab:green" if gain >= 1 else "tab:red", alpha=0.7)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_yticks(range(len(groups)), reversed(groups))
    axis.set(xscale="log", xlabel="time of the other / time of funcparam; each dot is a size")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.grid(axis="x", which="both", linewidth=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def grouped(name, figures, pairs):
    """Median ratios to other libraries, by benchmark, by what was measured, and by whom."""
    found = {}
    for figure in figures:
        first = next(iter(figure["case"].values()))
        what = f", {first}" if isinstance(first, str) and name in BY_MAP else ""
        for other, ours in pairs:
            if other in ("shell", "functional", "by hand") or ours in (
                "one by one",
                "by hand",
                "part",
            ):
                continue
            if other in figure["seconds"]:
                side = f" ({ours})" if ours in OURS else ""
                gain = ratio(figure["seconds"], other, ours)[0]
                found.setdefault(f"{name}{what}{side}: {other}", []).append(gain)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds")
    parser.add_argument("--only", nargs="*", default=[*TIMED, *WHOLE], help="these alone")
    parser.add_argument("--out", type=Path, default=Path("bench"), help="where everything goes")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    print(f"{conditions()}\n")
    everything, groups = {"conditions": conditions()}, {}
    for name in arguments.only:
        if name in WHOLE:
            figures, shown = import_module(name).report(quick=arguments.quick)
        else:
            figures, shown, pairs = timed(name, quick=arguments.quick)
            groups |= grouped(name, figures, pairs)
        everything[name] = figures
        (arguments.out / f"{name}.md").write_text(shown + "\n", encoding="utf-8")
        print(f"{name}\n\n{shown}\n", flush=True)
        (arguments.out / "figures.json").write_text(json.dumps(everything), encoding="utf-8")
    (arguments.out / "conditions.md").write_text(conditions() + ".\n", encoding="utf-8")
    if groups:
        picture(groups, arguments.out / "ratios.png")


if __name__ == "__main__":
    main()
