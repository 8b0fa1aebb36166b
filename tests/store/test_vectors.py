from __future__ import annotations

import os
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
from utils.store import vectors as journals
from utils.store.vectors import CHANGE, INDEXED, MODEL, REMOVE, STORE, Journal

D = 3


def ids_of(*numbers: int) -> np.ndarray:
    return np.frombuffer(b"".join(uuid.UUID(int=number + 1).bytes for number in numbers), "V16")


def vectors_of(*numbers: int) -> np.ndarray:
    return np.array([[number, -number, 0.5] for number in numbers], np.float32)


def add(journal: Journal, *numbers: int) -> int:
    metadata = [{"url": f"http://x/{number}", "n": number, "ü": "\n"} for number in numbers]
    return journal.append(STORE, ids_of(*numbers), metadata, vectors_of(*numbers))


def stored(journal: Journal) -> dict[bytes, tuple[dict, bytes]]:
    frames = [frame for frame in journal.frames() if frame.kind == STORE]
    return {
        id_: (metadata, vector.tobytes())
        for frame in frames
        for id_, metadata, vector in zip(frame.ids.tolist(), frame.metadata, frame.vectors)
    }


def test_what_is_appended_is_read_back_bit_for_bit(tmp_path: Path):
    journal = Journal(tmp_path)
    journal.note(MODEL, {"model_name": "m"})
    end = add(journal, 2, 0)
    journal.note(INDEXED, {"end": end})
    add(journal, 1)
    journal.close()
    again = Journal(tmp_path)
    assert again.model == {"model_name": "m"}
    assert again.ids.tolist() == ids_of(0, 1, 2).tolist()
    assert again.indexed > end, "what follows the index's note and holds no records is not to be indexed again"
    assert again.end > again.indexed
    assert stored(again)[ids_of(2).tobytes()] == (
        {"url": "http://x/2", "n": 2, "ü": "\n"},
        vectors_of(2).tobytes(),
    )


def test_an_index_that_has_everything_has_nothing_to_do_after_reopening(tmp_path: Path):
    journal = Journal(tmp_path)
    journal.note(INDEXED, {"end": add(journal, 1)})
    assert journal.indexed == journal.end
    journal.mark_gone(ids_of(1))
    assert journal.indexed == journal.end
    journal.close()
    assert (again := Journal(tmp_path)).indexed == again.end == journal.end
    assert again.gone.tolist() == ids_of(1).tolist()


def test_cut_at_every_byte_of_the_last_batches_it_opens_to_the_acknowledged_prefix(tmp_path: Path):
    journal = Journal(tmp_path / "whole")
    ends = [add(journal, 0, 1), add(journal, 2, 3), add(journal, 4, 5)]
    journal.close()
    content, whole = journal.path.read_bytes(), stored(journal)
    (tmp_path / "cut").mkdir()
    path = tmp_path / "cut" / "vectors.bin"
    for size in range(ends[0], len(content) + 1):
        path.write_bytes(content[:size])
        cut = Journal(tmp_path / "cut")
        n = 2 * sum(end <= size for end in ends)
        assert stored(cut) == dict(list(whole.items())[:n])
        assert len(cut.ids) == n
        if size in (ends[0] + 1, ends[1] + 30, ends[2] - 1):  # and it goes on from there
            add(cut, 9)
            cut.close()
            assert list(stored(Journal(tmp_path / "cut"))) == [*list(whole)[:n], ids_of(9).tobytes()]


def test_every_flipped_byte_is_found(tmp_path: Path):
    journal = Journal(tmp_path / "whole")
    ends = [add(journal, 0), add(journal, 1), add(journal, 2)]
    journal.close()
    content, whole = journal.path.read_bytes(), stored(journal)
    (tmp_path / "flipped").mkdir()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        (tmp_path / "flipped" / "vectors.bin").write_bytes(flipped)
        if position < ends[1]:  # intact records follow
            with pytest.raises(UserError, match="damaged at byte"):
                Journal(tmp_path / "flipped")
        else:
            assert stored(Journal(tmp_path / "flipped")) == dict(list(whole.items())[:2])


def test_unsynced_writes_that_are_lost_were_never_acknowledged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A disk that keeps only what was synced: after each acknowledgment that copy alone must hold the record."""
    disk = tmp_path / "disk" / "vectors.bin"
    disk.parent.mkdir()
    real, calls = os.fsync, []

    def fsync(descriptor: int) -> None:
        real(descriptor)
        calls.append(descriptor)
        if journal.path.exists():
            shutil.copy(journal.path, disk)

    monkeypatch.setattr(os, "fsync", fsync)
    journal = Journal(tmp_path / "journal")
    for number in range(4):
        add(journal, number)
        assert len(Journal(disk.parent).ids) == number + 1
    assert len(calls) >= 4 + (os.name != "nt"), "the new file's folder entry is synced, too"
    journal.remove(ids_of(2))
    assert len(Journal(disk.parent).ids) >= 3


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on the size of files")
def test_a_full_disk_is_one_line_and_the_journal_goes_on_afterwards(tmp_path: Path):
    code = (
        "import resource, sys; from pathlib import Path; from tests.store.test_vectors import *\n"
        "journal = Journal(Path(sys.argv[1])); add(journal, 0)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (journal.end + 40, -1))\n"
        "try: add(journal, 1)\n"
        "except UserError as error: print(error)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1)); add(journal, 2)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "cannot be written" in done.stdout and "run again" in done.stdout and done.stdout.count("\n") == 1
    assert list(stored(Journal(tmp_path))) == ids_of(0, 2).tolist()


def test_remove_keeps_the_other_records_and_their_changes(tmp_path: Path):
    journal = Journal(tmp_path)
    journal.note(MODEL, {"model_name": "m"})
    add(journal, 0, 1, 2)
    journal.append(CHANGE, ids_of(0, 1), [{"n": 10}, {"n": 11}], np.empty((2, 0), np.float32))
    journal.mark_gone(ids_of(1))
    journal.append(REMOVE, ids_of(1), [], np.empty((1, 0), np.float32))
    journal.remove(ids_of(1))
    add(journal, 3)
    journal.close()
    again = Journal(tmp_path)
    assert again.ids.tolist() == ids_of(0, 2, 3).tolist()
    assert (len(again.gone), len(again.removing), again.model) == (0, 0, {"model_name": "m"})
    assert dict(again.metadata())[ids_of(0).tobytes()] == {"n": 10}
    assert again.indexed < again.end, "the record added after the removal is not in the index"


def test_opening_keeps_ids_and_not_vectors_in_memory(tmp_path: Path):
    journal = Journal(tmp_path)
    for start in range(0, 2000, 100):
        ids = ids_of(*range(start, start + 100))
        journal.append(STORE, ids, [{}] * 100, np.zeros((100, 512), np.float32))
    journal.close()
    tracemalloc.start()
    again = Journal(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(again.ids) == 2000
    assert peak < 1_500_000, "4 MB of vectors, of which one frame at a time"


def test_the_head_says_the_version_of_the_format():
    assert journals._MAGIC == b"\xf5RAJ" and journals._HEAD.size == 25  # a change needs a new magic
