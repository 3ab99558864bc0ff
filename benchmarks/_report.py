"""Comparisons measured in interleaved rounds, and the tables that show them."""

import argparse
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from _timing import interleaved, machine, ratio


@dataclass(frozen=True)
class Comparison:
    """Functions that do the same by different libraries."""

    case: Mapping[str, object]
    functions: Mapping[str, Callable[[], object]]


def measure(comparisons: Iterable[Comparison], rounds: int, seconds: float = 0.02) -> list[dict]:
    """Seconds a call, of each candidate in each round."""
    return [
        {
            "case": dict(comparison.case),
            "seconds": interleaved(comparison.functions, rounds, seconds),
        }
        for comparison in comparisons
    ]


def table(figures: Sequence[dict], ratios: Sequence[tuple[str, str]]) -> str:
    """A row for each comparison: its medians in ms, and medians of ratios with their quartiles.

    A cell is empty where a candidate does not serve the case.
    """
    cases = list(figures[0]["case"])
    names = list(dict.fromkeys(name for figure in figures for name in figure["seconds"]))
    head = [*cases, *(f"{name}, ms" for name in names), *(f"{a} / {b}" for a, b in ratios)]
    rows = [_row(figure["case"].values(), names, figure["seconds"], ratios) for figure in figures]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _row(case, names, seconds, ratios):
    medians = (f"{statistics.median(seconds[n]) * 1e3:.3g}" if n in seconds else "" for n in names)
    return [*case, *medians, *(_gain(seconds, *pair) for pair in ratios)]


def _gain(seconds, other, ours):
    if other not in seconds or ours not in seconds:
        return ""
    return "{:.2f} ({:.2f} to {:.2f})".format(*ratio(seconds, other, ours))


def main(doc: str, comparisons: Callable[..., Iterable[Comparison]], ratios) -> None:
    """Measure one benchmark by itself, and print its table."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds and cases")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    print(f"{machine()}\n")
    print(table(measure(comparisons(quick=quick), rounds=5 if quick else 11), ratios))
