from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT
from utils.errors import ImageError, UserError
from utils.files import replacing
from utils.items import worklist
from utils.items.sources import open_source
from utils.items.worklist import DUPLICATE, FAILED, KNOWN, LASTING, STORED, TODO, Worklist

NONE = np.empty(0, "V16")
ITEMS = [{"url": "http://x/0"}, {"url": "http://x/1"}, {"url": "http://x/0", "a": 1}, {"n": 1}, {"url": "http://x/2"}]


@pytest.fixture
def open_list(tmp_path: Path) -> Callable[..., Worklist]:
    def open_list(items: list[object], id_field: str = "url") -> Worklist:
        (tmp_path / "list.json").write_text(json.dumps(items))
        return Worklist(open_source(tmp_path / "list.json", id_field=id_field), tmp_path / "failed.json")

    return open_list


def test_every_item_has_one_outcome(open_list: Callable[..., Worklist]):
    work = open_list(ITEMS)
    assert work.outcome.tolist() == [TODO, TODO, DUPLICATE, FAILED, TODO]
    assert work.n_differing == 1
    work.settle(work.ids[1:2], False, False, True)
    assert work.outcome.tolist() == [TODO, KNOWN, DUPLICATE, FAILED, TODO]
    assert [index for index, _ in work.todo()] == [0, 4]
    work.store(0)
    work.fail(4, "http://x/2", ImageError("timeout", "15 s"))
    assert work.outcome.tolist() == [STORED, KNOWN, DUPLICATE, FAILED, FAILED]
    assert work.reasons() == [("bad_record", 1), ("timeout", 1)]
    assert [index for index, _ in work.firsts()] == [0, 1, 4]


MISSING = "field 'url' is missing; --url-field names another field"


def test_the_failures_file_is_exact_and_ends_empty(open_list: Callable[..., Worklist], tmp_path: Path):
    work = open_list([*ITEMS, 7])
    work.fail(0, "http://x/0", ImageError("http_status", "404 Not Found"))
    work.save()
    assert json.loads((tmp_path / "failed.json").read_text()) == [
        {"index": 0, "url": "http://x/0", "reason": "http_status", "detail": "404 Not Found"},
        {"index": 3, "url": None, "reason": "bad_record", "detail": MISSING},
        {"index": 5, "url": None, "reason": "bad_record", "detail": "not an object but int"},
    ]
    work = open_list(ITEMS[:1])
    work.store(0)
    work.save()
    assert json.loads((tmp_path / "failed.json").read_text()) == []


@pytest.mark.parametrize(
    ("reason", "detail", "flags", "outcome"),
    [
        ("timeout", "", (False, False, True), TODO),
        ("connection", "", (False, False, True), TODO),
        ("rate_limited", "", (False, False, True), TODO),
        ("http_status", "503 x", (False, False, True), TODO),
        ("http_status", "404 x", (False, False, True), LASTING),
        ("not_an_image", "", (False, False, True), LASTING),
        ("not_an_image", "", (True, False, True), TODO),
        ("blocked_address", "", (False, False, True), LASTING),
        ("blocked_address", "", (False, True, True), TODO),
        ("opted_out", "", (False, False, True), LASTING),
        ("opted_out", "", (False, False, False), TODO),
        ("bad_record", "of another ID_FIELD", (False, False, True), TODO),
    ],
)
def test_what_is_tried_again(open_list, tmp_path: Path, reason: str, detail: str, flags: tuple, outcome: int):
    entry = {"index": 3, "url": "http://x/1", "reason": reason, "detail": detail}
    (tmp_path / "failed.json").write_text(json.dumps([entry]))
    work = open_list(ITEMS)
    work.settle(NONE, *flags)
    assert work.outcome[1] == outcome


def test_failures_that_a_run_did_not_reach_stay_listed_under_their_new_index(open_list, tmp_path: Path):
    entry = {"index": 9, "url": "http://x/1", "reason": "timeout", "detail": ""}
    (tmp_path / "failed.json").write_text(json.dumps([entry]))
    work = open_list(ITEMS[:2])
    work.settle(NONE, False, False, True)
    assert (work.outcome[1], work.reasons()) == (TODO, [])
    work.save()
    assert json.loads((tmp_path / "failed.json").read_text()) == [{**entry, "index": 1}]


@pytest.mark.parametrize(
    "content", ["{}", "[1]", '[{"index": 1}]', "[", '[{"index":0,"url":1,"reason":"","detail":""}]']
)
def test_a_failures_file_of_something_else_is_refused(open_list, tmp_path: Path, content: str):
    (tmp_path / "failed.json").write_text(content)
    with pytest.raises(UserError, match=r"failures file .*(it must be \[\{|is not JSON)"):
        open_list(ITEMS)


