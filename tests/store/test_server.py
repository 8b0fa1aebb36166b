"""The store on a real Chroma server: killed in the middle, shared by writers, read by two at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.faults.embed_kills import LIGHT, MAIN
from tests.support.annotation_data import random_vectors
from tests.support.chroma_server import ChromaServer
from tests.support.servers import PhotoServer, Server, closed_port, send
from utils.errors import UserError
from utils.ids import from_ids
from utils.store import collection, index, server
from utils.store.store import Store

MODEL = {"model_name": "some", "pretrained": "tag", "dimension": 8}
SECRET = "sesame"


@pytest.fixture
def chroma(tmp_path: Path) -> Iterator[ChromaServer]:
    with ChromaServer(tmp_path / "served") as running:
        yield running


def place(chroma: ChromaServer) -> server.Place:
    return server.choose("", chroma.url, "")


def new_ids(n: int) -> np.ndarray:
    return np.frombuffer(b"".join(uuid.uuid4().bytes for _ in range(n)), "V16")


def fill(store: Store, n: int, seed: int = 0) -> None:
    if not store.model:
        store.remember_model(MODEL)
    store.append(
        new_ids(n), [{"url": f"http://photos.invalid/{seed}/{i}"} for i in range(n)], random_vectors(n, 8, seed)
    )


def stored(chroma: ChromaServer, folder: Path, n: int, seed: int = 0) -> list[str]:
    """The ids, in order, of `n` records that a writer with its journal in `folder` has stored on the server."""
    store = Store(folder, "images", place(chroma))
    fill(store, n, seed)
    store.finish()
    ids = from_ids(store.journal.rows["id"])
    store.close()
    return ids


# --- the scripts ------------------------------------------------------------------------------------------------------
class Saboteur(PhotoServer):
    """Kills a Chroma server after half of the photos have been requested."""

    chroma: ChromaServer

    def answer(self, request) -> None:
        if self.requests.total() == len(self.files) // 2:
            self.chroma.kill()
        super().answer(request)


def start(name: str, *flags: object, cwd: Path) -> subprocess.Popen[str]:
    """A script as users run it; embed.py with an encoder that needs no torch."""
    program = ["-c", LIGHT + MAIN] if name == "embed.py" else [str(ROOT / name)]
    return subprocess.Popen(
        [sys.executable, *program, *map(str, flags)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_all(where: server.Place) -> dict[str, tuple[np.ndarray, dict]]:
    with collection.reading(where, "images") as images:
        ids = collection.read_ids(images)
        return dict(zip(ids, zip(collection.read_vectors(images, ids), collection.read_metadata(images, ids))))


def test_killed_in_the_middle_of_embed_it_is_waited_for(chroma, tmp_path, photos, offline_model_name, run_here):
    flags = ["--clip-model-name", offline_model_name, "--download-allow-local", "--batch-size", "8"]
    with Saboteur({photo.name: photo.data for photo in photos[::2]}) as web:
        web.chroma = chroma
        items = [{"url": f"{web.url}/{name}", "name": name} for name in web.files]
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "formatted.json").write_text(json.dumps(items))
        run = start("embed.py", *flags, "--chroma-server-url", chroma.url, cwd=tmp_path)
        assert run.stderr and run.stdout
        for line in run.stderr:
            if "is unavailable" in line:
                chroma.start()
        assert run.wait() == 0
        assert f"{len(items)} items = {len(items)} stored + 0 already there" in run.stdout.read()
        assert not (tmp_path / "data" / "chroma" / "chroma.sqlite3").exists()
        verified = run_here("embed.py", *flags, "--chroma-server-url", chroma.url, "--verify")
        assert verified.returncode == 0, verified.stdout + verified.stderr
        embedded = start("embed.py", *flags, "--chromadb-path", "data/other", cwd=tmp_path)
        assert embedded.communicate() and embedded.returncode == 0

    on_server, in_folder = read_all(place(chroma)), read_all(tmp_path / "data" / "other")
    assert on_server.keys() == in_folder.keys() and len(on_server) == len(items)
    for id_, (vector, metadata) in on_server.items():
        assert metadata == in_folder[id_][1]
        assert vector @ in_folder[id_][0] >= 0.9999

    flags = ["--chroma-server-url", chroma.url, "--ann-dirrify-ndirs", "2", "--ann-dirrify-nnearest", "5"]
    runs = [start("ann_dirrify.py", *flags, "--ann-dirrify-dir-path", f"data/{i}", cwd=tmp_path) for i in range(2)]
    for run in runs:
        told, problems = run.communicate()
        assert run.returncode == 0, problems
        assert told.startswith("2 directories with 12 images")


@pytest.mark.parametrize("name", ["embed.py", "ann_dirrify.py", "ann_export.py", "ann_report.py"])
def test_down_at_the_start_is_one_line(name, tmp_path, run_script):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "formatted.json").write_text('[{"url": "http://photos.invalid/1.jpg"}]')
    record = {"pos": [str(uuid.uuid4()), str(uuid.uuid4())], "neg": []}
    (tmp_path / "data" / "annotated.json").write_text(json.dumps([record]))
    result = run_script(name, "--chroma-server-url", f"http://127.0.0.1:{closed_port()}")
    assert result.returncode == 2
    [error] = [line for line in result.stderr.splitlines() if not line.endswith("a JSON list, 1 item")]
    assert error.startswith("error: no Chroma server answers at http://127.0.0.1:")


# --- the store --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("is_graceful", [False, True], ids=["killed", "restarted"])
def test_a_server_that_stops_while_idle_read_or_written_loses_nothing(is_graceful, chroma, tmp_path, monkeypatch):
    plain = index.call
    stops: list[object] = []

    def call(task, *args, progress=lambda n: None, **kwargs):
        """The server stops once in the middle of each kind of task, and is started again."""

        def stop_once(n: int) -> None:
            progress(n)
            if task not in stops:
                stops.append(task)
                chroma.kill(is_graceful)
                threading.Thread(target=chroma.start).start()

        return plain(task, *args, progress=stop_once, **kwargs)

    monkeypatch.setattr(index, "call", call)
    store = Store(tmp_path / "mine", "images", place(chroma))
    for seed in range(5):
        fill(store, 1_000, seed)
    store.finish()  # stops it while it is written to
    for seed in range(5, 7):
        fill(store, 1_000, seed)
    store.finish()
    store.close()
    chroma.kill(is_graceful)  # idle
    chroma.start()
    again = Store(tmp_path / "mine", "images", place(chroma))
    assert again.compare() == (7_000, [])  # stops it while it is read
    assert stops == [index.apply, index.compare]
    assert len(again.known) == again.count == 7_000 and not len(again.journal.gone)
    again.close()


def test_records_that_a_server_has_damaged_are_written_again(chroma, tmp_path, caplog):
    caplog.set_level("INFO")
    ids = stored(chroma, tmp_path / "mine", 100)
    images = collection.open_collection(place(chroma), "images")
    images.update(ids=ids[:7], embeddings=np.zeros((7, 8), np.float32))
    again = Store(tmp_path / "mine", "images", place(chroma))
    assert "writing 7 damaged records of collection images again" in caplog.messages
    assert again.compare() == (100, [])
    again.close()


def test_writers_add_to_one_collection_and_prune_their_own(chroma, tmp_path):
    writers = [Store(tmp_path / f"writer{i}", "images", place(chroma)) for i in range(2)]
    for i, writer in enumerate(writers):
        fill(writer, 50, i)
    threads = [threading.Thread(target=writer.finish) for writer in writers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
        writers[0].close()
    first = Store(tmp_path / "writer0", "images", place(chroma))
    assert len(first.own) == 50 and len(first.known) == first.count == 100
    first.remove(first.own)
    first.close()
    newcomer = Store(tmp_path / "newcomer", "images", place(chroma))
    assert newcomer.model == MODEL and not len(newcomer.own)
    assert set(newcomer.known.tolist()) == set(writers[1].journal.rows["id"].tolist())
    newcomer.close()


def test_a_collection_that_the_server_lacks_comes_back_from_the_journal(chroma, tmp_path):
    stored(chroma, tmp_path / "mine", 20)
    collection.open_client(place(chroma)).delete_collection("images")
    again = Store(tmp_path / "mine", "images", place(chroma))
    assert again.compare() == (20, [])
    again.close()


def test_each_writer_stores_its_own_records_again_after_a_loss_of_the_collection(chroma, tmp_path):
    for i in range(2):
        stored(chroma, tmp_path / f"writer{i}", 20, i)
    collection.open_client(place(chroma)).delete_collection("images")
    for i in range(2):  # the second finds a collection, and none of its records in it
        store = Store(tmp_path / f"writer{i}", "images", place(chroma))
        assert store.compare() == (20, []) and not len(store.journal.gone)
        store.close()


@pytest.mark.parametrize(("n_missing", "is_loss"), [(100, True), (99, False)])
def test_many_of_the_newest_missing_at_once_are_a_loss_and_written_again(n_missing, is_loss, chroma, tmp_path, caplog):
    """The state after restoring an older backup; earlier deletions of single records by people stay."""
    ids = stored(chroma, tmp_path / "mine", 300)
    images = collection.open_collection(place(chroma), "images")
    images.delete(ids=[ids[5], *ids[-n_missing:]])
    again = Store(tmp_path / "mine", "images", place(chroma))
    line = "has lost its newest records (100 of 300), as if an older backup had been restored; they are written again"
    assert (line in caplog.text) == is_loss
    assert len(again.journal.gone) == (1 if is_loss else n_missing + 1)
    assert again.count == 300 - len(again.journal.gone)
    assert again.compare() == (again.count, [])
    again.close()


# --- the client -------------------------------------------------------------------------------------------------------
def test_what_stays_away_is_given_up_in_one_line(chroma, monkeypatch):
    monkeypatch.setattr(server, "WAIT_S", 1)
    client = collection.open_client(place(chroma))
    chroma.kill()
    with pytest.raises(UserError, match="was unavailable for 1 s"):
        client.heartbeat()


class Proxy(Server):
    """Lets in who knows the secret, and then plays a server that hangs, but for its heartbeat; or answers `always`."""

    always = 0

    def answer(self, request) -> None:
        if self.always and not ("heartbeat" in request.path and self.always == 413):
            send(request, self.always, b"<html>\n<title>a page</title>", {"Location": "https://a.invalid"})
        elif request.headers.get("X-Token") != SECRET:
            send(request, 401, b"")
        elif "heartbeat" in request.path:
            send(request, 200, b'{"nanosecond heartbeat": 1}')
        else:
            self._closing.wait()
            request.close_connection = True


def test_headers_come_from_the_environment_and_a_hanging_server_times_out(monkeypatch, caplog):
    monkeypatch.setattr(server, "WAIT_S", 0.5)
    monkeypatch.setattr(server, "TIMEOUT_S", 0.2)
    with Proxy() as proxy:
        with pytest.raises(UserError, match=r"refuses access \(401\); set CHROMA_SERVER_HEADERS_ENV"):
            server.choose("", proxy.url, "")
        with pytest.raises(UserError, match="not set"):
            server.choose("", proxy.url, "TEST_HEADERS")
        for bad in (SECRET, f'["{SECRET}"]', f'{{"{SECRET}": 1}}'):
            monkeypatch.setenv("TEST_HEADERS", bad)
            with pytest.raises(UserError, match="TEST_HEADERS must be a JSON object") as caught:
                server.choose("", proxy.url, "TEST_HEADERS")
            assert SECRET not in str(caught.value)
        monkeypatch.setenv("TEST_HEADERS", json.dumps({"X-Token": SECRET}))
        found = server.choose("", proxy.url, "TEST_HEADERS")
        assert SECRET not in repr(found)
        with pytest.raises(UserError, match="ReadTimeout"):
            collection.open_client(found)
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "ftp://a",
        "http://",
        "http://[a",
        " http://a",
        "http://a#b",
        f"http://me:{SECRET}@a",
        f"http://a?k={SECRET}",
    ],
)
def test_urls_that_are_none_or_hold_secrets_are_refused(url):
    with pytest.raises(UserError) as caught:
        server.choose("", url, "")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "message"),
    [(301, r"not a Chroma server \(301\)"), (503, r"no Chroma .* \(503\)"), (413, r"proxy .* answers 413 \w+")],
)
def test_what_a_proxy_answers_is_named(status, message, monkeypatch):
    monkeypatch.setenv("TEST_HEADERS", json.dumps({"X-Token": SECRET}))
    with Proxy() as proxy, pytest.raises(UserError, match=message):
        proxy.always = status
        collection.open_client(server.choose("", proxy.url, "TEST_HEADERS"))


def test_requests_fit():
    metadata = [{"text": "x" * (i % 7) * 10**6} for i in range(40)]
    slices = server.request_slices(metadata, 512, 30)
    assert [i for part in slices for i in range(40)[part]] == list(range(40))
    for part in slices:
        assert 1 <= part.stop - part.start <= 30
        assert len(json.dumps(metadata[part])) < 40 * 2**20
    assert not server.request_slices([], 512, 30)
