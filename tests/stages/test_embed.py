from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT, RunScript
from tests.faults.embed_kills import LIGHT, MAIN
from tests.faults.fault_server import FAULTS, STORED, FaultServer
from tests.support.annotation_data import image_bytes
from tests.support.servers import PhotoServer, closed_port
from utils.store import collection as collections


def id_of(text: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, text))


def write_list(tmp_path: Path, items: list[object]) -> None:
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data/formatted.json").write_text(json.dumps(items))


def summary(stored: int, known: int, duplicates: int, failed: int, before: int, todo: int) -> str:
    n = stored + known + duplicates + failed + before + todo
    return (
        f"{n} items = {stored} stored + {known} already there + {duplicates} duplicates + {failed} failed now + "
        f"{before} failed before + {todo} not reached\n"
    )


def stored_metadata(tmp_path: Path) -> dict[str, dict]:
    collection = collections.open_collection(tmp_path / "data/chroma", "images")
    ids = collections.read_ids(collection)
    vectors = collections.read_vectors(collection, ids)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    return dict(zip(ids, collections.read_metadata(collection, ids)))


def test_a_list_from_first_run_to_prune(
    tmp_path: Path, run_here: RunScript, photo_server: PhotoServer, offline_model_name: str
):
    names = list(photo_server.files)[:6]
    url = photo_server.url
    items: list[object] = [{"url": f"{url}/{name}", "n": n} for n, name in enumerate(names)]
    items += [{"url": f"{url}/{names[0]}", "n": 99}, {"url": f"{url}/none.jpg"}, {"no": "url"}, "text"]
    items += [{"url": f"http://127.0.0.1:{closed_port()}/"}]
    write_list(tmp_path, items)
    flags = ["--download-allow-local", "--clip-model-name", offline_model_name]

    first = run_here("embed.py", *flags)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith(summary(6, 0, 1, 4, 0, 0))
    assert "duplicates with other fields than the first item with their id: 1" in first.stderr
    entries = json.loads((tmp_path / "data/failed.json").read_text())
    assert [(entry["index"], entry["url"], entry["reason"]) for entry in entries] == [
        (7, f"{url}/none.jpg", "http_status"),
        (8, None, "bad_record"),
        (9, None, "bad_record"),
        (10, items[10]["url"], "connection"),
    ]
    expected = {id_of(f"{url}/{name}"): {"url": f"{url}/{name}", "n": n} for n, name in enumerate(names)}
    assert stored_metadata(tmp_path) == expected
    for name in names:
        id_ = id_of(f"{url}/{name}")
        [cached] = (tmp_path / "data/images" / id_[:2]).glob(f"{id_}.*")
        assert cached.read_bytes() == photo_server.files[name]

    items[10] = {"url": f"{url}/{names[1]}", "n": 1}  # nothing open is left: no request, no model
    items[1] = {"url": f"{url}/{names[1]}", "other": None, "n": True}
    del items[5]
    write_list(tmp_path, items)
    requests = photo_server.requests.total()
    missing = ["--download-allow-local", "--clip-model-name", offline_model_name, "--device", "none such"]
    second = run_here("embed.py", *missing, "--refresh-metadata", "--prune")
    assert second.returncode == 0, second.stderr
    assert "metadata refreshed: 1 of 6 records\npruned: 1 record no longer in the list" in second.stdout
    assert summary(0, 5, 2, 2, 1, 0) in second.stdout
    assert photo_server.requests.total() == requests
    del expected[id_of(f"{url}/{names[5]}")]
    expected[id_of(f"{url}/{names[1]}")] = {
        "url": f"{url}/{names[1]}",
        "n": True,
        "_rest_json": '{"other": null}',
    }
    assert stored_metadata(tmp_path) == expected

    verified = run_here("embed.py", *flags, "--verify")
    assert verified.returncode == 0, verified.stdout
    assert verified.stdout.split("\n")[-2].split() == ["differences", "0"]
    other = run_here("embed.py", "--download-allow-local", "--clip-pretrained", "openai")
    assert other.returncode == 2
    assert "collection images was made with" in other.stderr and "the settings name ViT-B-32 openai" in other.stderr
    assert f"add --clip-model-name {offline_model_name} --clip-pretrained '', or" in other.stderr


