"""The command line, as a script uses it: output, files, exit status, one line for an error."""

import os
import sys
import warnings

import pytest
import torch
from torch import nn

import funcparam as fp
from funcparam import checkpoint
from funcparam.checkpoint._command import main
from funcparam.checkpoint._silent import transform_of
from funcparam.transforms import Chain, Orthogonal, Positive, SpectralNorm, Symmetric, WeightNorm
from tests.checkpoint.test_files import Bomb, write_shards
from tests.processes import python

ENDS = pytest.mark.parametrize("end", ["pt", "safetensors"])


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def network():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    net[1].running_mean.fill_(3.0)
    return net, fp.parametrize(net, {"0.weight": Orthogonal(), "2.weight": WeightNorm()})


def saved(path):
    net, p = network()
    raw, state = p.init(net)
    checkpoint.save(checkpoint.write(p, raw, state, net), path)
    return fp.fold(net, p(raw, state))


def one_line(capsys, text):
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("funcparam: error: ")
    assert text in error


@ENDS
def test_fold_from_the_file_alone(here, end, capsys):
    plain = saved(f"model.{end}")
    assert main(["fold", f"model.{end}", f"plain.{end}"]) == 0
    assert capsys.readouterr() == ("", "")
    net, _ = network()
    net.load_state_dict(checkpoint.load(f"plain.{end}"))
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], tensor)
    assert sorted(os.listdir()) == [f"model.{end}", f"plain.{end}"]


@pytest.mark.parametrize("style", ["torch", "funcparam", "plain"])
@ENDS
def test_convert_and_diff(here, end, style, capsys):
    saved(f"model.{end}")
    other = "pt" if end == "safetensors" else "safetensors"
    assert main(["convert", f"model.{end}", f"new.{other}", "--to", style]) == 0
    assert main(["diff", f"model.{end}", f"new.{other}"]) == 0
    assert main(["convert", f"new.{other}", f"new.{other}", "--to", "plain"]) == 0
    assert main(["diff", f"model.{end}", f"new.{other}"]) == 0
    assert capsys.readouterr() == ("", "")


def test_torchs_modules_load_what_is_converted(here):
    plain = saved("model.pt")
    main(["convert", "model.pt", "torch.pt", "--to", "torch"])
    net, _ = network()
    nn.utils.parametrizations.orthogonal(net[0])
    nn.utils.parametrizations.weight_norm(net[2])
    net.load_state_dict(torch.load("torch.pt", weights_only=True))
    torch.testing.assert_close(net[0].weight.detach(), plain[0].weight.detach())


def test_explain(here, capsys):
    saved("model.safetensors")
    assert main(["explain", "model.safetensors"]) == 0
    out = capsys.readouterr().out
    assert "WeightNorm(dim=0)" in out
    assert "raw.direction, raw.magnitude  (3, 4), (3, 1)" in out  # safetensors sort by name


def test_diff_says_what_differs(here, capsys):
    saved("a.pt")
    plain = saved("b.pt").state_dict()
    plain["more"] = plain.pop("2.bias")
    plain["0.bias"] = plain["0.bias"] + 0.5
    plain["1.weight"] = torch.ones(5)
    checkpoint.save(plain, "c.pt")
    assert main(["diff", "b.pt", "c.pt"]) == 1
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[2:]] == [
        "0.bias",
        "1.weight",
        "2.bias",
        "more",
    ]
    checkpoint.save({"w": torch.tensor([1.0, float("nan")])}, "x.pt")
    checkpoint.save({"w": torch.tensor([1.125, float("nan")])}, "y.pt")
    assert main(["diff", "x.pt", "y.pt"]) == 1
    assert "by up to 1.25e-01" in capsys.readouterr().out
    assert main(["diff", "x.pt", "y.pt", "--tolerance", "0.2"]) == 0
    checkpoint.save({"w": torch.tensor([1.0, 1.0])}, "z.pt")
    assert main(["diff", "x.pt", "z.pt", "--tolerance", "9"]) == 1
    checkpoint.save({"w": torch.empty(2, device="meta")}, "meta.pt")
    for files in (["x.pt", "meta.pt"], ["meta.pt", "x.pt"]):
        assert main(["diff", *files]) == 1
        assert "on the meta device, without entries" in capsys.readouterr().out


@pytest.mark.parametrize("end", ["safetensors", "bin"])
def test_folders_with_an_index(here, end):
    net, p = network()
    plain = fp.fold(net, p(*p.init(net))).state_dict()
    (here / "hub").mkdir()
    write_shards(here / "hub", checkpoint.write(p, *p.init(net), net, style="torch"), end)
    rule = ["--rule", "0.*", "Orthogonal()", "--rule", "2.w*", "WeightNorm()"]
    assert main(["fold", "hub", "plain.pt", *rule]) == 0
    loaded = checkpoint.load("plain.pt")
    for name, tensor in plain.items():
        torch.testing.assert_close(loaded[name], tensor)


