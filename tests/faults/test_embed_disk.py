"""embed.py with a full disk, without write permission, or without network: one line, and a rerun continues."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.faults.embed_kills import LIGHT, MAIN, check_journal, read_collection
from tests.support.servers import PhotoServer, closed_port

LIMITED = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, 2 * (int(sys.argv.pop(1)),)); "
# A journal of small pages and a short log is smaller than Chroma's files.
SMALL = "import utils.store.vectors as v; v.PAGE_BYTES, v.WAL_BYTES = 1024, 16384; "
FLAGS = ["--image-cache-dir-path", "", "--logs-dir-path", "", "--download-allow-local", "--batch-size", "8"]


def embed(folder: Path, model: str, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """embed.py with an encoder that needs no torch."""
    command = [sys.executable, "-c", code + LIGHT + MAIN, *arguments, *FLAGS, "--clip-model-name", model]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, timeout=120, capture_output=True, text=True)


@pytest.fixture
def folder(tmp_path: Path, photo_server: PhotoServer) -> Path:
    (tmp_path / "data").mkdir()
    items = [{"url": f"{photo_server.url}/{name}"} for name in photo_server.files]
    (tmp_path / "data/formatted.json").write_text(json.dumps(items))
    return tmp_path


def assert_one_line(done: subprocess.CompletedProcess[str], words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert words in line


# Bytes that a file may have: less than the journal with its log; enough for a journal of small pages, not for Chroma.
@pytest.mark.skipif(os.name == "nt", reason="Windows limits no file sizes")
@pytest.mark.parametrize(
    ("limit", "code", "words"), [(1_000_000, "", "journal"), (130_000, SMALL, "collection images in")], ids=str
)
def test_a_disk_that_is_full_costs_nothing_that_was_stored(folder: Path, offline_model_name: str, limit, code, words):
    done = embed(folder, offline_model_name, code + LIMITED, str(limit))
    assert_one_line(done, words)
    assert "File too large" in done.stderr or "I/O error" in done.stderr or "safe in the journal" in done.stderr
    stored = check_journal(folder / "data/chroma", {})
    assert 0 < len(stored) <= 64
    done = embed(folder, offline_model_name, "")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"64 items = {64 - len(stored)} stored + {len(stored)} already there")
    assert len(check_journal(folder / "data/chroma", stored)) == len(read_collection(folder / "data/chroma")[0]) == 64


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions bind neither Windows nor root")
def test_a_folder_that_is_read_only_is_one_line(folder: Path, offline_model_name: str):
    (folder / "data").chmod(0o555)
    try:
        assert_one_line(embed(folder, offline_model_name, ""), "Permission denied")
    finally:
        (folder / "data").chmod(0o755)


def test_a_network_that_is_down_fails_no_image(folder: Path, offline_model_name: str, monkeypatch: pytest.MonkeyPatch):
    urls = [f"http://host-{number}.example/photo.jpg" for number in range(60)]
    (folder / "data/formatted.json").write_text(json.dumps([{"url": url} for url in urls]))
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{closed_port()}")  # no test depends on this network
    done = embed(folder, offline_model_name, "")
    assert_one_line(done, "60 downloads in a row failed: the proxy does not answer (Connection refused)")
    assert json.loads((folder / "data/failed.json").read_text()) == []


def test_a_store_that_cannot_be_a_folder_is_one_line(folder: Path, offline_model_name: str):
    (folder / "file").touch()
    assert_one_line(embed(folder, offline_model_name, "", "--chromadb-path", "file/chroma"), "file")
    assert_one_line(embed(folder, offline_model_name, "", "--failed-data-path", "file/failed.json"), "file")
