from __future__ import annotations

import contextlib
import csv
import datetime
import gzip
import json
import sys
import tracemalloc
import uuid
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils.errors import ImageError, UserError
from utils.items import sources
from utils.items.sources import open_source

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(st.lists(VALUES, max_size=6), st.integers(1, 30), st.sampled_from([None, 1]), st.booleans())
def test_a_list_is_read_item_by_item_as_it_is_read_at_once(tmp_path, monkeypatch, items, chunk, indent, is_ascii):
    path = tmp_path / "list.json"
    path.write_text(json.dumps([{}, *items], indent=indent, ensure_ascii=is_ascii), encoding="utf-8")
    monkeypatch.setattr(sources, "CHUNK", chunk)
    assert list(open_source(path).read()) == [{}, *items]


@settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
@given(st.text(st.sampled_from('[]{},:"1e- \n\\u'), max_size=12), st.integers(1, 5))
def test_what_is_no_json_list_is_refused_wherever_it_breaks(tmp_path, monkeypatch, text, chunk):
    path = tmp_path / "list.json"
    path.write_text("[1," + text, encoding="utf-8")
    monkeypatch.setattr(sources, "CHUNK", chunk)
    try:
        expected = json.loads("[1," + text)
    except ValueError:
        expected = None
    if isinstance(expected, list):
        assert list(open_source(path).read()) == expected
    else:
        with pytest.raises(UserError, match="is broken as a JSON list"):
            list(open_source(path).read())


ITEMS = [{"url": "http://x/ä", "n": 1}, {"url": "http://x/b", "t": "日本"}]


def read(path: Path, **fields: str) -> list:
    return list(open_source(path, **fields).read())


def json_lines(items: list) -> str:
    return "\r\n".join(json.dumps(item, ensure_ascii=False) for item in items) + "\r\n"


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        ("a JSON list", "\r\n " + json.dumps(ITEMS, ensure_ascii=False, indent=2), ITEMS),
        ("a JSON list of URLs", '[\n"http://x/ä",\n"b.jpg"]', [{"url": "http://x/ä"}, {"url": "b.jpg"}]),
        ("JSON lines", json_lines(ITEMS) + "\r\n \r\n" + json_lines(ITEMS), [*ITEMS, *ITEMS]),
        ("JSON lines of URLs", json_lines(["http://x/ä", "b"]), [{"url": "http://x/ä"}, {"url": "b"}]),
        ("URLs, one per line", "http://x/ä\r\n\r\n b.jpg \r\n", [{"url": "http://x/ä"}, {"url": "b.jpg"}]),
        ("CSV", "url,n,t\r\nhttp://x/ä,1,日本\r\n", [{"url": "http://x/ä", "n": 1, "t": "日本"}]),
        ("TSV", '"n"\t"url"\n"a\nb"\thttp://x/ä', [{"n": "a\nb", "url": "http://x/ä"}]),
        ("CSV of one column", "url\nhttp://x/a,b\n", [{"url": "http://x/a,b"}]),
    ],
)
def test_the_form_is_told_by_content_in_every_encoding(tmp_path: Path, pack, encoding, form, text, expected):
    for name in ("list.json", "list.jsonl", "list.csv", "list"):
        (tmp_path / name).write_bytes(pack(text.encode(encoding)))
        source = open_source(tmp_path / name)
        assert source.format.startswith(form) and ("gzip" in source.format) == (pack is gzip.compress)
        assert list(source.read()) == expected
        assert list(source.read()) == expected, "again"


def test_lines_of_urls_may_be_paths(tmp_path: Path):
    for line in ("/home/a b/x.jpg", "./x.jpg", "C:\\a\\x.jpg", "x.jpg", "data:image/png;base64,AA==", "file:///x"):
        (tmp_path / "list").write_text(line + "\n")
        assert read(tmp_path / "list") == [{"url": line}]


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b" \n", b"hello world\n", b"null", b"12", b"<html>\n", b"\x89PNG\r\n\x1a\n/a.b", b"name,age\nx,1\n"),
        *(b'"a" b\n', b"\0" * 99, b"PK\3\4/x", b"\x1f\x8b\x08\0broken", b"\xff\xfe\0[", "größe\n".encode("latin-1")),
    ],
)
def test_what_is_no_list_is_one_line_that_shows_the_forms(tmp_path: Path, content: bytes):
    (tmp_path / "list.json").write_bytes(content)
    with pytest.raises(UserError) as raised:
        open_source(tmp_path / "list.json")
    line = str(raised.value)
    assert '[{"url": "https://..."}, ...], JSON lines, CSV or Parquet with a column url' in line and "\n" not in line