def test_a_placeholder_behind_many_links_is_counted(
    tmp_path: Path, run_here: RunScript, photo_server: PhotoServer, offline_model_name: str
):
    placeholder = base64.b64encode(image_bytes(0, "PNG")).decode()
    links = [f"data:image/\x1b[2J{number};base64,{placeholder}" for number in range(4)]
    photos = [f"{photo_server.url}/{name}" for name in list(photo_server.files)[:3]]
    photo_server.files["again.jpg"] = photo_server.files[photos[1].rpartition("/")[2]]
    write_list(tmp_path, [*photos, f"{photo_server.url}/again.jpg", *links])
    flags = ["--clip-model-name", offline_model_name, "--precision", "fp32"]
    done = run_here("embed.py", "--download-allow-local", *flags)
    assert done.stdout.startswith(summary(8, 0, 0, 0, 0, 0)), done.stderr
    finding = (
        "6 images of this run are byte-identical to another image; the most frequent, 4 times: data:image/\\x1b[2J0;"
    )
    assert finding in done.stdout


def test_lists_that_cannot_be_used_end_with_one_line_and_change_nothing(tmp_path: Path, run_script: RunScript):
    (tmp_path / "data").mkdir()
    for content, words in [
        (None, "does not exist; give a JSON list, [{"),
        ("{", "is broken as JSON lines, at its beginning: line 1 is not JSON"),
        ('{"url":\n"x"}', "is broken as JSON lines"),
        ("images", "unknown format, with the first line 'images'; give a JSON list, [{"),
        ("id,image_url\n1,http://x/a.jpg\n", "first line 'id,image_url'; give a JSON list, [{"),
        ('[{"url": "http://127.0.0.1/a\\u001b[2J"}, {"url": "file:///x"}]', "2 items on this machine"),
    ]:
        if content is not None:
            (tmp_path / "data/formatted.json").write_text(content)
        done = run_script("embed.py", "--logs-dir-path", "")
        assert done.returncode == 2
        assert words in done.stderr and done.stderr.count("error: ") == 1 and done.stdout == ""
        assert done.stderr.splitlines()[-1].startswith("error: ") and done.stderr.count("\n") <= 2  # one: its form
        assert "\x1b" not in done.stderr
    assert not (tmp_path / "data/failed.json").exists()


def test_an_empty_list_is_done_and_one_of_failures_alone_ends_with_1(tmp_path: Path, run_script: RunScript):
    write_list(tmp_path, [])
    done = run_script("embed.py")
    assert (done.returncode, done.stdout.startswith(summary(0, 0, 0, 0, 0, 0))) == (0, True)
    write_list(tmp_path, [{"image_url": "http://x/a.jpg"}])
    done = run_script("embed.py")
    assert (done.returncode, done.stdout.startswith(summary(0, 0, 0, 1, 0, 0))) == (1, True)
    finding = "the first bad record is item 0: field 'url' is missing; --url-field names another field\n"
    assert finding in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process that is sent a signal")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_keeps_what_it_has(
    tmp_path: Path, number: signal.Signals, offline_model_name: str, photos
):
    """The signal goes to the whole process group, as from a terminal; some photos never arrive."""

    class Stalling(PhotoServer):
        def answer(self, request) -> None:
            if request.path.startswith("/stall"):
                if not stopped:
                    stopped.append(process.pid)
                    os.killpg(process.pid, number)
                self._closing.wait()
            else:
                super().answer(request)

    stopped: list[int] = []
    with Stalling({photo.name: photo.data for photo in photos}) as server:
        names = [photo.name for photo in photos][:8]
        write_list(tmp_path, [{"url": f"{server.url}/{name}"} for name in [*names, *[f"stall{i}" for i in range(4)]]])
        command = [sys.executable, "-c", LIGHT + MAIN, "--download-allow-local", "--batch-size", "1"]
        command += ["--clip-model-name", offline_model_name, "--download-workers", "1"]
        with subprocess.Popen(
            command,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            out, error = process.communicate(timeout=200)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number], error
    assert "Traceback" not in error
    n = len(stored_metadata(tmp_path))
    assert out.startswith(summary(n, 0, 0, 0, 0, 12 - n)) and n >= 4


def test_every_fault_of_the_web_has_its_outcome(tmp_path: Path, run_here: RunScript, offline_model_name: str):
    with FaultServer() as server:
        write_list(tmp_path, [{"url": server.url(name)} for name in FAULTS])
        flags = ["--download-allow-local", "--clip-model-name", offline_model_name, "--download-timeout-s", "2"]
        done = run_here("embed.py", *flags, "--download-max-bytes", "5000000")
        urls = {server.url(name): name for name in FAULTS}
    assert done.returncode == 0, done.stderr
    failed = {urls[entry["url"]]: entry["reason"] for entry in json.loads((tmp_path / "data/failed.json").read_text())}
    assert failed == {name: reason for name, reason in FAULTS.items() if reason != STORED}
    n_stored = sum(reason == STORED for reason in FAULTS.values())
    assert done.stdout.startswith(summary(n_stored, 0, 0, len(FAULTS) - n_stored, 0, 0))
