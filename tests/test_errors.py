"""Every error of funcparam is read in errors.txt: its whole text, below a call that brings it up.

A `raise` that no call there meets fails the last test: add a call, with its text below.
"""

import ast
import builtins
import json
import re
import tempfile
import traceback
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import funcparam as fp
from funcparam import compat
from funcparam.checkpoint import _command
from funcparam.compat import parametrize
from funcparam.transforms import Mask, Symmetric, WeightNorm
from tests.networks import Tied
from tests.versions import words_of_213

ROOT = Path(fp.__file__).parent


def of(transform, value=None):
    """The parametrization of one weight by one transform."""
    tree = {"w": ONE if value is None else value}
    return fp.parametrize(tree, {"w": transform} if transform else {})


def made(forward, right_inverse=lambda value: value):
    return fp.transform(forward, right_inverse)


def log_det(transform, *shape):
    value = torch.full(shape or (2, 2), 0.5)
    p = of(transform, value)
    return p.log_abs_det_jacobian(*p.init({"w": value}))


def register(module, *parts):
    for part in parts:
        parametrize.register_parametrization(module, "weight", part)
    return module


def without(package, call):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "__import__", missing)
        return call()


def a_text_file(name):
    path = Path(tempfile.mkdtemp()) / name
    path.write_text("hello")
    return path


def a_pickle(item):
    path = Path(tempfile.mkdtemp()) / "model.pt"
    torch.save({"w": item}, path)
    return path


def an_index(text):
    path = Path(tempfile.mkdtemp()) / "model.safetensors.index.json"
    path.write_text(text)
    safetensors.torch.save_file({"a": ONE}, path.parent / "one.safetensors")
    return path


def with_header(**header):
    path = Path(tempfile.mkdtemp()) / "model.safetensors"
    safetensors.torch.save_file({"w": ONE}, path, metadata=header)
    return path


def saying(*texts):
    """A file that says this of itself."""
    found = OrderedDict({"w": ONE})
    found._metadata = {f"{'module.' * i}"[:-1]: {"funcparam": t} for i, t in enumerate(texts)}
    return found


def leaf(transform, **more):
    told = {"names": ["w"], "shape": [2, 3], "dtype": "float32", "transform": transform}
    return json.dumps({"version": 1, "leaves": [told | more]})


def command(name, *tensors, more=()):
    """A command, with a file for each of these."""
    folder = Path(tempfile.mkdtemp())
    for i, given in enumerate(tensors):
        torch.save(given, folder / f"{i}.pt")
    files = [folder / f"{i}.pt" for i in range(len(tensors))]
    given = _command._parser().parse_args([name, *map(str, [*files, *more])])
    return given.run(given, lambda _: None)


def endless():
    tree = {"w": ONE}
    tree["tree"] = tree
    return tree


def legacy():
    class Doubled(nn.Module):
        def forward(self, X):
            return 2 * X

    net, p, _, _ = compat.to_functional(register(nn.Linear(2, 2), Doubled()))
    p.init(net)


def compiled_call():
    layer = register(nn.Linear(2, 2), Symmetric())
    call = torch.compile(
        lambda W: torch.func.functional_call(layer, {"weight": W}, ONE[:, :2]), backend="eager"
    )
    call(ONE[:, :2])


def written_before_backward():
    net = nn.Linear(512, 512)
    model = fp.Parametrized(net, fp.parametrize(net, {"weight": WeightNorm()}), recompute=True)
    out = model(torch.ones(1, 512)).sum()
    with torch.no_grad():
        model.raw.weight.magnitude.mul_(2)
    out.backward()


def one_of_two():
    net = Tied()
    register(net.encoder, Symmetric())


def optimizer_of(names, **options):
    tree = {name: ONE.clone() for name in names}
    return fp.groups(tree, fp.parametrize(tree, []), **options).optimizer()


def moved_by_adagrad():
    p = fp.parametrize(NET, {"weight": fp.transforms.UnitNorm(dim=None)})
    raw, state = p.init(NET)
    with torch.no_grad():
        raw["weight"].mul_(2)
    fp.move(p, p, raw, state, torch.optim.Adagrad(fp.trainable(raw)))


