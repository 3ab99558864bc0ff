"""Every example runs, and prints what it claims."""

import itertools
import re
from pathlib import Path

from tests.processes import python

ROOT = Path(__file__).parent.parent


def test_quickstart(tmp_path):
    picture = tmp_path / "quickstart.png"
    out = python(ROOT / "examples" / "quickstart.py", "--quick", "--out", picture)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert float(re.search(r"outputs differ by (\S+)", out)[1]) < 1e-6
    rows = {
        name: [float(x) for x in re.findall(r"(\d\.\d\d) \(", cells)]
        for name, cells in re.findall(r"^(unconstrained|orthogonal) (.*)$", out, re.MULTILINE)
    }
    right, certain, _, _ = rows["orthogonal"]
    assert right > 0.7
    assert certain > rows["unconstrained"][1] + 0.2


def test_maml(tmp_path):
    picture = tmp_path / "maml.png"
    out = python(ROOT / "examples" / "maml_sinusoid.py", "--quick", "--out", picture)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert float(re.search(r"funcparam's weight norm +(\S+)", out)[1]) < 1e-6
    assert float(re.search(r"torch's weight norm +(\S+)", out)[1]) > 1e-3
    for label in ("plain", "weight norm", "LSTM, weight norm"):
        errors = re.search(rf"^{label} +([\d. ]+) {{3}}", out, re.MULTILINE)[1].split()
        assert float(errors[5]) < float(errors[0])


def test_legacy_vocoder(tmp_path):
    picture = tmp_path / "vocoder.png"
    out = python(ROOT / "examples" / "legacy_vocoder.py", "--quick", "--out", picture)
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
    out = python(ROOT / "examples" / "lora_minilm.py", "--quick", "--out", picture)
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


def test_ensemble(tmp_path):
    picture = tmp_path / "ensemble.png"
    out = python(ROOT / "examples" / "ensemble.py", "--quick", "--out", picture)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert float(re.search(r"they differ by (\S+)", out)[1]) < 1e-5
    for kind in ("clean", "noisy"):
        single, average = (
            [float(number) for number in re.search(rf"^{kind} +{row} +(.+)", out, re.M)[1].split()]
            for row in ("members, mean", "their average")
        )
        assert average[0] > 0.5
        assert average[2] < single[2]  # log-loss, by Jensen's inequality
    bounds = [[float(n) for n in row] for row in rows(out, after="bound  largest", columns=5)]
    assert len(bounds) == 8
    assert all(largest <= bound for bound, largest, *_ in bounds)
    assert bounds[0][3] < bounds[-1][3]  # a small bound keeps the network from being sure
    ranks = [[float(n) for n in row] for row in rows(out, after="rank  trained", columns=6)]
    assert [row[1] for row in ranks] == [202 * row[0] for row in ranks]
    assert ranks[0][2] < ranks[1][2] < ranks[-1][2]
    assert ranks[0][3] == ranks[0][4]  # rank 0 is the same frozen network from every seed
    assert all(row[5] < 1e-4 for row in ranks)


def test_compiled_training(tmp_path):
    picture = tmp_path / "compiled.png"
    program = ROOT / "examples" / "compiled_training.py"
    out = python(program, "--quick", "--out", picture)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    graphs, breaks = re.search(r"^funcparam, compiled +\S+ +\S+ +(\d+) +(\d+)", out, re.M).groups()
    assert (graphs, breaks) == ("1", "0")
    assert float(re.search(r"steps differ by at most (\S+)", out)[1]) < 1e-4
    assert "1 graph in all, 0 compiled again" in out
    before, after = re.search(r"unseen text: (\S+) before, (\S+) after", out).groups()
    assert float(after) < 0.8 * float(before)
    assert float(re.search(r"orthogonal to (\S+)", out)[1]) < 1e-5


def test_orthogonal_rnn(tmp_path):
    picture = tmp_path / "orthogonal_rnn.png"
    out = python(ROOT / "examples" / "orthogonal_rnn.py", "--quick", "--out", picture)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    copying, adding = out.split("adding", 1)
    baseline = float(re.search(r"without memory (\S+)", copying)[1])
    losses = {
        (name, seed): float(row.split()[3])
        for name, seed, row in re.findall(r"^(\w+) +\d+ +(\d)(.+)", copying, re.M)
    }
    assert len(losses) == 4
    for seed in "01":
        assert losses["orthogonal", seed] < 0.7 * baseline
        assert losses["LSTM", seed] > 0.9 * baseline
    notes = re.findall(
        r"^orthogonal: .*I\| (\S+); raw up to (\S+) long; rebase .* by (\S+)$", out, re.MULTILINE
    )
    assert len(notes) == 2
    for violation, length, change in notes:
        assert float(violation) < 1e-5
        assert float(length) > 0.05
        assert float(change) < 1e-5
    assert re.search(r"^base kept +4417 +0 ", adding, re.MULTILINE)


