from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromadb.errors import InternalError

from tests.conftest import ROOT
from utils.errors import UserError
from utils.ids import from_ids, to_ids
from utils.items.formatted import restore_item
from utils.log import LOG
from utils.store import collection as collections
from utils.store import index
from utils.store import store as store_module
from utils.store.store import Store
from utils.store.vectors import ROW, Journal

N, D = 300, 16
MODEL = {"model_name": "m", "pretrained": "p", "dimension": D}


def ids_of(*numbers: int) -> np.ndarray:
    return to_ids([str(uuid.uuid5(uuid.NAMESPACE_URL, f"http://x/{number}")) for number in numbers])


def vectors_of(*numbers: int) -> np.ndarray:
    vectors = np.stack([np.random.default_rng(number).normal(size=D) for number in numbers]).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def add(store: Store, *numbers: int) -> None:
    store.append(
        ids_of(*numbers), [{"url": f"http://x/{number}", "n": number} for number in numbers], vectors_of(*numbers)
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "chroma"
    store = Store(path, "images")
    store.remember_model(MODEL)
    add(store, *range(N))
    store.finish()
    store.close()
    return path


@pytest.fixture
def path(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "chroma")
    return tmp_path / "chroma"


def check(store: Store, *numbers: int) -> None:
    """Journal and collection hold exactly these records, bit for bit as far as Chroma keeps bits."""
    assert store.count == len(numbers)
    assert store.compare() == (len(numbers), [])
    assert sorted(set(store.known.tolist()) - set(store.journal.gone.tolist())) == sorted(ids_of(*numbers).tolist())


def reader_of(path: Path) -> collections.Collection:
    return collections.open_collection(path, "images")


def delete_in_chroma(path: Path, *numbers: int) -> None:
    """As people do."""
    reader_of(path).delete(ids=from_ids(ids_of(*numbers)))


def segment(path: Path) -> Path:
    return next(file.parent for file in path.glob("*/data_level0.bin"))


def cut(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))


TORN: dict[str, Callable[[Path], object]] = {
    "vectors cut by a little": lambda path: cut(segment(path) / "data_level0.bin", 0.999),
    "pickle cut": lambda path: cut(segment(path) / "index_metadata.pickle", 0.5),
    "header garbled": lambda path: (segment(path) / "header.bin").write_bytes(bytes(range(100))),
    "lengths lost": lambda path: (segment(path) / "length.bin").write_bytes(bytes(4 * N)),
    "segment folder missing": lambda path: shutil.rmtree(segment(path)),
    "database missing": lambda path: (path / "chroma.sqlite3").unlink(),
    "database cut": lambda path: cut(path / "chroma.sqlite3", 0.5),
    "database garbled": lambda path: (path / "chroma.sqlite3").write_bytes(b"garbage " * 1000),
}


@pytest.mark.parametrize("tear", TORN.values(), ids=TORN)
def test_what_is_torn_is_said_and_made_anew_from_the_journal(path: Path, tear: Callable[[Path], object], caplog):
    caplog.set_level(logging.INFO, LOG.name)
    tear(path)
    store = Store(path, "images")
    check(store, *range(N))
    assert not len(store.journal.gone)
    assert any("rebuilt" in message or "missing" in message for message in caplog.messages)
    assert len(list(path.glob("*/data_level0.bin"))) <= 1 + (path / "chroma.sqlite3.torn").exists()


def test_a_huge_sparse_file_of_links_does_no_harm(path: Path):
    os.truncate(segment(path) / "link_lists.bin", 1 << 40)
    store = Store(path, "images")
    check(store, *range(N))


@pytest.mark.parametrize("tear", [TORN["pickle cut"], TORN["database garbled"]])
def test_a_torn_collection_without_a_journal_is_refused_with_one_line(path: Path, tear: Callable[[Path], object]):
    shutil.rmtree(path / "journal")
    tear(path)
    with pytest.raises(UserError, match="has no journal to repair it from") as raised:
        Store(path, "images")
    assert "\n" not in str(raised.value)


def test_an_opening_with_nothing_to_do_writes_nothing(path: Path):
    before = (path / "journal/images.sqlite3").read_bytes()
    store = Store(path, "images")
    assert store.count == N and store.journal.indexed == store.journal.end
    store.finish()
    store.close()
    assert (path / "journal/images.sqlite3").read_bytes() == before


