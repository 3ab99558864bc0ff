"""Mutation testing: which wrong line would no test notice? `python -m tests.mutation --help`.

cosmic-ray knows how to change a line. A sample of the mutants of each file, by a fixed seed, is
tried in a copy of the project. Coverage says first which tests reach which line, and how long they
take: a mutant faces those that reach its line, one of each test function before a second, as many
as run in a minute. They run in a process that is forked from this one, which has loaded PyTorch.
"""

import argparse
import ast
import contextlib
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
from collections import Counter, defaultdict
from itertools import accumulate, islice
from pathlib import Path

import coverage
import hypothesis  # noqa: F401
import pytest
import scipy.stats  # noqa: F401
import torch._dynamo
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).parent.parent
QUIET = ["-q", "--assert=plain", "-p", "no:cacheprovider"]
# without those that compile, or that start programs, in which coverage sees nothing
SLOW = ["cuda", "ecosystem", "typing", "test_typing.py", "test_docs.py", "test_examples.py"]
SLOW += ["laws/test_compile.py", "laws/test_export.py", "compat/test_third_party.py"]
SLOW += [f"binding/test_{what}.py" for what in ("compile", "distributed", "frameworks", "memory")]
TESTS = ["funcparam", "tests", *(f"--ignore=tests/{slow}" for slow in SLOW)]


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
                found.setdefault(start, []).append((operator, occurrence))
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


def sample(path, seed):
    """A mutant of each place, in an order of the seed."""
    source = path.read_text()
    found = mutants(source)
    places = sorted(found)
    random.Random(f"{seed} {path}").shuffle(places)
    for start in places:
        operator, occurrence = random.Random(f"{seed} {start}").choice(found[start])
        if mutant := _mutated(source, operator, occurrence):
            yield start[0], mutant


def _mutated(source, operator, occurrence):
    """The source, changed, or nothing where that would not be Python."""
    try:
        mutant = mutate_code(source, operator, occurrence)
        compile(mutant, "mutant", "exec")
    except (
        SyntaxError,
        AttributeError,
    ):  # of f(*, key), a product; of `except a.b`, which has dots
        return None
    return mutant


class Observer:
    """Write down which lines of funcparam each test reaches, and how long it takes."""

    def __init__(self, folder):
        self.file = folder / "seconds.json"
        self.lines = coverage.Coverage(folder / "lines", source=["funcparam"], config_file=False)
        self.lines.set_option("run:core", "ctrace")  # others know no contexts
        self.lines.set_option("run:relative_files", True)
        self.seconds = Counter()
        self.failed = set()

    def pytest_sessionstart(self):
        self.lines.start()

    def pytest_runtest_setup(self, item):
        self.lines.switch_context(item.nodeid)

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.duration
        if not report.passed:
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self):
        self.lines.stop()
        self.lines.save()
        passed = {test: took for test, took in self.seconds.items() if test not in self.failed}
        self.file.write_text(json.dumps(passed))


class Chooser:
    """Say which tests a mutant faces."""

    def __init__(self, folder, limit):
        self.seconds = json.loads((folder / "seconds.json").read_text())
        self.lines = coverage.CoverageData(str(folder / "lines"))
        self.lines.read()
        self.limit = limit

    def tests(self, path, line):
        """Those that reach the line, or anything in the file if it runs at import."""
        reached = self.lines.contexts_by_lineno(str(path))
        if _in_function(path, line):
            found = set(reached[max(number for number in reached if number <= line)])
        else:
            found = {test for tests in reached.values() for test in tests}
        functions = defaultdict(list)
        for test in sorted(found & self.seconds.keys(), key=self.seconds.__getitem__):
            functions[test.split("[")[0]].append(test)
        turns = {test: turn for each in functions.values() for turn, test in enumerate(each)}
        order = sorted(turns, key=lambda test: (turns[test], self.seconds[test]))
        ends = accumulate(self.seconds[test] for test in order)
        return [test for test, end in zip(order, ends, strict=True) if end < self.limit]


def _in_function(path, line):
    functions = (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef))
    return any(n.body[0].lineno <= line <= n.end_lineno for n in functions)


class Chosen:
    """Run these tests only, in this order, and keep the name of one that fails."""

    def __init__(self, tests):
        self.turns = {test: turn for turn, test in enumerate(tests)}
        self.failed = "an import"

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if item.nodeid in self.turns]
        items.sort(key=lambda item: self.turns[item.nodeid])

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed = report.nodeid


def first_failure(tests):
    """The name of the first that fails, or nothing; examples first, then the files with most."""
    files = defaultdict(list)
    for test in tests:
        files[test.split("::")[0]].append(test)
    for file in sorted(files, key=lambda file: (file.startswith("tests"), -len(files[file]))):
        chosen = Chosen(files[file])
        code = pytest.main(["-x", *QUIET, file], [chosen])
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            return chosen.failed
    return ""


def forked(work, seconds=None):
    """What the work returns in a process of its own, in which it imports funcparam anew."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        answer = "a crash"
        with contextlib.suppress(BaseException):
            answer = work()
        os.write(write, f"{answer}\n".encode())
        os._exit(0)
    os.close(write)
    in_time = select.select([read], [], [], seconds)[0]
    with open(read) as pipe:
        answer = (pipe.readline() or "a crash").strip() if in_time else "the clock"
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return answer


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="all, if none is given")
    parser.add_argument("--count", type=int, default=1, help="mutants of each file")
    parser.add_argument("--seed", type=int, default=0, help="which mutants")
    parser.add_argument("--seconds", type=float, default=60, help="of tests that a mutant faces")
    parser.add_argument("--tests", default=" ".join(TESTS), help="those to choose among")
    parser.add_argument("--reach", type=Path, help="a folder that keeps what tests reach")
    parser.add_argument("--least", type=float, default=0.9, help="the share to be killed")
    options = parser.parse_args()
    every = (path for path in (ROOT / "funcparam").rglob("*.py") if "__" not in path.stem)
    files = [path.resolve().relative_to(ROOT) for path in options.files or sorted(every)]
    reach = options.reach and options.reach.resolve()
    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    rooms, killers = defaultdict(Counter), set()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "site"))
        os.chdir(copy)
        sys.path[:0] = [str(copy)]
        del sys.modules["tests"]  # the copy has its own
        reach = reach or Path(folder)
        if not (reach / "seconds.json").exists():
            forked(lambda: pytest.main([*QUIET, *options.tests.split()], [Observer(reach)]))
        chooser = Chooser(reach, options.seconds)
        for path in files:
            original = path.read_text()
            for line, mutant in islice(sample(path, options.seed), options.count):
                tests = chooser.tests(path, line)
                path.write_text(mutant)
                killer = forked(lambda: first_failure(tests), 60 + 10 * options.seconds)  # noqa: B023
                path.write_text(original)
                killers.add(killer)
                rooms[path.parent][bool(killer)] += 1
                end = f"killed by {killer}" if killer else f"SURVIVED {len(tests)} tests"
                text, changed = (code.splitlines()[line - 1].strip() for code in (original, mutant))
                print(f"{path}:{line} {text}  ->  {changed}\n    {end}", flush=True)
        unsure = forked(lambda: first_failure(sorted(test for test in killers if "::" in test)))
    for room, counts in rooms.items():
        print(f"{room}: {counts[True]} of {counts.total()} killed")
    total = sum(rooms.values(), Counter())
    print(f"{total[True]} of {total.total()} killed: {total[True] / total.total():.1%}")
    if unsure:
        sys.exit(f"{unsure} fails without any change, too")
    sys.exit(total[True] / total.total() < options.least)


if __name__ == "__main__":
    main()
