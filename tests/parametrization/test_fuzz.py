"""Anything at all as rules, trees, raw, state, checkpoints: a right result, or a documented error.

Never another exception, and nothing that was given is changed.
"""

import contextlib
import itertools
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from torch import nn

import funcparam as fp
from funcparam import checkpoint
from funcparam.transforms import (
    Cat,
    Chain,
    Frozen,
    Identity,
    Interval,
    LoRA,
    Mask,
    Orthogonal,
    Permute,
    Positive,
    Simplex,
    SpectralNorm,
    Stack,
    Symmetric,
    Triangular,
    WeightNorm,
)
from tests.cases import CASES
from tests.effort import examples
from tests.networks import Classifier, Tied, mixed, mlp

fuzz = examples(300, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


class Pair(NamedTuple):
    left: object
    right: object


class Strange(fp.Transform[torch.Tensor]):
    """A transform that goes wrong in one of many ways."""

    def __init__(self, **wrong):
        self.wrong = wrong

    def __repr__(self):
        return f"Strange({self.wrong})"

    def forward(self, raw, state):
        return self.wrong.get("forward", raw)

    def right_inverse(self, value, *, generator=None):
        return self.wrong.get("right_inverse", (value, {}))

    def violation(self, value, state):
        return value.sum()


TENSORS = [
    lambda: torch.rand(3, 3),
    lambda: torch.rand(2, 3, dtype=torch.float64),
    lambda: torch.randn(3),
    lambda: torch.randn(()),
    lambda: torch.randn(0, 3),
    lambda: torch.randn(4, 3, 3),
    lambda: torch.full((3, 3), torch.nan),
    lambda: torch.zeros(3, 3),
    lambda: torch.ones(3, 3, dtype=torch.int64),
    lambda: torch.ones(2, dtype=torch.bool),
    lambda: torch.randn(3, 3, dtype=torch.complex64),
    lambda: torch.randn(3, 3).bfloat16(),
    lambda: torch.randn(3, 3, device="meta"),
    lambda: torch.eye(3).to_sparse(),
    lambda: torch.randn(3, 3, requires_grad=True),
    lambda: nn.Parameter(torch.randn(3, 2)),
    lambda: nn.UninitializedParameter(),
    lambda: torch.randn(3, 6)[:, ::2],
    lambda: torch.randn(1, 3).expand(3, 3),
]
OTHERS = [None, 3, 2.5, "w", b"w", True, np.ones(3), [], {}, (), object(), torch.float32, len]
KEYS = ["w", "v", "a.b", "a", "b", "", "0", 0, 1, None, ("w",), "*", "[w]", "w\n", "ü"]
TRANSFORMS = [
    Orthogonal(),
    Orthogonal("householder", trivialize=False),
    WeightNorm(),
    WeightNorm(dim=None),
    WeightNorm(dim=-3),
    SpectralNorm(),
    Symmetric(),
    Triangular(),
    Positive(),
    Interval(0, 1),
    Simplex("stick_breaking"),
    Mask(),
    Frozen(),
    Identity(),
    LoRA(2),
    Permute((1, 0)),
    Chain(Symmetric(), Orthogonal("cayley")),
    Chain(Symmetric(), LoRA(1)),
    Cat([Mask(), WeightNorm()]),
    Stack([Positive()], dim=1),
    fp.transform(torch.exp),
    fp.transform(torch.exp, torch.log),
    fp.transform(lambda raw: raw["a"], lambda value: {"a": value}),
    fp.transform(lambda raw: raw, lambda value: (value, value)),
    Strange(forward=None),
    Strange(forward=torch.ones(1)),
    Strange(right_inverse=None),
    Strange(right_inverse=(None, None)),
    Strange(right_inverse=({"a": torch.ones(1)}, {"b": 3})),
    Strange(right_inverse=({}, {})),
]
NO_TRANSFORMS = [None, Orthogonal, torch.exp, nn.Identity(), "Orthogonal", 3]
SELECTORS = [
    *KEYS,
    "a.*",
    "*.weight",
    "[!w]",
    "[",
    "**",
    "?",
    nn.Module,
    nn.Linear,
    int,
    (nn.Linear, "weight"),
    (nn.Module, "*"),
    (nn.Module, 3),
    ("w", nn.Module),
    (),
    lambda name, tensor: True,
    lambda name, tensor: tensor.ndim == 2,
    lambda name, tensor: name,
    nn.Linear(1, 1),
    2.5,
    frozenset(),
]


tensors = st.sampled_from(range(len(TENSORS))).map(lambda i: TENSORS[i]())
others = st.sampled_from(range(len(OTHERS))).map(lambda i: OTHERS[i])
selectors = st.sampled_from(range(len(SELECTORS))).map(lambda i: SELECTORS[i])
transforms = st.sampled_from(TRANSFORMS) | st.sampled_from(TRANSFORMS + NO_TRANSFORMS)


def branches(children):
    return st.one_of(
        st.dictionaries(st.sampled_from(KEYS), children, max_size=4),
        st.lists(children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
        st.tuples(children, children).map(lambda pair: Pair(*pair)),
        st.dictionaries(st.sampled_from("wva"), children, max_size=3).map(OrderedDict),
    )


trees = st.one_of(
    st.recursive(tensors, branches, max_leaves=6),
    st.recursive(tensors | others, branches, max_leaves=6),
    st.dictionaries(st.sampled_from(["w", "v", "a.b", "*"]), tensors, min_size=1),
    st.sampled_from([Tied, Classifier, mlp, nn.Identity, lambda: nn.LazyLinear(2)]).map(
        lambda make: make()
    ),
)
pairs = st.tuples(selectors, transforms)
rules = st.one_of(
    st.lists(pairs, min_size=1, max_size=3),
    st.lists(pairs, max_size=3).map(dict),
    st.lists(pairs | selectors, max_size=3),
    others,
)


def snapshot(thing):
    """All that can be seen of a tree or module, bit for bit, and the objects that it is made of."""
    if isinstance(thing, nn.Module):
        tensors = dict(itertools.chain(thing.named_parameters(), thing.named_buffers()))
        return type(thing), [*vars(thing)], thing.training, snapshot(tensors)
    if isinstance(thing, torch.Tensor):
        seen = type(thing), id(thing), thing.requires_grad, thing._version
        if isinstance(thing, nn.parameter.UninitializedTensorMixin):
            return seen
        if thing.is_meta or thing.is_sparse:
            return seen, thing.shape, thing.dtype
        bits = thing.detach().contiguous().flatten().view(torch.uint8) if thing.numel() else []
        return (
            seen,
            thing.shape,
            thing.dtype,
            thing.stride(),
            bytes(bits if not len(bits) else bits.numpy()),
        )
    if isinstance(thing, dict):
        return type(thing), [(k, snapshot(v)) for k, v in thing.items()]
    if isinstance(thing, list | tuple):
        return type(thing), [*map(snapshot, thing)]
    return id(thing)


@contextlib.contextmanager
def unchanged(*things):
    before = [*map(snapshot, things)]
    yield
    assert [*map(snapshot, things)] == before


def refused(*errors):
    """A block that may raise one of these, with a text."""

    @contextlib.contextmanager
    def block():
        try:
            yield
        except errors as error:
            told = str(error)
            assert told

    return block()


# Rules and trees


@fuzz
@given(trees, rules)
def test_rules_and_trees(tree, chosen):
    use(tree, chosen)


@fuzz
@given(trees, st.lists(st.sampled_from(TRANSFORMS), min_size=1), st.randoms())
def test_rules_that_match(tree, chosen, random):
    try:
        names = [name for entry in fp.parametrize(tree, {}).entries for name in entry.names]
    except (TypeError, ValueError):
        return
    picked = random.sample(names, min(len(names), len(chosen)))
    use(tree, dict(zip(picked, chosen, strict=False)))


@pytest.mark.parametrize("kind", range(len(TENSORS)))
def test_every_transform_on_every_kind_of_tensor(kind):
    for transform in [*TRANSFORMS, *(case.transform for case in CASES)]:
        use({"w": TENSORS[kind]()}, {"w": transform})


def use(tree, chosen):
    """All that one does with a parametrization. Once there is raw nothing is refused any more."""
    raw = None
    with unchanged(tree), refused(TypeError, ValueError, NotImplementedError):
        p = fp.parametrize(tree, chosen)
        assert repr(p)
        assert repr(p.plan())
        raw, state = p.init(tree)
    if raw is None:
        return
    with unchanged(raw, state):
        values = p(raw, state)
        assert specs(values, p) == specs(tree, p)
        p.update(raw, state)
        p.rebase(raw, state)
        assert repr(p.summary(raw, state))
        with refused(NotImplementedError):
            p.log_abs_det_jacobian(raw, state)
        p.init(values)


def specs(tree, p):
    """Names, shapes and dtypes of what p holds, as far as they are a tree's."""
    if isinstance(tree, nn.Module):
        tree = {entry.name: tree.get_parameter(entry.name) for entry in p.entries}
    return [
        (entry.name, entry.signature.value) for entry in fp.parametrize(tree, {}, ties=True).entries
    ]


# Raw and state

PARAMETRIZED = [
    mixed,
    lambda: simple(Tied(), {"decoder.weight": SpectralNorm(), "encoder.bias": Frozen()}),
    lambda: simple(nn.Linear(3, 3), {"weight": LoRA(2)}),
    lambda: simple(
        nn.Linear(3, 4), {"weight": Cat([Mask(), WeightNorm()]), "bias": Interval(-9, 9)}
    ),
    lambda: simple({"a": [torch.rand(3, 3), None], "b": Pair(torch.rand(2), {})}, {"a.0": Mask()}),
    lambda: simple(mlp(dtype=torch.float32), {"*.weight": Orthogonal()}),
]


def simple(tree, rules):
    return tree, fp.parametrize(tree, rules)


def broken(draw, tree):
    """A tree of dictionaries, changed somewhere; what it was made of stays as it was."""
    tree = dict(tree)
    key = draw(st.sampled_from([*tree, *KEYS]))
    inner = tree.get(key)
    how = draw(st.sampled_from(["drop", "add", "rename", "replace", "inside", "like", "order"]))
    if how == "drop":
        tree.pop(key, None)
    elif how == "add":
        tree[draw(st.sampled_from(KEYS))] = draw(tensors | others)
    elif how == "rename" and key in tree:
        tree[draw(st.sampled_from(KEYS))] = tree.pop(key)
    elif how == "replace":
        tree[key] = draw(tensors | others | st.sampled_from([*tree.values(), None]))
    elif how == "inside" and isinstance(inner, dict):
        tree[key] = broken(draw, inner)
    elif how == "inside":
        tree[key] = {draw(st.sampled_from(KEYS)): inner}
    elif how == "like" and isinstance(inner, torch.Tensor):
        tree[key] = draw(st.sampled_from(LIKE))(inner)
    elif how == "order":
        tree = dict(reversed(tree.items()))
    return tree


LIKE = [
    torch.Tensor.double,
    torch.Tensor.half,
    torch.Tensor.int,
    torch.Tensor.bool,
    torch.Tensor.cfloat,
    torch.Tensor.numpy,
    torch.Tensor.tolist,
    lambda t: t.to("meta"),
    lambda t: t.unsqueeze(0),
    lambda t: t.expand(2, *t.shape),
    lambda t: t.flatten()[:-1],
    lambda t: t.mT if t.ndim > 1 else t[None],
    lambda t: t.to_sparse(),
    lambda t: torch.full_like(t, torch.nan) if t.is_floating_point() else t,
    nn.Parameter,
]


@fuzz
@given(st.data(), st.sampled_from(range(len(PARAMETRIZED))), st.integers(1, 3))
def test_raw_and_state(data, which, times):
    tree, p = PARAMETRIZED[which]()
    raw, state = p.init(tree)
    given_raw, given_state = raw, state
    for _ in range(times):
        if data.draw(st.booleans()):
            given_raw = broken(data.draw, given_raw)
        else:
            given_state = broken(data.draw, given_state)
    if data.draw(st.integers(0, 9)) == 0:
        given_raw = data.draw(tensors | others | st.just(tree))
    with unchanged(tree, given_raw, given_state):
        accepted = False
        with refused(TypeError, ValueError):
            values = p(given_raw, given_state)
            accepted = True
        if accepted:
            assert kinds(values, p) == kinds(tree, p)
        for method in (p.update, p.rebase, p.summary, p.log_abs_det_jacobian):
            errors = (NotImplementedError,) if accepted else (TypeError, ValueError)
            done = False
            with refused(*errors):
                method(given_raw, given_state)
                done = True
            assert accepted or not done


def kinds(tree, p):
    return sorted((name, spec.shape, spec.dtype.is_complex) for name, spec in specs(tree, p))


# Checkpoints


@fuzz
@given(
    st.data(),
    st.sampled_from(range(len(PARAMETRIZED))),
    st.sampled_from(["funcparam", "torch", "plain", "legacy"]),
    st.integers(1, 3),
)
def test_checkpoints(data, which, style, times):
    tree, p = PARAMETRIZED[which]()
    raw, state = p.init(tree)
    try:
        state_dict = checkpoint.write(p, raw, state, style=style)
    except ValueError:  # no legacy spelling
        state_dict = {"raw": raw, "state": state}
    for _ in range(times):
        state_dict = broken_keys(data.draw, state_dict)
    with unchanged(state_dict):
        with refused(TypeError, ValueError):
            assert str(checkpoint.explain(state_dict)).startswith("name")
        found = None
        torch.manual_seed(0)  # for LoRA's first factor
        with refused(TypeError, ValueError):
            found = checkpoint.read(state_dict, p)
        for to in ("funcparam", "torch", "plain", "legacy"):
            with refused(TypeError, ValueError):
                checkpoint.convert(state_dict, p, style=to)
    if found is not None:
        assert kinds(p(found.raw, found.state), p) == kinds(tree, p)
    if isinstance(tree, nn.Module) and all(isinstance(key, str) for key in state_dict):
        into_a_shell(fp.Parametrized(tree, p), state_dict, found)


def into_a_shell(shell, state_dict, found):
    own = not shell.state_dict().keys().isdisjoint(state_dict)
    before = snapshot(shell)
    taken = False
    torch.manual_seed(0)
    with refused(RuntimeError), unchanged(state_dict):  # torch's own error of load_state_dict
        shell.load_state_dict(state_dict)
        taken = True
    if taken and found is not None:
        raw, state = shell.raw_and_state()
        assert all(same(raw[name], found.raw[name]) for name in raw)
        assert all(same(state[name], found.state[name]) for name in state)
    if not taken and not own and not can_be_read(state_dict, shell.parametrization):
        assert snapshot(shell) == before


def can_be_read(state_dict, p):
    """In part, too: what is there is loaded, and torch says what is missing, as it always does."""
    with refused(TypeError, ValueError):
        checkpoint.read(state_dict, p, strict=False)
        return True
    return False


def same(a, b):
    if isinstance(a, torch.Tensor):
        if a.is_meta or b.is_meta:
            return a.shape == b.shape
        return torch.equal(a.nan_to_num(7), b.to(a.dtype).nan_to_num(7))
    return all(same(a[key], b[key]) for key in a)


def broken_keys(draw, state_dict):
    """A state_dict, changed as files are: a prefix, another spelling, parts of another one."""
    how = draw(st.sampled_from(["tree", "prefix", "suffix", "nest", "twice", "cut"]))
    keys = [*state_dict]
    if how == "tree" or not keys:
        return broken(draw, state_dict)
    key = draw(st.sampled_from(keys))
    if how == "prefix":
        prefix = draw(st.sampled_from(["module.", "_orig_mod.", "raw.", "state.", "."]))
        return {f"{prefix}{k}": t for k, t in state_dict.items()}
    if how == "nest":
        return {draw(st.sampled_from(["raw", "state", "model", 3])): state_dict}
    changed = dict(state_dict)
    text = str(key)
    if how == "suffix":
        ending = draw(st.sampled_from(ENDINGS))
        changed[f"{text}{ending}"] = changed.pop(key)
    if how == "twice":
        changed[f"{text}{draw(st.sampled_from(ENDINGS))}"] = changed[key]
        changed[f"parametrizations.{text}.original"] = changed[key]
    if how == "cut":
        changed[text.rpartition(".")[2]] = changed.pop(key)
    return changed


ENDINGS = ["_g", "_v", "_u", "_orig", "_mask", ".original", ".original0", ".0.base", "_extra_state"]


def recursive():
    made = {"w": torch.ones(2)}
    made["more"] = made
    return made


def deep():
    made = {}
    for _ in range(5000):
        made = {"a": made}
    return made


@pytest.mark.parametrize("make", [recursive, deep])
def test_nesting_without_end(make):
    p = fp.parametrize({"w": torch.ones(2)}, {"w": Mask()})
    for call in (
        lambda: checkpoint.read(make(), p),
        lambda: checkpoint.explain(make()),
        lambda: fp.parametrize(make(), {"w": Mask()}),
    ):
        with pytest.raises(ValueError, match="nested without end"):
            call()
