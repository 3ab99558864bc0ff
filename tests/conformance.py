"""Run PyTorch's own test file of parametrizations against funcparam.compat.

    python tests/conformance.py FILE [--dynamo] [--only=torch]

FILE is `test/nn/test_parametrization.py` of a PyTorch checkout, unedited, or a document that
quotes it, even if it ends in the middle. Each test runs with torch's own module and with compat;
it is an error if one passes with torch's and not with compat.
"""

import argparse
import ast
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

END = """

instantiate_device_type_tests(TestNNParametrizationDevice, globals())
instantiate_parametrized_tests(TestNNParametrization)
"""


def source_of(text):
    """The Python in a file or in a document, cut back to its last whole test."""
    block = re.search(r"^```python\n(.*?)(?:^```|\Z)", text, re.DOTALL | re.MULTILINE)
    lines = (block.group(1) if block else text).splitlines()
    while True:
        try:
            ast.parse("\n".join(lines))
        except SyntaxError:
            lines.pop()
            continue
        break
    if "instantiate_parametrized_tests(" in "\n".join(lines[-20:]):
        return "\n".join(lines) + "\n"
    last = max(i for i, line in enumerate(lines) if line.startswith("    def test_"))
    while lines[last - 1].startswith("    @"):
        last -= 1
    body = "\n".join(lines[:last])
    end = "\n".join(line for line in END.splitlines() if _defined(line, body))
    return f"{body}\n\n{end}\n"


def _defined(line, body):
    name = re.search(r"\((\w+)", line)
    return name is None or f"class {name[1]}(" in body


def run(source, *, compat, dynamo):
    """Run the tests; give each one's outcome."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "test_parametrization.py"
        path.write_text(source)
        report = Path(folder) / "report.xml"
        plugin = ["-p", "funcparam.compat.pytest_plugin"] if compat else []
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        environment |= {"PYTORCH_TEST_WITH_DYNAMO": "1"} if dynamo else {}
        options = ["-q", "--noconftest", "-c", "/dev/null", f"--rootdir={folder}"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *plugin, f"--junitxml={report}", path],
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
        )
        if not report.exists():
            sys.exit(done.stdout + done.stderr)
        found = dict(outcomes(report))
    return found, done.stdout


def outcomes(report):
    for case in ElementTree.parse(report).iter("testcase"):
        tags = {child.tag for child in case}
        name = f"{case.get('classname').split('.')[-1]}::{case.get('name')}"
        bad = "failed" if tags & {"failure", "error"} else "skipped"
        yield name, bad if tags & {"failure", "error", "skipped"} else "passed"


def _count(outcomes):
    kinds = sorted(set(outcomes.values()))
    return ", ".join(f"{list(outcomes.values()).count(kind)} {kind}" for kind in kinds)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--dynamo", action="store_true", help="with PYTORCH_TEST_WITH_DYNAMO=1")
    parser.add_argument("--verbose", action="store_true", help="show the tests' own output")
    arguments = parser.parse_args()
    source = source_of(arguments.file.read_text())
    theirs, _ = run(source, compat=False, dynamo=arguments.dynamo)
    ours, output = run(source, compat=True, dynamo=arguments.dynamo)
    how = "with dynamo" if arguments.dynamo else "plain"
    print(f"{how}: torch {_count(theirs)}; compat {_count(ours)}")
    worse = [name for name, outcome in theirs.items() if (outcome, ours.get(name)) in WORSE]
    if worse or arguments.verbose:
        print(output)
    if worse or not theirs:
        sys.exit(f"passes with torch's own module and not with compat: {worse}")


WORSE = {("passed", "failed"), ("passed", "skipped"), ("passed", None), ("skipped", "failed")}

if __name__ == "__main__":
    main()
