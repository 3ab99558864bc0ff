"""What `p(raw, state)` costs beyond the same maps written by hand.

    python benchmarks/evaluation.py [--rounds N]

Side by side in one process: by hand, a loop over the weights that are parametrized with the bare
mathematics and a copied dictionary; and `p`. Rounds alternate between the two; medians, and the
ratio of the medians with its quartiles. By hand the maps are what one would write first.
"""

import argparse
import itertools
import platform
import statistics
import time

import torch

import funcparam as fp
from funcparam.transforms import Orthogonal, WeightNorm


def by_hand(raw, state, names):
    values = dict(raw)
    for name in names:
        g, v = raw[name]["magnitude"], raw[name]["direction"]
        values[name] = v * (g / torch.linalg.vector_norm(v, dim=1, keepdim=True))
    return values


def by_hand_orthogonal(raw, state, names):
    values = dict(raw)
    for name in names:
        X = raw[name]
        A = X.tril() - X.tril().mT
        eye = torch.eye(len(A))
        values[name] = state[name]["base"] @ (2 * torch.linalg.inv(eye - A / 2) - eye)
    return values


def by_hand_mixed(raw, state, names):
    orthogonal = [name for name in names if isinstance(raw[name], torch.Tensor)]
    normed = [name for name in names if not isinstance(raw[name], torch.Tensor)]
    return by_hand(by_hand_orthogonal(raw, state, orthogonal), state, normed)


def median_times(functions, rounds):
    """Times of each function, alternating, in microseconds."""
    times = [[] for _ in functions]
    for _ in range(rounds):
        for function, seen in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            seen.append((time.perf_counter() - start) * 1e6)
    return times


def compare(transforms, hand, leaves, chosen, width, rounds):
    tree = {f"layer.{i}.weight": torch.randn(width, width) for i in range(leaves)}
    names = list(tree)[:: leaves // chosen][:chosen]
    p = fp.parametrize(tree, dict(zip(names, itertools.cycle(transforms))))
    raw, state = p.init(tree)
    for tensors in raw.values():
        for tensor in [tensors] if isinstance(tensors, torch.Tensor) else tensors.values():
            tensor.requires_grad_()
    functions = [lambda: hand(raw, state, names), lambda: p(raw, state)]
    torch.testing.assert_close(functions[0](), functions[1]())
    median_times(functions, 5)
    by, ours = median_times(functions, rounds)
    quartiles = statistics.quantiles([b / a for a, b in zip(by, ours, strict=True)])
    ratio = statistics.median(ours) / statistics.median(by)
    names = " and ".join(map(repr, transforms))
    print(
        f"| {names} | {width} | {leaves} | {chosen} | {statistics.median(by):.0f} |"
        f" {statistics.median(ours):.0f} | {ratio:.2f} |"
        f" {quartiles[0]:.2f} to {quartiles[2]:.2f} |",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, one thread\n")
    print("| transform | n | leaves | parametrized | by hand, us | p, us | ratio | quartiles |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for width in (64, 256, 1024):
        for leaves, chosen in ((10, 2), (100, 10), (1000, 100)):
            if width == 1024 and leaves == 1000:
                continue  # 4 GB of weights
            compare([WeightNorm()], by_hand, leaves, chosen, width, rounds)
    for leaves, chosen in ((10, 2), (100, 10), (1000, 100)):
        compare([Orthogonal("cayley")], by_hand_orthogonal, leaves, chosen, 64, rounds)
    for leaves, chosen in ((10, 2), (100, 10), (1000, 100)):
        maps = [WeightNorm(), Orthogonal("cayley")]
        compare(maps, by_hand_mixed, leaves, chosen, 128, rounds)


if __name__ == "__main__":
    main()
