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


@pytest.fixture
def write(tmp_path):
    """Writes bytes to a file of the test's folder and gives its path: write(content, name)."""

    def write(content: bytes, name: str = "model.gguf"):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write
