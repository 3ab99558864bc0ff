"""Rules: which selector picks which name, and what is refused."""

import pytest
import torch
from torch import nn

import funcparam as fp
from funcparam.transforms import Frozen, Mask, Orthogonal, Positive, Symmetric, WeightNorm
from tests.networks import Classifier, Tied

ALL_WEIGHTS = ["rnn.weight_ih_l0", "rnn.weight_hh_l0", "head.weight"]


@pytest.mark.parametrize(
    ("selector", "names"),
    [
        ("head.weight", ["head.weight"]),
        ("rnn.weight_hh_*", ["rnn.weight_hh_l0"]),
        ("*weight_??_l0", ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]),
        (nn.Linear, ["head.weight", "head.bias"]),
        ((nn.LSTM, "weight_hh_*"), ["rnn.weight_hh_l0"]),
        ((nn.RNNBase, "bias_ih_l0"), ["rnn.bias_ih_l0"]),
        (lambda name, tensor: tensor.ndim == 2, ALL_WEIGHTS),
        ("norm.running_var", ["norm.running_var"]),
        ((nn.BatchNorm1d, "running_var"), ["norm.running_var"]),
        ("norm.*", ["norm.weight", "norm.bias"]),
    ],
)
def test_selectors(selector, names):
    p = fp.parametrize(Classifier(), [(selector, Mask())])
    assert list(p) == names


def test_first_match_wins():
    rules = {"head.weight": WeightNorm(), "*": Mask()}
    p = fp.parametrize(Classifier(), rules)
    assert p["head.weight"] == WeightNorm()
    assert p["head.bias"] == Mask()


def test_a_name_with_glob_characters_is_itself():
    tree = {"w[0]": torch.ones(2), "w0": torch.ones(2)}
    assert list(fp.parametrize(tree, {"w[0]": Positive()})) == ["w[0]"]


def test_rules_without_effect_are_refused():
    with pytest.raises(ValueError, match=r"'head.weigth' matches nothing; .*'head.weight'"):
        fp.parametrize(Classifier(), {"head.weigth": Mask()})
    with pytest.raises(ValueError, match=r"Conv2d matches nothing; the names are 'rnn.weight_ih"):
        fp.parametrize(Classifier(), {nn.Conv2d: Mask()})
    with pytest.raises(ValueError, match=r"'zzz' matches nothing; the names are .* and 5 more"):
        fp.parametrize(Classifier(), {"zzz": Mask()})
    with pytest.raises(ValueError, match=r"never applies: the earlier rule 'head.\*' takes"):
        fp.parametrize(Classifier(), {"head.*": Mask(), "head.weight": WeightNorm()})
    with pytest.raises(ValueError, match=r"\(Conv2d, 'weight'\) matches nothing"):
        fp.parametrize(Classifier(), {(nn.Conv2d, "weight"): Mask()})


def test_types_need_a_module():
    with pytest.raises(ValueError, match="Linear matches nothing"):
        fp.parametrize({"weight": torch.ones(2, 2)}, {nn.Linear: Mask()})


@pytest.mark.parametrize("selector", [3, int, nn.Linear(1, 1), (nn.Linear,), (nn.Linear, 3), None])
def test_a_selector_is_one_of_five(selector):
    with pytest.raises(TypeError, match="expected a name, a glob, a module type"):
        fp.parametrize(nn.Linear(2, 2), {selector: Mask()})


def test_rules_are_pairs_of_selector_and_transform():
    net = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="expected a transform; got .*fp.transform makes one"):
        fp.parametrize(net, {"weight": torch.exp})
    with pytest.raises(TypeError, match=r"expected a transform; got Mask\. Call the class"):
        fp.parametrize(net, {"weight": Mask})
    with pytest.raises(TypeError, match="expected pairs"):
        fp.parametrize(net, ["weight"])
    with pytest.raises(TypeError, match="expected a mapping, or a list of pairs"):
        fp.parametrize(net, "weight")


def test_two_rules_on_one_tie():
    match = "'encoder.weight' = 'decoder.weight' is one weight .* got 'encoder.* and 'decoder"
    with pytest.raises(ValueError, match=match):
        fp.parametrize(Tied(), {"encoder.weight": Orthogonal(), "decoder.weight": Symmetric()})
    p = fp.parametrize(Tied(), {"decoder.weight": Orthogonal(), "*": WeightNorm(dim=None)})
    assert p["encoder.weight"] == Orthogonal()
    p = fp.parametrize(Tied(), {"*.weight": Orthogonal()})
    assert list(p) == ["encoder.weight"]
    assert list(fp.parametrize(Tied(), {"decoder.weight": Orthogonal()})) == ["encoder.weight"]


