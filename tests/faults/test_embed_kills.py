"""The short form of tests/faults/embed_kills.py."""

from __future__ import annotations

from pathlib import Path

from tests.faults.embed_kills import LIGHT, MAIN, kill_embed


def test_killed_at_random_moments_it_loses_nothing_and_ends_as_if_nothing_had_been(
    tmp_path: Path, offline_model_name: str
):
    flags = ["--clip-model-name", offline_model_name]
    assert kill_embed(tmp_path, LIGHT + MAIN, flags, n_kills=3, seed=1, n_photos=2)["lists finished"] > 0
