"""Programs in processes of their own, each forked from one that has loaded PyTorch.

To load PyTorch takes a new interpreter longer than most of the programs take to run.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.multiprocessing import start_processes

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch"])


def python(*command: str | Path, cwd: str | Path = ".") -> str:
    """Return what `python *command` prints: of `-c code`, `-m module` or a script."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder) / name for name in ("out", "err"))
        process = CONTEXT.Process(target=_run, args=([*map(str, command)], cwd, out, err))
        process.start()
        process.join()
        assert process.exitcode == 0, err.read_text()[-4000:]
        return out.read_text()


def _run(command: list[str], cwd: str | Path, *files: Path) -> None:
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    match command:
        case ["-c", code, *_]:
            sys.path.insert(0, "")
            exec(code, {"__name__": "__main__"})
        case ["-m", module, *arguments]:
            sys.path.insert(0, "")
            sys.argv[:] = [module, *arguments]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case [script, *_]:
            sys.path.insert(0, str(Path(script).parent))
            sys.argv[:] = command
            runpy.run_path(script, run_name="__main__")


def on_two(worker: Callable[[int], Any]) -> Any:
    """What `worker(rank)` returns for rank 0, on two processes of one group that works by gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with CONTEXT.Manager() as manager:
        found = manager.dict()
        start_processes(_in_group, (worker, port, found), nprocs=2, start_method="forkserver")
        return found[0]


def _in_group(rank: int, worker: Callable[[int], Any], port: int, found: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found[rank] = worker(rank)
    dist.barrier()
    dist.destroy_process_group()
