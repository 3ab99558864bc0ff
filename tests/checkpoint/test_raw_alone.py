"""Raw in a file that does not say its transforms: never taken for values."""

import pytest
import torch
from torch import nn

import funcparam as fp
from funcparam import checkpoint
from funcparam.checkpoint._command import main
from funcparam.transforms import (
    AOL,
    LoRA,
    NMSparse,
    Positive,
    PositiveDefinite,
    SpectralNorm,
    UnitNorm,
    WeightNorm,
)

EACH = pytest.mark.parametrize(
    ("call", "transform"),
    [
        ("Positive()", Positive()),
        ("UnitNorm()", UnitNorm()),
        ("NMSparse(2, 4)", NMSparse(2, 4)),
        ("AOL()", AOL()),
        ("PositiveDefinite()", PositiveDefinite()),
        ("WeightNorm()", WeightNorm()),
        ("SpectralNorm()", SpectralNorm()),
        ("LoRA(2)", LoRA(2)),
    ],
    ids=lambda item: "" if isinstance(item, str) else type(item).__name__,
)

LAYOUTS = pytest.mark.parametrize(
    "lay_out",
    [
        lambda raw, state: {"raw": raw, "state": state},
        lambda raw, _: {"raw": raw},
        lambda raw, state: {"raw": raw, "state": state, "buffers": {}},
        lambda raw, state: {"raw": raw, "state": state, "step": torch.tensor(3)},
        lambda raw, state: {"model": {"raw": raw, "state": state}, "epoch": 3},
        lambda raw, state: {"state_dict": {"raw": raw, "state": state}},
    ],
    ids=["both", "raw", "buffers", "step", "model", "state_dict"],
)


def initialised(transform):
    torch.manual_seed(0)
    net = nn.Linear(4, 4)
    value = torch.rand(4, 4) + 0.1
    net.weight.data = value @ value.mT + torch.eye(4)
    p = fp.parametrize(net, {"weight": transform})
    raw, state = p.init(net)
    return net, p, raw, state


@LAYOUTS
@EACH
def test_the_command_line_does_not_fold_it(call, transform, lay_out, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, _, raw, state = initialised(transform)
    torch.save(lay_out(raw, state), "a.pt")
    for command in (["fold"], ["convert", "--to", "torch"]):
        assert main([command[0], "a.pt", "b.pt", *command[1:]]) == 2
        error = capsys.readouterr().err
        assert "does not say which transforms" in error
        assert "'Identity()'" in error
        assert not (tmp_path / "b.pt").exists()


@EACH
@pytest.mark.parametrize("more", [{}, {"step": torch.tensor(3)}], ids=["", "step"])
def test_the_command_line_folds_it_by_rules(call, transform, more, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, p, raw, state = initialised(transform)
    torch.save({"raw": raw, "state": state, **more}, "a.pt")
    rules = ["--rule", "weight", call, "--rule", "*", "Identity()"]
    assert main(["fold", "a.pt", "b.pt", *rules]) == 0
    torch.testing.assert_close(dict(checkpoint.load("b.pt")), p(raw, state))


@LAYOUTS
@EACH
def test_no_rules_do_not_read_it(call, transform, lay_out):
    net, _, raw, state = initialised(transform)
    inner = lay_out(raw, state)
    with pytest.raises(ValueError, match="is stored as .*raw.*Give it the transform"):
        checkpoint.read(inner, fp.parametrize(net, []))


def test_its_own_rules_read_it():
    _, p, raw, state = initialised(Positive())
    found = checkpoint.read({"raw": raw, "state": state}, p)
    assert torch.equal(found.raw["bias"], raw["bias"])
    assert torch.equal(found.raw["weight"], raw["weight"])


def test_a_plain_file_folds_to_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = {"raw.weight": torch.ones(2, 2), "head.weight": torch.ones(3)}  # a layer called raw
    torch.save(file, "a.pt")
    assert main(["fold", "a.pt", "b.pt"]) == 0
    torch.testing.assert_close(dict(checkpoint.load("b.pt")), file)
