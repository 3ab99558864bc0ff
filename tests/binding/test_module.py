"""The module shell, and folding."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import funcparam as fp
from funcparam.transforms import (
    Frozen,
    LoRA,
    Mask,
    Orthogonal,
    Positive,
    SpectralNorm,
    WeightNorm,
    full_precision,
)
from tests.networks import Classifier, Tied, mixed, mlp
from tests.processes import python

RULES = {"rnn.weight_hh_*": Orthogonal(), "head.weight": SpectralNorm(), "rnn.*": WeightNorm()}


def classifier():
    net = Classifier()
    return net, fp.Parametrized(net, fp.parametrize(net, RULES))


def train(model, x, steps=3):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return model


X = torch.linspace(-1, 1, 4 * 5 * 3).reshape(4, 5, 3)


def test_an_lstm_with_batch_norm_trains_saves_and_folds():
    net, model = classifier()
    before = copy.deepcopy(net.state_dict())
    train(model, X)
    assert all(
        torch.equal(a, b) for a, b in zip(net.state_dict().values(), before.values(), strict=True)
    )
    assert type(model.net.rnn) is nn.LSTM
    assert model.net.norm.num_batches_tracked == 3
    model.eval()
    assert not model.net.norm.training
    other = classifier()[1]
    other.load_state_dict(model.state_dict(), strict=True)
    other.eval()
    assert torch.equal(other(X), model(X))
    folded = model.fold()
    assert type(folded) is Classifier
    assert list(folded.state_dict()) == list(net.state_dict())
    torch.testing.assert_close(folded(X), model(X), rtol=0, atol=0)
    plain = Classifier()
    plain.load_state_dict(folded.state_dict(), strict=True)
    assert torch.equal(plain.eval()(X), folded(X))


def test_training_mode_follows_and_advances_state_once_a_forward():
    _, model = classifier()
    assert model.training
    u = model.state.head.weight.u
    first = u.clone()
    with torch.no_grad():
        model.raw.head.weight.add_(torch.randn(4, 8))
    model(X)
    assert model.state.head.weight.u is u
    assert not torch.equal(u, first)
    model.eval()
    second = u.clone()
    model(X)
    assert torch.equal(u, second)
    assert not model.net.training
    assert not fp.Parametrized(Classifier().eval(), model.parametrization).training


def test_several_forwards_before_one_backward():
    _, model = classifier()
    (model(X).sum() + model(2 * X).sum()).backward()
    assert model.raw.head.weight.grad.isfinite().all()


def test_it_is_what_functional_call_gives():
    net, p = mixed()
    model = fp.Parametrized(net, p).eval()
    x = torch.randn(3, 6).double()
    raw, state = p.init(net)
    torch.testing.assert_close(model(x), torch.func.functional_call(net, p(raw, state), (x,)))
    torch.testing.assert_close(model.values(), p(raw, state))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("net", "rules", "x"),
    [
        (Classifier(), {"rnn.weight_*": WeightNorm()}, X),
        (Attention(), {"*.in_proj_weight": WeightNorm()}, torch.randn(2, 3, 8)),
    ],
    ids=["LSTM", "MultiheadAttention"],
)
def test_each_map_is_evaluated_once_a_forward(net, rules, x, training, monkeypatch):
    model = fp.Parametrized(net, fp.parametrize(net, rules)).train(training)
    calls, forward = [], WeightNorm.forward

    def counted(self, raw, state):
        calls.append(self)
        return forward(self, raw, state)

    monkeypatch.setattr(WeightNorm, "forward", counted)
    with torch.set_grad_enabled(training):
        model(x)
    assert len(calls) == len(model.parametrization)


def test_tied_weights_stay_tied():
    net = Tied()
    model = fp.Parametrized(net, fp.parametrize(net, {"decoder.weight": Orthogonal()}))
    assert [name for name, _ in model.named_parameters()] == [
        "net.encoder.bias",
        "net.decoder.bias",
        "raw.encoder.weight",
    ]
    train(model, torch.randn(3, 5))
    folded = model.fold()
    assert folded.decoder.weight is folded.encoder.weight
    W = folded.encoder.weight
    torch.testing.assert_close(W.mT @ W, torch.eye(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        folded(X[:, 0].repeat(1, 2)[:, :5]), model(X[:, 0].repeat(1, 2)[:, :5])
    )


def test_casting_moves_everything():
    _, model = classifier()
    model = model.double().eval()
    assert {t.dtype for t in model.parameters()} == {torch.float64}
    assert model(X.double()).dtype == torch.float64
    model = model.to(torch.bfloat16)
    assert model.values()["rnn.weight_hh_l0"].dtype == torch.bfloat16
    assert model.to("meta").values()["head.weight"].is_meta


def test_masks_stay_boolean_under_casts():
    net = nn.Linear(3, 3)
    model = fp.Parametrized(net, fp.parametrize(net, {"weight": Mask()})).half()
    assert model.state.weight.mask.dtype == torch.bool
    assert model.raw.weight.dtype == torch.float16


def test_copies_are_independent():
    _, model = classifier()
    model.eval()
    twin = copy.deepcopy(model)
    assert twin.net is not model.net
    out = model(X)
    assert torch.equal(twin(X), out)
    train(twin.train(), X)
    assert torch.equal(model(X), out)


def test_pickle_and_torch_save_of_the_module():
    _, model = classifier()
    train(model, X).eval()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(loaded(X), model(X))
    assert torch.equal(pickle.loads(pickle.dumps(model))(X), model(X))


def test_state_dict_loads_with_weights_only(tmp_path):
    _, model = classifier()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    fresh = classifier()[1]
    fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(fresh.eval()(X), model.eval()(X))


def test_resuming_is_bit_equal():
    _, one = classifier()
    train(one, X)
    two = classifier()[1]
    two.load_state_dict(one.state_dict())
    train(one, X)
    train(two, X)
    saved = one.state_dict(), two.state_dict()
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])


def test_a_folded_module_loads_in_a_process_without_funcparam(tmp_path):
    net = mlp(dtype=torch.float32)
    model = fp.Parametrized(net, mixed(net)[1])
    torch.save(model.fold(), tmp_path / "plain.pt")
    code = (
        "import sys; sys.modules['funcparam'] = None; import torch\n"
        f"net = torch.load({str(tmp_path / 'plain.pt')!r}, weights_only=False)\n"
        "print(net(torch.ones(1, 6)).sum().item())"
    )
    out = python("-c", code)
    assert float(out) == pytest.approx(model.eval()(torch.ones(1, 6)).sum().item())


def convolutional():
    layers = nn.Conv1d(5, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)
    net = nn.Sequential(*layers)
    rules = {"0.weight": SpectralNorm(), "4.weight": Orthogonal("cayley"), "*": WeightNorm()}
    return net, fp.Parametrized(net, fp.parametrize(net, rules))


@torch._dynamo.config.patch(allow_rnn=True)
@pytest.mark.parametrize(
    ("make", "backend"),
    # aot_autograd cannot save what torch's own fused LSTM saves, plain LSTMs included
    [(classifier, "eager"), (convolutional, "aot_eager")],
)
# torch's LSTM keeps its last weights in a list, where dynamo looks at their grad
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_compiled_training_without_a_break_or_a_recompile(make, backend):
    _, model = make()
    eager = copy.deepcopy(model)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    counts = []
    for _ in range(4):
        optimizer.zero_grad()
        compiled(X).square().sum().backward()
        eager(X).square().sum().backward()
        for a, b in zip(model.parameters(), eager.parameters(), strict=True):
            # a compiled exponential rounds differently
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
        optimizer.step()
        eager.load_state_dict(model.state_dict())
        eager.zero_grad()
        counts.append(counter.frame_count)
    assert counts[1:] == counts[1:2] * 3
    compiled.eval()
    torch.testing.assert_close(compiled(X), model(X), rtol=1e-4, atol=1e-4)


def test_export():
    _, model = classifier()
    model.eval()
    program = torch.export.export(model, (X,))
    torch.testing.assert_close(program.module()(X), model(X))


def test_requires_grad_and_buffers_follow_the_weights():
    net = nn.BatchNorm1d(3)
    net.bias.requires_grad_(False)
    net.register_buffer("scratch", torch.ones(2), persistent=False)
    p = fp.parametrize(net, {"bias": WeightNorm(), "running_var": Positive()})
    model = fp.Parametrized(net, p)
    assert [n for n, t in model.named_parameters() if t.requires_grad] == ["net.weight"]
    assert "raw.running_var" in dict(model.named_buffers())
    assert "net.scratch" in dict(model.named_buffers())
    assert "net.scratch" not in model.state_dict()
    assert not model.fold().bias.requires_grad


class Counter(nn.Module):
    """Puts a new tensor in its buffer's place instead of writing to it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count = self.count + 1
        return self.linear(x)


