"""Where torch.nn.utils.parametrize goes wrong, and the functional form does not.

Each test names the problem; where it is stable, torch's own failure is asserted beside it.
"""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_leaves, tree_map

import funcparam as fp
from funcparam.transforms import Orthogonal, SpectralNorm, WeightNorm
from tests.networks import Tied
from tests.training.test_training import error


def hessian_vector(loss, leaves, direction):
    g = torch.autograd.grad(loss(), leaves, create_graph=True)
    return torch.autograd.grad(
        sum((a * b).sum() for a, b in zip(g, direction, strict=True)), leaves
    )


def finite_difference(loss, leaves, direction, step=1e-5):
    def gradient(k):
        with torch.no_grad():
            for t, d in zip(leaves, direction, strict=True):
                t.add_(k * d)
        g = torch.autograd.grad(loss(), leaves)
        with torch.no_grad():
            for t, d in zip(leaves, direction, strict=True):
                t.sub_(k * d)
        return g

    plus, minus = gradient(step), gradient(-step)
    return [(a - b) / (2 * step) for a, b in zip(plus, minus, strict=True)]


def test_problem_1_second_order_gradients_of_weight_norm():
    x, y = torch.randn(6, 4).double(), torch.randn(6, 3).double()
    net = nn.Linear(4, 3).double()

    def gap(loss, leaves):
        direction = [torch.randn_like(t) for t in leaves]
        exact = hessian_vector(loss, leaves, direction)
        finite = finite_difference(loss, leaves, direction)
        return max((a - b).abs().max().item() for a, b in zip(exact, finite, strict=True))

    p = fp.parametrize(net, {"weight": WeightNorm()})
    raw, state = p.init(net)
    leaves = [t.requires_grad_() for t in tree_leaves(raw)]

    def ours():
        return F.mse_loss(functional_call(net, p(raw, state), (x,)).tanh(), y)

    assert gap(ours, leaves) < 1e-7

    theirs = parametrizations.weight_norm(copy.deepcopy(net))
    assert gap(lambda: F.mse_loss(theirs(x).tanh(), y), list(theirs.parameters())) > 1e-3


@pytest.mark.parametrize("map", ["matrix_exp", "cayley", "householder"])
def test_problem_2_orthogonal_weights_survive_weight_decay(map):
    net = nn.Linear(8, 8, bias=False)
    model = fp.Parametrized(net, fp.parametrize(net, {"weight": Orthogonal(map)}))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
    assert error(model.values()["weight"]) < 1e-5


def test_problem_2_torch_householder_does_not():
    net = parametrizations.orthogonal(nn.Linear(8, 8, bias=False), orthogonal_map="householder")
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    assert net.weight.count_nonzero() == 0


@pytest.mark.parametrize("transform", [Orthogonal(), WeightNorm(), SpectralNorm()], ids=repr)
def test_problem_6_ties_survive_everything(transform):
    net = Tied()
    before = copy.deepcopy(net.state_dict())
    p = fp.parametrize(net, {"encoder.weight": transform})
    raw, state = p.init(net)
    params = p(raw, state)
    assert params["decoder.weight"] is params["encoder.weight"]
    x = torch.randn(3, 5)

    def loss(params):
        return functional_call(net, params, (x,), tie_weights=False).square().sum()

    def through(raw):
        return loss(p(raw, state))

    g = grad(through)(raw)
    # the gradient of a tie is the sum over its places
    separate = grad(loss)({**params, "decoder.weight": params["decoder.weight"].clone()})
    _, pull = torch.func.vjp(lambda r: p(r, state)["encoder.weight"], raw)
    (summed,) = pull(separate["encoder.weight"] + separate["decoder.weight"])
    torch.testing.assert_close(
        tree_leaves(g["encoder.weight"]), tree_leaves(summed["encoder.weight"])
    )
    assert net.decoder.weight is net.encoder.weight
    assert all(torch.equal(a, before[name]) for name, a in net.state_dict().items())
    model = fp.Parametrized(net, p)
    assert not any(key.startswith("raw.decoder.weight") for key in model.state_dict())
    folded = model.fold()
    assert folded.decoder.weight is folded.encoder.weight


def test_problem_8_one_power_iteration_a_step():
    net = nn.Linear(4, 4)
    with torch.no_grad():
        net.weight.copy_(torch.randn(4, 4))
    p = fp.parametrize(net, {"weight": SpectralNorm()})
    raw, state = p.init(net)
    raw = tree_map(lambda t: t + torch.randn_like(t), raw)
    assert torch.equal(p(raw, state)["weight"], p(raw, state)["weight"])
    assert not torch.equal(p.update(raw, state)["weight"]["u"], state["weight"]["u"])

    theirs = parametrizations.spectral_norm(copy.deepcopy(net))
    with torch.no_grad():
        theirs.parametrizations.weight.original.copy_(raw["weight"])
    assert not torch.equal(theirs.weight, theirs.weight)


def test_problem_13_types_are_kept():
    net = nn.Linear(4, 4)
    p = fp.parametrize(net, {"weight": Orthogonal()})
    functional_call(net, p(*p.init(net)), (torch.ones(1, 4),))
    assert type(net) is nn.Linear
    assert type(fp.Parametrized(net, p).net) is nn.Linear
    assert type(parametrizations.orthogonal(copy.deepcopy(net))) is not nn.Linear


