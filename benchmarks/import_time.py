"""How long `import funcparam` takes after `import torch`, in fresh processes."""

import os
import statistics
import subprocess
import sys

STEPS = {
    "import optree": "import optree",
    "import funcparam": "import funcparam",
    "two transforms": "from funcparam.transforms import Orthogonal, WeightNorm",
    "all transforms": "from funcparam.transforms import *",
    "checkpoint": "import funcparam.checkpoint",
    "compat": "import funcparam.compat",
}
CODE = f"""
import time, torch
for step in {list(STEPS.values())!r}:
    start = time.perf_counter()
    exec(step)
    print(time.perf_counter() - start)
"""

ENV = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}  # as users have it


def main():
    def once():
        out = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, env=ENV)
        return [1e3 * float(line) for line in out.stdout.split()]

    once()  # so that the bytecode is there
    for label, times in zip(STEPS, zip(*(once() for _ in range(9)), strict=True), strict=True):
        print(f"{label:18} {statistics.median(times):6.1f} ms")


if __name__ == "__main__":
    main()
