"""The tests of single ops run with every implementation: also with the CUDA kernels, on the host and on a GPU."""

import pytest
from support.backends import CUDA, HOST, use


@pytest.fixture(params=[*HOST, *CUDA])
def backend(request):
    """Runs the test with each implementation of the ops; the value is its name."""
    with use(request.param):
        yield request.param


@pytest.fixture
def fast_backend(backend):
    """All but the reference, whose loops over rows take minutes where there are many."""
    if backend == "reference":
        pytest.skip("loops over rows in Python")
    return backend
