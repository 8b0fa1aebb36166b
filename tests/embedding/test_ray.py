"""embed.py on a real local Ray with two actors: the same collection as from one process, even if an actor dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support import offline_model
from tests.support.servers import PhotoServer, closed_port
from utils.embedding import ray_actor, ray_run
from utils.embedding.fetcher import Fetcher
from utils.embedding.run import Plan
from utils.errors import UserError
from utils.store import collection
from utils.web.download import DownloadLimits

ray = pytest.importorskip("ray", reason='Ray is not installed: pip install "ray[data]"')
LIMIT_S = 300


class Trap(PhotoServer):
    """Kills one of the actors of a run after `deadly` requests for photos."""

    run: subprocess.Popen[str]
    deadly = 0
    killed = 0

    def answer(self, request) -> None:
        if self.deadly and not self.killed and self.requests.total() >= self.deadly:
            self.killed = kill_actor(self.run.pid)
        super().answer(request)


def kill_actor(pid: int) -> int:
    import psutil  # comes with Ray

    for child in psutil.Process(pid).children(recursive=True):
        if "MapWorker" in " ".join(child.cmdline()):
            child.kill()
            return child.pid
    return 0


def embed(web: Trap, folder: Path, model: str, *flags: str) -> str:
    items = [{"url": f"{web.url}/{name}", "name": name} for name in [*web.files, "missing.jpg"]]
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "formatted.json").write_text(json.dumps(items))
    flags = ("--clip-model-name", model, "--download-allow-local", "--precision", "fp32", "--batch-size", "8", *flags)
    web.run = subprocess.Popen(
        [sys.executable, str(ROOT / "embed.py"), *flags],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    told, problems = web.run.communicate(timeout=LIMIT_S)
    assert web.run.returncode == 0, problems
    return told


def read_all(folder: Path) -> dict:
    with collection.reading(folder / "data" / "chroma", "images") as images:
        ids = collection.read_ids(images)
        return dict(zip(ids, zip(collection.read_vectors(images, ids), collection.read_metadata(images, ids))))


def test_two_actors_make_what_one_process_makes_though_one_is_killed(photos, tmp_path, offline_model_name):
    files = {photo.name: photo.data for photo in photos[::2]} | {"bad.jpg": b"\xff\xd8\xff no image"}
    with Trap(files) as web:
        alone = embed(web, tmp_path / "alone", offline_model_name)
        web.requests.clear()
        web.deadly = len(files) // 2
        on_ray = embed(
            web, tmp_path / "ray", offline_model_name, "--embed-ray-address", "local", "--embed-ray-actors", "2"
        )
    n = len(photos[::2])
    assert web.killed
    first, second = alone.splitlines()[:2]
    assert on_ray.splitlines()[:2] == [first, second]
    assert first.startswith(f"{n + 2} items = {n} stored + 0 already there + 0 duplicates + 2 failed")
    expected, found = read_all(tmp_path / "alone"), read_all(tmp_path / "ray")
    assert expected.keys() == found.keys() and len(found) == n
    for id_, (vector, metadata) in expected.items():
        assert found[id_][1] == metadata
        assert found[id_][0] @ vector >= 0.9999


@pytest.mark.parametrize("prefix", ["127.0.0.1:", "ray://127.0.0.1:"])
def test_an_address_without_ray_is_one_line_at_once(prefix):
    refused = pytest.raises(UserError, match=r"no Ray at EMBED_RAY_ADDRESS .*refused")
    with refused, ray_run.cluster(f"{prefix}{closed_port()}"):
        pass


def test_too_few_cores_for_an_actor_are_named(monkeypatch, caplog):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    assert ray_run.count_actors(0, 2) == (1, 0) and not caplog.text
    assert ray_run.count_actors(0, 64) == (1, 0)
    assert "EMBED_RAY_CPUS_PER_ACTOR is 64, and Ray has 2" in caplog.text


def test_an_error_of_an_actor_is_one_line_and_its_traceback_in_the_log(photo_server, tmp_path, run_script):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "formatted.json").write_text(json.dumps([f"{photo_server.url}/a.jpg"]))
    model = offline_model.build_small_vit(tmp_path / "model")
    flags = ["--clip-model-name", f"local-dir:{model}", "--download-allow-local", "--device", "cuda:99"]
    done = run_script("embed.py", *flags, "--embed-ray-address", "local", "--embed-ray-actors", "1", timeout=LIMIT_S)
    assert done.returncode == 2
    assert "\nerror: Ray failed: DEVICE 'cuda:99' cannot be used" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    (log,) = (tmp_path / "data" / "logs").iterdir()
    assert "_find_device" in log.read_text()


class Broken(Fetcher):
    """Fails before its first result."""

    def _dispatch(self) -> None:
        self._results.put(UserError("planted"))


def test_an_actor_whose_fetcher_failed_opens_another(photo_server, tmp_path, offline_model_name, monkeypatch):
    import pyarrow

    monkeypatch.setattr(
        sys.modules["__main__"], "__file__", "planted", raising=False
    )  # it is taken away, and comes back
    monkeypatch.chdir(tmp_path)
    limits = DownloadLimits(5, 1, 10**7, allow_local=True, respect_noai=True)
    model = (offline_model_name, "", "cpu", "fp32")
    embedder = ray_actor.Embedder(Plan(model, {}, limits, 10**8, ("", 0), 4, 0, 8), 2, str(tmp_path))
    rows = [ray_actor.Row(i, str(i), f"{photo_server.url}/{name}", "{}") for i, name in enumerate(photo_server.files)][
        :5
    ]
    block = pyarrow.table(dict(zip(ray_actor.Row._fields, map(list, zip(*rows)))))
    with monkeypatch.context() as patch, pytest.raises(UserError, match="planted"):
        patch.setattr(ray_actor, "Fetcher", Broken)
        embedder(block)
    done = embedder(block).to_pydict()
    assert done["key"] == [0, 1, 2, 3, 4] and all(done["vector"]) and not any(done["reason"])
