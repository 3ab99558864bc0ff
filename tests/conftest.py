import pytest
import torch

import tests.effort  # noqa: F401  (registers the profile that an option of pytest may name)

torch.set_num_threads(1)  # small matrices gain nothing from more, and the tests share the cores
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
