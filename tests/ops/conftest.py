"""The tests of single ops run with every implementation: also with the CUDA kernels, on the host and on a GPU."""

import pytest
from support import emulation
from support.backends import CUDA, HOST, use


@pytest.fixture(params=[*HOST, *CUDA])
def backend(request):
    """Runs the test with each implementation of the ops; the value is its name."""
    with use(request.param):
        yield request.param


@pytest.fixture
def fast_backend(backend):
    """For tests with much to do: not the reference, which loops over rows, nor emulation that checks every access."""
    if backend == "reference" or (backend == "emulated" and emulation.chosen() in ("race", "asan")):
        pytest.skip("would take minutes")
    return backend
