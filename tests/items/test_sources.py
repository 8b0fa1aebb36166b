from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils.errors import UserError
from utils.items import sources
from utils.items.sources import read_items, read_list

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(st.lists(VALUES, max_size=6), st.integers(1, 30), st.sampled_from([None, 1]), st.booleans())
def test_a_list_is_read_item_by_item_as_it_is_read_at_once(tmp_path, monkeypatch, items, chunk, indent, is_ascii):
    path = tmp_path / "list.json"
    path.write_text(json.dumps(items, indent=indent, ensure_ascii=is_ascii), encoding="utf-8")
    monkeypatch.setattr(sources, "CHUNK", chunk)
    assert list(read_list(path, "list", "[...]")) == items


@settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
@given(st.text(st.sampled_from('[]{},:"1e- \\n\\u'), max_size=12), st.integers(1, 5))
def test_what_is_no_json_list_is_refused_wherever_it_breaks(tmp_path, monkeypatch, text, chunk):
    path = tmp_path / "list.json"
    path.write_text("[" + text, encoding="utf-8")
    monkeypatch.setattr(sources, "CHUNK", chunk)
    try:
        expected = json.loads("[" + text)
    except ValueError:
        expected = None
    if isinstance(expected, list):
        assert list(read_list(path, "list", "[...]")) == expected
    else:
        with pytest.raises(UserError, match="is not a JSON list"):
            list(read_list(path, "list", "[...]"))


@pytest.mark.parametrize("text", ["{}", "1", '"[]"', "null"])
def test_json_that_is_no_list_is_said_to_be_none(tmp_path, text):
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(UserError, match=r"list .* is not a JSON list, at its beginning.*it must be \[\.\.\.\]"):
        list(read_list(tmp_path / "list.json", "list", "[...]"))


def test_jsonl_is_read_line_by_line_and_blank_lines_are_skipped(tmp_path: Path):
    path = tmp_path / "list.jsonl"
    path.write_text('\ufeff{"url": "a"}\n\n  \n{"url": "b"}', encoding="utf-8")
    assert [item["url"] for item in read_items(path)] == ["a", "b"]
    path.write_text('{"url": "a"}\n{"url": ')
    items = read_items(path)
    assert next(items) == {"url": "a"}
    with pytest.raises(UserError, match="line 2, is not JSON"):
        next(items)


@pytest.mark.parametrize("name", ["list.json", "list.jsonl"])
def test_bytes_that_are_no_text_and_bottomless_nesting_are_one_line(tmp_path: Path, name: str):
    for content in (b"\xff\xfe\x00[", b"[" * 200_000):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=r"is not (a JSON list|JSON)"):
            list(read_items(tmp_path / name))
