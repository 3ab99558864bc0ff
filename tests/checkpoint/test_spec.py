"""Files that say what they are, and what becomes of them where something else is wanted."""

import json
from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import funcparam as fp
from funcparam import checkpoint
from funcparam.transforms import (
    Chain,
    Frozen,
    Interval,
    LoRA,
    Mask,
    Orthogonal,
    Positive,
    SpectralNorm,
    Symmetric,
    Transform,
    WeightNorm,
)
from tests.cases import every_case, raw_and_state
from tests.networks import Tied, mixed
from tests.processes import python


@dataclass(frozen=True)
class Doubled(Transform[torch.Tensor]):
    by: float = 2.0

    def forward(self, raw, state):
        return self.by * raw

    def right_inverse(self, value, *, generator=None):
        return value / self.by, {}

    def violation(self, value, state):
        return value.new_zeros(())


def halve(x):
    return x / 2


def double(x):
    return 2 * x


def saved(p, net, style="funcparam"):
    return checkpoint.write(p, *p.init(net), net, style=style)


def through_files(written, tmp_path):
    """The file itself, and what two formats give back."""
    checkpoint.save(written, tmp_path / "a.pt")
    checkpoint.save(written, tmp_path / "a.safetensors")
    torch.save(written, tmp_path / "b.pt")
    yield written
    yield checkpoint.load(tmp_path / "a.pt")
    yield checkpoint.load(tmp_path / "a.safetensors")
    yield torch.load(tmp_path / "b.pt", weights_only=True)


@every_case
def test_every_transform_is_made_again_from_the_file_alone(case, shape):
    raw, state = raw_and_state(case, shape)
    value = case.transform.forward(raw, state)
    p = fp.parametrize({"a.w": value}, {"a.w": case.transform})
    written = checkpoint.write(p, {"a.w": raw}, {"a.w": state} if state else {})
    known = {f"{f.__module__}:{f.__qualname__}": f for f in _functions(case.transform)}
    found = checkpoint.read(written, known=known)
    assert found.p == p
    assert torch.equal(found.p(found.raw, found.state)["a.w"], value)
    assert checkpoint.parametrization(written, known=known) == p


def _functions(transform):
    return [f for f in vars(transform).values() if callable(f) and hasattr(f, "__qualname__")]


@pytest.mark.parametrize("style", ["funcparam", "torch"])
def test_a_network_is_read_without_rules(tmp_path, style):
    net, p = mixed()
    raw, state = p.init(net)
    for file in through_files(checkpoint.write(p, raw, state, net, style=style), tmp_path):
        found = checkpoint.read(file)
        assert found.p == p
        for name, value in p(raw, state).items():
            assert torch.equal(found.p(found.raw, found.state)[name], value), name


def test_no_key_is_added_and_no_code_is_needed(tmp_path):
    net = nn.Linear(3, 3)
    p = fp.parametrize(net, {"weight": Orthogonal()})
    written = saved(p, net, "torch")
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(3, 3))
    assert written.keys() == layer.state_dict().keys()
    layer.load_state_dict(written)  # torch's own module minds neither
    torch.save(written, tmp_path / "a.pt")
    code = (
        "import sys, torch\n"
        "found = torch.load('a.pt', weights_only=True)\n"
        "assert 'Orthogonal' in found._metadata['']['funcparam']\n"
        "assert 'funcparam' not in sys.modules\n"
    )
    python("-c", code, cwd=tmp_path)
    assert not hasattr(saved(p, net, "plain"), "_metadata")


