"""Every example runs, and prints what it claims."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_quickstart(tmp_path):
    picture = tmp_path / "quickstart.png"
    command = [sys.executable, ROOT / "examples" / "quickstart.py", "--quick", "--out", picture]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert picture.read_bytes()[:4] == b"\x89PNG"
    difference = re.search(r"outputs differ by (\S+)", out)[1]
    assert float(difference) < 1e-6
    orthogonal = re.search(r"^orthogonal.*", out, re.MULTILINE)[0].split()
    assert float(orthogonal[-2]) < 1e-5
    assert "ensemble of 8 by vmap" in out
