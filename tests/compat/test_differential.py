"""The same random operations on torch's module and on compat: equal values, keys and errors.

What differs on purpose is in the table of docs/compat.md, and is left out by a precondition here.
"""

import copy
import threading

import torch
from hypothesis import HealthCheck
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

from tests.compat.parts import BOTH, Centred, Double, Factors, Scaled, Sum, Symmetric
from tests.effort import examples

PARTS = {
    "centred": Centred,
    "double": Double,
    "factors": Factors,
    "scaled": Scaled,
    "sum": Sum,
    "symmetric": Symmetric,
}
MOVE = {"double", "factors", "scaled", "sum", "orthogonal", "weight_norm"}  # raw is not the value
SEVERAL = {"factors", "sum", "weight_norm"}  # have several raw tensors, so come first
FUNCTIONS = ["orthogonal", "weight_norm", "spectral_norm"]
ERRORS = (ValueError, RuntimeError, TypeError, AttributeError, NotImplementedError, KeyError)
NAMES = st.sampled_from(["weight", "bias"])
NUMBERS = st.integers(0, 9)


def numbers(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.double)


class Sides(RuleBasedStateMachine):
    """One layer with torch's module and one with compat, and what was registered on them."""

    @initialize(
        first=st.sampled_from([None, *FUNCTIONS, *PARTS]),
        bias=st.sampled_from([None, "double", "scaled", "sum"]),
    )
    def build(self, first, bias):
        self.parts = {"weight": [], "bias": []}
        self.transferred = self.tied = False
        self.layers, self.twins = {}, {}
        for side in BOTH:
            torch.manual_seed(0)
            self.layers[side] = nn.Linear(4, 4).double()
        if first in FUNCTIONS:
            self.function(first)
        elif first is not None:
            self.register("weight", first)
        if bias is not None:
            self.register("bias", bias)

    def on_both(self, operation):
        """Run it on each layer; errors, if any, have equal types."""
        errors = {}
        for side, layer in self.layers.items():
            torch.manual_seed(1)
            try:
                self.layers[side] = operation(layer, *BOTH[side]) or layer
            except ERRORS as error:
                errors[side] = type(error)
        assert len(errors) in (0, 2), errors
        assert len(set(errors.values())) <= 1, errors
        return not errors

    def fits(self, name, part):
        """Whether torch can register it there; what it cannot leaves its module half changed."""
        if part in SEVERAL and self.parts[name]:
            return False
        if name == "weight" and self.is_refused(part):
            return False
        return name == "weight" or part in {"double", "scaled", "sum", "centred"}

    def is_refused(self, part):
        """Whether compat refuses it for a tie's sake; torch changes the twin."""
        return self.tied and part in MOVE and not self.parts["weight"]

    @rule(name=NAMES, part=st.sampled_from(sorted(PARTS)))
    def register(self, name, part):
        if self.fits(name, part) and len(self.parts[name]) < 4:
            unsafe = part == "factors"
            assert self.on_both(
                lambda layer, api, _: api.register_parametrization(
                    layer, name, PARTS[part](), unsafe=unsafe
                )
            )
            self.parts[name].append(part)

    @rule(kind=st.sampled_from(FUNCTIONS))
    def function(self, kind):
        if not self.parts["weight"] and not self.is_refused(kind):
            assert self.on_both(lambda layer, _, fs: getattr(fs, kind)(layer))
            self.parts["weight"].append(kind)

    @rule(threaded=st.booleans())
    def read(self, threaded):
        """In training mode a read may be a step."""
        values = []

        def operation(layer, *_):
            read = lambda: values.append((layer.weight.detach(), layer.bias.detach()))  # noqa: E731
            if threaded:
                thread = threading.Thread(target=read)
                thread.start()
                thread.join()
            else:
                read()

        assert self.on_both(operation)
        assert_close(values[1], values[0], atol=1e-7, rtol=1e-6, equal_nan=True)

    @rule(seed=NUMBERS)
    def write_data(self, seed):
        """What no version counts: raw, and the vectors that are iterated."""

        def operation(layer, *_):
            for tensor in layer.state_dict().values():
                tensor.data.add_(numbers(tensor.shape, seed), alpha=0.1)

        assert self.on_both(operation)

    @rule(on=st.booleans())
    def swap(self, on):
        torch.__future__.set_swap_module_params_on_conversion(on)

    def teardown(self):
        torch.__future__.set_swap_module_params_on_conversion(False)

    @precondition(lambda self: not self.tied and not self.transferred)
    @rule()
    def tie(self):
        """Another module shares the parameter, or what became of it."""

        def operation(layer, api, _):
            raw = layer.parametrizations.weight if api.is_parametrized(layer, "weight") else layer
            name = "weight" if raw is layer else "original"
            if name not in raw._parameters:
                return
            twin = nn.Linear(4, 4, bias=False)
            twin.weight = raw._parameters[name]
            self.twins["torch" if api is BOTH["torch"][0] else "compat"] = twin

        assert self.on_both(operation)
        self.tied = bool(self.twins)

    @invariant()
    def twins_agree(self):
        if self.twins:
            assert_close(self.twins["compat"].weight, self.twins["torch"].weight, equal_nan=True)

    @rule(name=NAMES, seed=NUMBERS)
    def assign(self, name, seed):
        value = numbers((4, 4) if name == "weight" else (4,), seed)
        self.on_both(lambda layer, *_: setattr(layer, name, nn.Parameter(value).detach().clone()))

    @rule(name=NAMES, keep=st.booleans())
    def remove(self, name, keep):
        done = self.on_both(
            lambda layer, api, _: api.remove_parametrizations(layer, name, leave_parametrized=keep)
        )
        if done:
            self.parts[name] = []

    @rule()
    def step(self):
        def operation(layer, *_):
            layer.zero_grad()
            layer(torch.linspace(-1, 1, 8).double().reshape(2, 4)).square().sum().backward()
            with torch.no_grad():
                for parameter in layer.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(parameter.grad, alpha=0.01)

        self.on_both(operation)  # an error if all is frozen

    @rule()
    def deepcopy(self):
        self.on_both(lambda layer, *_: copy.deepcopy(layer))
        self.tied, self.twins = False, {}

    @rule(assign=st.booleans())
    def save_and_load(self, assign):
        def operation(layer, *_):
            saved = copy.deepcopy(layer.state_dict())
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.add_(1)
            layer.load_state_dict(saved, assign=assign)

        assert self.on_both(operation)

    @precondition(lambda self: not self.transferred)  # torch's hook stays where it was
    @rule(seed=NUMBERS)
    def load_what_old_weight_norm_saved(self, seed):
        old = {
            "bias": numbers((4,), seed),
            "weight_g": numbers((4, 1), seed),
            "weight_v": numbers((4, 4), seed + 1),
        }
        self.on_both(lambda layer, *_: layer.load_state_dict(dict(old)) and None)

    @rule(names=st.sampled_from([None, "weight", "bias"]))
    def transfer(self, names):
        # torch's registration changes the state that the two then share
        if self.tied or {"orthogonal", "spectral_norm"} & set(self.parts["weight"]):
            return
        if names and not self.parts[names]:
            return

        def operation(layer, api, _):
            other = nn.Linear(4, 4).double().train(layer.training)
            api.transfer_parametrizations_and_params(layer, other, names)
            return other

        if any(self.parts.values()):
            assert self.on_both(operation)
            self.transferred = True
            if names:
                self.parts = {
                    name: self.parts[name] if name == names else [] for name in self.parts
                }

    @rule(seed=NUMBERS, copied=st.booleans())
    def functional_call(self, seed, copied):
        outs = []

        def operation(layer, *_):
            raw = {name: numbers(p.shape, seed) for name, p in layer.named_parameters()}
            target = copy.deepcopy(layer) if copied else layer
            outs.append(functional_call(target, raw, (torch.eye(4).double(),)))

        assert self.on_both(operation)
        assert_close(outs[1], outs[0], atol=1e-7, rtol=1e-6, equal_nan=True)

    @rule(training=st.booleans())
    def mode(self, training):
        self.on_both(lambda layer, *_: layer.train(training))

    @rule()
    def cast(self):
        self.on_both(lambda layer, *_: layer.float().double())

    @rule(name=NAMES)
    def freeze(self, name):
        def operation(layer, *_):
            for path, parameter in layer.named_parameters():
                if name in path:
                    parameter.requires_grad_(not parameter.requires_grad)

        self.on_both(operation)

    @rule(name=st.sampled_from(["weight", "bias", "nothing"]))
    def wrong_calls(self, name):
        self.on_both(lambda layer, api, _: api.register_parametrization(layer, "nothing", Double()))
        if name == "nothing" or not self.parts[name]:
            self.on_both(lambda layer, api, _: api.remove_parametrizations(layer, name))

    @precondition(lambda self: not self.layers["torch"].training)
    @invariant()
    def computed_values_are_read_as_they_are(self):
        self.compare(self.layers)

    @invariant()
    def copies_in_evaluation_mode_agree(self):
        self.compare({side: copy.deepcopy(x).eval() for side, x in self.layers.items()})

    def compare(self, layers):
        a, b = layers.values()
        assert list(a.state_dict()) == list(b.state_dict())
        for name in ("weight", "bias"):
            theirs, ours = getattr(a, name), getattr(b, name)
            assert theirs.requires_grad == ours.requires_grad
            assert_close(ours, theirs, atol=1e-7, rtol=1e-6, equal_nan=True, check_stride=False)


Sides.TestCase.settings = examples(
    300, stateful_step_count=12, suppress_health_check=list(HealthCheck)
)
TestSides = Sides.TestCase
