"""Settings and fixtures that all tests share."""

import pytest
import torch
from hypothesis import HealthCheck, settings
from support.backends import HOST, use
from support.policies import EVERYDAY, FIRST, POLICIES

# Machines that run the tests share their cores; a second thread per process makes everything slower there.
torch.set_num_threads(1)

settings.register_profile("kvcache", deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
settings.load_profile("kvcache")


#: Beside these, whole models on a pretended GPU run in ``make test-slow``.
ON_A_GPU = ("full", "h2o", "tokenselect", "snapkv")


def pytest_collection_modifyitems(items):
    """Marks as slow what stands for nothing new beside what runs in ``make test``, which is to stay within minutes."""
    for item in items:
        if _slow(item):
            item.add_marker(pytest.mark.slow)


def _slow(item):
    folder, file = item.path.parent.name, item.path.name
    backends = [name for name in ("reference", "emulated") if item.get_closest_marker(name)]
    if backends and folder not in ("ops", "core", "emulation", "bench"):  # whole models run over the CPU kernels
        return True
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    policies = {x for x in values if isinstance(x, str) and x in POLICIES}
    if folder == "oracles":  # variants; and the later oracles of what is of a kind with another
        first = item.originalname.startswith(("test_o1_", "test_o2_"))
        return not policies <= ({*EVERYDAY, *FIRST.values()} if first else {*EVERYDAY})
    if file in ("test_decode_graphs.py", "test_on_a_gpu.py"):
        return not policies <= {*ON_A_GPU} or "right" in values
    return folder == "generation" and not policies <= {*EVERYDAY}


@pytest.fixture(params=HOST)
def backend(request):
    """Runs the test with the reference and with the CPU kernels; the value is the name. In tests/ops: with all four."""
    with use(request.param):
        yield request.param
