"""Known problems of torch's module: each test shows torch's failing and compat passing.

Where torch's failure is not stable enough to assert, the test shows compat's side only.
"""

import copy
import gc
import operator
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call, grad, hessian, jvp, stack_module_state, vmap
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from tests.compat.parts import BOTH, Centred, Double, Symmetric, api, functions
from tests.versions import words_of_213

RAW = "parametrizations.weight.original"


@pytest.fixture(params=["torch", "compat"])
def both(request):
    """The two implementations; `right` says whether the problem has to be gone."""
    register, functions_ = BOTH[request.param]
    return register, functions_, request.param == "compat"


def linear(*shape, seed=0, **kwargs):
    torch.manual_seed(seed)
    return nn.Linear(*(shape or (3, 3)), **kwargs)


def kernels():
    """The three ready-made parametrizations of compat."""
    return [functions.orthogonal, functions.weight_norm, functions.spectral_norm]


def orthogonality(W):
    tall = W if W.shape[-2] >= W.shape[-1] else W.mT
    gram = (tall.mT @ tall).float()
    return (gram - torch.eye(len(gram))).abs().max().item()


@pytest.mark.parametrize("trivial", [True, False])
def test_problem_2_householder_survives_weight_decay(both, trivial):
    _, functions_, right = both
    layer = functions_.orthogonal(linear(3, 5), "weight", "householder", use_trivialization=trivial)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        layer(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
    assert (orthogonality(layer.weight) < 1e-5) == right


def test_problem_3_functional_call_uses_the_plain_name_as_it_is(both):
    _, functions_, right = both
    layer = functions_.orthogonal(linear())
    W = torch.randn(3, 3, requires_grad=True)
    x = torch.randn(2, 3)
    functional_call(layer, {"weight": W}, (x,)).sum().backward()
    assert (W.grad is not None) == right
    assert (layer.parametrizations.weight.original.grad is None) == right


class Shared(nn.Module):
    """Calls its layer inside of a second functional_call."""

    def __init__(self, layer, inner):
        super().__init__()
        self.layer, self.inner = layer, inner

    def forward(self, x):
        before = self.layer(x)
        inside = functional_call(self.layer, {"weight": self.inner}, (x,))
        assert torch.equal(self.layer(x), before)
        return before, inside


@pytest.mark.parametrize("function", kernels())
def test_problem_3_nested_and_failing_calls_leave_the_module_alone(function):
    layer = function(linear()).eval()
    x, value = torch.randn(2, 3), layer.weight.detach().clone()
    outer, inner = torch.randn(3, 3), torch.randn(3, 3)
    before, inside = functional_call(Shared(layer, inner), {"layer.weight": outer}, (x,))
    assert_close(before, x @ outer.T + layer.bias)
    assert_close(inside, x @ inner.T + layer.bias)
    assert torch.equal(layer.weight, value)
    with pytest.raises(RuntimeError, match="shapes"):
        functional_call(layer, {"weight": outer}, (torch.ones(2, 7),))
    assert torch.equal(layer.weight, value)
    assert "_funcparam_exchanged" not in vars(layer)
    with api.cached():
        same = functional_call(layer, {"weight": layer.weight}, (x,))
    assert torch.equal(same, layer(x))
    W = torch.randn(4, 3, 3)
    batch = vmap(lambda w: functional_call(layer, {"weight": w}, (x,)))(W)
    assert_close(batch[2], x @ W[2].T + layer.bias)
    assert torch.equal(layer.weight, value)


def test_problem_3_strict_refuses_the_plain_name():
    with pytest.raises(RuntimeError, match="weight"):
        functional_call(
            functions.orthogonal(linear()),
            {"weight": torch.eye(3)},
            (torch.ones(1, 3),),
            strict=True,
        )


def test_problem_3_in_a_compiled_graph_is_a_clear_error():
    layer = functions.orthogonal(linear())
    with pytest.raises(Exception, match="parametrizations.weight.original"):
        torch.compile(
            lambda w: functional_call(layer, {"weight": w}, (torch.ones(1, 3),)),
            backend="eager",
            fullgraph=True,
        )(torch.eye(3))


# problem 4: cached()


def test_problem_4_another_raw_tensor_in_one_block(both):
    register, _, right = both
    layer = register.register_parametrization(linear(bias=False), "weight", Double())
    x = torch.eye(3)
    with register.cached():
        a, b = (functional_call(layer, {RAW: torch.full((3, 3), v)}, (x,)) for v in (1.0, 2.0))
    assert torch.equal(a, b) != right


def test_problem_4_gradients_in_one_block(both):
    register, _, right = both
    layer = register.register_parametrization(linear(bias=False), "weight", Double())

    def loss(raw):
        return functional_call(layer, {RAW: raw}, (torch.eye(3),)).sum()

    with register.cached():
        first, second = (grad(loss)(torch.ones(3, 3) * v) for v in (1.0, 2.0))
    assert_close(first, torch.full((3, 3), 2.0))
    assert bool(second.any()) == right


def test_problem_4_an_update_in_place(both):
    register, _, right = both
    layer = register.register_parametrization(linear(), "weight", Double())
    with register.cached():
        before = layer.weight
        with torch.no_grad():
            layer.parametrizations.weight.original.add_(1)
        assert torch.equal(before, layer.weight) != right


def test_problem_4_a_first_read_without_grad(both):
    register, _, right = both
    layer = register.register_parametrization(linear(), "weight", Double())
    with register.cached():
        with torch.no_grad():
            _ = layer.weight
        assert layer.weight.requires_grad == right


def test_problem_4_another_thread(both):
    register, _, right = both
    layer = register.register_parametrization(linear(), "weight", Double())
    seen = []
    with register.cached():
        here = layer.weight
        thread = threading.Thread(target=lambda: seen.append(layer.weight))
        thread.start()
        thread.join()
        assert here is layer.weight
    assert (seen[0] is not here) == right


def test_problem_4_vmap_leaks_nothing(both):
    register, _, right = both
    layer = register.register_parametrization(linear(bias=False), "weight", Double())
    x = torch.eye(3)
    with register.cached():
        vmap(lambda raw: functional_call(layer, {RAW: raw}, (x,)))(torch.ones(2, 3, 3))
        after = layer.weight
    assert (torch.func.debug_unwrap(after) is after) == right


def test_problem_4_export_leaks_nothing(both):
    register, _, right = both
    layer = register.register_parametrization(linear(), "weight", Double())
    with register.cached():
        torch.export.export(layer, (torch.ones(2, 3),), strict=False)
        assert (type(layer.weight) is torch.Tensor) >= right


def test_problem_4_a_block_that_is_never_left_gives_no_stale_value():
    layer = api.register_parametrization(linear(), "weight", Double())
    blocks = []

    def forward(x):
        blocks.append(api.cached())
        blocks[-1].__enter__()
        return layer(x)

    checkpoint(forward, torch.ones(1, 3), use_reentrant=False).sum().backward()
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(1)
    assert_close(layer.weight, before + 2)
    for block in blocks:
        block.__exit__(None, None, None)


def test_problem_4_the_cache_evaluates_once_and_holds_nothing():
    calls = []
    layer = api.register_parametrization(linear(), "weight", lambda X: calls.append(1) or 2 * X)
    calls.clear()

    with api.cached():
        value = layer.weight
        with api.cached():
            assert layer.weight is value
        assert layer.weight is value
        layer.weight.sum().backward()
        gone = weakref.ref(value)
        del value
        assert gone() is not None
    assert gone() is None
    assert len(calls) == 1
    with pytest.raises(RuntimeError, match="inside"), api.cached():
        raise RuntimeError("inside")
    assert layer.weight is not layer.weight


def test_problem_4_the_cache_in_a_compiled_graph():
    cell = api.register_parametrization(linear(), "weight", Double())

    def step(x):
        with api.cached():
            for _ in range(3):
                x = cell(x)
        return x

    graphs = []

    def backend(graph, _):
        graphs.append(sum(node.target is operator.mul for node in graph.graph.nodes))
        return graph

    x = torch.ones(1, 3)
    expected = step(x)
    assert_close(torch.compile(step, backend=backend, fullgraph=True)(x), expected)
    assert graphs == [1]


def test_problem_4_a_block_around_a_compiled_function():
    layer = api.register_parametrization(linear(), "weight", Double())
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def read():
        return layer.weight, layer.weight

    for _ in range(3):
        with api.cached():
            assert operator.is_(*read())
            for _ in range(3):
                with torch.no_grad():
                    layer.parametrizations.weight.original.add_(1)
                expected = 2 * layer.parametrizations.weight.original
                assert all(torch.equal(value, expected) for value in read())
                assert layer.weight is layer.weight
                assert torch.equal(layer.weight, expected)
    assert counter.frame_count <= 3


def test_problem_4_a_compiler_that_gave_up_on_the_block():
    layer = api.register_parametrization(linear(), "weight", Double())

    def values():
        with api.cached():
            a = layer.weight
            torch._dynamo.graph_break()
            b = layer.weight
            with torch.no_grad():
                layer.parametrizations.weight.original.add_(1)
            torch._dynamo.graph_break()
            return a, b, layer.weight

    a, b, c = torch.compile(values, backend="eager")()
    assert a is b
    assert_close(c, a + 2)


def test_problem_4_autocast_inference_and_training_mode_are_seen():
    layer = api.register_parametrization(linear(), "weight", Product())
    with api.cached():
        full = layer.weight
        with torch.autocast("cpu", torch.bfloat16):
            assert layer.weight.dtype is torch.bfloat16
        assert layer.weight.dtype is full.dtype
        with torch.inference_mode():
            assert layer.weight.is_inference()
        assert not layer.weight.is_inference()
    layer = api.register_parametrization(linear(), "weight", Centred())
    with api.cached():
        training = layer.train().weight
        assert not torch.equal(layer.eval().weight, training)


class Product(nn.Module):
    def forward(self, X):
        return X @ X


@pytest.mark.filterwarnings("ignore")
def test_tracing_a_cached_model_is_torchs_error():
    layer = api.register_parametrization(linear(), "weight", Double())
    with pytest.raises(RuntimeError, match="Cannot trace a model while caching"), api.cached():
        torch.jit.trace(layer, torch.ones(1, 3))


def test_problem_5_reset_parameters_changes_the_weight(both):
    _, functions_, right = both
    layer = functions_.weight_norm(linear())
    before = layer.weight.detach().clone()
    torch.manual_seed(7)
    layer.reset_parameters()
    assert torch.equal(layer.weight, before) != right
    if right:
        assert_close(layer.weight.detach(), linear(seed=7).weight.detach())


def test_problem_5_reset_parameters_works_on_meta():
    with torch.device("meta"):
        layer = nn.Linear(3, 3)
    functions.weight_norm(layer).reset_parameters()
    assert layer.weight.is_meta


def test_problem_5_assignment_initialises():
    layer = functions.orthogonal(linear())
    with torch.no_grad():
        layer.weight = nn.init.orthogonal_(torch.empty(3, 3))
    assert orthogonality(layer.weight) < 1e-5


def test_problem_5_computing_with_a_value_in_place_leaves_raw_alone(both):
    register, _, _ = both
    layer = register.register_parametrization(linear(), "weight", Double())
    before = layer.weight.detach().clone()
    local = layer.weight
    local *= 2
    with torch.no_grad():
        layer.weight.zero_()
    assert_close(layer.weight.detach(), before)


def test_a_copy_made_during_functional_call_is_independent():
    class Copying(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = api.register_parametrization(linear(), "weight", Double())

        def forward(self, x):
            self.copy = copy.deepcopy(self.layer)
            return self.layer(x)

    net = Copying()
    with torch.no_grad():
        functional_call(net, {"layer.weight": torch.zeros(3, 3)}, (torch.ones(1, 3),))
        net.copy.parametrizations.weight.original.fill_(3.0)
    assert_close(net.copy.weight.detach(), torch.full((3, 3), 6.0))


@pytest.mark.parametrize("dim", [2, 5, -3])
def test_weight_norm_refuses_a_dimension_that_is_not_there(both, dim):
    _, functions_, _ = both
    with pytest.raises(IndexError, match="Dimension out of range"):
        functions_.weight_norm(linear(), dim=dim)


def test_problem_5_what_shares_memory_with_raw_may_be_written_to():
    layer = api.register_parametrization(linear(), "weight", nn.Identity())
    nn.init.ones_(layer.weight)
    assert_close(layer.weight.detach(), torch.ones(3, 3))


def test_problem_5_reset_parameters_where_nothing_can_be_written():
    layer = api.register_parametrization(linear(), "weight", Symmetric())
    with pytest.raises(RuntimeError, match="does not implement right_inverse"):
        layer.reset_parameters()


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("name", ["orthogonal", "weight_norm"])
def test_problem_6_one_of_two_that_are_tied_is_refused(both, name, optimized):
    _, functions_, right = both
    a, b = linear(), nn.Embedding(3, 3)
    b.weight = a.weight
    before = a.weight.detach().clone()
    if optimized:
        torch.optim.SGD(a.parameters(), 0.1)
    if right:
        with pytest.raises(
            ValueError, match=r"also 'weight' of Embedding\(3, 3\), which.*To share"
        ):
            getattr(functions_, name)(a)
        assert a.weight is b.weight
        assert type(a) is nn.Linear
    else:
        getattr(functions_, name)(a)
        with torch.no_grad():
            for raw in a.parametrizations.weight.parameters():
                raw.add_(1)
    assert torch.equal(b.weight, before) == right


def test_problem_6_ties_within_a_module_of_buffers_and_of_raw_are_found():
    layer = nn.Linear(3, 3)
    layer.twin = layer.weight
    with pytest.raises(ValueError, match="'weight' of Linear.* is also 'twin' of Linear"):
        api.register_parametrization(layer, "weight", Double())
    layer = nn.BatchNorm1d(3)
    layer.register_buffer("twin", layer.running_mean)
    with pytest.raises(ValueError, match="'running_mean' of BatchNorm1d.* is also 'twin' of B"):
        api.register_parametrization(layer, "running_mean", Double())
    a, b = linear(), linear()
    api.register_parametrization(a, "weight", Symmetric())
    b.weight = a.parametrizations.weight.original
    with pytest.raises(ValueError, match="also 'original' of ParametrizationList"):
        api.register_parametrization(b, "weight", Double())


@pytest.mark.parametrize("part", [Symmetric(), nn.Identity()], ids=["inverse", "identity"])
def test_problem_6_where_raw_is_the_value_the_twin_stays_what_it_was(part):
    a, b = linear(), linear()
    b.weight = a.weight
    before = a.weight.detach().clone()
    api.register_parametrization(a, "weight", part)
    assert b.weight is a.parametrizations.weight.original
    assert torch.equal(b.weight, before)


def test_problem_6_what_nobody_holds_is_no_tie():
    a, b = linear(), linear()
    b.weight = a.weight
    b.itself = [b]  # found by the garbage collector only
    del b
    gc.disable()
    try:
        functions.orthogonal(a)
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["orthogonal", "weight_norm"])
def test_problem_6_removal_on_one_of_two_leaves_the_other_alone(both, name):
    register, functions_, right = both
    a, b = getattr(functions_, name)(linear()), linear()
    register.transfer_parametrizations_and_params(a, b, "weight")
    with torch.no_grad():
        for raw in a.parametrizations.weight.parameters():
            raw.mul_(0.5)
    before = b.weight.detach().clone()
    register.remove_parametrizations(a, "weight")
    assert_close(a.weight.detach(), before)
    assert torch.equal(b.weight, before) == (right or name == "weight_norm")


@pytest.mark.parametrize("function", ["orthogonal", "weight_norm", "spectral_norm"])
def test_problem_6_a_tie_is_transferred(both, function):
    register, functions_, _ = both
    a, b = linear(seed=0), linear(seed=1)
    b.weight = a.weight
    del b.weight
    getattr(functions_, function)(a)
    a.eval(), b.eval()
    before = a.weight.detach().clone()
    register.transfer_parametrizations_and_params(a, b)
    assert torch.equal(a.weight, b.weight)
    assert torch.equal(a.weight, before)
    net = nn.Sequential(a, b)
    x = torch.ones(1, 3)
    net(x).square().sum().backward()
    total = [raw.grad.clone() for raw in a.parametrizations.parameters()]
    net.zero_grad()
    b(a(x).detach()).square().sum().backward()
    parts = [raw.grad.clone() for raw in a.parametrizations.parameters()]
    assert not torch.equal(total[0], parts[0])
    twin = copy.deepcopy(net)
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin[0].weight, twin[1].weight)
    raw = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    functional_call(net, raw, (x,))
    assert torch.equal(a.weight, b.weight)