class LanguageModel(nn.Module):
    """A head that is tied to the embedding, and parts that are not."""

    def __init__(self, *, positions, blocks):
        super().__init__()
        self.embedding = nn.Embedding(5, 5)
        self.head = nn.Linear(5, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.positions = nn.Embedding(4, 5) if positions else None
        self.block = nn.Linear(5, 5) if blocks else None


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("blocks", [False, True])
def test_two_rules_meet_on_a_tie_whatever_else_there_is(positions, blocks):
    net = LanguageModel(positions=positions, blocks=blocks)
    by_type = {(nn.Linear, "weight"): WeightNorm(), (nn.Embedding, "weight"): Mask()}
    for rules in (by_type, dict(reversed(by_type.items()))):
        with pytest.raises(ValueError, match="'embedding.weight' = 'head.weight' is one weight"):
            fp.parametrize(net, rules)
    if positions and blocks:  # else a rule is left with nothing
        both = {lambda name, tensor: name in ("embedding.weight", "head.weight"): Orthogonal()}
        p = fp.parametrize(net, both | by_type)
        assert p["embedding.weight"] == Orthogonal()
        assert p["positions.weight"] == Mask()
        assert p["block.weight"] == WeightNorm()


def test_rules_of_which_one_picks_all_names_of_a_tie_have_an_order():
    net = LanguageModel(positions=True, blocks=True)
    p = fp.parametrize(net, {"*.weight": Mask(), "block.*": WeightNorm(dim=None)})
    assert p["embedding.weight"] == Mask()
    p = fp.parametrize(net, {"head.weight": WeightNorm(), "*.weight": Mask()})
    assert p["embedding.weight"] == WeightNorm()
    p = fp.parametrize(net, {"*d*.weight": WeightNorm(), nn.Linear: Mask()})
    assert p["embedding.weight"] == WeightNorm()


def test_static_checks_name_the_path_and_leave_the_net_alone():
    net = Classifier()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    cases = [
        (
            {"head.bias": Orthogonal()},
            r"'head.bias': .*matrix or batch of matrices; got shape \(4,\)",
        ),
        ({"head.weight": Symmetric()}, r"'head.weight': .*square matrix .* got shape \(4, 8\)"),
        ({"norm.num_batches_tracked": Mask()}, r"num_batches_tracked': .*got torch.int64"),
        ({"head.bias": WeightNorm(dim=1)}, r"'head.bias': .*with a dimension 1; got shape \(4,\)"),
        ({"head.bias": WeightNorm(dim=-2)}, r"'head.bias': .*with a dimension -2"),
    ]
    for rules, match in cases:
        with pytest.raises(ValueError, match=match):
            fp.parametrize(net, rules)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert list(fp.parametrize(net, {"norm.num_batches_tracked": Frozen()}))


def test_complex_where_it_is_not_defined():
    tree = {"w": torch.ones(3, 3, dtype=torch.complex64)}
    for transform in (Orthogonal("householder"), WeightNorm(), Positive()):
        with pytest.raises(ValueError, match="'w': .* expects a real tensor; got torch.complex64"):
            fp.parametrize(tree, {"w": transform})
    assert fp.parametrize(tree, {"w": Orthogonal("cayley")})


def test_transforms_that_change_shape_or_dtype_are_refused():
    tree = {"w": torch.ones(3, 3)}
    with pytest.raises(ValueError, match=r"'w': .*expected float32 \(3, 3\).*got float32 \(2, 3\)"):
        fp.parametrize(tree, {"w": fp.transform(lambda raw: raw[:2], lambda v: v)})
    with pytest.raises(ValueError, match=r"'w': .*got float64 \(3, 3\)"):
        fp.parametrize(tree, {"w": fp.transform(lambda raw: raw.double(), lambda v: v)})
    with pytest.raises(TypeError, match="'w': .*forward to return a tensor; got tuple"):
        fp.parametrize(tree, {"w": fp.transform(lambda raw: (raw,), lambda v: v)})
    with pytest.raises(TypeError, match="'w': .*raw as a tensor or a dict of tensors; got list"):
        fp.parametrize(tree, {"w": fp.transform(lambda raw: raw[0], lambda v: [v])})
    item = fp.transform(lambda raw: raw * raw.sum().item(), lambda v: v)
    with pytest.raises(ValueError, match="'w': .*forward to run on meta tensors.* got "):
        fp.parametrize(tree, {"w": item})
    with pytest.raises(TypeError, match="'w': .*names to tensors; got 'a': int"):
        fp.parametrize(tree, {"w": fp.transform(lambda raw: raw, lambda v: {"a": 3})})


def test_lazy_modules_say_what_to_do():
    with pytest.raises(ValueError, match="'weight' is not initialised: .*Run one batch"):
        fp.parametrize(nn.LazyLinear(3), {"weight": Orthogonal()})