def test_rotations(tmp_path):
    picture = tmp_path / "rotations.png"
    out = python(ROOT / "examples" / "rotations.py", "--quick", "--out", picture)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    none, *_, learned = (
        float(number) for number in re.search(r"^4 bits +(.*)$", out, re.MULTILINE)[1].split()
    )
    assert learned < 0.99 * none
    assert float(re.search(r"rotations alone change embeddings by (\S+)", out)[1]) < 1e-5
    assert "12288 trained numbers turn 3538944 weights" in out
    assert float(re.search(r"Encoder: differs by (\S+)", out)[1]) < 1e-5
    assert int(re.search(r"at most (\d+)$", out, re.MULTILINE)[1]) <= 15


def test_few_shot(tmp_path):
    picture = tmp_path / "few_shot.png"
    out = python(ROOT / "examples" / "few_shot_digits.py", "--quick", "--out", picture)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    found = re.findall(
        r"^(MAML|ANIL|Reptile) +(plain|weight norm|orthogonal) +([\d. ]+)$", out, re.MULTILINE
    )
    assert len(found) == 9
    times = {(method, rules): float(row.split()[-1]) for method, rules, row in found}
    for rules in ("plain", "weight norm", "orthogonal"):
        assert times["ANIL", rules] < times["MAML", rules]
    for method, _, row in found:
        _, none, *_, twenty, _ = map(float, row.split())
        assert abs(none - 0.2) < 0.1  # labels have no meaning before a task is seen
        assert method == "ANIL" or twenty > 0.35


def test_many_adapters(tmp_path):
    picture = tmp_path / "many_adapters.png"
    out = python(ROOT / "examples" / "many_adapters.py", "--quick", "--out", picture)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    sizes = {"shuffled": (2, 19202), "pairs exchanged": (4, 37634), "reversed": (8, 74498)}
    for task, size in sizes.items():
        row = re.search(rf"^{task} +(\d+) +(\d+) +\S+ +(\S+) +(\S+) +(\S+)$", out, re.MULTILINE)
        assert (int(row[1]), int(row[2])) == size
        assert abs(float(row[3]) - float(row[4])) < 0.1
        assert float(row[5]) < 1e-3  # together or by itself
    for change in re.findall(r"logits of the others change by (\S+)$", out, re.MULTILINE):
        assert float(change) < 1e-5


def test_stiefel(tmp_path):
    picture = tmp_path / "stiefel.png"
    out = python(ROOT / "examples" / "stiefel.py", "--quick", "--out", picture)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    row = re.compile(r"^([a-z]+) +(SGD|Adam|Muon) +(\S+) +(\S+) +(\S+) ", re.MULTILINE)
    subspace, components = (
        {(way, optimizer): [float(n) for n in numbers] for way, optimizer, *numbers in found}
        for found in map(row.findall, out.split("components of patches"))
    )
    own = [(way, by) for way in ("trivialized", "rebased", "projected") for by in ("SGD", "Adam")]
    assert {*own, ("projected", "Muon")} < subspace.keys()
    start = float(re.search(r"noise: cost (\S+) at the start", out)[1])
    for key, (cost, violation, explained) in subspace.items():
        assert cost < start - 0.5
        assert violation < 1e-5 or key[0] == "unconstrained"
        assert explained > 0.5
    assert components["unconstrained", "Adam"][1] > 0.5  # it shrinks to nothing
    for key in own:
        assert components[key][1] < 1e-5
        assert components[key][2] > 5  # sparser than at the start


def test_ngpt(tmp_path):
    picture = tmp_path / "ngpt.png"
    out = python(ROOT / "examples" / "ngpt.py", "--quick", "--out", picture)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    row = re.compile(r"^(plain|weight norm|nGPT) +\d+ +(\S+) +\S+ +(.+)$", re.MULTILINE)
    found = {
        label: (float(loss), [float(n) for n in re.findall(r"\d\S*", lengths)])
        for label, loss, lengths in row.findall(out)
    }
    assert found.keys() == {"plain", "weight norm", "nGPT"}
    assert all(loss < 3.2 for loss, _ in found.values())  # frequencies of letters: 3.24
    for label in ("plain", "weight norm"):
        assert found[label][1][-1] > 0.1
    assert found["nGPT"][1][:4] == [1, 1, 1, 1]
    assert found["nGPT"][1][4] < 1e-5


def rows(text, after, columns):
    """The rows of numbers below the head of a table."""
    lines = text[text.index(after) :].splitlines()[1:]
    table = itertools.takewhile(str.strip, lines)
    return [line.split() for line in table if len(line.split()) == columns]