def test_a_collection_that_nothing_has_touched_since_is_not_opened(path: Path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(index, "call", None)
        Store(path, "images").close()
    collections.open_client(path).create_collection("other").add(ids=["x"], embeddings=np.ones((1, 3)))
    with monkeypatch.context() as patch:
        patch.setattr(index, "call", None)
        Store(path, "images").close()
        delete_in_chroma(path, 9)
        with pytest.raises(TypeError):
            Store(path, "images")
    check(Store(path, "images"), *(number for number in range(N) if number != 9))


@pytest.mark.parametrize("change", [lambda s: add(s, N), lambda s: s.remove(ids_of(3))], ids=["added", "removed"])
def test_after_a_single_write_the_collection_is_not_opened_either(path: Path, change, monkeypatch):
    """Chroma never flushes a single write: it stays in the log until another one comes."""
    store = Store(path, "images")
    change(store)
    store.finish()
    store.close()
    numbers = from_ids(store.journal.rows["id"])
    monkeypatch.setattr(index, "call", None)
    store = Store(path, "images")
    assert store.count == len(numbers) and sorted(from_ids(store.own)) == sorted(numbers)
    store.close()


def test_a_collection_that_a_reader_finds_torn_is_opened_and_made_anew(path: Path):
    """Flipped bits do not change a file's modification time."""
    data = segment(path) / "index_metadata.pickle"
    status = data.stat()
    data.write_bytes(bytes(status.st_size))
    os.utime(data, ns=(status.st_atime_ns, status.st_mtime_ns))
    code = "import sys; from pathlib import Path; from utils.store import collection as c\n"
    code += "with c.reading(Path(sys.argv[1]), 'images') as i: c.read_vectors(i, c.read_ids(i))"
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert "python embed.py repairs it" in done.stderr
    assert not collections.seen_path(path, "images").exists()
    check(Store(path, "images"), *range(N))


def test_urls_that_cannot_be_read_make_the_next_opening_look(path: Path, monkeypatch):
    """read_urls() does not know the folder; the block around it does."""

    def fail(*_: Any) -> None:
        raise InternalError("planted")

    with pytest.raises(collections.UnreadableError), collections.reading(path, "images") as images:
        monkeypatch.setattr(collections, "_metadata_of", fail)
        collections.read_urls(images, from_ids(ids_of(1)))
    assert not collections.seen_path(path, "images").exists()


def test_the_comparison_of_all_vectors_first_looks_at_the_index(path: Path, caplog):
    caplog.set_level(logging.INFO, LOG.name)
    data = segment(path) / "index_metadata.pickle"
    status = data.stat()
    data.write_bytes(bytes(status.st_size))
    os.utime(data, ns=(status.st_atime_ns, status.st_mtime_ns))
    check(Store(path, "images"), *range(N))
    assert any("rebuilt" in message for message in caplog.messages)


def test_an_older_journal_with_as_many_records_is_compared_with_the_collection(path: Path, tmp_path: Path):
    shutil.copy(path / "journal/images.sqlite3", tmp_path)
    delete_in_chroma(path, 3)
    store = Store(path, "images")
    add(store, N)
    store.finish()
    store.close()
    shutil.copy(tmp_path / "images.sqlite3", path / "journal")
    assert Store(path, "images").journal.gone.tolist() == ids_of(3).tolist()


def test_a_look_at_a_missing_database_makes_none(tmp_path: Path):
    assert index.fingerprint(tmp_path, "images", np.empty(0, ROW)) == b""
    with pytest.raises(sqlite3.OperationalError):
        index._query(tmp_path, "SELECT 1")
    assert not list(tmp_path.iterdir())


def test_what_never_reached_the_index_is_brought_there_and_is_not_taken_for_deleted(path: Path):
    journal = Journal(path / "journal/images.sqlite3")
    journal.append(ids_of(N, N + 1), [{"url": "u"}] * 2, vectors_of(N, N + 1))
    journal.close()
    check(Store(path, "images"), *range(N + 2))


def test_what_people_deleted_stays_deleted_even_if_the_collection_is_made_anew(path: Path):
    delete_in_chroma(path, 3, 4)
    store = Store(path, "images")
    assert sorted(store.journal.gone.tolist()) == sorted(ids_of(3, 4).tolist())
    store.close()
    shutil.rmtree(segment(path))
    check(Store(path, "images"), *(number for number in range(N) if number not in (3, 4)))


def test_a_removal_that_was_killed_halfway_is_finished(path: Path):
    journal = Journal(path / "journal/images.sqlite3")
    journal.note(removing=ids_of(5, 6))
    journal.close()
    delete_in_chroma(path, 5)
    store = Store(path, "images")
    assert len(store.journal.gone) == 0 and len(store.known) == N - 2
    add(store, 5)  # it may come back
    store.finish()
    store.close()
    check(Store(path, "images"), *(number for number in range(N) if number != 6))


def test_a_removal_from_a_torn_collection_makes_it_anew(path: Path, caplog):
    caplog.set_level(logging.INFO, LOG.name)
    store = Store(path, "images")
    TORN["pickle cut"](path)
    store.remove(ids_of(5, 6))
    store.close()
    assert sum("rebuilt" in message for message in caplog.messages) == 1
    check(Store(path, "images"), *(number for number in range(N) if number not in (5, 6)))


def die_taking_over(*args: Any) -> None:
    index.take_over(*args[:-1], lambda n: os._exit(1))


def test_a_collection_without_a_journal_is_taken_over_whole_or_not_at_all(path: Path, monkeypatch):
    shutil.rmtree(path / "journal")
    with monkeypatch.context() as patch:
        patch.setattr(index, "take_over", die_taking_over)
        with pytest.raises(UserError, match="died with 1"):
            Store(path, "images")
    assert not (path / "journal/images.sqlite3").exists()
    store = Store(path, "images")
    check(store, *range(N))
    assert store.model["model_name"] == "m"


def test_a_collection_that_names_no_model_or_has_other_ids_is_refused(tmp_path: Path):
    for name, id_ in (("nameless", str(uuid.uuid4())), ("foreign", "x1")):
        collection = collections.create(tmp_path, name, {})
        collection.add(ids=[id_], embeddings=np.ones((1, D), np.float32), metadatas=[{"url": "u"}])
    with pytest.raises(UserError, match="does not name the model that made it"):
        Store(tmp_path, "nameless")
    with pytest.raises(UserError, match="ids that are not uuids"):
        Store(tmp_path, "foreign")


def test_metadata_changes_reach_the_collection_with_fields_removed(path: Path):
    store = Store(path, "images")
    store.change_metadata(ids_of(1), [{"url": "new", "added": True}])
    store.finish()
    store.close()
    collection = collections.open_collection(path, "images")
    assert collections.read_metadata(collection, from_ids(ids_of(1, 2))) == [
        {"url": "new", "added": True},
        {"url": "http://x/2", "n": 2},
    ]


def test_after_an_interrupted_write_every_record_is_compared_and_the_damaged_ones_written_again(path: Path, caplog):
    caplog.set_level(logging.INFO, LOG.name)
    store = Store(path, "images")
    store.journal.note(indexing=True)  # as a kill during a write leaves it
    store.close()
    right, wrong = collections.read_vectors(reader_of(path), from_ids(ids_of(150, 151)))
    data = segment(path) / "data_level0.bin"
    numbers = np.fromfile(data, "<f4")
    [at] = np.flatnonzero(np.abs(np.lib.stride_tricks.sliding_window_view(numbers, D) - right).max(axis=1) < 1e-5)
    numbers[at : at + D] = wrong  # also of length 1, so that no sample notices
    numbers.tofile(data)
    delete_in_chroma(path, 7)  # deleted by a person meanwhile
    store = Store(path, "images")
    check(store, *(number for number in range(N) if number != 7))
    assert not store.journal.indexing
    assert "writing 1 damaged record of collection images again" in caplog.messages


def test_a_rebuild_that_is_killed_takes_nothing_for_deleted(path: Path, monkeypatch):
    (path / "chroma.sqlite3").unlink()
    real = index.call

    def killed(task, *args, **kwargs):
        if task is not index.apply:
            return real(task, *args, **kwargs)
        real(task, *args[:3], args[3][:100], *args[4:], **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(index, "call", killed)
    with pytest.raises(KeyboardInterrupt):
        Store(path, "images")
    monkeypatch.undo()
    check(Store(path, "images"), *range(N))


def test_damage_of_the_journal_is_named_and_costs_the_record_only(path: Path, caplog):
    content = bytearray((path / "journal/images.sqlite3").read_bytes())
    content[content.find(vectors_of(42)[0].tobytes()) + 5] ^= 1
    (path / "journal/images.sqlite3").write_bytes(content)
    shutil.rmtree(segment(path))
    store = Store(path, "images")
    assert from_ids(ids_of(42))[0] in caplog.text
    check(store, *(number for number in range(N) if number != 42))
    add(store, 42)
    store.finish()
    store.close()
    check(Store(path, "images"), *range(N))


def test_damaged_facts_bring_back_nothing_that_people_deleted(path: Path, caplog):
    """The content of the collection shows up to where it was indexed, and all of it is compared."""
    store = Store(path, "images")
    store.journal.append(ids_of(N, N + 1), [{"url": "u"}] * 2, vectors_of(N, N + 1))
    store.close()
    delete_in_chroma(path, 3)
    with contextlib.closing(sqlite3.connect(path / "journal/images.sqlite3")) as database, database:
        database.execute("UPDATE facts SET checksum = 1 WHERE name IN ('indexed', 'indexing')")
    assert Journal(path / "journal/images.sqlite3").indexing
    store = Store(path, "images")
    assert "was damaged and is repaired: 0 records lost" in caplog.text
    assert store.journal.gone.tolist() == ids_of(3).tolist()
    assert store.journal.indexed == N + 2 and not store.journal.indexing
    check(store, *(number for number in range(N + 2) if number != 3))


def test_files_of_chroma_that_outgrow_the_records_are_made_anew(path: Path, caplog, monkeypatch):
    caplog.set_level(logging.INFO, LOG.name)
    monkeypatch.setattr(index, "GROWTH_BYTES", 3_000_000)
    store = Store(path, "images")
    (segment(path) / "link_lists.bin").write_bytes(bytes(8_000_000))
    add(store, N)
    store.finish()
    store.close()
    assert sum("rebuilt" in message for message in caplog.messages) == 1
    assert sum(file.stat().st_size for file in path.rglob("*") if "journal" not in str(file)) < 3_000_000
    check(Store(path, "images"), *range(N + 1))


def test_a_first_write_of_the_index_that_fails_is_tried_on_a_new_collection(tmp_path: Path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, LOG.name)
    real, failures = index.call, [index.TornError("its files grew")]

    def call(task, *args, **kwargs):
        if task is index.apply and failures:
            raise failures.pop()
        return real(task, *args, **kwargs)

    monkeypatch.setattr(index, "call", call)
    store = Store(tmp_path / "chroma", "images")
    store.remember_model(MODEL)
    add(store, *range(10))
    store.finish()
    assert any("its files grew" in message and "rebuilt" in message for message in caplog.messages)
    store.close()
    check(Store(tmp_path / "chroma", "images"), *range(10))


def test_a_write_that_fails_during_a_run_is_followed_by_a_comparison_of_all_records(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(store_module, "INDEX_EVERY", 10)
    real, tasks = index.call, []

    def call(task, *args, **kwargs):
        """The second write is killed."""
        tasks.append(task)
        if tasks == [index.apply, index.apply]:
            raise index.TornError("the process died")
        return real(task, *args, **kwargs)

    monkeypatch.setattr(index, "call", call)
    store = Store(tmp_path / "chroma", "images")
    store.remember_model(MODEL)
    for first in range(0, 40, 10):
        add(store, *range(first, first + 10))
        store._thread.join()
    assert tasks == [index.apply, index.apply], "the end of the run writes the rest"
    store.finish()
    assert tasks[2:] == [index.compare, index.apply]
    store.close()
    check(Store(tmp_path / "chroma", "images"), *range(40))


def test_a_collection_that_too_many_values_have_wedged_is_repaired(path: Path):
    store = Store(path, "images")
    wide = {"url": "u", "list": list(range(6_000))}
    store.journal.append(ids_of(N), [wide], vectors_of(N))  # as a version without a bound stored it
    store.close()
    collection = reader_of(path)
    with pytest.raises(Exception, match="Failed to apply logs"):
        collection.add(ids=["w"], embeddings=vectors_of(N), metadatas=[wide])
    store = Store(path, "images")
    check(store, *range(N + 1))
    store.close()
    [metadata] = collections.read_metadata(reader_of(path), from_ids(ids_of(N)))
    assert restore_item(metadata) == wide
