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


def test_legacy_vocoder(tmp_path):
    picture = tmp_path / "vocoder.png"
    command = [sys.executable, ROOT / "examples" / "legacy_vocoder.py", "--quick", "--out", picture]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "<All keys matched successfully>" in out
    assert "deepcopy: torch's hooks raise RuntimeError, here works" in out
    differences = re.findall(r"outputs differ by (\S+)", out)
    assert len(differences) == 3
    assert all(float(difference) < 1e-5 for difference in differences)
    assert float(re.search(r"losses differ by ([\d.e+-]+)", out)[1]) < 1e-3
    assert float(re.search(r"move by (\S+)", out)[1]) == 0
    errors = {
        label: float(re.search(rf"^{label} +\d+ +(\S+)", out, re.MULTILINE)[1])
        for label in ("old checkpoint", "trained on", "moving average of it")
    }
    assert errors["trained on"] < errors["old checkpoint"]
    assert errors["moving average of it"] < errors["old checkpoint"]


def test_lora(tmp_path):
    picture = tmp_path / "lora.png"
    command = [sys.executable, ROOT / "examples" / "lora_minilm.py", "--quick", "--out", picture]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert picture.read_bytes()[:4] == b"\x89PNG"
    trained = {"head only": 770, "LoRA, rank 8": 74498, "DoRA, rank 8": 79106}
    for label, size in trained.items():
        row = re.search(rf"^{label} +(\S+) +(\S+) +(\d+)$", out, re.MULTILINE)
        assert float(row[1]) > 0.6  # chance is 0.5
        assert int(row[3]) == size
    for label in ("LoRA", "DoRA"):
        differences = re.search(rf"^{label} {{10,}}(.*)$", out, re.MULTILINE)[1].split()
        assert len(differences) == 3
        assert all(float(difference) < 1e-4 for difference in differences)
    assert float(re.search(r"logits differ by (\S+) from one by one", out)[1]) < 1e-4
    assert float(re.search(r"Classifier: logits differ by (\S+)", out)[1]) < 1e-4