def test_a_replaced_buffer_stays_out_of_the_state_dict_if_it_was():
    net = Counter()
    net.register_buffer("count", torch.zeros(()), persistent=False)
    model = fp.Parametrized(net, fp.parametrize(net, {"linear.weight": Orthogonal()}))
    before = list(model.state_dict())
    model(torch.ones(1, 2))
    assert model.net.count == 1
    assert list(model.state_dict()) == before


def test_buffers_that_the_network_replaces_are_kept():
    net = Counter()
    model = fp.Parametrized(net, fp.parametrize(net, {"linear.weight": Orthogonal()}))
    model(torch.ones(1, 2))
    model(torch.ones(1, 2))
    assert model.net.count == 2
    assert net.count == 0


def test_frozen_parts_of_the_network_stay_in_evaluation_mode():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).train()
    net[1].eval()
    model = fp.Parametrized(net, fp.parametrize(net, {"0.weight": Orthogonal()}))
    assert model.training
    assert not model.net[1].training
    assert not model.fold()[1].training
    assert model.fold()[0].training


def test_adapters_train_on_a_frozen_network():
    net = mlp(depth=1).requires_grad_(False)
    model = fp.Parametrized(net, fp.parametrize(net, {"0.weight": LoRA(rank=1)}))
    trained = [name for name, q in model.named_parameters() if q.requires_grad]
    assert trained == ["raw.0.weight.A", "raw.0.weight.B"]
    assert not model.fold()[0].weight.requires_grad