def moved_by_a_stranger():
    p = fp.parametrize(NET, {"weight": fp.transforms.UnitNorm(dim=None)})
    raw, state = p.init(NET)
    fp.trainable(raw)
    with torch.no_grad():
        raw["weight"].mul_(2)
    fp.move(p, p, raw, state, torch.optim.SGD([torch.ones(1)]))


def moved_out_of_several_groups():
    net = nn.Linear(2, 2)
    p = fp.parametrize(net, {"weight": WeightNorm()})
    raw, state = p.init(net)
    optimizer = torch.optim.SGD(fp.groups(raw, p, net).param_groups(lr=0.1))
    fp.move(p, fp.parametrize(net, []), raw, state, optimizer)


def a_group_twice():
    saved = optimizer_of(["a"]).state_dict()
    return saved | {"param_groups": saved["param_groups"] * 2}


def written_in_blocks(write, net=None):
    net = net or nn.Sequential(nn.Linear(400, 400), nn.Linear(400, 400))
    model = fp.Parametrized(
        net, fp.parametrize(net, {"0.weight": WeightNorm(), "1.weight": Mask()})
    )
    with torch.no_grad(), model.bound() as inside:
        return write(model, inside)


def written_late(_, inside):
    for weight in list(inside.parameters()):
        weight.fill_(1.0)


def written_around(model, inside):
    inside[0].weight.fill_(1.0)
    model(torch.ones(1, 400))


def written_inside(model, _):
    with model.bound() as again:
        again[0].weight.fill_(1.0)


def written_in_one_place():
    net = Tied()
    model = fp.Parametrized(net, fp.parametrize(net, {"encoder.weight": WeightNorm()}))
    with model.bound() as inside:
        inside.encoder.weight = nn.Parameter(torch.ones(5, 5))


def moved_to_another_kind():
    p, q = of(None, torch.eye(2)), of(fp.transforms.Orthogonal(), torch.eye(2))
    raw, state = p.init({"w": torch.eye(2)})
    fp.move(p, q, raw, state, fp.groups(raw, p).optimizer())


def moved_in_views():
    p = fp.parametrize(NET, {"weight": WeightNorm(dim=None)})
    raw, state = p.init(NET)
    fp.move(p, fp.parametrize(NET, []), raw, state, fp.groups(raw, p).optimizer())


def averaged(*trees, transform=None, **options):
    p = fp.parametrize(trees[0], {"w": transform} if transform else {})
    fp.average([p.init(tree) for tree in trees], p, **options)


def with_another_radius():
    p = of(fp.transforms.AlmostOrthogonal(0.5), torch.eye(2))
    raw, state = p.init({"w": torch.eye(2)})
    raw["w"]["S"] += 1
    state["w"]["lam"] += 0.5
    fp.average([(raw, state)], p, "values")


def in_bound(net, values):
    with fp.bound(net, values):
        pass


def shell_with(change):
    """Call a shell after its network was changed."""
    net = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    model = fp.Parametrized(net, fp.parametrize(net, {"*.weight": WeightNorm(dim=None)}))
    change(model)
    model(torch.ones(1, 3))


def without_a_layer():
    net = nn.Sequential(nn.Linear(512, 512), nn.Linear(2, 2))
    call = fp.recompute(net, p := fp.parametrize(net, {"0.weight": WeightNorm()}))
    raw, state = p.init(net)
    del net[0]
    with torch.enable_grad():
        call(raw, state, torch.ones(1, 2))


def of_another_network(folder):
    norm = nn.BatchNorm1d(3)
    model = fp.Parametrized(norm, fp.parametrize(norm, {"weight": WeightNorm(dim=None)}))
    fp.checkpoint.save(model.state_dict(), f"{folder}/a.pt")
    fp.Parametrized.from_checkpoint(nn.LayerNorm(3), f"{folder}/a.pt")


