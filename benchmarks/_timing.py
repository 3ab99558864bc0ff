"""Interleaved timing: every round measures each candidate once, so a busy machine slows all.

In another order each round: what comes after a large one finds its memory in pieces.
"""

import platform
import random
import statistics
import subprocess
import time

import torch


def once(function, repeats, device="cpu"):
    """Seconds a call, over `repeats` calls.

    Of one thread on a CPU its processor time, of which other programs take less. Of CUDA the time
    between two events in the stream, so that launching counts where the device waits for it.
    """
    if device == "cuda":
        return _between_events(function, repeats)
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for _ in range(repeats):
        function()
    return (clock() - start) / repeats


def _between_events(function, repeats):
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def interleaved(functions, rounds=11, seconds=0.02, device="cpu"):
    """Seconds a call of each function in each round, as lists by name."""
    repeats = {}
    for name, function in functions.items():
        function()
        repeats[name] = max(1, int(seconds / once(function, 2, device)))
    times = {name: [] for name in functions}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(functions), len(functions)):
            functions[name]()  # or the caches have what the one before has left there
            times[name].append(once(functions[name], repeats[name], device))
    return times


def ratio(times, slow, fast):
    """Median of slow / fast over the rounds, with its quartiles."""
    ratios = [a / b for a, b in zip(times[slow], times[fast], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return statistics.median(ratios), low, high


def machine(device="cpu"):
    """What it ran on, in one line."""
    if device == "cuda":
        card = torch.cuda.get_device_name()
        return f"{card}, driver {_driver()}, CUDA {torch.version.cuda}, torch {torch.__version__}"
    threads = torch.get_num_threads()
    return f"torch {torch.__version__}, {platform.machine()}, threads: {threads}"


def _driver():
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.split()[0]
