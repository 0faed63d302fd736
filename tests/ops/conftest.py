"""Fixtures of the ops' tests."""

import pytest


@pytest.fixture
def fast_backend(backend):
    """All but the reference, whose loops over rows take minutes where there are many."""
    if backend == "reference":
        pytest.skip("loops over rows in Python")
    return backend
