"""Files: ties and views, formats that others read, and no code run on load."""

import ast
import json
import os
import pickle
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import funcparam as fp
from funcparam import checkpoint
from funcparam.transforms import Mask, SpectralNorm, WeightNorm
from tests.effort import examples
from tests.networks import Tied, mixed
from tests.processes import python

FORMATS = pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])


@FORMATS
@pytest.mark.parametrize("style", ["funcparam", "torch", "plain"])
def test_what_is_saved_is_loaded(tmp_path, name, style):
    net, p = mixed()
    raw, state = p.init(net)
    written = checkpoint.write(p, raw, state, style=style)
    checkpoint.save(written, tmp_path / name)
    loaded = checkpoint.load(tmp_path / name)
    assert loaded.keys() == written.keys()
    assert all(torch.equal(loaded[key], written[key]) for key in written)
    assert all(loaded[key].dtype == written[key].dtype for key in written)


def test_others_read_the_files(tmp_path):
    net = nn.Linear(4, 3)
    with torch.no_grad():
        net.weight[0] = 0
    p = fp.parametrize(net, {"weight": Mask()})
    written = checkpoint.write(p, *p.init(net))
    checkpoint.save(written, tmp_path / "model.pt")
    checkpoint.save(written, str(tmp_path / "model.safetensors"))
    for loaded in (
        torch.load(tmp_path / "model.pt", weights_only=True),
        safetensors.torch.load_file(tmp_path / "model.safetensors"),
    ):
        assert loaded.keys() == written.keys()
        assert all(torch.equal(loaded[key], written[key]) for key in written)


def test_a_shell_and_a_folded_network_go_through_safetensors(tmp_path):
    net, p = mixed()
    shell = fp.Parametrized(net, p)
    checkpoint.save(shell.state_dict(), tmp_path / "shell.safetensors")
    other = fp.Parametrized(net, p)
    other.load_state_dict(checkpoint.load(tmp_path / "shell.safetensors"))
    x = torch.randn(2, 6).double()
    assert torch.equal(other.eval()(x), shell.eval()(x))
    checkpoint.save(shell.fold().state_dict(), tmp_path / "plain.safetensors")
    net.load_state_dict(checkpoint.load(tmp_path / "plain.safetensors"))
    assert torch.equal(net(x), shell(x))


@FORMATS
def test_ties_are_written_once(tmp_path, name):
    net = Tied(n=200)
    p = fp.parametrize(net, {"encoder.weight": WeightNorm()})
    checkpoint.save(fp.fold(net, p(*p.init(net))).state_dict(), tmp_path / name)
    assert os.path.getsize(tmp_path / name) < 1.5 * 4 * 200 * 200
    loaded = checkpoint.load(tmp_path / name)
    assert loaded["encoder.weight"].data_ptr() == loaded["decoder.weight"].data_ptr()
    net.load_state_dict(loaded)
    if name.endswith(".safetensors"):
        safetensors.torch.load_model(Tied(n=200), tmp_path / name)


@FORMATS
def test_of_a_view_only_its_own_entries_are_written(tmp_path, name):
    whole = torch.randn(1000, 1000)
    views = {"row": whole[0], "column": whole[:, 0], "turned": whole[:2].mT}
    checkpoint.save(views, tmp_path / name)
    assert os.path.getsize(tmp_path / name) < 40_000
    loaded = checkpoint.load(tmp_path / name)
    assert all(torch.equal(loaded[key], view) for key, view in views.items())


@FORMATS
@pytest.mark.parametrize(
    "views",
    [
        lambda z: {"a": z, "b": z.mH},
        lambda z: {"a": z, "b": z.conj()},
        lambda z: {"b": z.conj()},
        lambda z: {"a": z.imag, "b": z.conj().imag},
        lambda z: {"b": z.conj().imag},
        lambda z: {"a": z.real.clone(), "b": torch._neg_view(z.real.clone())},
        lambda z: {"a": z, "b": z.T.conj(), "c": z.mH, "d": z.conj().conj()},
    ],
)
def test_conjugated_and_negated_views(tmp_path, name, views):
    given = views(torch.randn(3, 3, dtype=torch.complex64))
    checkpoint.save(given, tmp_path / name)
    loaded = checkpoint.load(tmp_path / name)
    assert all(torch.equal(loaded[key], tensor) for key, tensor in given.items())
    assert not any(tensor.is_conj() or tensor.is_neg() for tensor in loaded.values())