def test_failures_are_saved_while_another_thread_stores_what_failed_before(open_list, tmp_path: Path, monkeypatch):
    entries = [{"index": i, **item, "reason": "timeout", "detail": ""} for i, item in enumerate(ITEMS[:2])]
    (tmp_path / "failed.json").write_text(json.dumps(entries))
    work = open_list(ITEMS[:2])
    work.settle(NONE, False, False, True)

    @contextlib.contextmanager
    def storing_meanwhile(path: Path):
        with replacing(path) as file:
            yield types.SimpleNamespace(write=lambda text: (store_all(), file.write(text)))

    def store_all() -> None:
        writer = threading.Thread(target=lambda: [work.store(index) for index in range(len(work))])
        writer.start()
        writer.join()

    monkeypatch.setattr(worklist, "replacing", storing_meanwhile)
    work.save()
    assert json.loads((tmp_path / "failed.json").read_text()) == entries, "as they were when it was begun"
    work.save()
    assert json.loads((tmp_path / "failed.json").read_text()) == []


def test_stored_images_of_the_same_bytes_are_counted_and_the_most_frequent_named(open_list, tmp_path: Path):
    work = open_list([{"url": f"http://x/{number}"} for number in range(9)])
    assert work.identical() == (0, 0, "")
    for index, digest in enumerate([5, 7, 8, 7, 5, 7, 9, 0, 0]):  # 0: unknown
        work.store(index, digest)
    assert work.identical() == (5, 3, "http://x/1")
    (tmp_path / "list.json").write_text("[]")
    assert work.identical() == (5, 3, "a URL that is no longer in the list")


@pytest.mark.parametrize(
    "now",
    [
        [{"url": "http://x/new"}, *ITEMS],  # each item one place on
        [ITEMS[0], {**ITEMS[1], "a": 2}, *ITEMS[2:]],  # the same ids, other metadata
        ITEMS[:2],
        [],
    ],
)
def test_a_list_that_is_rewritten_during_a_run_ends_it_with_one_line(open_list, tmp_path: Path, now: list):
    work = open_list(ITEMS)
    (tmp_path / "list.json").write_text(json.dumps(now))
    with pytest.raises(UserError, match=r"list\.json was rewritten during this run, from item \d on; run again"):
        list(work.firsts())
    with pytest.raises(UserError, match="was rewritten"):
        for index, item in work.todo():
            assert item == ITEMS[index]


def test_a_list_that_grows_during_a_run_is_read_as_far_as_it_was(open_list, tmp_path: Path, caplog):
    work = open_list(ITEMS)
    (tmp_path / "list.json").write_text(json.dumps([*ITEMS, {"url": "http://x/9"}]))
    assert [index for index, _ in work.firsts()] == [0, 1, 4]
    assert [index for index, _ in work.todo()] == [0, 1, 4]
    assert "grew during this run; run again" in caplog.text


def test_another_id_field_keeps_the_id_when_the_url_changes(open_list: Callable[..., Worklist]):
    one = open_list([{"url": "http://x/?sig=1", "sku": 5}, {"url": "http://x/2"}], "sku")
    other = open_list([{"url": "http://x/?sig=2", "sku": 5}], "sku")
    assert one.ids[0] == other.ids[0]
    assert one.outcome.tolist() == [TODO, FAILED]


def test_a_long_list_costs_little_memory(tmp_path: Path):
    """All stored or failed before; the long form of this is a million."""
    n = 10_000
    with (tmp_path / "list.jsonl").open("w") as file:
        file.writelines(f'{{"url": "http://host{i % 100}.example/{i}", "n": {i}}}\n' for i in range(n))
    failed = [
        {"index": i, "url": f"http://host{i % 100}.example/{i}", "reason": "http_status", "detail": "404 Not Found"}
        for i in range(0, n, 2)
    ]
    (tmp_path / "failed.json").write_text(json.dumps(failed))
    code = (
        "import sys, tracemalloc; from tests.items.test_worklist import *\n"
        "path = Path(sys.argv[1]); tracemalloc.start()\n"
        "work = Worklist(open_source(path / 'list.jsonl'), path / 'failed.json')\n"
        "work.settle(np.sort(work.ids[1::2]), False, False, True)\n"
        "assert not work.count(TODO) and work.count(KNOWN, LASTING) == len(work); work.save()\n"
        "print(tracemalloc.get_traced_memory()[1] // len(work))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 700, "bytes an item at the peak, half of them failures"
