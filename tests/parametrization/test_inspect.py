"""Tables and pictures of parametrizations."""

import builtins
import dataclasses
import html.parser
import io
import re
from math import inf

import matplotlib as mpl
import pytest
import rich.console
import scipy.linalg
import torch
from torch import nn

import funcparam as fp
from funcparam.parametrization.inspect import spelt
from funcparam.transforms import (
    Cat,
    Chain,
    DoRA,
    Frozen,
    Interval,
    LoRA,
    Mask,
    Orthogonal,
    Positive,
    SpectralNorm,
    Stack,
    Symmetric,
    WeightNorm,
)
from tests.cases import CASES
from tests.networks import mixed, mlp
from tests.processes import python

mpl.use("Agg")


class Own(fp.Transform[torch.Tensor]):
    """A transform that is no dataclass."""

    def __init__(self, shift):
        self.shift = shift

    def forward(self, raw, state):
        return raw + self.shift

    def right_inverse(self, value, *, generator=None):
        return value - self.shift, {}

    def violation(self, value, state):
        return value.sum() * 0


@dataclasses.dataclass(frozen=True)
class Named(Own):
    """A transform with a repr of its own."""

    shift: int = 3

    def __repr__(self):
        return f"+{self.shift}"


# Tables


@pytest.mark.parametrize(
    ("transform", "text"),
    [
        (Orthogonal(), "Orthogonal()"),
        (Orthogonal("qr"), "Orthogonal(map='qr')"),
        (Orthogonal(trivialize=False), "Orthogonal(trivialize=False)"),
        (Interval(0, 1), "Interval(low=0, high=1)"),
        (LoRA(rank=2), "LoRA(rank=2)"),
        (Chain(Symmetric(), Orthogonal()), "Chain(Symmetric(), Orthogonal())"),
        (Cat([Orthogonal(), Mask()]), "Cat(parts=(Orthogonal(), Mask()))"),
        (Cat([Mask()], lengths=[3]), "Cat(parts=(Mask(),), lengths=(3,))"),
        (Stack([Chain(WeightNorm(1))]), "Stack(parts=(Chain(WeightNorm(dim=1)),))"),
        (fp.transform(torch.exp), "transform(exp)"),
        (Named(), "+3"),
        (Named(4), "+4"),
    ],
    ids=str,
)
def test_tables_leave_defaults_out(transform, text):
    assert spelt(transform) == text


def test_what_is_spelt_makes_the_transform_again():
    names = {name: getattr(fp.transforms, name) for name in fp.transforms.__all__} | {"inf": inf}
    told = [case.transform for case in CASES if not spelt(case.transform).startswith("transform(")]
    assert len(told) > 40
    for transform in told:
        assert eval(spelt(transform), names) == transform


def test_a_transform_that_is_no_dataclass_is_its_repr():
    own = Own(3)
    assert spelt(own) == repr(own)


def test_summary_counts_and_measures():
    tree = {
        "w": torch.ones(3, 2),
        "f": torch.ones(5),
        "m": torch.tensor([1.0, 0.0]),
        "n": torch.tensor(1),
        "b": torch.ones(7),
    }
    p = fp.parametrize(tree, {"w": WeightNorm(), "f": Frozen(), "m": Mask()})
    raw, state = p.init(tree)
    assert p.summary(raw, state).head == (
        "name",
        "transform",
        "raw",
        "trained",
        "total",
        "violation",
    )
    assert p.summary(raw, state).rows == (
        ("w", "WeightNorm()", "magnitude: (3, 1), direction: (3, 2)", "9", "9", "0.0e+00"),
        ("f", "Frozen()", "nothing", "0", "5", "0.0e+00"),
        ("m", "Mask()", "(2,)", "2", "4", "0.0e+00"),
        ("everything else", "", "", "7", "8", ""),
        ("total", "", "", "18", "26", ""),
    )
    q = fp.parametrize({"b": tree["b"]}, {"b": Mask()})
    lines = str(q.summary(*q.init({"b": tree["b"]}))).splitlines()
    assert lines == [
        "name   transform  raw   trained  total  violation",
        "-----  ---------  ----  -------  -----  ---------",
        "b      Mask()     (7,)        7     14    0.0e+00",
        "total                         7     14",
    ]


