from __future__ import annotations

import io
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import pytest

from utils.images.cache import ABANDONED_S, ImageCache

ID = "0a000000-0000-5000-8000-000000000000"
PNG = b"\x89PNG\r\n\x1a\n"


def make(directory: Path | str, max_bytes: int = 1000) -> ImageCache:
    return ImageCache(str(directory), max_bytes, multiprocessing.Value("q", 0))


@pytest.fixture(autouse=True)
def half_empty_disk(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(100, 50, 50))


def test_what_is_added_is_found_under_the_first_two_letters(tmp_path: Path):
    cache = make(tmp_path)
    cache.add(ID, io.BytesIO(PNG))
    assert cache.find(ID) == tmp_path / "0a" / f"{ID}.png"
    assert cache.find(ID).read_bytes() == PNG
    assert cache.size() == (1, 8)
    assert cache.find(ID.replace("0a", "0b")) is None


def test_it_stops_at_its_size_and_says_so(tmp_path: Path):
    cache = make(tmp_path, 8)
    cache.add(ID, io.BytesIO(b"BM345"))
    assert cache.full == ""
    cache.add(ID.replace("0a", "0b"), io.BytesIO(b"BM345"))
    assert "IMAGE_CACHE_MAX_BYTES is 8" in cache.full
    assert cache.size() == (1, 5)


def test_it_leaves_a_tenth_of_the_disk_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(100, 91, 9))
    cache = make(tmp_path)
    cache.add(ID, io.BytesIO(b"BM345"))
    assert "10% of the disk" in cache.full and cache.size() == (0, 0)


def test_a_folder_that_cannot_be_written_stops_it_without_an_error(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    cache = make(tmp_path / "file" / "cache")
    cache.add(ID, io.BytesIO(b"BM345"))
    assert "cannot be written" in cache.full


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(_source: object, target: io.BytesIO) -> None:
        target.write(b"1")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", fail)
    cache = make(tmp_path)
    cache.add(ID, io.BytesIO(b"BM345"))
    assert cache.full.endswith("No space left on device") and cache.size() == (0, 0)


def test_temporary_files_of_killed_runs_are_removed_and_no_others(tmp_path: Path):
    cache = make(tmp_path)
    cache.add(ID, io.BytesIO(b"BM345"))
    folder = tmp_path / "0a"
    abandoned, being_written = folder / f".{ID}.jpg.4194305.tmp", folder / f".{ID}.png.1.tmp"
    others = [folder / name for name in (f".{ID}.tmp", f"{ID}.jpg.1.tmp", ".notes.txt.1.tmp", f"x.{ID}.jpg.1.tmp")]
    for path in (abandoned, being_written, *others):
        path.write_bytes(b"1")
        if path != being_written:
            os.utime(path, (time.time() - 2 * ABANDONED_S,) * 2)
    assert cache.size() == (6, 10)
    assert not abandoned.exists() and being_written.exists() and all(path.exists() for path in others)


def test_without_a_folder_nothing_is_kept():
    cache = make("")
    cache.add(ID, io.BytesIO(b"BM345"))
    assert cache.find(ID) is None and cache.size() == (0, 0) and cache.full == ""