def test_files_that_do_not_say_it(here, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old = nn.utils.weight_norm(nn.Linear(3, 2))
    torch.save(
        {"state_dict": {f"module.{k}": t for k, t in old.state_dict().items()}, "epoch": 3}, "a.pt"
    )
    assert main(["fold", "a.pt", "plain.pt"]) == 0  # the keys say enough
    torch.testing.assert_close(checkpoint.load("plain.pt")["weight"], old.weight.detach())
    assert main(["convert", "a.pt", "a.safetensors", "--to", "torch"]) == 0
    assert main(["fold", "a.safetensors", "again.pt"]) == 0  # and now it says it
    assert main(["diff", "again.pt", "a.pt"]) == 0

    new = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    torch.save(new.state_dict(), "b.pt")
    assert main(["fold", "b.pt", "c.pt"]) == 2
    one_line(capsys, "'b.pt': 'weight' is stored as ['parametrizations.weight.original0',")
    assert main(["fold", "b.pt", "c.pt", "--rule", "weight", "LoRA(2)"]) == 2
    one_line(capsys, "'weight': LoRA(rank=2")
    assert not os.path.exists("c.pt")
    assert main(["fold", "a.pt", "c.pt", "--rule", "bias", "WeightNorm()"]) == 2
    one_line(capsys, "rule 'bias' matches no tensor that is stored in parts")
    assert main(["fold", "b.pt", "c.pt", "--rule", "w*", "WeightNorm(dim=0)"]) == 0
    torch.testing.assert_close(checkpoint.load("c.pt")["weight"], new.weight.detach())


def test_rules_that_nothing_would_look_at_are_an_error(here, capsys):
    saved("model.pt")
    rule = ["--rule", "0.weight", "WeightNorm()"]
    assert main(["fold", "model.pt", "plain.pt", *rule]) == 2
    one_line(capsys, "'model.pt' says its transforms itself: leave --rule out")
    assert main(["diff", "model.pt", "model.pt", *rule]) == 2
    assert sorted(os.listdir()) == ["model.pt"]


def test_own_keys_that_do_not_say_it(here):
    plain = saved("model.pt")
    torch.save(dict(checkpoint.load("model.pt")), "silent.pt")  # as gathered from shards, too
    rules = ["--rule", "0.weight", "Orthogonal()", "--rule", "2.*", "WeightNorm()"]
    assert main(["fold", "silent.pt", "plain.pt", *rules]) == 0
    for name, tensor in checkpoint.load("plain.pt").items():
        torch.testing.assert_close(tensor, plain.state_dict()[name])
    assert main(["diff", "model.pt", "silent.pt", *rules]) == 0  # for the one that needs them


@pytest.mark.parametrize("size", ["200", "0.1KB", "1GB"])
def test_large_files_in_shards(here, size, capsys):
    saved("model.pt")
    assert main(["convert", "model.pt", "out", "--to", "funcparam", "--shards", size]) == 0
    files = sorted(os.listdir("out"))
    assert files[-1] == "model.safetensors.index.json"
    assert (len(files) > 2) == (size != "1GB")
    assert main(["diff", "model.pt", "out"]) == 0
    assert capsys.readouterr() == ("", "")
    assert checkpoint.parametrization(checkpoint.load("out")) == network()[1]
    assert main(["fold", "out", "plain", "--shards", size]) == 0
    assert main(["diff", "plain", "out"]) == 0
    assert main(["fold", "out", "plain", "--shards", size]) == 2
    one_line(capsys, "'plain': expected a folder to make; it is there already")
    assert sorted(os.listdir()) == ["model.pt", "out", "plain"]


def test_a_size_of_shards_is_a_size(here, capsys):
    for size in ("0", "-1", "many", "nan", "1XB"):
        with pytest.raises(SystemExit) as left:
            main(["fold", "model.pt", "out", f"--shards={size}"])
        assert left.value.code == 2
        assert f"expected a size, as '500MB' or '4GB'; got {size!r}" in capsys.readouterr().err


def test_the_entry_of_a_training_checkpoint(here, capsys):
    torch.save({"critic": {"weight": torch.ones(1)}, "epoch": 3}, "a.pt")
    assert main(["fold", "a.pt", "b.pt"]) == 2
    one_line(capsys, "'epoch': expected a tensor; got int")
    assert main(["fold", "a.pt", "b.pt", "--entry", "critic"]) == 0
    assert checkpoint.load("b.pt") == {"weight": torch.ones(1)}
    assert main(["explain", "a.pt", "--entry", "actor"]) == 2
    one_line(capsys, "'a.pt': no entry 'actor'; got ['critic', 'epoch']")


def test_diff_takes_the_entry_of_the_file_that_has_it(here, capsys):
    torch.save({"generator": {"weight": torch.ones(1)}, "epoch": 3}, "g.pt")
    torch.save({"generator": {"weight": torch.zeros(1)}}, "h.pt")
    torch.save({"weight": torch.ones(1)}, "plain.pt")
    for files in (["plain.pt", "g.pt"], ["g.pt", "plain.pt"], ["g.pt", "g.pt"]):
        assert main(["diff", *files, "--entry", "generator"]) == 0
    assert main(["diff", "g.pt", "h.pt", "--entry", "generator"]) == 1
    assert main(["diff", "plain.pt", "g.pt", "--entry", "critic"]) == 2
    one_line(capsys, "'plain.pt': no entry 'critic'; got ['weight']")


@pytest.mark.parametrize("style", ["legacy", "torch", "funcparam"])
def test_plain_values_are_not_converted(here, style, capsys):
    checkpoint.save({"weight": torch.ones(2, 2)}, "plain.safetensors")
    assert main(["convert", "plain.safetensors", "x.pt", "--to", style]) == 2
    one_line(capsys, "'plain.safetensors' holds plain values alone")
    assert not (here / "x.pt").exists()
    assert main(["convert", "plain.safetensors", "x.pt", "--to", "plain"]) == 0


def test_a_tensor_is_no_checkpoint(here, capsys):
    torch.save(torch.ones(2), "a.pt")
    for more in ((), ("--entry", "w")):
        assert main(["fold", "a.pt", "b.pt", *more]) == 2
        one_line(capsys, "expected a dict of tensors, by key; got torch.Tensor")


def test_errors_are_one_line_and_write_nothing(here, capsys):
    saved("model.pt")
    cases = {
        ("explain", "missing.pt"): "missing.pt",
        ("convert", "model.pt", "new.pt", "--to", "legacy"): "has no legacy spelling",
        ("fold", "model.pt", "nowhere/new.pt"): "'nowhere': no such folder",
        ("fold", "model.pt", "."): "'.': expected a file to write; got a folder",
        ("fold", "broken.pt", "new.pt"): "'broken.pt': expected a file that checkpoint.save",
        ("fold", "bomb.pt", "new.pt"): "'bomb.pt': expected tensors and plain containers alone",
        ("explain", "cut.pt"): "'cut.pt': expected",
        ("explain", "short.pt"): "'short.pt': expected",
        ("explain", "model.pt", "--entry", "net.0.bias"): "'model.pt': expected a dict of tensors",
        ("fold", "model.pt", "new.pt", "--rule", "w", "print()"): "'print' is no transform",
        ("explain", "."): "expected one checkpoint",
    }
    (here / "broken.pt").write_bytes((here / "model.pt").read_bytes()[:500])
    (here / "cut.pt").write_bytes((here / "model.pt").read_bytes()[:-1])
    (here / "short.pt").write_bytes(b"P")
    torch.save({"w": Bomb(str(here / "boom"))}, "bomb.pt")
    before = sorted(os.listdir())
    for arguments, text in cases.items():
        assert main(arguments) == 2
        one_line(capsys, text)
    assert sorted(os.listdir()) == before
    with pytest.raises(SystemExit) as left:
        main(["convert", "model.pt", "new.pt", "--to", "else"])
    assert left.value.code == 2


def test_it_runs_as_a_program(here):
    saved("model.pt")
    assert "Orthogonal" in python("-m", "funcparam", "explain", "model.pt", cwd=here)


def test_who_reads_may_have_seen_enough(here):
    saved("model.pt")
    code = (
        "import os, sys\n"
        "from funcparam.checkpoint._command import main\n"
        "reader, writer = os.pipe()\n"
        "os.close(reader)\n"
        "os.dup2(writer, 1)\n"
        "assert main(['explain', 'model.pt']) == 0\n"
        "print('more', flush=True)  # goes nowhere, as at exit\n"
    )
    python("-c", code, cwd=here)


def test_progress_on_a_screen(here, monkeypatch, capsys):
    saved("model.safetensors")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["fold", "model.safetensors", "plain.pt"]) == 0
    error = capsys.readouterr().err
    assert "reading model.safetensors, tensor 3 of 1" in error
    assert error.endswith("\r")


@pytest.mark.parametrize(
    "transform",
    [
        Orthogonal("cayley", trivialize=False),
        WeightNorm(None),
        WeightNorm(-1),
        SpectralNorm(dim=1, eps=1e-6),
        Chain(Symmetric(), Positive()),
    ],
    ids=repr,
)
def test_transforms_are_read_from_text(transform):
    assert transform_of(repr(transform)) == transform


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3",
        "WeightNorm",
        "os.system('x')",
        "__import__('os')",
        "Chain(print('x'))",
        "Transform()",
        "WeightNorm(dim=open('x'))",
        "WeightNorm(**{})",
        "WeightNorm(dimension=0)",
        "(" * 200,
        "transform()",
    ],
)
def test_other_text_is_no_transform(text):
    with pytest.raises(ValueError, match="expected the call of a transform"):
        transform_of(text)