def test_problem_7_the_direction_is_the_parameter_an_optimizer_knows(both):
    register, functions_, right = both
    layer = linear()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    functions_.weight_norm(layer)
    before = layer.weight.detach().clone()
    layer(torch.ones(1, 3)).square().sum().backward()
    optimizer.step()
    assert torch.equal(layer.weight, before) != right
    if right:
        known = layer.parametrizations.weight.original1
        register.remove_parametrizations(layer, "weight")
        assert layer.weight is known


def test_problem_8_each_read_is_a_step_as_in_torch_and_cached_reads_once(both):
    register, functions_, _ = both
    layer = functions_.spectral_norm(linear(20, 20))
    assert not torch.equal(layer.weight, layer.weight)
    with register.cached():
        a, u = layer.weight, layer.parametrizations.weight[0]._u.clone()
        assert layer.weight is a
    assert torch.equal(u, layer.parametrizations.weight[0]._u)


def test_problem_8_a_fused_optimizer_is_a_change_of_raw(both):
    _, functions_, _ = both
    layer = functions_.spectral_norm(linear(8, 8))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, fused=True)
    layer(torch.ones(1, 8)).square().sum().backward()
    optimizer.step()
    u = layer.parametrizations.weight[0]._u.clone()
    _ = layer.weight
    assert not torch.equal(u, layer.parametrizations.weight[0]._u)