@pytest.mark.parametrize(
    ("content", "n_good", "words"),
    [
        (b'{"url": "a"}\n{"url": ', 1, "line 2 is not JSON"),
        (b'{"url": "a"}\n\n{"url": "\xe4"}\n', 1, "line 3 is not JSON: it is not UTF-8"),
        (b'{\n"url": "a"\n}', 0, "line 1 is not JSON"),
        (b'[{"url": "a"},\n{"url": "b"}', 1, "after element 1: it ends early"),
        (b'[{"url": "a"} {"url": "b"}]', 0, "at its beginning: no comma after an element"),
        (b'[{"url": "a"}]]', 1, "other text follows its end"),
        (b"[" * 200_000, 0, "recursion"),
        (b"{" * 200_000, 0, "line 1 is not JSON"),
        (b"url,url\n", 0, "two columns are named 'url'"),
        (b'{"url": "a"}\n'.decode().encode("utf-16")[:-1], 0, "truncated data"),
        (gzip.compress(b'{"url": "a"}\n' * 100_000)[:-9], None, "ended before"),
    ],
)
def test_a_list_that_is_broken_further_on_names_the_place(
    tmp_path: Path, content: bytes, n_good: int | None, words: str
):
    (tmp_path / "list").write_bytes(content)
    good = []
    with pytest.raises(UserError, match=words) as raised:
        good += [good.append(item) for item in open_source(tmp_path / "list").read()]
    assert n_good is None or len(good) == n_good
    assert "\n" not in str(raised.value)


def test_cells_are_numbers_or_booleans_if_they_print_the_same(tmp_path: Path):
    cells = ["1", "-5", "0.5", "1e-07", "true", "false", "0", "12345678901234567890123"]
    texts = ["00123", "nan", "inf", "1.50", "+1", "-0", "1e5", "True", "", " 1", "1_000", "\u0661", "1" * 5000, "1e999"]
    with (tmp_path / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["url", *(f"c{i}" for i in range(len(cells + texts)))], ["5", *cells, *texts]])
    (item,) = read(tmp_path / "list.csv")
    assert list(item.values()) == ["5", *map(json.loads, cells), *texts]
    assert [type(value) for value in list(item.values())[1:7]] == [int, int, float, float, bool, bool]


def test_a_wrong_row_is_a_bad_record_with_its_line(tmp_path: Path):
    rows = b'url,"a"\nu1,1\n\nu2\nu3,"x\ny"\nu4,"x\ny",3\nu5,\xe4\nu6,2\nu7,"open\n'
    (tmp_path / "list.csv").write_bytes(rows)
    good = [item for item in read(tmp_path / "list.csv") if isinstance(item, dict)]
    assert [tuple(item.values()) for item in good] == [("u1", 1), ("u3", "x\ny"), ("u6", 2), ("u7", "open\n")]
    bad = [str(item) for item in read(tmp_path / "list.csv") if isinstance(item, ImageError)]
    assert bad == [
        "bad_record: line 4: 1 cell in place of 2",
        "bad_record: lines 7 to 8: 3 cells in place of 2",
        "bad_record: line 9: not UTF-8",
    ]
    source = open_source(tmp_path / "list.csv")
    with pytest.raises(ImageError, match="line 4"):
        [source.identify(item) for item in source.read()]


def test_blank_lines_and_columns_without_name_cost_no_row(tmp_path: Path):
    (tmp_path / "list.csv").write_bytes(b"\r\n \r\n,url,n,,\r\n0,u1,2,,x\r\n1,u2,3\r\n")
    good, bad = read(tmp_path / "list.csv")
    assert good == {"column 1": 0, "url": "u1", "n": 2, "column 4": "", "column 5": "x"}
    assert str(bad) == "bad_record: line 5: 3 cells in place of 5"