NOTES = [
    {"weight": "bias", "best": "weight"},
    {"best": "weight", "epoch": "3"},
    {"funcparam": "a note"},
    {"format": "pt"},
]


@pytest.mark.parametrize("header", NOTES)
def test_notes_in_a_header_are_no_tensors(tmp_path, header):
    stored = {"weight": torch.ones(2), "bias": torch.zeros(2)}
    safetensors.torch.save_file(stored, tmp_path / "a.safetensors", metadata=header)
    loaded = checkpoint.load(tmp_path / "a.safetensors")
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in stored.items())


def test_ties_that_safetensors_wrote(tmp_path):
    net = Tied()
    safetensors.torch.save_model(net, str(tmp_path / "a.safetensors"))
    loaded = checkpoint.load(tmp_path / "a.safetensors")
    assert loaded.keys() == net.state_dict().keys()
    assert loaded["encoder.weight"].data_ptr() == loaded["decoder.weight"].data_ptr()


def write_shards(folder, tensors, end):
    """What save_pretrained lays out."""
    weight_map = {k: f"model-{i % 3 + 1:05}-of-00003.{end}" for i, k in enumerate(tensors)}
    for file in set(weight_map.values()):
        part = {key: t for key, t in tensors.items() if weight_map[key] == file}
        checkpoint.save(part, folder / file)
    index = folder / f"model.{end}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("end", ["safetensors", "bin"])
def test_shards_with_an_index(tmp_path, end):
    net, _ = mixed()
    tensors = net.state_dict()
    index = write_shards(tmp_path, tensors, end)
    for path in (index, tmp_path):
        loaded = checkpoint.load(path)
        assert loaded.keys() == tensors.keys()
        assert all(torch.equal(loaded[key], tensor) for key, tensor in tensors.items())
    (tmp_path / f"model-00002-of-00003.{end}").unlink()
    with pytest.raises(FileNotFoundError):
        checkpoint.load(index)


