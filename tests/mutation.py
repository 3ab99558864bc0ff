"""Mutation testing: which wrong line would no test notice? `python -m tests.mutation --help`.

cosmic-ray knows how to change a line. A sample of the mutants of each file, by a fixed seed, is
tried in a copy of the project, against the laws and the tests of the transforms in that file. Each
runs in a process that is forked from this one, which has loaded PyTorch already.
"""

import argparse
import ast
import contextlib
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import hypothesis  # noqa: F401
import pytest
import scipy.stats  # noqa: F401
import torch._dynamo
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).parent.parent
LAWS = [f"tests/laws/test_{law}.py" for law in ("round_trip", "grad", "vmap", "dtypes", "purity")]
LAWS += [f"tests/laws/test_{law}.py" for law in ("log_det", "static", "meta")]
OF_TRANSFORMS = ["bad_input", "errors", "constraints", "structured", "manifolds", "lipschitz_conv"]
OF_TRANSFORMS += ["problems", "skew_exp", "fused_norm", "edges", "batching", "geotorch"]
OF_HELPERS = {
    "parametrization": ["parametrization", "selection", "inspect", "batching", "errors", "module"],
    "parametrize": ["parametrization", "selection", "errors"],
    "signature": ["parametrization", "selection", "errors", "own_transforms", "bad_input"],
    "_spellings": ["codec", "keys", "errors"],
    "arguments": ["bad_input", "errors"],
    "base": ["bad_input", "errors", "selection", "parametrization"],
    "_constraints": ["constraints", "errors"],
    "function": ["own_transforms", "bad_input", "errors", "selection", "inspect"],
    "precision": ["dtypes", "parametrization", "inspect", "module"],
}


def mutants(source):
    """Each place that can be changed, (line, column), with what can be done to it."""
    tree = get_ast(source)
    ignored = {place for node in ast.walk(ast.parse(source)) for place in _for_checkers(node)}
    found = {}
    for name in operator_names():
        operator_class = get_operator(name)
        if operator_class.arguments():
            continue
        operator = operator_class()
        places = (place for node in ast_nodes(tree) for place in operator.mutation_positions(node))
        for occurrence, (start, _) in enumerate(places):
            if start not in ignored:
                found.setdefault(start, []).append((operator, occurrence, name))
    return found


def _for_checkers(node):
    """The places of types and of marks such as @final, which change nothing when the code runs."""
    types = [getattr(node, "annotation", None), getattr(node, "returns", None)]
    marks = [
        mark
        for mark in getattr(node, "decorator_list", [])
        if ast.unparse(mark) in ("final", "abstractmethod", "overload")
    ]
    for part in (part for kind in [*types, *marks] if kind for part in ast.walk(kind)):
        if hasattr(part, "lineno"):
            columns = range(part.col_offset - 1, part.end_col_offset + 1)
            yield from ((part.lineno, column) for column in columns)


def sample(path, count):
    source = path.read_text()
    found = mutants(source)
    places = sorted(found)
    random.Random(path.name).shuffle(places)
    for start in places:
        operator, occurrence, name = random.Random(str(start)).choice(found[start])
        mutant = mutate_code(source, operator, occurrence)
        if count and _compiles(mutant):
            count -= 1
            yield start[0], name.removeprefix("core/"), mutant


def _compiles(code):
    """Whether it is Python; the mark of keyword-only arguments is mutated like a product."""
    try:
        return bool(compile(code, "mutant", "exec"))
    except SyntaxError:
        return False


def runs_of(path):
    """The arguments of pytest for a file, run by run: its rows of the laws, and files about it."""
    if path.stem in OF_HELPERS:
        return [[_test(name) for name in OF_HELPERS[path.stem]]]
    own = sorted({path.stem.removeprefix("_"), *_transforms(path)})
    files = [_test(name) for name in OF_TRANSFORMS]
    about = [file for file in files if re.search("|".join(own), (ROOT / file).read_text())]
    return [[*LAWS, "-k", " or ".join(own)], *([about] if about else [])]


def _test(name):
    return str(next(ROOT.glob(f"tests/**/test_{name}.py")).relative_to(ROOT))


def _transforms(path):
    """The public classes of a file, or else of the files that import it."""
    nodes = ast.parse(path.read_text()).body
    own = [n.name for n in nodes if isinstance(n, ast.ClassDef) and not n.name.startswith("_")]
    return own or [name for other in _importers(path) for name in _transforms(other)]


def _importers(path):
    module = ".".join(path.with_suffix("").parts)
    files = Path("funcparam/transforms").rglob("*.py")
    return [file for file in files if f"from {module} import" in file.read_text()]


def killed(runs, seconds):
    """Run the tests in a forked process; True if one fails, or takes too long."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        code = 1
        with contextlib.suppress(BaseException):
            options = ["-xq", "--assert=plain", "-p", "no:cacheprovider"]
            code = int(any(pytest.main([*options, *arguments]) for arguments in runs))
        os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) != 0
        time.sleep(0.05)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="all, if none is given")
    parser.add_argument("--count", type=int, default=5, help="mutants of each file")
    parser.add_argument("--seconds", type=float, default=300, help="after which one is killed")
    parser.add_argument("--least", type=float, default=0.9, help="the share to be killed")
    options = parser.parse_args()
    package = ROOT / "funcparam"
    every = [
        path for path in sorted((package / "transforms").rglob("*.py")) if path.stem != "__init__"
    ]
    every += sorted((package / "parametrization").glob("parametriz*.py"))
    files = [path.resolve().relative_to(ROOT) for path in options.files or every]
    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    counts = Counter()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "site"))
        os.chdir(copy)
        sys.path[:0] = [str(copy)]
        del sys.modules["tests"]  # the copy has its own
        for path in files:
            original = path.read_text()
            runs = runs_of(path)
            if killed(runs, 10 * options.seconds):
                sys.exit(f"{path}: its tests fail, or there are none, without any change")
            for line, what, mutant in sample(path, options.count):
                path.write_text(mutant)
                dead = killed(runs, options.seconds)
                path.write_text(original)
                counts[dead] += 1
                text = original.splitlines()[line - 1].strip()
                print(
                    f"{'killed  ' if dead else 'SURVIVED'} {path}:{line} {what}: {text}", flush=True
                )
    share = counts[True] / counts.total()
    print(f"{counts[True]} of {counts.total()} killed: {share:.1%}")
    sys.exit(share < options.least)


if __name__ == "__main__":
    main()