def test_removing_under_no_grad_leaves_a_parameter():
    layer = functions.weight_norm(linear())
    with torch.no_grad():
        api.remove_parametrizations(layer, "weight")
    assert isinstance(layer.weight, nn.Parameter)
    assert layer.weight.requires_grad


@words_of_213
def test_problem_3_in_a_compiled_function_is_refused():
    layer = functions.orthogonal(linear())

    def call(W):
        return functional_call(layer, {"weight": W}, (torch.ones(1, 3),)).sum()

    with pytest.raises(RuntimeError, match="Pass the raw tensors instead"):
        torch.compile(call, backend="eager")(torch.randn(3, 3, requires_grad=True))


def test_problem_8_values_are_torchs_with_one_read_a_step():
    traces = []
    for _, functions_ in BOTH.values():
        layer = functions_.spectral_norm(linear(4, 4))
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            layer(torch.ones(1, 4)).square().sum().backward()
            optimizer.step()
        traces.append(layer.eval().weight.detach())
    assert_close(*traces)


def test_problem_10_copies_are_independent(both):
    register, _, right = both
    layer = register.register_parametrization(linear(), "weight", Double())
    x = torch.ones(1, 3)
    expected = layer(x)
    register.remove_parametrizations(copy.deepcopy(layer), "weight")
    try:
        assert torch.equal(layer(x), expected)
        fine = True
    except AttributeError:
        fine = False
    assert fine == right
    if right:
        twin = copy.deepcopy(layer)
        register.register_parametrization(twin, "bias", Double())
        assert torch.equal(layer(x), expected)
        register.remove_parametrizations(layer, "weight")
        assert torch.equal(twin(x), expected)
        average = AveragedModel(twin)
        register.remove_parametrizations(average.module, "weight")
        assert torch.equal(twin(x), expected)