def test_what_is_no_parametrization_and_no_value():
    net = mlp(depth=1)
    with pytest.raises(TypeError, match="expected a parametrization; got a dict"):
        fp.Parametrized(net, {"0.weight": Orthogonal()})
    p = fp.parametrize(net, {"0.weight": WeightNorm()})
    with pytest.raises(
        TypeError, match=r"values\['0.weight'\]: .* fold takes values, p\(raw, state\)"
    ):
        fp.fold(net, p.init(net)[0])


def test_the_parametrization_has_to_know_every_parameter_and_tie():
    net = Tied()
    p = fp.parametrize(dict(net.named_parameters()), {"encoder.weight": Orthogonal()})
    with pytest.raises(ValueError, match=r"'encoder.weight': .* got encoder.weight = decoder.wei"):
        fp.Parametrized(net, p)
    part = {"encoder.bias": net.encoder.bias, "encoder.weight": net.encoder.weight}
    p = fp.parametrize(part, {})
    with pytest.raises(ValueError, match="unknown name 'decoder.bias': p was made without it; the"):
        fp.Parametrized(net, p)
    with pytest.raises(ValueError, match=r"unknown name '4.weight'"):
        fp.parametrize(mlp(depth=2), {"0.weight": Orthogonal()}).init(mlp(depth=3))


def test_replicas_have_networks_of_their_own():
    _, model = classifier()
    model.eval()
    expected = model(X)
    modules = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, twin in modules.items():  # as torch.nn.parallel.replicate wires them
        for name, child in module._modules.items():
            twin._modules[name] = modules[child]
        for name, tensor in module._parameters.items():
            if tensor is None:
                twin._parameters[name] = None
            else:
                setattr(twin, name, tensor.detach().clone())
        twin._buffers = {n: b if b is None else b.clone() for n, b in module._buffers.items()}
    replica = modules[model]
    assert replica.net is modules[model.net]
    for twin in (replica, model, replica):
        torch.testing.assert_close(twin(X), expected)
    assert model.net.rnn.weight_hh_l0 is None


