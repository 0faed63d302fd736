"""Settings and fixtures that all tests share."""

import pytest
import torch
from hypothesis import HealthCheck, settings

import kvcache

# Machines that run the tests share their cores; a second thread per process makes everything slower there.
torch.set_num_threads(1)

settings.register_profile("kvcache", deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
settings.load_profile("kvcache")


@pytest.fixture(
    params=[
        pytest.param("reference", marks=pytest.mark.reference),
        pytest.param("cpu", marks=pytest.mark.cpu),
    ]
)
def backend(request):
    """Runs the test with each implementation of the ops; the value is its name."""
    with kvcache.ops.use_backend("reference" if request.param == "reference" else "native"):
        yield request.param
