"""The same random operations on torch's module and on compat: equal values, keys and errors.

What differs on purpose is in the table of docs/compat.md, and is left out by a precondition here.
"""

import copy

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
        self.transferred = False
        self.layers = {}
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
        return name == "weight" or part in {"double", "scaled", "sum", "centred"}

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
        if not self.parts["weight"]:
            # torch takes a step at each read: only converged vectors can be compared
            options = {"n_power_iterations": 60} if kind == "spectral_norm" else {}
            assert self.on_both(lambda layer, _, fs: getattr(fs, kind)(layer, **options))
            self.parts["weight"].append(kind)

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
        if {"orthogonal", "spectral_norm"} & set(self.parts["weight"]):
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
