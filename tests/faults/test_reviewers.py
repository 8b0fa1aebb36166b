"""The short form of tests/faults/reviewers.py: what people and file managers do to folders is never misread."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.reviewers import play


@pytest.mark.parametrize("seed", range(1000, 1025))
def test_every_decision_is_recorded_exactly_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
):
    monkeypatch.chdir(tmp_path)
    play(tmp_path, seed)
