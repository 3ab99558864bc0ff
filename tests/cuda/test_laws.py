"""Every law for every row on the device: it does what the CPU does."""

from contextlib import suppress

import pytest
import torch
from torch.func import grad, vmap
from torch.utils._pytree import tree_map

from funcparam.transforms import Orthogonal, SpectralNorm, WeightNorm
from tests.cases import raw_and_state, rebuild, tensors, value_of
from tests.cuda.devices import CUDA, captured, finished, nothing_waits, on_devices
from tests.laws.test_dtypes import BOUNDS, cast
from tests.laws.test_sync import MAY_WAIT, kinds

# how far off gradients are, of their length; those of a half are rounded, and the sums before
GRADIENTS = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}


def moved(tree, device):
    return tree_map(lambda t: t.detach().to(device), tree)


def evaluated(case, raw, state):
    """The value, and the gradients of a sum of it."""
    leaves = [t.requires_grad_() for t in tensors(raw) if t.is_floating_point() or t.is_complex()]
    value = case.transform.forward(raw, state)
    if not value.requires_grad:
        return value, []
    weights = torch.linspace(-1, 1, value.numel(), dtype=torch.float64, device=value.device)
    weights = weights.reshape(value.shape).to(value.dtype)
    grads = torch.autograd.grad(value, leaves, weights, allow_unused=True)
    return value.detach(), [g for g in grads if g is not None]


@on_devices()
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_values_and_gradients_are_those_of_the_cpu_in_float64(device, case, dtype):
    for shape in case.shapes:
        raw, state = (cast(tree, dtype) for tree in raw_and_state(case, shape))
        wide = [cast(tree, torch.float64) for tree in (raw, state)]
        value, grads = evaluated(case, *moved((raw, state), device))
        expected, exact = evaluated(case, *moved(wide, "cpu"))
        assert value.device.type == device
        bound = 40 * torch.finfo(dtype).eps * expected.abs().amax().clamp_min(1)
        assert (value.cpu().to(expected.dtype) - expected).abs().amax() <= bound
        assert len(grads) == len(exact)
        for found, other in zip(grads, exact, strict=True):
            off = torch.linalg.vector_norm(found.cpu().to(other.dtype) - other)
            assert off <= GRADIENTS[dtype] * torch.linalg.vector_norm(other).clamp_min(1)


@on_devices()
def test_tf32_keeps_the_constraint_to_three_digits(device, case):
    """Products then have the ten bits of its fractions, whatever a parametrization does."""
    raw, state = (cast(t, torch.float32) for t in raw_and_state(case, case.shapes[0]))
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        value = case.transform.forward(*moved((raw, state), device)).cpu()
    finally:
        torch.set_float32_matmul_precision(precision)
    expected = case.transform.forward(raw, state)
    bound = 2e-2 * expected.abs().amax().clamp_min(1)
    assert (value - expected).abs().amax() <= bound
    before = case.transform.violation(expected, state).nan_to_num()
    assert case.transform.violation(value, state).nan_to_num() <= before + 2e-2


@on_devices()
def test_init_and_update_are_those_of_the_cpu(device, case):
    for shape in case.shapes:
        value = value_of(case, shape)
        raw, state = case.transform.right_inverse(
            value.to(device), generator=torch.Generator(device).manual_seed(0)
        )
        assert all(t.device.type == device for t in (*tensors(raw), *tensors(state)))
        back = case.transform.forward(raw, state).cpu()
        torch.testing.assert_close(back, value, rtol=1e-7, atol=1e-8)
        raw, state = raw_and_state(case, shape)
        new = case.transform.update(*moved((raw, state), device))
        expected = case.transform.update(raw, state)
        torch.testing.assert_close(moved(dict(new), "cpu"), dict(expected), rtol=1e-9, atol=1e-9)


def waits_by_itself(case):
    return kinds(case.transform) & MAY_WAIT["forward"].keys()


