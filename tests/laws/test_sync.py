"""A step waits for no device: no entry is read, nothing is counted, no errors are looked for.

What a device would do is done on the CPU, where transforms are told that entries are far away.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import funcparam.transforms.contract.base as base
from tests.cases import CASES, ROWS, TAKING, raw_and_state, tensors
from tests.waiting import Waits

EXACT = "SpectralNorm(n_power_iterations=None)"
SVD, EIGH, READS = "_linalg_svd", "_linalg_eigh", "_local_scalar_dense"

# PyTorch's decompositions wait for CUDA, and no other operation gives what they do.
MAY_WAIT: Mapping[str, Mapping[str, set[str]]] = {
    "forward": {EXACT: {EIGH}, "OperatorNorm": {EIGH, SVD}},
    "project": {
        "SpectralNorm": {EIGH},
        "OperatorNorm": {EIGH, SVD},
        "PositiveDefinite": {EIGH},
        "PSDLowRank": {EIGH},
        "LowRank": {SVD},
        "Kronecker": {SVD},
        "Monarch": {SVD},
        "AlmostOrthogonal": {SVD},
        "Isospectral": {SVD},
        "OrthogonalConv": {EIGH, SVD},
        "FixedRank": {SVD, READS},
        "SpecialLinear": {SVD, READS},
        "Chain": {READS},
    },
}


def kinds(transform):
    """The names of a transform and of its parts."""
    found = set(re.findall(r"\w+(?=\()", repr(transform)))
    return found | ({EXACT} if "n_power_iterations=None" in repr(transform) else set())


def waits(case, shape):
    """What each method of a transform would wait for."""
    raw, state = raw_and_state(case, shape)
    leaves = [t.requires_grad_() for t in tensors(raw) if t.is_floating_point() or t.is_complex()]
    with Waits() as forward:
        value = case.transform.forward(raw, state)
        if value.requires_grad:
            torch.autograd.grad(value, leaves, torch.ones_like(value), allow_unused=True)
    with Waits() as update:
        case.transform.update(raw, state)
    with Waits() as project:
        with suppress(NotImplementedError):  # an adapter
            case.transform.project(value.detach(), state)
    return {"forward": forward.found, "update": update.found, "project": project.found}


@pytest.mark.parametrize("case", [*CASES, *TAKING], ids=str)
@pytest.mark.usefixtures("entries_are_far")
def test_no_step_waits_for_a_device(case):
    for shape in case.shapes:
        for method, found in waits(case, shape).items():
            may = [MAY_WAIT.get(method, {}).get(kind, set()) for kind in kinds(case.transform)]
            assert found <= set().union(*may), (method, shape)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_are_those_of_a_cpu(case, monkeypatch):
    raw, state = raw_and_state(case, case.shapes[0])
    leaves = [t.requires_grad_() for t in tensors(raw) if t.is_floating_point() or t.is_complex()]

    def found():
        value = case.transform.forward(raw, state)
        if not value.requires_grad:
            return [value]
        grads = torch.autograd.grad(value, leaves, value.detach().cos(), allow_unused=True)
        return [value, *grads]

    near = found()
    monkeypatch.setattr(base, "_AT_HAND", ())
    torch.testing.assert_close(found(), near, rtol=1e-11, atol=1e-12)


def test_the_page_tells_what_may_wait():
    page = (Path(__file__).parents[2] / "docs" / "devices.md").read_text(encoding="utf-8")
    for method, names in MAY_WAIT.items():
        (row,) = re.findall(rf"^\| `{method}` \| (.*) \|$", page, re.MULTILINE)
        assert re.findall(r"`(.+?)`", row) == list(names)


@pytest.mark.usefixtures("entries_are_far")
def test_what_may_wait_does():
    found = {method: {} for method in MAY_WAIT}
    for case, shape in ROWS:
        if kinds(case.transform) & (MAY_WAIT["forward"].keys() | MAY_WAIT["project"].keys()):
            for method, waited in waits(case, shape).items():
                for kind in kinds(case.transform) & MAY_WAIT.get(method, {}).keys():
                    found[method].setdefault(kind, set()).update(waited)
    for method, expected in MAY_WAIT.items():
        for kind, waited in expected.items():
            assert waited <= found[method][kind], (method, kind)
