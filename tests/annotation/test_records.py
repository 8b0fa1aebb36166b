"""utils/annotation/records.py: the annotated data are replaced completely or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.annotation_data import id_of
from utils.annotation.records import Record, backup_path, put_back, read_items, read_records, write_items
from utils.errors import UserError

FIRST: list[Record] = [{"pos": [id_of("a"), id_of("b")], "neg": [id_of("c")]}]
SECOND: list[Record] = [*FIRST, {"pos": [id_of("d")], "neg": []}]


def test_what_is_written_is_read(tmp_path: Path):
    path = tmp_path / "data" / "annotated.json"
    assert read_records(path) == []
    write_items(path, SECOND)
    assert read_records(path) == json.loads(path.read_text()) == SECOND


def test_the_version_before_stays_beside_it_byte_for_byte(tmp_path: Path):
    path = tmp_path / "annotated.json"
    path.write_text(as_written := json.dumps(FIRST, indent=3))
    write_items(path, SECOND)
    assert backup_path(path).read_text() == as_written
    put_back(path, FIRST)
    assert path.read_text() == as_written
    assert read_records(tmp_path / "annotated.json.undone") == SECOND
    assert not backup_path(path).exists()


def test_an_earlier_version_than_the_backup_is_written_anew(tmp_path: Path):
    path = tmp_path / "annotated.json"
    write_items(path, FIRST)
    write_items(path, SECOND)
    put_back(path, [])
    assert read_records(path) == []
    assert not backup_path(path).exists()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_a_file_of_an_editor_is_read(tmp_path: Path, encoding: str):
    path = tmp_path / "annotated.json"
    path.write_bytes(json.dumps(FIRST, indent=1).replace("\n", "\r\n").encode(encoding))
    assert read_records(path) == FIRST


@pytest.mark.parametrize(
    "item",
    [
        [],
        "a note",
        {"pos": [], "neg": [id_of("a")]},
        {"pos": [id_of("a")]},
        {"pos": id_of("a"), "neg": []},
        {"pos": [id_of("a") + "/../x"], "neg": []},
        {"pos": [None], "neg": []},
        {"label": "cat", "ids": [1, 2]},
    ],
)
def test_items_of_other_tools_are_kept_and_not_used(tmp_path: Path, item):
    path = tmp_path / "annotated.json"
    path.write_text(json.dumps([item, *FIRST]))
    assert read_records(path) == FIRST
    assert read_items(path) == [item, *FIRST]


def test_a_record_may_have_other_keys(tmp_path: Path):
    path = tmp_path / "annotated.json"
    path.write_text(json.dumps([{**FIRST[0], "by": "me"}]))
    assert read_records(path) == [{**FIRST[0], "by": "me"}]


@pytest.mark.parametrize("content", [b"{", b"{}", b"3", b'"pos"', b"\xff\xfe[", b"\x00", b"[" * 100_000])
def test_anything_else_is_one_line_that_names_the_last_good_version(tmp_path: Path, content: bytes):
    path = tmp_path / "annotated.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"annotated\.json .*no \.bak beside it") as error:
        read_records(path)
    assert "\n" not in str(error.value)
    backup_path(path).write_text("[]")
    with pytest.raises(UserError, match=r"last good version is .*annotated\.json\.bak$"):
        read_records(path)
