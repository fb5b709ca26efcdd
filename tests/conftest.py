"""What every test rests on."""

import os
import tempfile

import pytest

# Before edgeinfer looks: the user's own measurements are neither used nor written by tests.
_CACHE = tempfile.TemporaryDirectory(prefix="edgeinfer-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name


@pytest.fixture(scope="session", autouse=True)
def _remove_cache():
    yield
    _CACHE.cleanup()
