import os

# Small matrices gain nothing from more threads, and the cores are shared by the tests and by the
# programs that they start.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

import tests.effort  # noqa: F401  (registers the profile that an option of pytest may name)

# programs, which tests run in processes of their own, or which need more than tests do
collect_ignore_glob = ["compat/third_party/*", "mutation.py"]

torch.set_num_threads(1)
torch.manual_seed(0)  # for the arguments of tests, which each worker draws when it collects


@pytest.fixture(autouse=True)
def _seeded():
    # torch.manual_seed writes down the stack for each kind of accelerator, which takes longer than
    # most of the tests
    torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    yield
    torch._dynamo.reset()


@pytest.fixture
def entries_are_far(monkeypatch):
    """Transforms do as on a device, whose entries would have to be waited for."""
    monkeypatch.setattr("funcparam.transforms.contract.base._AT_HAND", ())


def pytest_collection_modifyitems(items):
    """Names of tests hold no address: each worker has to collect the same."""
    for item in items:
        if " at 0x" in item.nodeid:
            raise pytest.UsageError(f"the ids of {item.location[2].split('[')[0]} hold an address")
