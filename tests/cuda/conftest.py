import pytest

from tests.cuda.devices import CUDA


@pytest.fixture(params=["cpu", CUDA])
def device(request):
    """CUDA, and a CPU, so that tests of devices are tried where there is none."""
    return request.param