def test_frozen_weights_share_a_row():
    tree = {f"{i}.{name}": torch.eye(2) for i in range(3) for name in ("q", "v")}
    tree["head"] = torch.ones(2, 3)
    rules = {"*.q": LoRA(1), "1.v": Frozen(), "2.v": Orthogonal("qr"), "*": Frozen()}
    p = fp.parametrize(tree, rules)
    raw, state = p.init(tree)
    assert [row[0] for row in repr_rows(p)] == ["0.q", "0.v and 2 more", "1.q", "2.q", "2.v"]
    assert repr_rows(p)[1][1:] == ["Frozen()", "…", "nothing", "…"]
    counts = ("nothing", "0", "14", "0.0e+00")
    assert p.summary(raw, state).rows[1] == ("0.v and 2 more", "Frozen()", *counts)
    one_shape = fp.parametrize({"a": torch.eye(2), "b": torch.eye(2)}, {"*": Frozen()})
    row = ["a and 1 more", "Frozen()", "float32 (2, 2)", "nothing", "value: (2, 2)"]
    assert repr_rows(one_shape) == [row]


def repr_rows(p):
    return [re.split(r"\s{2,}", line) for line in repr(p).splitlines()[2:]]


def test_summary_of_half_precision_and_of_the_meta_device():
    low, p = mixed(mlp(dtype=torch.bfloat16))
    text = str(p.summary(*p.init(low)))
    assert "Orthogonal()" in text
    assert "nan" not in text
    net, p = mixed(mlp().to("meta"))
    assert [row[-1] for row in p.summary(*p.init(net)).rows[:-2]] == ["meta"] * len(p)


def test_summary_checks_what_it_gets():
    net, p = mixed()
    _, state = p.init(net)
    with pytest.raises(ValueError, match="raw: missing '0.weight'"):
        p.summary({}, state)
    with pytest.raises(ValueError, match="raw: missing '0.weight'"):
        p.plot({}, state)


def tables():
    net = nn.Linear(3, 2)
    # brackets are markup for rich, and angle brackets for a browser
    tree = {"[b]<w>&": net.weight.detach()}
    p = fp.parametrize(tree, {"[b]<w>&": WeightNorm()})
    raw, state = p.init(tree)
    return [p, p.summary(raw, state), p.plan(), fp.checkpoint.explain(tree)]


