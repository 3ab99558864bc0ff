"""What PyTorch's own test file asks of a parametrization, in other words, of torch and of compat.

`make conformance` runs the file itself, where there is a copy of it.
"""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.testing import assert_close
from torch.testing._internal.two_tensor import TwoTensor

import funcparam.compat
from tests.compat.parts import BOTH

MAPS = ("matrix_exp", "cayley", "householder")


@pytest.fixture(params=BOTH)
def side(request):
    return BOTH[request.param]


@pytest.fixture(params=[False, True], ids=["set", "swap"])
def swap(request):
    torch.__future__.set_swap_module_params_on_conversion(request.param)
    yield request.param
    torch.__future__.set_swap_module_params_on_conversion(False)


def linear(*shape, **options):
    torch.manual_seed(0)
    return nn.Linear(*(shape or (3, 4)), **options)


def vectors(layer):
    part = layer.parametrizations.weight[0]
    return part._u, part._v


def naive_step(layer):
    """The value after one power iteration, by the formula."""
    W, (_, v) = layer.parametrizations.weight.original.detach(), vectors(layer)
    u = nn.functional.normalize(W @ v, dim=0)
    v = nn.functional.normalize(W.mH @ u, dim=0)
    return W / torch.vdot(u, W @ v)


class TestSpectralNorm:
    def test_what_it_adds(self, side, swap):
        _, functions = side
        before = linear()
        layer = functions.spectral_norm(copy.deepcopy(before))
        assert set(layer.state_dict()) == {
            "bias",
            "parametrizations.weight.original",
            "parametrizations.weight.0._u",
            "parametrizations.weight.0._v",
        }
        assert [x.shape for x in vectors(layer)] == [(4,), (3,)]
        assert set(layer.parametrizations.weight[0]._buffers) == {"_u", "_v"}
        raw = layer.parametrizations.weight.original
        assert isinstance(raw, nn.Parameter)
        assert raw.stride() == layer.weight.stride() == before.weight.stride()
        assert "weight" not in {*layer._buffers, *layer._parameters}

    def test_on_one_tensor_twice_and_on_another(self, side, swap):
        register, functions = side
        layer = linear()
        for name in ("weight", "weight", "bias"):
            functions.spectral_norm(layer, name)
        assert len(layer.parametrizations.weight) == 2
        register.remove_parametrizations(layer, "bias")
        assert "bias" in layer._parameters
        assert register.is_parametrized(layer, "weight")
        register.remove_parametrizations(layer, "weight")
        assert type(layer) is nn.Linear
        assert "weight" in layer._parameters

    def test_each_read_in_training_mode_is_one_iteration(self, side):
        _, functions = side
        layer = functions.spectral_norm(linear(5, 7).double())
        for _ in range(3):
            expected = naive_step(layer)
            before = copy.deepcopy(vectors(layer))
            assert_close(layer.weight.detach(), expected)
            assert not torch.equal(before[0], vectors(layer)[0])
        assert len({id(x) for x in (*before, *vectors(layer))}) == 4

    def test_iterations_in_one_step(self, side):
        _, functions = side
        layers = [functions.spectral_norm(linear(), n_power_iterations=n) for n in (1, 3)]
        layers[1].load_state_dict(layers[0].state_dict())
        for _ in range(3):
            _ = layers[0].weight
        _ = layers[1].weight
        assert_close(vectors(layers[1]), vectors(layers[0]))

    def test_none_in_evaluation_mode(self, side):
        _, functions = side
        layer = functions.spectral_norm(linear())
        last = layer(torch.eye(3))
        layer.eval()
        u, v = copy.deepcopy(vectors(layer))
        assert_close(layer(torch.eye(3)), last)
        assert torch.equal(layer.weight, layer.weight)
        assert torch.equal(u, vectors(layer)[0])
        assert torch.equal(v, vectors(layer)[1])

    def test_a_vector_is_divided_by_its_norm(self, side):
        _, functions = side
        layer = functions.spectral_norm(linear(), "bias")
        assert list(layer.parametrizations.bias[0].buffers()) == []
        raw = layer.parametrizations.bias.original
        assert_close(layer.bias, raw / raw.norm())

    def test_the_rows_are_the_outputs(self, side):
        _, functions = side
        layer = functions.spectral_norm(nn.ConvTranspose2d(3, 4, (5, 6)))
        assert vectors(layer)[0].shape == (4,)
        assert vectors(layer)[1].shape == (3 * 5 * 6,)
        assert layer(torch.ones(2, 3, 10, 12)).shape == (2, 4, 14, 17)

    @pytest.mark.parametrize("dtype", [torch.float, torch.cfloat])
    def test_a_diagonal_matrix(self, side, swap, dtype):
        _, functions = side
        layer = linear(2, 2, dtype=dtype)
        with torch.no_grad():
            diagonal = layer.weight.diagonal()
            layer.weight = nn.Parameter(torch.diag(diagonal))
            functions.spectral_norm(layer)
            assert_close(layer.weight.data, torch.diag(diagonal / diagonal.abs().max()))

    def test_training_moves_the_vectors(self, side, swap):
        _, functions = side
        layer = functions.spectral_norm(linear())
        u = vectors(layer)[0].clone()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        layer(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
        layer(torch.ones(2, 3))
        assert not torch.equal(u, vectors(layer)[0])

    def test_backward_after_several_forwards(self, side):
        """Vectors that are reset by `.data` are the ones that the next forward starts from."""
        _, functions = side
        layer = functions.spectral_norm(linear().double())
        saved = copy.deepcopy(vectors(layer))

        def forwards(x, *modes):
            for vector, before in zip(vectors(layer), saved, strict=True):
                vector.data.copy_(before)
            return sum(layer.train(mode)(x) for mode in modes)

        x = torch.randn(2, 3, dtype=torch.double, requires_grad=True)
        for modes in ((True, True), (True, False, True, False)):
            forwards(x, *modes).sum().backward()
            assert gradcheck(lambda x, modes=modes: forwards(x, *modes), (x,))
        raw = layer.parametrizations.weight.original
        assert gradcheck(lambda _: layer.eval()(x.detach()), (raw,))

    @pytest.mark.parametrize("requires_grad", [True, False])
    def test_removal_in_evaluation_mode_keeps_the_value(self, side, swap, requires_grad):
        register, functions = side
        layer = linear()
        layer.weight.requires_grad_(requires_grad)
        functions.spectral_norm(layer)
        for _ in range(3):
            out = layer(torch.eye(3)).detach()
        register.remove_parametrizations(layer.eval(), "weight")
        assert layer.weight.requires_grad == requires_grad
        assert_close(layer(torch.eye(3)).detach(), out)

    @pytest.mark.parametrize("reads", [0, 3])
    def test_loading(self, side, swap, reads):
        register, functions = side
        layer = functions.spectral_norm(linear())
        x = torch.randn(2, 3)
        for _ in range(reads):
            layer(x)
        saved = copy.deepcopy(layer.state_dict())
        partial = copy.deepcopy(saved)
        partial["nonsense"] = "nonsense"
        with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "nonsense"'):
            layer.load_state_dict(partial)
        for key in ("", "weight.original", "weight.0._u", "weight.0._v"):
            partial.pop(f"parametrizations.{key}", None)
            layer.load_state_dict(partial, strict=False)
        partial["weight"] = layer.weight.detach().clone()  # an unexpected key, and no more
        layer.load_state_dict(partial, strict=False)
        del partial._metadata["parametrizations.weight.0"]
        layer.load_state_dict(partial, strict=False)
        outs = []
        for _ in range(2):
            register.remove_parametrizations(layer, "weight")
            functions.spectral_norm(layer)
            layer.load_state_dict(saved)
            with torch.no_grad():
                outs.append([layer.train(mode)(x) for mode in (False, True, True, False)])
        assert_close(*outs)


def assert_orthogonal(W):
    tall = W if W.shape[-2] >= W.shape[-1] else W.mT
    bound = 10 * tall.shape[-2] * torch.finfo(W.dtype).eps
    eye = torch.eye(tall.shape[-1], dtype=W.dtype)
    assert_close(tall.mH @ tall, eye, atol=bound, rtol=0)


def q_factor(value):
    tall = value if value.shape[-2] >= value.shape[-1] else value.mT
    Q, R = torch.linalg.qr(tall)
    Q = Q * R.diagonal(dim1=-2, dim2=-1).sgn().unsqueeze(-2)
    return Q if value.shape[-2] >= value.shape[-1] else Q.mT


class TestOrthogonal:
    @pytest.mark.parametrize("trivial", [True, False])
    @pytest.mark.parametrize("map_", MAPS)
    @pytest.mark.parametrize("dtype", [torch.float, torch.cfloat])
    @pytest.mark.parametrize("shape", [(4, 4), (5, 3), (3, 5)])
    def test_values_assignments_and_training(self, side, swap, shape, dtype, map_, trivial):
        _, functions = side
        layer = linear(*shape, dtype=dtype)
        before = layer.weight.detach().clone()
        if dtype.is_complex and map_ == "householder":
            with pytest.raises(ValueError, match="does not support complex tensors"):
                functions.orthogonal(layer, "weight", map_, use_trivialization=trivial)
            return
        functions.orthogonal(layer, "weight", map_, use_trivialization=trivial)
        assert layer.weight.shape == before.shape
        assert_orthogonal(layer.weight)
        for value in (None, q_factor(torch.randn_like(before)), torch.randn_like(before)):
            if not trivial and map_ != "householder":
                with pytest.raises(NotImplementedError, match="assign to the matrix exp"):
                    layer.weight = before
                break
            if value is not None:
                layer.weight = value
            expected = q_factor(before if value is None else value)
            assert_close(layer.weight.detach(), expected, atol=1e-5, rtol=0)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            layer(torch.randn(3, shape[0], dtype=dtype)).norm().backward()
            grad = layer.parametrizations.weight.original.grad
            unused = grad.triu(1) if grad.shape[0] >= grad.shape[1] else grad.tril(-1)
            assert not unused.any()
            diagonal = grad.diagonal()
            assert not (diagonal.real if grad.is_complex() else diagonal).any()
            optimizer.step()
            assert_orthogonal(layer.weight)

    def test_errors(self, side):
        _, functions = side
        layer = linear()
        with pytest.raises(ValueError, match="has to be one of"):
            functions.orthogonal(layer, "weight", "foo")
        with pytest.raises(ValueError, match="Expected a matrix"):
            functions.orthogonal(layer, "bias")
        functions.orthogonal(layer)
        with pytest.raises(ValueError, match="matrices of shape"):
            layer.weight = torch.randn(5, 5)


class TestWeightNorm:
    @pytest.mark.parametrize("dtype", [torch.float, torch.bfloat16])
    @pytest.mark.parametrize(("dim", "shape"), [(0, (5, 1)), (1, (1, 4)), (None, ()), (-1, ())])
    def test_the_output_stays_the_same(self, side, swap, dtype, dim, shape):
        register, functions = side
        layer, x = linear(4, 5, dtype=dtype), torch.randn(3, 4, dtype=dtype)
        expected = layer(x).detach()
        near = {"atol": 0.02, "rtol": 0.02} if dtype is torch.bfloat16 else {}
        functions.weight_norm(layer, dim=dim)
        held = layer.parametrizations.weight
        assert held.original0.shape == shape
        assert held.original1.shape == (5, 4)
        assert_close(layer(x).detach(), expected, **near)
        register.remove_parametrizations(layer, "weight")
        assert type(layer) is nn.Linear
        assert_close(layer(x).detach(), expected, **near)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(("name", "dim"), [("torch", None), ("compat", None), ("compat", 0)])
    def test_half_precision_gives_the_value_back(self, name, dtype, dim):
        layer = linear(40, 30, dtype=dtype)
        before = layer.weight.detach().clone()
        assert torch.equal(BOTH[name][1].weight_norm(layer, dim=dim).weight, before)

    @pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
    def test_what_the_older_hook_saved_loads(self, side, swap):
        _, functions = side
        old, new = nn.utils.weight_norm(linear(4, 5)), functions.weight_norm(nn.Linear(4, 5))
        new.load_state_dict(old.state_dict())
        assert_close(new(torch.ones(1, 4)), old(torch.ones(1, 4)))

    def test_pickle_is_refused_and_a_copy_is_not(self, side, swap):
        _, functions = side
        layer = functions.weight_norm(linear())
        with pytest.raises(RuntimeError, match="state_dict"):
            pickle.dumps(layer)
        assert torch.equal(copy.deepcopy(layer)(torch.eye(3)), layer(torch.eye(3)))


def test_frozen_tensors_stay_frozen(side):
    class Halves(nn.Module):
        def forward(self, a, b):
            return torch.cat([a, b])

        def right_inverse(self, value):
            return value.chunk(2)

    register, _ = side
    layer = linear(8, 8)
    layer.weight.requires_grad_(False)
    register.register_parametrization(layer, "weight", Halves())
    held = layer.parametrizations.weight
    assert not any(x.requires_grad for x in (layer.weight, held.original0, held.original1))


class Wrap(nn.Module):
    def forward(self, X):
        return TwoTensor(X, X)


class Unwrap(nn.Module):
    def forward(self, X):
        return X.a


class WrapRaw(nn.Module):
    def forward(self, X):
        return X

    def right_inverse(self, value):
        return TwoTensor(value, value)


@pytest.mark.parametrize("keep", [False, True], ids=["raw", "value"])
@pytest.mark.parametrize("part", [Wrap, Unwrap, WrapRaw])
def test_wrapper_subclasses_are_swapped_in(side, part, keep):
    register, _ = side
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer = linear(2, 2)
        layer.register_buffer("buffer", torch.randn(2, 2))
        if part is Unwrap:
            layer._apply(lambda t: TwoTensor(t, t))
        known = {name: getattr(layer, name) for name in ("weight", "buffer")}
        for name in known:
            register.register_parametrization(layer, name, part())
            value = getattr(layer, name)
            assert type(value) is (torch.Tensor if part is Unwrap else TwoTensor)
            raw = layer.parametrizations[name].original
            assert isinstance(raw, nn.Parameter) == (name == "weight")
            assert isinstance(raw, TwoTensor) == (part is not Wrap)
            del value, raw
        for name, tensor in known.items():
            register.remove_parametrizations(layer, name, leave_parametrized=keep)
            assert getattr(layer, name) is tensor
            assert isinstance(tensor, nn.Parameter) == (name == "weight")
            wrapped = part is WrapRaw or (part is Unwrap) != keep
            assert isinstance(tensor, TwoTensor) == wrapped
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_the_private_classes_are_torchs_own_kinds():
    with funcparam.compat.installed():
        theirs = torch.nn.utils.parametrizations
        for name, kind in (
            ("spectral_norm", theirs._SpectralNorm),
            ("weight_norm", theirs._WeightNorm),
            ("orthogonal", theirs._Orthogonal),
        ):
            layer = getattr(theirs, name)(linear())
            (part,) = layer.parametrizations.weight
            assert type(part) is kind
            assert repr(part) == f"{kind.__name__}()"
        assert part.orthogonal_map is theirs._OrthMaps.householder
        fixed = theirs.orthogonal(linear(), use_trivialization=False).parametrizations.weight[0]
        assert not hasattr(fixed, "base")


def test_before_an_installation_they_are_torchs_too():
    theirs = torch.nn.utils.parametrizations
    _, functions = BOTH["compat"]
    for name in ("spectral_norm", "weight_norm", "orthogonal"):
        part = getattr(functions, name)(linear()).parametrizations.weight[0]
        assert isinstance(part, (theirs._SpectralNorm, theirs._WeightNorm, theirs._Orthogonal))


@pytest.mark.parametrize("name", BOTH)
def test_a_subclass_with_a_power_method_of_its_own(name):
    class Frozen(BOTH[name][1]._SpectralNorm):
        def _power_method(self, weight_mat, n_power_iterations):
            with torch.no_grad():
                self._u.fill_(1)
                self._v.fill_(2)

    register, _ = BOTH[name]
    layer = linear()
    register.register_parametrization(layer, "weight", Frozen(layer.weight, 2, dim=0, eps=1e-9))
    raw = layer.parametrizations.weight.original.detach()
    assert_close(layer.weight.detach(), raw / (2 * raw.sum()))
    assert layer.parametrizations.weight[0].n_power_iterations == 2