@pytest.mark.parametrize("transform", [SpectralNorm(), WeightNorm(), Orthogonal("householder")])
def test_problem_15_vmap_jvp_hessian_in_training_mode(transform):
    net = nn.Linear(3, 3).double().train()
    p = fp.parametrize(net, {"weight": transform})
    raw, state = p.init(net)
    raw = tree_map(lambda t: t + 0.1 * torch.randn_like(t), raw)
    x = torch.randn(2, 3).double()

    def loss(raw):
        new = p.update(raw, state)
        return functional_call(net, p(raw, new), (x,)).square().sum()

    stacked = tree_map(lambda t: torch.stack([t, 2 * t]), raw)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = vmap(loss)(stacked)
    torch.testing.assert_close(losses[0], loss(raw))
    _, slope = jvp(loss, (raw,), (raw,))
    torch.testing.assert_close(
        slope,
        sum(
            (a * b).sum()
            for a, b in zip(tree_leaves(grad(loss)(raw)), tree_leaves(raw), strict=True)
        ),
    )
    bias = raw["bias"]
    H = hessian(lambda b: loss({**raw, "bias": b}))(bias)
    torch.testing.assert_close(H, 4 * torch.eye(3, dtype=torch.float64))


def test_problem_15_torch_fails():
    net = parametrizations.spectral_norm(nn.Linear(3, 3)).train()
    params = dict(net.named_parameters())
    stacked = {name: torch.stack([t, t]).detach() for name, t in params.items()}
    with pytest.raises(RuntimeError):
        vmap(lambda q: functional_call(net, q, (torch.ones(1, 3),)))(stacked)


class Reads(nn.Module):
    """Reads its weight three times."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3, 3))

    def forward(self, x):
        return x @ self.weight @ self.weight @ self.weight


def test_problem_16_one_evaluation_a_step():
    calls = []

    def counted(raw):
        calls.append(raw)
        return raw.exp()

    net = Reads()
    p = fp.parametrize(net, {"weight": fp.transform(counted, torch.log)})
    raw, state = p.init(net)
    calls.clear()
    grad(lambda r: functional_call(net, p(r, state), (torch.ones(1, 3),)).sum())(raw)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("map", ["matrix_exp", "cayley", "householder"])
def test_problem_17_orthogonality_is_bounded_in_every_dtype(map, dtype):
    net = nn.Linear(16, 16).to(dtype)
    p = fp.parametrize(net, {"weight": Orthogonal(map)})
    raw, state = p.init(net)
    raw["weight"] = torch.randn(16, 16).to(dtype)
    assert error(p(raw, state)["weight"]) < 4 * torch.finfo(dtype).eps
    wide = fp.parametrize(nn.Linear(16, 16), {"weight": Orthogonal(map)})
    raw, state = wide.init(nn.Linear(16, 16))
    with torch.autocast("cpu", torch.bfloat16):
        value = wide(raw, state)["weight"]
    assert value.dtype == torch.float32
    assert error(value) < 1e-5


def test_problem_17_torch_fails():
    for map in ("cayley", "householder"):
        net = parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map=map).bfloat16()
        with pytest.raises(NotImplementedError, match="not implemented for 'BFloat16'"):
            net(torch.ones(1, 4, dtype=torch.bfloat16))


@pytest.mark.parametrize("transform", [Orthogonal(), WeightNorm(), SpectralNorm()], ids=repr)
def test_problem_18_meta_then_materialise_then_train(transform):
    with torch.device("meta"):
        net = nn.Linear(4, 4)
    p = fp.parametrize(net, {"weight": transform})
    raw, state = p.init(net)
    shapes = tree_map(lambda t: t.shape, (raw, state))
    assert all(t.is_meta for t in tree_leaves((raw, state)))
    net = net.to_empty(device="cpu")
    net.reset_parameters()
    assert tree_map(lambda t: t.shape, p.init(net)) == shapes
    model = fp.Parametrized(net, p)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    x = torch.randn(8, 4)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(F.mse_loss(model(x), x))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("transform", [Orthogonal(), WeightNorm(), SpectralNorm()], ids=repr)
def test_problem_18_lazy_then_one_batch_then_train(transform):
    net = nn.Sequential(nn.LazyLinear(4), nn.LazyLinear(2))
    with pytest.raises(ValueError, match="Run one batch through the network first"):
        fp.parametrize(net, {"0.weight": transform})
    net(torch.randn(3, 5))
    model = fp.Parametrized(net, fp.parametrize(net, {"0.weight": transform}))
    model(torch.randn(3, 5)).sum().backward()
    assert all(q.grad.isfinite().all() for q in model.parameters())


def test_problem_18_torch_fails_on_meta():
    with torch.device("meta"):
        net = nn.Linear(4, 4)
    with pytest.raises(RuntimeError):
        parametrizations.orthogonal(net)


def test_feasible_weights_are_kept_not_sampled():
    net = nn.Linear(4, 4)
    nn.init.orthogonal_(net.weight)
    p = fp.parametrize(net, {"weight": Orthogonal(), "bias": fp.transforms.Interval(-9, 9)})
    torch.testing.assert_close(p(*p.init(net)), dict(net.named_parameters()))
