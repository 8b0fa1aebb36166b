"""The short form of tests/faults/annotation_kills.py."""

from __future__ import annotations

from pathlib import Path

from tests.faults.annotation_kills import kill_dirload, kill_dirrify


def test_killed_ann_dirrify_leaves_only_complete_directories_and_is_continued(tmp_path: Path):
    assert kill_dirrify(tmp_path, n_kills=4, seed=1)["finished"] > 0


def test_killed_ann_dirload_leaves_the_old_records_or_the_new(tmp_path: Path):
    assert kill_dirload(tmp_path, n_kills=4, seed=1)["kills"] == 4
