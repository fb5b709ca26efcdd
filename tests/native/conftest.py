"""`make sanitize` runs this folder on a sanitizer build; stop if it is another build that was imported."""

import os

import pytest

if os.environ.get("EDGEINFER_SANITIZE"):
    import edgeinfer._native

    if "sanitize" not in edgeinfer._native.__file__:
        pytest.exit(f"expected the sanitizer build, found {edgeinfer._native.__file__}", returncode=1)