def test_the_url_may_stand_in_another_field(tmp_path: Path):
    expected = [{"url": "http://x/a", "n": 1, "_url": "http://page/"}]
    for text in (
        '[{"image": "http://x/a", "n": 1, "url": "http://page/"}]',
        '{"image": "http://x/a", "n": 1, "url": "http://page/"}\n',
        "image,n,url\nhttp://x/a,1,http://page/\n",
    ):
        (tmp_path / "list").write_text(text)
        assert read(tmp_path / "list", url_field="image") == expected
        source = open_source(tmp_path / "list", url_field="image", id_field="image")
        assert source.identify(expected[0]) == uuid.uuid5(uuid.NAMESPACE_URL, "http://x/a")
    (tmp_path / "list").write_text('["http://x/a"]')
    assert read(tmp_path / "list", url_field="image") == [{"url": "http://x/a"}]
    (tmp_path / "list").write_text('[{"url": "http://x/a"}]')
    source = open_source(tmp_path / "list", url_field="image")
    with pytest.raises(ImageError, match="field 'image' is missing"):
        source.identify(next(source.read()))


def test_parquet_is_read_row_by_row_as_its_json_would_be(tmp_path: Path):
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    rows = [
        {"url": "http://x/a", "n": 1, "f": 0.5, "b": True, "l": [1, 2], "d": datetime.date(2024, 5, 1), "raw": b"\0"},
        {"url": None, "n": None, "f": None, "b": None, "l": None, "d": None, "raw": None},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "list.json")
    source = open_source(tmp_path / "list.json")
    first = {"url": "http://x/a", "n": 1, "f": 0.5, "b": True, "l": [1, 2], "d": "2024-05-01"}
    assert (source.format, list(source.read())) == ("Parquet", [first, {}])
    (tmp_path / "list.json").write_bytes((tmp_path / "list.json").read_bytes()[:-9])
    with pytest.raises(UserError, match="is broken as Parquet"):
        read(tmp_path / "list.json")


def test_parquet_without_pyarrow_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "list").write_bytes(b"PAR1....")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        read(tmp_path / "list")


def test_a_table_streams(tmp_path: Path):
    """The long form of this is ten million rows."""
    n = 20_000
    with (tmp_path / "list.csv").open("w") as file:
        file.write("url,product,price\n")
        file.writelines(f"http://host.example/{i},product {i},{i / 8}\n" for i in range(n))
    tracemalloc.start()
    assert sum(1 for _ in open_source(tmp_path / "list.csv").read()) == n
    assert tracemalloc.get_traced_memory()[1] < 3_000_000
    tracemalloc.stop()


SEEDS = [
    json.dumps(ITEMS * 3, ensure_ascii=False).encode(),
    json.dumps(ITEMS * 3).encode("utf-16"),
    json_lines(ITEMS * 3).encode(),
    gzip.compress(json_lines(["http://x/a", "b"] * 9).encode()),
    'url;größe\na;1\n"b\nc";2\n'.encode(),
    "größe,url\n1,x\n".encode("latin-1"),
    b"http://x/a\r\n/b/c.jpg\r\n",
]
INSERTED = [b"\0", b"\r", b'"', b"\xff\xfe", b"[", b"{", b",", b"\x1f\x8b", b"\n\n"]


@settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 9), st.sampled_from(INSERTED))))
def test_damaged_lists_are_read_or_refused_in_one_line(tmp_path: Path, content: bytes, damages: list):
    """The long form of this, with Parquet, was run 30,000 times."""
    for place, n, inserted in damages:
        at = int(place * len(content))
        content = content[:at] + inserted + content[at + n :]
    (tmp_path / "list").write_bytes(content)
    try:
        source = open_source(tmp_path / "list")
        for element in source.read():
            with contextlib.suppress(ImageError):
                source.identify(element)
    except UserError as error:
        assert "\n" not in str(error)