def test_problem_11_pickle_is_refused_while_parametrized_and_works_afterwards(both):
    register, functions_, right = both
    layer = functions_.weight_norm(linear())
    with pytest.raises(RuntimeError, match="state_dict"):
        pickle.dumps(layer)
    _ = layer.weight
    register.remove_parametrizations(layer, "weight")
    try:
        twin = pickle.loads(pickle.dumps(layer))
        assert torch.equal(twin.weight, layer.weight)
        fine = True
    except (AttributeError, pickle.PicklingError):
        fine = False
    assert fine == right


def test_problem_13_independently_built_modules_stack(both):
    _, functions_, right = both
    layers = [functions_.weight_norm(linear(seed=i)) for i in range(4)]
    assert (len({type(layer) for layer in layers}) == 1) == right
    try:
        params, buffers = stack_module_state(layers)
    except RuntimeError:
        assert not right
        return
    x = torch.randn(2, 3)
    out = vmap(lambda p, b: functional_call(layers[0], (p, b), (x,)))(params, buffers)
    assert_close(out, torch.stack([layer(x) for layer in layers]))


def test_problem_13_one_compile_serves_48_layers(both):
    _, functions_, right = both
    layers = [functions_.weight_norm(linear(seed=i)) for i in range(48 if right else 10)]
    counter = CompileCounter()

    def run(layer, x):
        return layer(x)

    compiled = torch.compile(run, backend=counter)
    x = torch.ones(1, 3)
    for layer in layers:
        assert_close(compiled(layer, x), layer(x))
    assert (counter.frame_count == 1) == right


