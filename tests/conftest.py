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


def pytest_collection_modifyitems(items):
    """Marks as slow whole models over the plain-torch reference and over emulated kernels, and whole generations under
    policies of which others are of the same kind, and the oracles of their variants.

    Beside them stand the same over the CPU kernels, and the ops' own tests compare all three; ``make test`` is to stay
    within minutes.
    """
    rare = POLICIES.keys() - EVERYDAY
    for item in items:
        folder = item.path.parent.name
        slow = folder not in ("ops", "core", "emulation", "bench") and any(
            item.get_closest_marker(name) for name in ("reference", "emulated")
        )
        if folder in ("generation", "oracles") and hasattr(item, "callspec"):
            names = {x for x in item.callspec.params.values() if isinstance(x, str)}
            slow |= bool(names & (rare if folder == "generation" else rare - set(FIRST.values())))
        if slow:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(params=HOST)
def backend(request):
    """Runs the test with the reference and with the CPU kernels; the value is the name. In tests/ops: with all four."""
    with use(request.param):
        yield request.param