def hooked(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's weight_norm is deprecated
        return nn.Sequential(kind(nn.Linear(2, 2)))


class Untied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(5, 5)
        self.decoder = nn.Linear(5, 5)


class NoPair(fp.Transform[torch.Tensor]):
    def __repr__(self):
        return f"{type(self).__name__}()"

    def forward(self, raw, state):
        return raw

    def right_inverse(self, value, *, generator=None):
        return value

    def violation(self, value, state):
        return value.sum()


class NoState(NoPair):
    def right_inverse(self, value, *, generator=None):
        return value, None


class Unhashable(NoPair):
    __hash__ = None


ONE = torch.ones(2, 3)
META = torch.ones(2, 3, device="meta")
NET = nn.Linear(3, 2)
TIED = Tied()
VALUES = dict(TIED.state_dict())
WEIGHT_HOOK = hooked(nn.utils.weight_norm)
P = fp.parametrize(TIED, {"encoder.weight": WeightNorm(), "decoder.bias": Mask()})
RAW, STATE = P.init(TIED)
NORM = fp.parametrize({"w": ONE, "b": torch.ones(2)}, {"w": WeightNorm()})
OWN = {"raw.w.magnitude": ONE[:, :1], "raw.w.direction": ONE, "raw.b": torch.ones(2)}
STORED = "parametrizations.w"

NAMES = {
    **vars(fp.transforms),
    **{name: getattr(fp.transforms, name) for name in fp.transforms.__all__},
    **globals(),
    "checkpoint": fp.checkpoint,
    "constraints": torch.distributions.constraints,
    "parametrizations": compat.parametrizations,
}


def rows():
    """The call, the error's type and its text, of each row of errors.txt."""
    row = []
    for line in (Path(__file__).parent / "errors.txt").read_text().splitlines():
        if line.startswith("    "):
            row.append(line.strip())
        else:
            if row:
                yield _row(row)
            row = [line] if line and not line.startswith("#") else []
    yield _row(row)


def _row(lines):
    call, *text = lines
    kind, _, text = " ".join(text).partition(": ")
    return call, kind, text


ROWS = list(rows())
NEW = ("compiled_call()",)  # rows that need PyTorch 2.13


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [pytest.param(*row, id=row[0], marks=[words_of_213] if row[0] in NEW else []) for row in ROWS],
)
def test_it_says(call, kind, text):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        eval(call, NAMES)
    assert type(caught.value).__name__ == kind
    pattern = ".*".join(map(re.escape, text.split("…")))
    assert re.fullmatch(pattern, str(caught.value), re.DOTALL), str(caught.value)


# Every raise has a row.


@dataclass(frozen=True)
class Site:
    """A raise statement: the file, its lines, and its text."""

    path: str
    first: int
    last: int
    text: str

    def __str__(self):
        return f"{self.path}:{self.first}: {self.text}"


def sites():
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and node.exc is not None:
                where = path.relative_to(ROOT).as_posix()
                yield Site(where, node.lineno, node.end_lineno, ast.unparse(node))


def raised_at(error):
    """File and line of the raise, and those of the errors that led to it."""
    while error is not None:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        yield frame.filename, frame.lineno
        error = error.__cause__ or error.__context__


def is_torchs(site):
    """Whether compat says what torch says, which tests/compat compares word for word."""
    return site.path.startswith("compat/") and max(_words(site.text), key=len) in TORCHS


def _words(text):
    return [
        node.value
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ] or [""]


TORCHS = " ".join(
    text
    for module in ("parametrize", "parametrizations", "weight_norm", "spectral_norm")
    for text in _words(Path(torch.nn.utils.__path__[0], f"{module}.py").read_text())
)


@words_of_213
def test_every_raise_is_in_the_table():
    met = set()
    for call, _, _ in ROWS:
        try:
            eval(call, NAMES)
        except Exception as error:
            met.update(raised_at(error))
    found = list(sites())
    assert len(found) > 150
    unread = [
        str(site)
        for site in found
        if not is_torchs(site)
        and not any(
            (str(ROOT / site.path), line) in met for line in range(site.first, site.last + 1)
        )
    ]
    assert not unread, "raises without a row above:\n" + "\n".join(unread)