@pytest.mark.parametrize("function", kernels())
def test_problem_13_modules_compile_whole(function):
    layer = function(linear())
    x = torch.ones(2, 3)
    expected = copy.deepcopy(layer)(x)
    assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), expected)
    exported = torch.export.export(layer.eval(), (x,))
    assert_close(exported.module()(x), layer(x))


def test_problem_15_vmap_and_forward_mode(both):
    _, functions_, right = both
    layer = functions_.spectral_norm(linear().double())
    raws = torch.randn(4, 3, 3, dtype=torch.float64)
    x = torch.ones(1, 3, dtype=torch.float64)
    u = layer.parametrizations.weight[0]._u.clone()

    def loss(raw):
        return functional_call(layer, {RAW: raw}, (x,)).square().sum()

    try:
        batch = vmap(loss)(raws)
        jvp(loss, (raws[0],), (raws[1],))
        hessian(loss)(raws[0])
    except Exception:
        assert not right
        return
    assert right
    assert torch.equal(layer.parametrizations.weight[0]._u, u)
    assert_close(grad(loss)(raws[0]), vmap(grad(loss))(raws)[0])
    assert batch.shape == (4,)


@pytest.mark.parametrize("function", kernels())
@pytest.mark.parametrize("training", [True, False])
def test_problem_15_all_transforms_of_all_three(function, training):
    layer = function(linear().double()).train(training)
    x = torch.ones(1, 3, dtype=torch.float64)
    raw = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(raw):
        return functional_call(layer, raw, (x,)).square().sum()

    first = grad(loss)(raw)
    _, forward = jvp(loss, (raw,), (first,))
    assert_close(forward, sum((g * g).sum() for g in first.values()))
    stacked = {name: torch.stack([t, t]) for name, t in raw.items()}
    for name, g in vmap(grad(loss))(stacked).items():
        assert_close(g[1], first[name])
    twice = hessian(loss)(raw)
    assert all(h.isfinite().all() for row in twice.values() for h in row.values())


