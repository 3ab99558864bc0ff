"""What is said about checkpoints: explanations and errors."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations as torch_parametrizations

import funcparam as fp
from funcparam import checkpoint
from funcparam.transforms import Mask, Orthogonal, Positive, SpectralNorm, WeightNorm
from tests.effort import examples
from tests.networks import Tied

ONE = torch.ones(2, 2)

SPECTRAL = {"weight_orig": ONE, "weight_u": torch.ones(2), "weight_v": torch.ones(2)}


def test_explain_shows_every_style():
    tensors = {
        "a.weight_g": torch.ones(2, 1),
        "a.weight_v": ONE,
        "a.bias": torch.ones(2),
        **{f"b.{key}": tensor for key, tensor in SPECTRAL.items()},
        "c.weight_orig": ONE,
        "c.weight_mask": ONE,
        "d.parametrizations.weight.original": ONE,
        "d.parametrizations.weight.0.base": ONE,
        "d._extra_state": 3,
    }
    assert [line.rstrip() for line in str(checkpoint.explain(tensors)).splitlines()] == [
        "name            stored as             parts             shapes",
        "--------------  --------------------  ----------------  ------------------",
        "a.weight        legacy weight_norm    _g, _v            (2, 1), (2, 2)",
        "a.bias          plain                                   (2,)",
        "b.weight        legacy spectral_norm  _orig, _u, _v     (2, 2), (2,), (2,)",
        "c.weight        legacy prune          _orig, _mask      (2, 2), (2, 2)",
        "d.weight        torch                 original, 0.base  (2, 2), (2, 2)",
        "d._extra_state  plain                                   extra state",
    ]


def test_explain_knows_funcparams_own():
    net = Tied()
    shell = fp.Parametrized(net, fp.parametrize(net, {"encoder.weight": WeightNorm()}))
    found = checkpoint.explain(shell.state_dict()).stored
    assert {item.style for item in found} == {"funcparam"}
    keys = {item.name: item.keys for item in found}
    parts = (f"raw.{part}" for part in ("magnitude", "direction"))
    assert keys["encoder.weight"] == tuple((p, p.replace(".", ".encoder.weight.")) for p in parts)
    assert keys["decoder.bias"] == (("net", "net.decoder.bias"),)


def test_explain_takes_the_outermost_parametrization():
    layer = torch_parametrizations.weight_norm(nn.Linear(2, 2))

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.by = torch_parametrizations.weight_norm(nn.Linear(2, 2))

        def forward(self, X):
            return self.by(X)

    nn.utils.parametrize.register_parametrization(layer, "weight", Scale())
    names = [item.name for item in checkpoint.explain(layer.state_dict()).stored]
    assert names == ["bias", "weight"]


P = fp.parametrize({"weight": ONE, "bias": torch.ones(2)}, {"weight": WeightNorm()})
BIAS = {"bias": torch.ones(2)}
ORIGINAL = "parametrizations.weight.original"

ERRORS = {
    "no dict": (3, r"expected a dict of tensors, by key; got int$"),
    "a module": (nn.Linear(2, 2), r"got torch.nn.*Linear. Pass its state_dict\(\)"),
    "a training checkpoint": (
        {"critic": {"weight": ONE, "bias": ONE[0]}, "epoch": 3},
        r"all names are there, but below 'critic.': pass that part, without",
    ),
    "more than tensors": (
        {"weight": ONE, "bias": ONE[0], "epoch": 3},
        r"'epoch': expected a tensor; got int. Of a training checkpoint, pass the entry that holds",
    ),
    "missing": ({"weight": ONE}, r"missing 'bias'; got the keys \['weight'\]"),
    "at two places": (
        {f"{place}.{name}": ONE for place in ("student", "teacher") for name in ("weight", "bias")},
        r"all names are there several times, below 'student.', 'teacher.': pass one of these",
    ),
    "missing, own": (
        {"raw.weight.magnitude": ONE[:, :1], "raw.bias": ONE[0]},
        r"'weight': missing 'raw.weight.direction', which WeightNorm\(dim=0\) needs",
    ),
    "devices": (
        {"weight_g": ONE[:, :1], "weight_v": ONE.to("meta"), **BIAS},
        r"'weight': expected its tensors on one device; got 'weight_g' on cpu, 'weight_v' on meta",
    ),
    "unknown, own": (
        {
            "raw.weight.magnitude": ONE[:, :1],
            "raw.weight.direction": ONE,
            "raw.bias": ONE[0],
            "raw.more": ONE,
        },
        r"unknown key 'raw.more': the parametrization was made without it",
    ),
    "half": (
        {"weight_g": ONE, **BIAS},
        r"'weight_g': part of 'weight', of which the other parts are missing",
    ),
    "twice": (
        {"weight": ONE, f"{ORIGINAL}0": ONE[:, :1], f"{ORIGINAL}1": ONE, **BIAS},
        r"'weight' is there twice, as \['weight', .*original1'\]: leave one of them out",
    ),
    "twice, own": (
        {
            "weight": ONE,
            "raw.weight.magnitude": ONE[:, :1],
            "raw.weight.direction": ONE,
            "raw.bias": ONE[0],
        },
        r"'weight' is there twice, as \['raw.weight.magnitude', .*'weight'\]: leave one",
    ),
    "shape": ({"weight": ONE[:1], **BIAS}, r"'weight': expected float32 \(2, 2\); got .*\(1, 2\)"),
    "shape of a part": (
        {f"{ORIGINAL}0": ONE, f"{ORIGINAL}1": ONE, **BIAS},
        rf"'{ORIGINAL}0': expected float32 \(2, 1\); got float32 \(2, 2\)",
    ),
    "not finite": ({"weight": ONE / 0, **BIAS}, r"'weight': expected finite values; got NaN or"),
    "a value outside": (
        {"weight": -ONE},
        r"'weight' is stored as its value, but Positive.* expects every entry to be positive",
        Positive(),
    ),
    "another transform": (
        {f"{ORIGINAL}": ONE, "parametrizations.weight.0.base": ONE, **BIAS},
        r"'weight' is stored as \['parametrizations.weight.original', 'parametrizations.weight.0"
        r".base'\], which does not say its value. WeightNorm\(dim=0\) expects"
        r" \['parametrizations.weight.original0', 'parametrizations.weight.original1'\]",
    ),
    "no transform": (
        {f"{ORIGINAL}0": ONE, f"{ORIGINAL}1": ONE},
        r"does not say its value. Give it the transform that it was saved with, and fold; it has"
        r" none",
        None,
    ),
    "rows or columns": (
        {**SPECTRAL},
        r"\['weight_orig', 'weight_u', 'weight_v'\], which does not say .* it has Orthogonal",
        Orthogonal(),
    ),
    "no mask": (
        {"weight_orig": ONE, "weight_mask": 2 * ONE},
        r"'weight': expected a mask of zeros and ones; got other numbers",
        Mask(),
    ),
}


@pytest.mark.parametrize("row", ERRORS.values(), ids=ERRORS)
def test_errors_of_read(row):
    given, text, *transforms = row
    p = P
    if transforms:
        rules = {"weight": transforms[0]} if transforms[0] else {}
        p = fp.parametrize({"weight": ONE}, rules)
    with pytest.raises((TypeError, ValueError), match=text):
        checkpoint.read(given, p)


def test_errors_of_write():
    p = fp.parametrize({"weight": ONE}, {"weight": Orthogonal()})
    raw, state = p.init({"weight": torch.eye(2)})
    with pytest.raises(ValueError, match="style: expected one of .*'legacy'.*; got 'plane'"):
        checkpoint.write(p, raw, state, style="plane")
    with pytest.raises(ValueError, match="'weight': Orthogonal.* has no legacy spelling. Write it"):
        checkpoint.write(p, raw, state, style="legacy")
    with pytest.raises(ValueError, match="state: missing 'weight' with 'base'"):
        checkpoint.write(p, raw, {})


def test_two_tensors_for_a_tie():
    net = Tied()
    p = fp.parametrize(net, {"encoder.weight": SpectralNorm()})
    given = net.state_dict()
    given["decoder.weight"] = given["decoder.weight"].double()
    with pytest.raises(ValueError, match="'encoder.weight' and 'decoder.weight' are tied in the"):
        checkpoint.read(given, p)


def test_copies_of_a_tie_are_equal_where_both_have_nan():
    net = Tied()
    p = fp.parametrize(net, {"encoder.bias": Positive()})
    with torch.no_grad():
        net.encoder.bias.abs_()
        net.encoder.weight[0] = float("nan")
    given = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    raw, _, _ = checkpoint.read(given, p)
    assert raw["encoder.weight"][0].isnan().all()


def test_the_shell_says_what_is_wrong_and_stays_as_it_is():
    net = nn.Linear(2, 2)
    shell = fp.Parametrized(net, fp.parametrize(net, {"weight": WeightNorm()}))
    before = copy.deepcopy(shell.state_dict())
    with pytest.raises(RuntimeError, match="'weight_g': part of 'weight', of which the other"):
        shell.load_state_dict({"weight_g": ONE, "bias": torch.ones(2)})
    assert all(torch.equal(before[key], tensor) for key, tensor in shell.state_dict().items())


def test_the_shell_is_as_strict_as_torch_with_its_own_keys():
    net = nn.Linear(2, 2)
    shell = fp.Parametrized(net, fp.parametrize(net, {"weight": WeightNorm()}))
    given = shell.state_dict()
    del given["net.bias"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "net.bias"'):
        shell.load_state_dict(given)
    assert shell.load_state_dict(given, strict=False).missing_keys == ["net.bias"]
    plain = {**net.state_dict(), "strange": ONE}
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\).*"strange"'):
        shell.load_state_dict(plain)


KEYS = [
    "weight",
    "bias",
    *(f"weight_{part}" for part in ("g", "v", "orig", "u", "mask")),
    *(f"bias_{part}" for part in ("orig", "mask", "u", "v")),
    *(f"parametrizations.weight.{p}" for p in ("original", "original0", "original1", "0._u")),
    *(f"parametrizations.weight.{p}" for p in ("0._v", "0.base", "0.mask", "0")),
    "parametrizations.bias.original",
    *(f"raw.{name}" for name in ("weight", "bias", "weight.magnitude", "weight.direction")),
    *(f"state.weight.{name}" for name in ("u", "v", "base", "mask")),
    "raw.bias.direction",
    "net_buffers.x",
    "x_extra_state",
]
VALUES = [
    ONE,
    torch.eye(2),
    torch.zeros(2, 2),
    torch.full((2, 2), torch.nan),
    torch.ones(2, 1),
    torch.ones(2),
    torch.ones(3, 2),
    torch.ones(()),
    torch.ones(2, 2, dtype=torch.float64),
    torch.ones(2, 2, dtype=torch.complex64),
    torch.ones(2, 2, dtype=torch.int64),
    torch.ones(2, 2, dtype=torch.bool),
    torch.empty(0, 2),
    torch.ones(2, 2, device="meta"),
    torch.eye(2).to_sparse(),
]
FUZZED = [None, WeightNorm(), WeightNorm(None), SpectralNorm(), Mask(), Orthogonal(), Positive()]
FUZZED += [Orthogonal("householder"), Orthogonal("householder", False)]


@examples(600, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    st.dictionaries(st.sampled_from(KEYS), st.sampled_from(range(len(VALUES))), max_size=7),
    st.sampled_from(FUZZED),
)
@pytest.mark.filterwarnings("ignore:values of the file do not satisfy")
def test_any_state_dict_is_an_error_or_a_right_result(choice, transform):
    given_ = {key: VALUES[i] for key, i in choice.items()}
    p = fp.parametrize(
        {"weight": ONE, "bias": torch.ones(2)}, {"weight": transform} if transform else {}
    )
    str(checkpoint.explain(given_))
    shell = fp.Parametrized(_Net(), p)
    before = copy.deepcopy(shell.state_dict())
    try:
        raw, state, others = checkpoint.read(given_, p)
    except (TypeError, ValueError):
        if shell.state_dict().keys().isdisjoint(given_):
            with pytest.raises(RuntimeError, match=r"\w"):
                shell.load_state_dict(given_)
            for key, tensor in shell.state_dict().items():
                assert torch.equal(tensor, before[key])
        return
    values = p(raw, state)
    assert values["weight"].shape == (2, 2)
    assert values["bias"].shape == (2,)
    for style in ("funcparam", "torch", "plain"):
        written = checkpoint.write(p, raw, state, others, style=style)
        assert isinstance(written, dict)


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))
        self.bias = nn.Parameter(torch.ones(2))