def test_folded_weights_keep_their_layout_and_share_nothing(tmp_path):
    from safetensors.torch import save_file

    net = nn.Linear(5, 3)
    model = fp.Parametrized(net, fp.parametrize(net, {"weight": Orthogonal()}))
    folded = model.fold()
    assert folded.weight.is_contiguous()
    save_file(folded.state_dict(), tmp_path / "folded.safetensors")
    save_file(model.state_dict(), tmp_path / "raw.safetensors")
    values = {"weight": torch.randn(3, 5)}
    twin = fp.fold(net, values)
    with torch.no_grad():
        values["weight"].zero_()
        net.bias.zero_()
    assert twin.weight.count_nonzero() == 15
    assert twin.bias.count_nonzero() == 3


def test_a_leaf_without_raw_has_an_empty_one():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    shell = fp.Parametrized(net, fp.parametrize(net, {"1.*": Frozen()}))
    raw, state = shell.raw_and_state()
    assert raw["1.bias"] == {}
    torch.testing.assert_close(shell.parametrization(raw, state)["1.bias"], net[1].bias)


def test_rebase_keeps_outputs_and_parameters():
    _, model = classifier()
    train(model, X).eval()
    out, raw = model(X), model.raw.rnn.weight_hh_l0
    model.rebase()
    assert model.raw.rnn.weight_hh_l0 is raw
    assert raw.count_nonzero() == 0
    torch.testing.assert_close(model(X), out)


def test_functional_call_on_the_shell():
    net, p = mixed()
    model = fp.Parametrized(net, p).eval()
    x = torch.randn(3, 6).double()
    params = dict(model.named_parameters())

    def loss(params):
        return torch.func.functional_call(model, params, (x,)).square().sum()

    g = torch.func.grad(loss)(params)
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(g[name], parameter.grad)


def test_adapters_are_drawn_from_the_generator():
    net = mlp()
    p = fp.parametrize(net, {"*.weight": LoRA(rank=1)})
    one, two = (
        fp.Parametrized(net, p, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_failed_construction_leaves_the_network_alone():
    net = nn.Linear(2, 2)
    before = dict(net.__dict__)
    p = fp.parametrize(net, {"weight": Positive()})
    with pytest.raises(ValueError, match="'weight': Positive"):
        fp.Parametrized(net, p)
    assert net.__dict__ == before


def test_fold_checks_names_shapes_and_ties():
    net = Tied()
    ones = torch.ones(5, 5)
    with pytest.raises(ValueError, match="unknown name 'nope'"):
        fp.fold(net, {"nope": ones})
    with pytest.raises(ValueError, match=r"values\['encoder.weight'\]: expected shape \(5, 5\)"):
        fp.fold(net, {"encoder.weight": torch.ones(5)})
    with pytest.raises(ValueError, match="'decoder.weight' is tied; got two different tensors"):
        fp.fold(net, {"encoder.weight": ones, "decoder.weight": ones.clone()})
    with pytest.raises(TypeError, match="values: expected a dict of tensors; got"):
        fp.fold(net, net)
    folded = fp.fold(net, {"decoder.weight": ones})
    assert torch.equal(folded.encoder.weight, ones)
    assert folded.encoder.bias is not net.encoder.bias
    assert torch.equal(folded.encoder.bias, net.encoder.bias)


def test_repr_shows_the_network_and_the_table():
    _, model = classifier()
    assert "(rnn): LSTM(3, 8, batch_first=True)" in repr(model)
    assert "head.weight" in repr(model)


def test_full_precision_is_public_for_own_transforms():
    class Inverse:
        @full_precision
        def forward(self, raw, state):
            assert raw.dtype == torch.float32
            return torch.linalg.inv(raw)

    assert Inverse().forward(torch.eye(2, dtype=torch.bfloat16), {}).dtype == torch.bfloat16
