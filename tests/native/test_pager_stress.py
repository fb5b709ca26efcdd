"""The pager's threads under the compiler's sanitizers: see stress.c."""

import pytest
from sanitizers import SANITIZERS, run_sanitized


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_passes_in_random_orders_with_aborts(sanitizer, tmp_path):
    counts = run_sanitized("stress", sanitizer, tmp_path)
    assert counts["passes"] > 10 and counts["acquired"] > 1000, counts
    assert counts["refused"] < 0.8 * counts["rounds"], counts
