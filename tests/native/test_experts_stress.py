"""The cache of experts under the compiler's sanitizers: see stress_experts.c."""

import pytest
from sanitizers import SANITIZERS, run_sanitized


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_choices_predictions_and_evictions_with_aborts(sanitizer, tmp_path):
    counts = run_sanitized("stress_experts", sanitizer, tmp_path)
    assert counts["passes"] > 100 and counts["compared"] > 10_000, counts
    assert counts["aborted"] > counts["too_many"] > 10, counts
    assert counts["guesses"] > counts["guesses_used"] > 10, counts
