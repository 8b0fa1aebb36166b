"""utils/annotation/records.py: the annotated data, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.annotation_data import id_of
from utils.annotation.records import Record, backup_path, read_records, undo, write_records
from utils.errors import UserError

FIRST: list[Record] = [{"pos": [id_of("a"), id_of("b")], "neg": [id_of("c")]}]
SECOND: list[Record] = [*FIRST, {"pos": [id_of("d")], "neg": []}]


def test_what_is_written_is_read(tmp_path: Path):
    path = tmp_path / "data" / "annotated.json"
    assert read_records(path) == []
    write_records(path, SECOND)
    assert read_records(path) == json.loads(path.read_text()) == SECOND


def test_the_version_before_stays_beside_it_byte_for_byte(tmp_path: Path):
    path = tmp_path / "annotated.json"
    path.write_text(as_written := json.dumps(FIRST, indent=3))
    write_records(path, SECOND)
    assert backup_path(path).read_text() == as_written


def test_undo_puts_the_version_before_back_and_keeps_what_it_takes(tmp_path: Path):
    path = tmp_path / "annotated.json"
    write_records(path, FIRST)
    write_records(path, SECOND)
    assert undo(path) == (SECOND, FIRST)
    assert read_records(path) == FIRST
    assert read_records(tmp_path / "annotated.json.undone") == SECOND
    with pytest.raises(UserError, match="nothing to take back"):
        undo(path)


def test_a_file_by_windows_is_read(tmp_path: Path):
    path = tmp_path / "annotated.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(FIRST).encode().replace(b",", b",\r\n"))
    assert read_records(path) == FIRST


@pytest.mark.parametrize(
    "value",
    [
        {"pos": [], "neg": []},
        [[]],
        [{"pos": [id_of("a")]}],
        [{"pos": [id_of("a")], "neg": [], "note": ""}],
        [{"pos": id_of("a"), "neg": []}],
        [{"pos": [id_of("a") + "/../x"], "neg": []}],
        [{"pos": [None], "neg": []}],
        [{"pos": [], "neg": [id_of("a")]}],
    ],
)
def test_anything_else_is_one_line_that_names_the_record(tmp_path: Path, value):
    path = tmp_path / "annotated.json"
    path.write_text(json.dumps(value))
    with pytest.raises(UserError, match=r"annotated\.json") as error:
        read_records(path)
    assert "\n" not in str(error.value)