def test_problem_15_weight_norms_second_derivative(both):
    _, functions_, right = both
    layer = functions_.weight_norm(linear().double())
    names = ("parametrizations.weight.original0", "parametrizations.weight.original1")
    raw = [dict(layer.named_parameters())[name].detach().requires_grad_() for name in names]

    def value(g, v):
        out = functional_call(
            layer, dict(zip(names, (g, v), strict=True)), (torch.ones(1, 3, dtype=torch.float64),)
        )
        return out.square().sum()

    fine = torch.autograd.gradgradcheck(value, raw, raise_exception=False)
    assert fine == right


def test_problem_16_one_evaluation_for_a_forward_of_rnn_and_attention(both):
    register, _, _ = both
    calls = []

    class Count(nn.Module):
        def forward(self, X):
            calls.append(1)
            return 2 * X

    for net, name, inputs in (
        (nn.LSTM(3, 3), "weight_hh_l0", (torch.ones(5, 1, 3),)),
        (nn.MultiheadAttention(4, 2), "in_proj_weight", (torch.ones(5, 1, 4),) * 3),
    ):
        register.register_parametrization(net, name, Count())
        calls.clear()
        net(*inputs)
        assert len(calls) > 1
        calls.clear()
        with register.cached():
            net(*inputs)
        assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("map_", ["matrix_exp", "cayley", "householder"])