class Cells(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        if tag == "tr":
            self.found.append([])

    def handle_data(self, data):
        self.found[-1].append(data)


@pytest.mark.parametrize("table", tables(), ids=["p", "summary", "plan", "explain"])
def test_tables_are_plain_text_html_and_rich_alike(table):
    text = [line.split("  ") for line in str(table).splitlines()]
    words = [[cell.strip() for cell in line if cell.strip()] for line in text]
    del words[1]  # the rule below the head
    assert str(table) == repr(table)

    cells = Cells()
    cells.feed(table._repr_html_())
    assert cells.found == words

    console = rich.console.Console(width=300, file=(out := io.StringIO()))
    console.print(table)
    drawn = [line.strip("┃│").replace("┃", "│").split("│") for line in out.getvalue().splitlines()]
    cells = [[c.strip() for c in line if c.strip()] for line in drawn if len(line) > 1]
    assert cells == words


def test_narrow_consoles_fold_and_drop_nothing():
    net = nn.Linear(3, 2)
    p = fp.parametrize(net, {"weight": WeightNorm(1)})
    out = io.StringIO()
    rich.console.Console(width=40, file=out).print(p)
    assert "…" not in out.getvalue()


# Pictures


@pytest.fixture
def close():
    import matplotlib.pyplot as plt

    yield
    plt.close("all")


@pytest.mark.usefixtures("close")
def test_the_picture_shows_violations_and_singular_values():
    tree = {
        "a": torch.randn(4, 3, dtype=torch.float64),
        "b": torch.rand(5),
        "c": torch.randn(2, 3, 4, dtype=torch.complex64),
        "k": torch.randn(6, 2, 3, 3),
        "t": torch.randn(2, 6, 3, 3),
        "free": torch.randn(2, 2),
    }
    rules = {
        "a": Orthogonal(),
        "b": Positive(),
        "c": Orthogonal("cayley"),
        "k": SpectralNorm(),
        "t": SpectralNorm(1),
    }
    p = fp.parametrize(tree, rules)
    raw, state = p.init(tree)
    raw["k"] = 2 * raw["k"] + torch.randn(6, 2, 3, 3)
    values = p(raw, state)
    figure = p.plot(raw, state)
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == list(p)
    found = [bar.get_width() for bar in left.patches]
    expected = p.violation(values, state)
    assert found == [violation.item() for violation in expected.values()]
    assert expected["k"] > 1e-3
    lines = {line.get_label(): line.get_ydata() for line in right.lines}
    matrices = {
        "a": [values["a"]],
        "c": [*values["c"]],
        "k": [values["k"].reshape(6, 18)],
        "t": [values["t"].permute(1, 0, 2, 3).reshape(6, 18)],
    }
    assert lines.keys() == matrices.keys()
    for name, line in lines.items():
        oracle = sorted((s for m in matrices[name] for s in scipy.linalg.svdvals(m)), reverse=True)
        torch.testing.assert_close(
            torch.tensor(line).double(), torch.tensor(oracle).double(), rtol=1e-5, atol=1e-6
        )
    assert [text.get_text() for text in right.get_legend().get_texts()] == list(matrices)


@pytest.mark.usefixtures("close")
def test_pictures_of_odd_parametrizations(tmp_path):
    for tree, rules in [
        ({"b": torch.ones(3)}, {"b": Positive()}),
        ({"w": torch.ones(1, 4)}, {"w": WeightNorm()}),
        ({"w": torch.ones(0, 4)}, {"w": Mask()}),
        ({str(i): torch.eye(2) for i in range(30)}, {"*": Orthogonal()}),
        ({"w": torch.randn(3, 3).bfloat16()}, {"w": Orthogonal()}),
    ]:
        p = fp.parametrize(tree, rules)
        figure = p.plot(*p.init(tree))
        figure.savefig(tmp_path / "picture.png")  # warnings of the layout would be errors
        assert len(figure.axes[0].patches) == len(p)
    raw, state = p.init(tree)
    raw["w"].requires_grad_()
    assert p.plot(raw, state)


@pytest.mark.usefixtures("close")
def test_singular_values_that_are_equal_have_room_above_them():
    tree = {"w": torch.eye(4), "row": 3 * torch.ones(1, 4)}
    for rules, largest in [({"w": Orthogonal()}, 1), ({"*": Mask()}, 6)]:
        p = fp.parametrize(tree, rules)
        axes = p.plot(*p.init(tree)).axes[1]
        assert axes.get_ylim() == pytest.approx((0, 1.05 * largest))
        assert axes.get_xlim() == pytest.approx((-0.05, 1.05))


@pytest.mark.usefixtures("close")
def test_frozen_weights_are_left_out_of_the_picture(tmp_path):
    tree = {"a": torch.eye(3), "w": torch.eye(2), "b": torch.ones(2)}
    for rules, drawn in [({"w": Orthogonal(), "*": Frozen()}, ["w"]), ({"*": Frozen()}, [])]:
        p = fp.parametrize(tree, rules)
        figure = p.plot(*p.init(tree))
        figure.savefig(tmp_path / "picture.png")
        left, right = figure.axes
        assert len(left.patches) == len(right.lines) == len(drawn)
        assert [line.get_label() for line in right.lines] == drawn


def test_there_is_nothing_to_draw_on_the_meta_device():
    net, p = mixed(mlp().to("meta"))
    with pytest.raises(ValueError, match="'0.weight': expected a tensor with entries; .* meta"):
        p.plot(*p.init(net))


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    net, p = mixed()
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install 'funcparam\[plot\]'"):
        p.plot(*p.init(net))


def test_tables_need_neither_rich_nor_matplotlib():
    code = (
        "import sys; sys.modules |= dict.fromkeys(['rich', 'matplotlib'])\n"
        "import torch, funcparam as fp\n"
        "from funcparam.transforms import WeightNorm\n"
        "net = torch.nn.Linear(3, 2)\n"
        "p = fp.parametrize(net, {'weight': WeightNorm()})\n"
        "tables = [p, p.summary(*p.init(net)), p.plan()]\n"
        "assert all(str(t) and t._repr_html_() for t in tables)\n"
    )
    python("-c", code)


# What an optimizer takes


def test_trainable_lists_the_tensors_of_raw():
    net, p = mixed()
    raw, state = p.init(net)
    leaves = fp.trainable(raw)
    assert [id(t) for t in leaves] == [
        id(t)
        for own in raw.values()
        for t in ([own] if isinstance(own, torch.Tensor) else own.values())
    ]
    assert all(t.requires_grad and t.is_leaf for t in leaves)
    optimizer = torch.optim.SGD(leaves, lr=0.1)
    before = {name: value.detach().clone() for name, value in p(raw, state).items()}
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.func.functional_call(net, p(raw, state), (x,)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(v, before[n]) for n, v in p(raw, state).items() if n in p)


def test_trainable_leaves_out_what_cannot_be_trained():
    tree = {"w": torch.rand(2), "f": torch.rand(2), "steps": torch.tensor(3)}
    tree["z"] = torch.ones(2, dtype=torch.complex64)
    p = fp.parametrize(tree, {"w": Positive(), "f": Frozen()})
    raw, _ = p.init(tree)
    assert [*map(id, fp.trainable(raw))] == [id(raw["w"]), id(raw["z"])]
    assert [*map(id, fp.trainable({name: raw[name] for name in p}))] == [id(raw["w"])]


def test_trainable_refuses_all_or_nothing():
    good = torch.ones(2)
    with pytest.raises(
        TypeError, match=r"raw\['w'\]\['B'\]: expected a tensor or a dict .*got float"
    ):
        fp.trainable({"good": good, "w": {"B": 3.0}})
    with pytest.raises(
        TypeError, match=r"raw: expected a tensor or a dict of tensors; got .*Linear"
    ):
        fp.trainable(nn.Linear(1, 1))
    computed = 2 * torch.ones(2, requires_grad=True)
    with pytest.raises(
        ValueError, match=r"raw\['w'\]: expected a tensor that autograd did not comp"
    ):
        fp.trainable({"good": good, "w": computed})
    assert not good.requires_grad


def test_what_is_not_measured_is_said_and_never_0():
    tree = {"a": torch.eye(2), "b": torch.eye(2), "c": torch.eye(2)}
    rules = {"a": DoRA(1), "b": fp.transform(torch.sin), "c": WeightNorm()}
    p = fp.parametrize(tree, rules)
    one = fp.parametrize({"a": tree["a"], "c": tree["c"]}, {"a": DoRA(1), "c": WeightNorm()})
    raw, state = one.init({"a": tree["a"], "c": tree["c"]})
    raw["b"] = torch.eye(2)
    violation = p.violation(p(raw, state), state)
    assert [violation[name].isnan().item() for name in "abc"] == [True, True, False]
    ends = [row[-1] for row in p.summary(raw, state).rows]
    assert ends == ["not measured", "not measured", "0.0e+00", ""]
    figure = p.plot(raw, state)
    assert sum(text.get_text() == " not measured" for text in figure.axes[0].texts) == 2
    raw["a"] = {**raw["a"], "magnitude": torch.full((2,), torch.nan)}
    assert p.summary(raw, state).rows[0][-1] == "nan"  # of what has diverged