def test_a_folder_with_one_file(tmp_path):
    checkpoint.save({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert checkpoint.load(tmp_path)["w"] == 1
    checkpoint.save({"w": torch.ones(1)}, tmp_path / "other.bin")
    with pytest.raises(ValueError, match=r"got \['model.safetensors', 'other.bin'\]"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": {}}',
        '{"weight_map": {"w": "../a.safetensors"}}',
        '{"weight_map": {"w": "/etc/passwd"}}',
        '{"weight_map": {"w": 3}}',
        "[" * 100_000,
    ],
)
def test_a_broken_index(tmp_path, text):
    checkpoint.save({"w": torch.ones(1)}, tmp_path.parent / "a.safetensors")
    (tmp_path / "a.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"expected an index, JSON with a 'weight_map'"):
        checkpoint.load(tmp_path)


@FORMATS
def test_empty_scalar_and_bool_tensors(tmp_path, name):
    odd = {"none": torch.empty(0, 3), "one": torch.tensor(2.0), "mask": torch.tensor([True])}
    odd["also none"] = torch.empty(0, 3)
    checkpoint.save(odd, tmp_path / name)
    loaded = checkpoint.load(tmp_path / name)
    assert all(torch.equal(loaded[key], tensor) for key, tensor in odd.items())


@FORMATS
def test_raw_and_state_are_saved_as_they_are(tmp_path, name):
    net, p = mixed()
    raw, state = p.init(net)
    checkpoint.save({"raw": raw, "state": state}, tmp_path / name)
    raw2, state2, _ = checkpoint.read(checkpoint.load(tmp_path / name), p)
    assert all(torch.equal(p(raw2, state2)[n], value) for n, value in p(raw, state).items())


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def _zip(item, path):
    torch.save({"w": item}, path)


def _plain_pickle(item, path):
    path.write_bytes(pickle.dumps(item))


def _before_zip(item, path):
    torch.save({"w": item}, path, _use_new_zipfile_serialization=False)


@FORMATS
@pytest.mark.parametrize("write", [_zip, _plain_pickle, _before_zip])
def test_loading_runs_no_code(tmp_path, name, write):
    path = tmp_path / name
    write(Bomb(str(tmp_path / "boom")), path)
    with pytest.raises((pickle.UnpicklingError, ValueError)):
        checkpoint.load(path)
    assert not (tmp_path / "boom").exists()
    with open(path, "rb") as file:  # the file is dangerous indeed
        if write is _plain_pickle:
            pickle.load(file).close()
        else:
            torch.load(file, weights_only=False)["w"].close()
    assert (tmp_path / "boom").exists()


def test_no_other_code_reads_files():
    for path in Path(fp.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".load", ".loads")):
                if ast.unparse(node.func) == "json.loads":  # text, which runs nothing
                    continue
                assert ast.unparse(node.func) == "torch.load", path
                assert "weights_only=True" in map(ast.unparse, node.keywords), path
            if isinstance(node, ast.Attribute | ast.Name):
                assert "Unpickler" not in ast.unparse(node), path


@FORMATS
@examples(150)
@given(st.binary(max_size=40), st.floats(0, 1), st.booleans(), st.integers(0, 40))
def test_broken_files_are_refused(name, noise, where, cut, more):
    good = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        checkpoint.save(good, path)
        whole = path.read_bytes()
        start = int(where * len(whole))
        rest = b"" if cut else whole[start + more :]
        path.write_bytes(whole[:start] + noise + rest)
        try:
            loaded = checkpoint.load(path)
        except (pickle.UnpicklingError, ValueError) as error:
            told = str(error)
            assert told
        else:
            assert isinstance(loaded, dict)


@FORMATS
def test_a_file_that_is_not_there(tmp_path, name):
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / name)


def test_extra_state_has_no_place_in_safetensors(tmp_path):
    given = {"w": torch.ones(1), "part._extra_state": 3}
    checkpoint.save(given, tmp_path / "model.pt")
    assert checkpoint.load(tmp_path / "model.pt")["part._extra_state"] == 3
    with pytest.raises(TypeError, match="'part._extra_state': safetensors hold tensors only; got"):
        checkpoint.save(given, tmp_path / "model.safetensors")


def test_without_safetensors_only_its_own_files_fail(tmp_path):
    code = (
        "import sys; sys.modules['safetensors'] = None\n"
        "import torch, funcparam as fp\n"
        "fp.checkpoint.save({'w': torch.ones(1)}, 'a.pt')\n"
        "assert fp.checkpoint.load('a.pt')['w'] == 1\n"
        "try:\n"
        "    fp.checkpoint.save({'w': torch.ones(1)}, 'a.safetensors')\n"
        "except ImportError as error:\n"
        "    assert 'pip install safetensors' in str(error)\n"
        "else:\n"
        "    raise SystemExit('no error')\n"
    )
    python("-c", code, cwd=tmp_path)


def test_a_model_saved_whole_loads_in_a_process_that_never_saw_it(tmp_path):
    net = nn.Linear(4, 3)
    shell = fp.Parametrized(net, fp.parametrize(net, {"weight": SpectralNorm()}))
    torch.save(shell, tmp_path / "shell.pt")
    torch.save(shell.fold(), tmp_path / "plain.pt")
    code = (
        "import sys, torch\n"
        "plain = torch.load('plain.pt', weights_only=False)\n"
        "assert 'funcparam' not in sys.modules\n"
        "shell = torch.load('shell.pt', weights_only=False)\n"
        "x = torch.ones(2, 4)\n"
        "assert torch.equal(plain(x), shell.eval()(x))\n"
    )
    python("-c", code, cwd=tmp_path)