def test_problem_17_half_precision(dtype, map_):
    layer = functions.orthogonal(linear(4, 4, dtype=dtype), orthogonal_map=map_)
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(torch.randn(4, 4).to(dtype))
    assert layer.weight.dtype == dtype
    assert orthogonality(layer.weight) < 0.03
    full = functions.orthogonal(linear(4, 4), orthogonal_map=map_)
    with torch.autocast("cpu"):
        value = full.weight
    assert orthogonality(value) < 1e-5


def test_problem_18_meta_device(both):
    register, functions_, right = both
    try:
        layer = functions_.orthogonal(nn.Linear(4, 4, device="meta"))
    except Exception:
        assert not right
        return
    assert right
    assert layer.weight.shape == (4, 4)
    for function in kernels():
        layer = function(nn.Linear(3, 5, device="meta"))
        expected = function(linear(3, 5))
        layer.to_empty(device="cpu").load_state_dict(expected.state_dict())
        assert_close(layer.eval().weight, expected.eval().weight)
        layer.train()(torch.ones(1, 3)).sum().backward()
        register.remove_parametrizations(layer, "weight")


def test_problem_20_maml_through_weight_norm():
    """Five inner steps of second order against finite differences."""
    layer = functions.weight_norm(linear().double())
    raw = {name: p.detach().clone() for name, p in layer.named_parameters()}
    x = torch.linspace(-1, 1, 6).double().reshape(2, 3)

    def loss(raw, target):
        return (functional_call(layer, raw, (x,)) - target).square().mean()

    def adapted(raw):
        for _ in range(5):
            gradients = grad(loss)(raw, 1.0)
            raw = {name: raw[name] - 0.1 * gradients[name] for name in raw}
        return loss(raw, 0.5)

    exact = grad(adapted)(raw)
    direction = {name: torch.randn_like(p) for name, p in raw.items()}
    h = 1e-6
    moved = [adapted({n: raw[n] + s * h * direction[n] for n in raw}) for s in (1, -1)]
    expected = (moved[0] - moved[1]) / (2 * h)
    assert_close(sum((exact[n] * direction[n]).sum() for n in raw), expected, rtol=1e-6, atol=0)


