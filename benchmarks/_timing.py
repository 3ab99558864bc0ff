"""Interleaved timing: every round measures each candidate once, so a busy machine slows all."""

import platform
import statistics
import time

import torch


def once(function, repeats):
    """Seconds a call, over `repeats` calls.

    Of one thread its processor time, of which other programs take less.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for _ in range(repeats):
        function()
    return (clock() - start) / repeats


def interleaved(functions, rounds=11, seconds=0.02):
    """Seconds a call of each function in each round, as lists by name."""
    repeats = {}
    for name, function in functions.items():
        function()
        repeats[name] = max(1, int(seconds / once(function, 2)))
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(once(function, repeats[name]))
    return times


def ratio(times, slow, fast):
    """Median of slow / fast over the rounds, with its quartiles."""
    ratios = [a / b for a, b in zip(times[slow], times[fast], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return statistics.median(ratios), low, high


def machine():
    """What it ran on, in one line."""
    threads = torch.get_num_threads()
    return f"torch {torch.__version__}, {platform.machine()}, threads: {threads}"
