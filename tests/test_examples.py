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


def test_maml(tmp_path):
    picture = tmp_path / "maml.png"
    command = [sys.executable, ROOT / "examples" / "maml_sinusoid.py", "--quick", "--out", picture]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert float(re.search(r"funcparam's weight norm +(\S+)", out)[1]) < 1e-6
    assert float(re.search(r"torch's weight norm +(\S+)", out)[1]) > 1e-3
    for label in ("plain", "weight norm", "LSTM, weight norm"):
        errors = re.search(rf"^{label} +([\d. ]+) {{3}}", out, re.MULTILINE)[1].split()
        assert float(errors[5]) < float(errors[0])