PAIRS = [
    (Orthogonal(), Orthogonal("cayley")),
    (Orthogonal("cayley"), Orthogonal()),
    (Orthogonal("householder"), Orthogonal()),
    (Symmetric(), Positive()),
    (Interval(0.0, 2.0), Interval(-1.0, 2.0)),
    (WeightNorm(), LoRA(1)),
    (LoRA(1), None),
    (None, WeightNorm()),
    (Frozen(), Mask()),
    (SpectralNorm(), SpectralNorm(1)),
    (Chain(Symmetric(), Positive()), Positive("exp")),
]


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=str)
@pytest.mark.parametrize("style", ["funcparam", "torch"])
def test_another_map_than_the_files_is_converted_by_value(first, second, style, tmp_path):
    value = torch.linalg.qr(torch.randn(4, 4)).Q
    if any(isinstance(t, Positive | Interval | Chain) for t in (first, second)):
        value = torch.rand(4, 4) + 0.2
        value = (value + value.mT) / 2
    p = fp.parametrize({"w": value}, {"w": first} if first else {})
    q = fp.parametrize({"w": value}, {"w": second} if second else {})
    raw, state = p.init({"w": value})
    nudge = [raw["w"]] if isinstance(raw["w"], torch.Tensor) else raw["w"].values()
    for tensor in nudge:
        tensor += 0.01  # not where the right inverse put it
    if second == SpectralNorm(1) or isinstance(first, Symmetric):
        raw, state = p.init({"w": value})
    expected = p(raw, state)["w"]
    for file in through_files(checkpoint.write(p, raw, state, style=style), tmp_path):
        raw2, state2, _ = checkpoint.read(file, q)
        torch.testing.assert_close(q(raw2, state2)["w"], expected, atol=1e-4, rtol=1e-4)


def test_the_value_that_the_map_cannot_have_is_refused_or_said():
    p = fp.parametrize({"w": torch.eye(3)}, {"w": Symmetric()})
    written = checkpoint.write(p, *p.init({"w": -torch.eye(3)}))
    q = fp.parametrize({"w": torch.eye(3)}, {"w": Positive()})
    with pytest.raises(ValueError, match="'w' is stored as its value, but Positive"):
        checkpoint.read(written, q)
    r = fp.parametrize({"w": torch.eye(3)}, {"w": Orthogonal()})
    written = checkpoint.write(p, *p.init({"w": 3 * torch.eye(3)}))
    with pytest.warns(UserWarning, match="'w' by up to 2, to Orthogonal"):
        checkpoint.read(written, r)


def test_classes_of_the_users_are_given_and_never_imported(tmp_path):
    p = fp.parametrize({"w": torch.ones(2)}, {"w": Doubled(3.0)})
    written = checkpoint.write(p, *p.init({"w": torch.ones(2)}))
    name = f"{__name__}:Doubled"
    for file in through_files(written, tmp_path):
        raw, _, _ = checkpoint.read(file, p)  # by itself it needs nothing
        assert torch.equal(raw["w"], torch.ones(2) / 3.0)
        with pytest.raises(ValueError, match=rf"'w': the file names '{name}', which is not"):
            checkpoint.read(file)
        found = checkpoint.read(file, known={name: Doubled})
        assert found.p == p
        q = fp.parametrize({"w": torch.ones(2)}, {"w": Positive()})
        with pytest.raises(ValueError, match=rf"'w': the file names '{name}', which is not"):
            checkpoint.read(file, q)
        raw, state, _ = checkpoint.read(file, q, known={name: Doubled})
        torch.testing.assert_close(q(raw, state)["w"], torch.ones(2))


def test_functions_are_named():
    p = fp.parametrize({"w": torch.ones(2)}, {"w": fp.transform(double, halve)})
    written = checkpoint.write(p, *p.init({"w": torch.ones(2)}))
    known = {f"{__name__}:{f.__name__}": f for f in (double, halve)}
    assert checkpoint.parametrization(written, known=known) == p
    with pytest.raises(ValueError, match="the file names '.*:double', which is not funcparam's"):
        checkpoint.read(written)


def test_arguments_that_are_newer_than_the_file_have_their_defaults():
    value = torch.randn(4, 3)
    p = fp.parametrize({"w": value}, {"w": SpectralNorm()})
    raw, state = p.init({"w": value})
    written = checkpoint.write(p, raw, state)
    text = written._metadata[""]["funcparam"]
    assert '"eps": 1e-12' in text
    written._metadata[""]["funcparam"] = text.replace(', "eps": 1e-12', "")
    found = checkpoint.read(written, p)
    assert torch.equal(found.raw["w"], raw["w"])
    assert checkpoint.parametrization(written) == p


def test_nothing_is_imported_from_a_file(tmp_path):
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')")
    found = OrderedDict({"w": torch.ones(2)})
    for name in ("trap:Squared", "os:system", "Transform", "full_precision", "AnyTransform", "x.y"):
        leaf = {"names": ["w"], "shape": [2], "dtype": "float32", "transform": {"class": name}}
        text = json.dumps({"version": 1, "leaves": [leaf]})
        found._metadata = {"": {"funcparam": text}}
        with pytest.raises(ValueError, match="'w': "):
            checkpoint.read(found)