@on_devices()
def test_no_step_waits(device, case):
    may = {method: kinds(case.transform) & set(own) for method, own in MAY_WAIT.items()}
    raw, state = moved(raw_and_state(case, case.shapes[0]), device)

    def step():
        value, _ = evaluated(case, raw, state)
        case.transform.update(raw, state)
        return value

    def project(value):
        with suppress(NotImplementedError):  # an adapter
            case.transform.project(value, state)

    value = step()
    project(value)  # the first calls make handles and plans
    if not may["forward"]:
        with nothing_waits(device):
            step()
    if not may["forward"] and not may["project"]:
        with nothing_waits(device):
            project(value)


@on_devices()
def test_a_captured_graph(device, case):
    if waits_by_itself(case):
        return
    raw, state = moved(raw_and_state(case, case.shapes[0]), device)
    other = rebuild(raw, [0.9 * t if t.is_floating_point() else t for t in tensors(raw)])
    expected = evaluated(case, moved(other, device), state)
    step = captured(device, lambda: evaluated(case, raw, state))
    with torch.no_grad():
        for old, new in zip(tensors(raw), tensors(other), strict=True):
            old.copy_(new)
    found = step()
    finished(device)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@on_devices()
def test_vmap_is_a_loop(device, case):
    pairs = [moved(raw_and_state(case, case.shapes[0]), device) for _ in range(2)]
    raws, states = tree_map(lambda *own: torch.stack(own), *pairs)
    values = vmap(case.transform.forward)(raws, states)
    loop = torch.stack([case.transform.forward(*pair) for pair in pairs])
    torch.testing.assert_close(values, loop, rtol=1e-9, atol=1e-9)
    if tensors(raws) and not values.is_complex():
        gradient = grad(lambda raw, state: case.transform.forward(raw, state).square().sum())
        expected = [gradient(*pair) for pair in pairs]
        found = vmap(gradient)(raws, states)
        stacked = tree_map(lambda *own: torch.stack(own), *expected)
        torch.testing.assert_close(found, stacked, rtol=1e-8, atol=1e-8)


@on_devices()
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(device, case, low):
    raw, state = (cast(t, torch.float32) for t in raw_and_state(case, case.shapes[0]))
    raw, state = moved((raw, state), device)
    expected = case.transform.forward(raw, state)
    with torch.autocast(device, low):
        found = case.transform.forward(raw, state)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


COMPILED = [
    Orthogonal(),
    Orthogonal("cayley"),
    Orthogonal("householder"),
    SpectralNorm(),
    WeightNorm(),
]


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("transform", COMPILED, ids=str)
def test_compiled_with_graphs_and_exported(device, transform):
    torch.manual_seed(0)
    raw, state = transform.right_inverse(torch.linalg.qr(torch.randn(33, 33)).Q)
    raw, state = moved((raw, state), device)
    expected = transform.forward(raw, state)
    how = {"backend": "aot_eager"} if device == "cpu" else {"mode": "reduce-overhead"}
    compiled = torch.compile(transform.forward, fullgraph=True, **how)
    for _ in range(3):  # the third replays a graph
        found = compiled(raw, state).clone()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    class Map(torch.nn.Module):
        def forward(self, raw, state):
            return transform.forward(raw, state)

    program = torch.export.export(Map(), (raw, state))
    torch.testing.assert_close(program.module()(raw, state), expected, rtol=1e-4, atol=1e-5)


def test_what_is_out_of_reach_is_not_finite(device):
    base = torch.eye(3, device=device)
    huge = torch.full((3, 3), 1e20, device=device)
    if device == "cpu":
        with pytest.raises(torch.linalg.LinAlgError):
            Orthogonal("cayley").forward(huge, {"base": base})
        return
    assert not Orthogonal("cayley").forward(huge, {"base": base}).isfinite().all()
    assert Orthogonal().forward(huge, {"base": base}).isnan().all()
