"""utils/annotation/history.py: events are appended durably, and even a damaged file can be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from utils.annotation import history

SHOWN = {"root": "/r", "main": "a", "shown": {"a": 1.0, "b": 0.5}, "time": "2026-01-01T00:00:00Z"}
GONE = {"root": "/r", "main": "b", "discarded": True, "time": "2026-01-02T00:00:00Z"}


def test_events_are_appended_in_order(tmp_path: Path):
    path = tmp_path / "deep" / "history.jsonl"
    history.append(path, [SHOWN])
    history.append(path, [GONE, SHOWN])
    assert list(history.read_events(path)) == [SHOWN, GONE, SHOWN]
    assert [json.loads(line) for line in path.read_text().splitlines()] == [SHOWN, GONE, SHOWN]


def test_without_a_path_or_a_file_there_is_none(tmp_path: Path):
    history.append("", [SHOWN])
    history.append(tmp_path / "none.jsonl", [])
    assert list(history.read_events("")) == list(history.read_events(tmp_path / "none.jsonl")) == []
    assert not (tmp_path / "none.jsonl").exists()


def test_a_line_that_was_cut_costs_that_line_only(tmp_path: Path):
    path = tmp_path / "history.jsonl"
    history.append(path, [SHOWN, GONE])
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        history.append(path, [GONE])
        events = list(history.read_events(path))
        n_whole = sum(size >= end for end in (whole.index(b"\n"), len(whole) - 1))
        assert events == [*[SHOWN, GONE][:n_whole], GONE]


def test_damaged_lines_are_left_out(tmp_path: Path):
    path = tmp_path / "history.jsonl"
    path.write_bytes(b'\xff\xfe{\n[]\n{"main": 3}\n\n' + json.dumps(SHOWN).encode())
    assert list(history.read_events(path)) == [SHOWN]


@pytest.mark.parametrize(
    "odd",
    [
        {"kept": 5, "deleted": []},
        {"kept": ["a"]},
        {"kept": ["a"], "deleted": [[]]},
        {"kept": ["a"], "deleted": [], "replaced": None},
        {"second_look": {"kept": ["a"], "deleted": []}},
        {"second_look": [], "record": {"pos": ["a"], "neg": []}},
        {"shown": ["a"]},
        {"shown": {"a": 1}, "pool": 5},
        {"root": ["/r"], "discarded": True},
    ],
)
def test_lines_with_odd_types_are_left_out(odd, tmp_path: Path):
    path = tmp_path / "history.jsonl"
    history.append(path, [{"root": "/r", "main": "a", "load": "1", "records": "r", **odd}, GONE])
    assert list(history.read_events(path)) == [GONE]


def test_a_main_image_that_was_kept_after_it_was_discarded_is_not_discarded():
    kept = {"root": "/r", "main": "b", "kept": ["b"], "deleted": []}
    assert history.discarded([SHOWN, GONE]) == {"b"}
    assert history.discarded([GONE, kept]) == set()
    assert history.discarded([kept, GONE]) == {"b"}


def test_kappa_is_agreement_beyond_chance_by_hand():
    assert history.kappa([]) is None
    assert history.kappa([(True, True), (True, True)]) is None
    assert history.kappa([(True, True), (False, False)]) == 1
    both = [(True, True)] * 20 + [(True, False)] * 5 + [(False, True)] * 10 + [(False, False)] * 15
    assert history.kappa(both) == 0.4  # observed 0.7, by chance 0.5 * 0.6 + 0.5 * 0.4
