"""The journal: acknowledged records survive cuts, lost writes, full disks, flipped bits; an older one is converted."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tracemalloc
import uuid
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT
from utils.errors import UserError
from utils.ids import from_ids
from utils.store import vectors as module
from utils.store.migration import migrate
from utils.store.vectors import DamagedError, Journal, read_records

STEP = int(os.environ.get("STEP", 7))  # bytes between two cuts; 1 takes half a minute
N_FLIPS = int(os.environ.get("FLIPS", 50))
OLD = Path(__file__).with_name("vectors_of_version_1.bin")


def ids_of(*numbers: int) -> np.ndarray:
    return np.frombuffer(b"".join(uuid.UUID(int=number + 1).bytes for number in numbers), "V16")


def vectors_of(*numbers: int) -> np.ndarray:
    return np.array([[number, -number, 0.5] for number in numbers], np.float32)


def add(journal: Journal, *numbers: int) -> None:
    metadata = [{"url": f"http://x/{number}", "n": number, "ü": "\n"} for number in numbers]
    journal.append(ids_of(*numbers), metadata, vectors_of(*numbers))


def stored(journal: Journal) -> dict[bytes, tuple[dict, bytes]]:
    records = read_records(journal.path, journal.rows)
    found = [
        (i, m, v.tobytes()) for ids, metadata, vectors in records for i, m, v in zip(ids.tolist(), metadata, vectors)
    ]
    assert len({id_ for id_, _, _ in found}) == len(found), "an id is stored twice"
    return {id_: (metadata, vector) for id_, metadata, vector in found}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal" / "images.sqlite3"


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small sizes, so that every byte can be cut or flipped within seconds."""
    monkeypatch.setattr(module, "PAGE_BYTES", 512)


def test_what_is_appended_is_read_back_bit_for_bit(path: Path):
    journal = Journal(path)
    journal.note(model={"model_name": "m"})
    add(journal, 2, 0)
    journal.note(indexed=journal.end)
    add(journal, 1)
    journal.close()
    again = Journal(path)
    assert again.model == {"model_name": "m"}
    assert again.ids.tolist() == ids_of(0, 1, 2).tolist()
    assert again.rows["id"].tolist() == ids_of(2, 0, 1).tolist()
    assert (again.indexed, again.end, again.n_records) == (2, 3, 3)
    assert stored(again)[ids_of(2).tobytes()] == ({"url": "http://x/2", "n": 2, "ü": "\n"}, vectors_of(2).tobytes())
    assert [file.name for file in path.parent.iterdir() if "-" not in file.name] == ["images.sqlite3"]


def test_an_opening_makes_no_file(path: Path):
    assert Journal(path).n_records == 0
    assert not path.parent.exists()