def test_a_parameter_is_assigned_like_any_value(both):
    register, _, right = both
    layer = register.register_parametrization(linear(), "weight", Double())
    value = nn.Parameter(torch.rand(3, 3))
    if right:
        layer.weight = value
        assert_close(layer.weight.detach(), value.detach())
        functional_call(layer, {"weight": value}, (torch.ones(1, 3),)).sum().backward()
        assert_close(value.grad, torch.ones(3, 3))
    else:
        with pytest.raises(KeyError):
            layer.weight = value


def test_casts_leave_no_old_storage_alive():
    layer = functions.spectral_norm(linear(8, 8))
    _ = layer.weight
    storage = weakref.ref(layer.parametrizations.weight.original.untyped_storage())
    layer.double()
    gc.collect()
    assert storage() is None or storage().nbytes() == 8 * 8 * 8


def test_old_names_are_renamed_after_the_hooks_of_users():
    layer = linear()

    def older(module, state_dict, prefix, *rest):
        for key in list(state_dict):
            state_dict[key.replace("scale", "weight_g")] = state_dict.pop(key)

    layer.register_load_state_dict_pre_hook(older)
    functions.weight_norm(layer)
    saved = {"bias": torch.ones(3), "scale": torch.ones(3, 1), "weight_v": torch.eye(3)}
    layer.load_state_dict(saved)
    assert_close(layer.weight.detach(), torch.eye(3))


def test_weight_norm_comes_first_in_a_chain():
    layer = api.register_parametrization(linear(), "weight", Double())
    with pytest.raises(ValueError, match="magnitude, direction.*come first.*'weight'"):
        functions.weight_norm(layer)
    assert len(layer.parametrizations.weight) == 1


def test_the_attributes_of_torchs_parametrizations(both):
    _, functions_, _ = both
    part = functions_.spectral_norm(linear(), n_power_iterations=3, eps=1e-9).parametrizations
    assert (part.weight[0].n_power_iterations, part.weight[0].eps, part.weight[0].dim) == (
        3,
        1e-9,
        0,
    )
    assert functions_.weight_norm(linear(), dim=None).parametrizations.weight[0].dim == -1
    assert functions_.weight_norm(linear(), dim=1).parametrizations.weight[0].dim == 1


def test_spectral_norm_in_training_under_a_compiled_gradient():
    layer = functions.spectral_norm(linear())
    raw = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(raw, x):
        return functional_call(layer, raw, (x,)).square().sum()

    x = torch.ones(1, 3)
    u = layer.parametrizations.weight[0]._u.clone()
    compiled = torch.compile(grad(loss), backend="aot_eager", fullgraph=True)(raw, x)
    assert torch.equal(layer.parametrizations.weight[0]._u, u)
    assert_close(compiled, grad(loss)(raw, x))


@pytest.mark.parametrize("given", [Double(), torch.tanh], ids=["module", "function"])
def test_problem_23_a_missing_bias_and_a_plain_function(both, given):
    register, _, right = both
    with pytest.raises(Exception) as error:  # noqa: PT011
        register.register_parametrization(linear(bias=False), "bias", given)
    assert ("this module was built without it" in str(error.value)) == right
    assert isinstance(error.value, ValueError) == right


def test_problem_23_a_missing_bias_for_the_functions():
    for function in kernels():
        with pytest.raises(ValueError, match="built without it"):
            function(linear(bias=False), "bias")


def test_symmetric_without_right_inverse_is_refused_on_assignment_only():
    layer = api.register_parametrization(linear(), "weight", Symmetric())
    with pytest.raises(RuntimeError, match="does not implement right_inverse"):
        layer.weight = torch.eye(3)