def test_ties_and_infinite_numbers():
    net = Tied()
    p = fp.parametrize(net, {"encoder.weight": Doubled(float("inf"))})
    written = saved(p, net)
    assert "Infinity" not in written._metadata[""]["funcparam"]
    found = checkpoint.parametrization(written, known={f"{__name__}:Doubled": Doubled})
    assert found == p
    assert found.entries[0].names == ("encoder.weight", "decoder.weight")


def test_modules_say_it_wherever_they_are(tmp_path):
    net = nn.Linear(3, 3)
    p = fp.parametrize(net, {"weight": Orthogonal()})
    written = saved(p, net)
    outer = OrderedDict({f"module.{key}": tensor for key, tensor in written.items()})
    outer._metadata = {"module": written._metadata[""], "": {"version": 1}}
    nested = {"epoch": 3, "state_dict": outer}
    torch.save(nested, tmp_path / "nested.pt")
    for file in (outer, nested, torch.load(tmp_path / "nested.pt", weights_only=True)):
        assert checkpoint.parametrization(file) == p
        q = fp.parametrize(net, {"weight": Orthogonal("cayley")})
        raw, state, _ = checkpoint.read(file, q)
        expected = p(*p.init(net))["weight"]
        torch.testing.assert_close(q(raw, state)["weight"], expected)
    checkpoint.save(outer, tmp_path / "outer.safetensors")
    assert checkpoint.parametrization(checkpoint.load(tmp_path / "outer.safetensors")) == p


def test_explain_shows_what_the_file_says():
    net = nn.Linear(3, 2)
    p = fp.parametrize(net, {"weight": WeightNorm()})
    assert [line.rstrip() for line in str(checkpoint.explain(saved(p, net))).splitlines()] == [
        "name    stored as  transform          parts                         shapes",
        "------  ---------  -----------------  ----------------------------  --------------",
        "weight  funcparam  WeightNorm(dim=0)  raw.magnitude, raw.direction  (2, 1), (2, 3)",
        "bias    funcparam                     net                           (2,)",
    ]


def test_a_dictionary_says_nothing_and_loads_as_before():
    net = nn.Linear(3, 3)
    p = fp.parametrize(net, {"weight": Orthogonal("cayley")})
    silent = dict(saved(p, net))
    with pytest.raises(ValueError, match="the file does not say which transforms it was written"):
        checkpoint.read(silent)
    raw, state, _ = checkpoint.read(silent, p)
    assert p.violation(p(raw, state))["weight"] < 1e-5


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["Orthogonal", "WeightNorm", "Chain", "transform", "float32", "w"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["class", "object", "number", "parts", "dim", "map", "names", "shape"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(JSON, JSON, JSON, st.sampled_from(["leaf", "transform", "all", "text"]))
def test_any_text_is_an_error_or_a_parametrization(a, b, c, where):
    leaf = {"names": ["w"], "shape": [2, 2], "dtype": "float32", "transform": None}
    told = {"version": 1, "leaves": [leaf]}
    if where == "leaf":
        told["leaves"] = [leaf | {"names": a, "shape": b, "dtype": c}]
    elif where == "transform":
        told["leaves"] = [leaf | {"transform": {"class": a, "dim": b, "parts": c}}]
    elif where == "all":
        told = {"version": a, "leaves": b}
    found = OrderedDict({"w": torch.eye(2)})
    text = str(a) if where == "text" else json.dumps(told)
    found._metadata = {"": {"funcparam": text}}
    try:
        p = checkpoint.parametrization(found)
    except ValueError:
        return
    assert isinstance(p, fp.Parametrization)


def test_a_transform_nested_without_end():
    deep = '{"class": "Chain", "parts": [' * 5000 + "]}" * 5000
    leaf = '{"names": ["w"], "shape": [2], "dtype": "float32", "transform": ' + deep + "}"
    found = OrderedDict({"w": torch.ones(2)})
    found._metadata = {"": {"funcparam": f'{{"version": 1, "leaves": [{leaf}]}}'}}
    with pytest.raises(ValueError, match=r"\w"):
        checkpoint.read(found)