def snapshot(path: Path, to: Path) -> Path:
    """The files as a power cut would leave them."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(path.parent, to, ignore=shutil.ignore_patterns("*-shm"))
    return to / path.name


def test_cut_at_every_byte_of_the_last_batches_it_opens_to_the_acknowledged_prefix(path, tmp_path, small_pages):
    journal = Journal(path)
    ends = []
    for numbers in ((0, 1), (2, 3), (4, 5)):
        add(journal, *numbers)
        ends.append(path.with_name(path.name + "-wal").stat().st_size)
    copy, whole = snapshot(path, tmp_path / "whole"), list(stored(journal).items())
    content = copy.with_name(copy.name + "-wal").read_bytes()
    for size in sorted({*range(ends[0], len(content), STEP), *ends, len(content) - 1}):
        copy.with_name(copy.name + "-wal").write_bytes(content[:size])
        cut = Journal(snapshot(copy, tmp_path / "cut"))
        n = 2 * sum(end <= size for end in ends)
        assert cut.n_records == n
        if size in ends or size % 50 == 0:
            assert list(stored(cut).items()) == whole[:n]
            add(cut, 9)
            cut.close()
            assert list(stored(Journal(cut.path))) == [*(id_ for id_, _ in whole[:n]), ids_of(9).tobytes()]
        cut.close()


@pytest.mark.usefixtures("small_pages")
def test_a_flipped_bit_costs_what_it_hit_and_never_gives_a_wrong_vector(path, tmp_path, caplog):
    journal = Journal(path)
    journal.note(model={"model_name": "m"})
    for first in range(0, 40, 4):
        add(journal, *range(first, first + 4))
    journal.close()
    content, whole = path.read_bytes(), stored(journal)
    positions = [*range(0, 100, 6), *random.Random(0).sample(range(100, len(content)), N_FLIPS)]
    n_lost = 0
    for position in positions:
        caplog.clear()
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        copy = snapshot(path, tmp_path / "flipped")
        copy.write_bytes(flipped)
        opened = Journal(copy)
        try:
            found = stored(opened)
        except DamagedError:
            opened.repair()
            found = stored(opened)
        assert found.items() <= whole.items(), position
        assert opened.model in ({"model_name": "m"}, {})
        lost = whole.keys() - found.keys()
        assert not lost or any("damaged" in text for text in caplog.messages), position
        if len(found) and len(lost) < 20:
            assert all(name in caplog.text for name in from_ids(np.array([*lost], "V16"))), position
        n_lost += len(lost)
        try:
            add(opened, 99)
        except UserError as error:
            assert "is repaired; run again" in str(error)
            add(opened, 99)
        opened.close()
        assert stored(Journal(copy)).keys() == found.keys() | {ids_of(99).tobytes()}
    assert 0 < n_lost < 8 * len(positions), "mostly one record, now and then a page"


def test_metadata_can_be_read_past_a_damaged_record(path: Path, caplog):
    journal = Journal(path)
    add(journal, 0, 1, 2)
    journal.close()
    content = bytearray(path.read_bytes())
    content[content.find(b"http://x/1")] ^= 1
    path.write_bytes(content)
    assert list(Journal(path).metadata()) == ids_of(0, 2).tolist()
    assert from_ids(ids_of(1))[0] in caplog.text


def test_unsynced_writes_that_are_lost_were_never_acknowledged(path: Path, tmp_path: Path):
    """SQLite syncs without Python, so a trace shows its system calls."""
    if not shutil.which("strace"):
        pytest.skip("needs strace")
    code = "import sys; from tests.store.test_vectors import *; j = Journal(Path(sys.argv[1]))\n"
    code += "for i in range(4): add(j, i); os.write(2, b'')"
    trace = tmp_path / "trace"
    command = [
        "strace",
        "-f",
        "-e",
        "trace=pwrite64,fsync,fdatasync,write",
        "-o",
        str(trace),
        sys.executable,
        "-c",
        code,
    ]
    subprocess.run([*command, str(path)], cwd=ROOT, check=True)
    calls = [line.split(" ", 1)[1] for line in trace.read_text().splitlines()]
    marks = [number for number, line in enumerate(calls) if line.strip().startswith('write(2, ""')]
    assert len(marks) == 4
    for number in marks:
        before = [line for line in calls[:number] if "pwrite64" in line or "sync" in line]
        assert "sync" in before[-1], "a record was acknowledged after a write that nothing synced"


def test_commits_are_synced_and_the_folder_too(path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[Path] = []
    monkeypatch.setattr(module, "fsync_dir", synced.append)
    journal = Journal(path)
    add(journal, 0)
    database = journal._connect()
    assert database.execute("PRAGMA synchronous").fetchone() == (2,)
    assert database.execute("PRAGMA journal_mode").fetchone() == (b"wal",)
    assert synced == [path.parent, path.parent.parent]


def test_a_second_writer_is_refused_and_both_find_only_whole_records(path: Path):
    first, second = Journal(path), Journal(path)
    add(first, 0)
    with pytest.raises(UserError, match="another process writes to the journal"):
        add(second, 1)
    add(first, 2)
    add(second, 3)  # it has looked again
    with pytest.raises(UserError, match="another process"):
        add(first, 4)
    assert list(stored(Journal(path))) == ids_of(0, 2, 3).tolist()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on the size of files")
def test_a_full_disk_is_one_line_and_the_journal_goes_on_afterwards(path: Path):
    code = (
        "import resource, sys; from tests.store.test_vectors import *\n"
        "journal = Journal(Path(sys.argv[1])); add(journal, 0)\n"
        "size = Path(sys.argv[1] + '-wal').stat().st_size\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, -1))\n"
        "try: add(journal, 1)\n"
        "except UserError as error: print(error)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1)); add(journal, 2)"
    )
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "cannot be written" in done.stdout and "run again" in done.stdout and done.stdout.count("\n") == 1
    assert list(stored(Journal(path))) == ids_of(0, 2).tolist()


def test_removal_and_changes_last(path: Path):
    journal = Journal(path)
    journal.note(model={"model_name": "m"})
    add(journal, 0, 1, 2)
    journal.note(indexed=3)
    journal.change_metadata(ids_of(0, 1), [{"n": 10}, {"n": 11}])
    journal.note(gone=ids_of(1), removing=ids_of(1, 2))
    journal.remove(ids_of(1, 2))
    add(journal, 3)
    journal.close()
    again = Journal(path)
    assert again.ids.tolist() == ids_of(0, 3).tolist()
    assert (len(again.gone), len(again.removing), again.model) == (0, 0, {"model_name": "m"})
    assert again.metadata()[ids_of(0).tobytes()] == {"n": 10}
    assert again.changed.tolist() == ids_of(0).tolist()
    assert again.rows["seq"].tolist() == [1, 4], "a place that the index knows is not used again"


def test_opening_keeps_ids_and_not_vectors_in_memory(path: Path):
    journal = Journal(path)
    for start in range(0, 2000, 100):
        journal.append(ids_of(*range(start, start + 100)), [{}] * 100, np.zeros((100, 512), np.float32))
    journal.close()
    tracemalloc.start()
    assert Journal(path).n_records == 2000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000, "4 MB of vectors"
    assert path.stat().st_size < 1.2 * 2000 * 512 * 4


def test_what_is_no_database_any_more_is_set_aside(path: Path, caplog):
    path.parent.mkdir()
    path.write_bytes(b"garbage " * 1000)
    journal = Journal(path)
    assert journal.n_records == 0 and "is renamed to images.sqlite3.damaged" in caplog.text
    add(journal, 1)
    assert path.with_name("images.sqlite3.damaged").exists()


def test_a_network_file_system_gets_another_journal_mode(path: Path, tmp_path: Path, monkeypatch):
    mounts = tmp_path / "mounts"
    mounts.write_text(f"disk / ext4 rw 0 0\nserver:/ {tmp_path} nfs4 rw 0 0\n")
    assert module.is_on_network(path, mounts) and not module.is_on_network(Path("/elsewhere"), mounts)
    monkeypatch.setattr(module, "is_on_network", lambda path: True)
    journal = Journal(path)
    add(journal, 0)
    add(journal, 1)
    assert not path.with_name(path.name + "-wal").exists()
    assert len(stored(journal)) == 2


# --- the journal of the version before --------------------------------------------------------------------------------
def old_id(number: int) -> bytes:
    return uuid.uuid5(uuid.NAMESPACE_URL, f"http://x/{number}").bytes


def put_old(path: Path, content: bytes) -> Path:
    old = path.with_suffix("") / "vectors.bin"
    old.parent.mkdir(parents=True, exist_ok=True)
    old.write_bytes(content)
    return old


def check_migrated(path: Path) -> None:
    journal = Journal(path)
    assert journal.model == {"model_name": "m", "pretrained": "p", "dimension": 8}
    assert journal.rows["id"].tolist() == [old_id(i) for i in range(24)]
    assert journal.indexed == 16 and not journal.indexing
    assert journal.gone.tolist() == [old_id(3)]
    assert set(journal.removing.tolist()) == {old_id(5), old_id(20)}
    assert set(journal.changed.tolist()) == {old_id(1), old_id(9)}
    for number, (metadata, vector) in enumerate(stored(journal).values()):
        expected = {1: {"url": "http://x/1", "n": 100}, 9: {"url": "http://x/9", "new": True}}
        assert metadata == expected.get(number, {"url": f"http://x/{number}", "n": number, "title": "ü\n"})
        i = number
        assert np.frombuffer(vector, "<f4").tolist() == [i + 1, -i, 0.5, i % 3, 1, 2, 3, i * i]
    journal.close()


def test_a_journal_of_the_version_before_is_taken_over_once(path: Path, caplog):
    caplog.set_level("INFO")
    put_old(path, OLD.read_bytes() + b"\xf5RAJ an unfinished write")
    migrate(path)
    check_migrated(path)
    assert (path.with_suffix("") / "vectors.bin.bak").read_bytes().startswith(OLD.read_bytes())
    damage, line = caplog.messages
    assert "24 bytes are damaged or from an unfinished write" in damage
    assert line.endswith("vectors.bin.bak is no longer used and can be deleted")
    migrate(path)
    assert len(caplog.messages) == 2


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_a_takeover_that_is_killed_begins_again(path: Path):
    """At each change of a file, which Python announces, and at each transaction."""
    code = (
        "import os, sys, itertools; from pathlib import Path; from utils.store import migration, vectors\n"
        "n, numbers = int(sys.argv[1]), itertools.count(1)\n"
        "die = lambda: next(numbers) == n and os.kill(os.getpid(), 9)\n"
        "insert = vectors._insert\n"
        "vectors._insert = lambda *a: (insert(*a), die())\n"
        "sys.addaudithook(lambda e, a: die() if e in ('os.rename', 'os.remove', 'sqlite3.connect') else None)\n"
        "migration.migrate(Path(sys.argv[2]))"
    )
    for n in range(1, 30):
        shutil.rmtree(path.parent, ignore_errors=True)
        put_old(path, OLD.read_bytes())
        done = subprocess.run([sys.executable, "-c", code, str(n), str(path)], cwd=ROOT)
        assert path.exists() or (path.with_suffix("") / "vectors.bin").exists()
        migrate(path)
        check_migrated(path)
        if done.returncode == 0:
            break
    assert 6 < n < 29


def test_a_takeover_needs_room(path: Path, monkeypatch):
    old = put_old(path, OLD.read_bytes())
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 100))
    with pytest.raises(UserError, match=r"of disk, but only 0\.0 GB are free"):
        migrate(path)
    assert old.exists() and not path.exists()


def test_damage_of_the_version_before_costs_the_frames_that_it_hit(path: Path, caplog):
    """Frames hold eight records each here. A bit in every byte is wrong in turn."""
    content = OLD.read_bytes()
    whole = {old_id(i) for i in range(24)}
    for position in range(0, len(content), 53):
        shutil.rmtree(path.parent, ignore_errors=True)
        caplog.clear()
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        put_old(path, bytes(damaged))
        migrate(path)
        journal = Journal(path)
        assert {*journal.ids.tolist()} <= whole and len(journal.ids) >= 16
        for id_, (_, vector) in stored(journal).items():
            i = next(i for i in range(24) if old_id(i) == id_)
            assert np.frombuffer(vector, "<f4").tolist() == [i + 1, -i, 0.5, i % 3, 1, 2, 3, i * i]
        assert any("bytes are damaged" in text for text in caplog.messages)
