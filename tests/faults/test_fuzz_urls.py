from __future__ import annotations

import pytest

from tests.faults.fuzz_urls import compare
from tests.support import browser


@pytest.mark.skipif(not browser.find(), reason="no Chromium here")
def test_random_urls_are_read_as_chromium_reads_them():
    differing, n_refused = compare(count=1000, seed=0)
    assert differing == []
    assert n_refused < 30  # by one of the two: hosts with spaces or empty labels
