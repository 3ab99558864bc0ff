"""What completions and type checkers show: pyright's own answers, beside the code that asks."""

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

USE = Path(__file__).parent / "typing" / "use.py"


@pytest.mark.skipif(find_spec("pyright") is None, reason="`make types` installs it, and runs this")
def test_types_are_what_the_comments_say():
    command = [sys.executable, "-m", "pyright", "--outputjson", str(USE)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=USE.parent.parent.parent)
    found = {}
    for diagnostic in json.loads(run.stdout)["generalDiagnostics"]:
        line = diagnostic["range"]["start"]["line"]
        if diagnostic["severity"] == "information":
            text = re.search(r' is "(.*)"$', diagnostic["message"], re.MULTILINE)[1]
        else:
            text = f"error: {diagnostic['rule']}"
        found.setdefault(line, set()).add(text)
    lines = USE.read_text().splitlines()
    told = {i: line.split("  # ")[1] for i, line in enumerate(lines) if "  # " in line}
    assert len(told) > 50
    wrong = {i + 1: texts for i, texts in found.items() if told.get(i) not in texts}
    assert not wrong
    assert found.keys() == told.keys()
