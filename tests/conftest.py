"""Fixtures for all tests: a model with real weights, real photos, loopback servers, scripts run as users run them."""

from __future__ import annotations

import contextlib
import importlib
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import offline_model
from tests.support.photos import PHOTOS, Variation, variations
from tests.support.servers import FakeHub, PhotoServer
from utils import cli, processes
from utils.log import LOG

ROOT = Path(__file__).resolve().parents[1]

# No test leaves this machine: the hub is off unless a test starts its own, and no proxy is used.
os.environ["HF_HUB_OFFLINE"] = "1"
for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
    del os.environ[name]

# A shell may ignore SIGINT in background jobs, and scripts started by tests would inherit this.
signal.signal(signal.SIGINT, signal.default_int_handler)

RunScript = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session", autouse=True)
def _quick_children() -> None:
    """This process forks its children from one that has imported what they need; what run_script runs spawns them."""
    if "forkserver" in multiprocessing.get_all_start_methods():
        processes.CONTEXT = multiprocessing.get_context("forkserver")
        processes.CONTEXT.set_forkserver_preload(["chromadb", "utils.store.index", "utils.embedding.fetch_worker"])


@pytest.fixture(autouse=True)
def _log_as_it_was() -> Iterator[None]:
    """Undo what a script in this process does to the log: it adds handlers and disconnects those of pytest."""
    yield
    LOG.handlers.clear()
    LOG.propagate = True
    LOG.setLevel(logging.NOTSET)


@pytest.fixture
def run_script(tmp_path: Path) -> RunScript:
    """run_script("embed.py", "--flag", "value", cwd=, env=, timeout=): its result, with stdout and stderr as text.

    It starts in an empty folder, so that the constants' relative paths are the test's own.
    """

    def run(name: str, *args: object, cwd: Path = tmp_path, env: dict[str, str] | None = None, timeout: float = 120):
        command = [sys.executable, str(ROOT / name), *map(str, args)]
        environment = {**os.environ, "PYTHONIOENCODING": "utf-8", **(env or {})}
        return subprocess.run(
            command, cwd=cwd, env=environment, timeout=timeout, capture_output=True, text=True, encoding="utf-8"
        )

    return run


@pytest.fixture
def run_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> RunScript:
    """Like run_script, but in this process: for scripts that need torch, whose import takes seconds."""

    def run(name: str, *args: object, cwd: Path = tmp_path):
        monkeypatch.chdir(cwd)
        script = importlib.import_module(name.removesuffix(".py"))
        capfd.readouterr()
        before = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as ended:
                cli.run(lambda: script.main([*map(str, args)]))
        finally:
            signal.signal(signal.SIGTERM, before)
        return subprocess.CompletedProcess([name, *args], ended.value.code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def offline_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an open_clip model with real ImageNet weights."""
    return offline_model.build(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def offline_model_name(offline_model_path: Path) -> str:
    """This folder as a CLIP_MODEL_NAME."""
    return f"local-dir:{offline_model_path}"


@pytest.fixture(scope="session")
def small_vit_name(tmp_path_factory: pytest.TempPathFactory) -> str:
    """CLIP_MODEL_NAME of a small seeded ViT, for which bf16 is accurate enough."""
    return f"local-dir:{offline_model.build_small_vit(tmp_path_factory.mktemp('small'))}"


@pytest.fixture(scope="session")
def photos() -> list[Variation]:
    """Sixteen variations each of four photos."""
    return list(variations([name for name in PHOTOS if name.startswith(("astronaut", "chelsea", "coffee", "rocket"))]))


@pytest.fixture
def photo_server(photos: list[Variation]) -> Iterator[PhotoServer]:
    """Serves `photos` by their names; a test may add to its `files`."""
    with PhotoServer({photo.name: photo.data for photo in photos}) as server:
        yield server


@pytest.fixture(scope="session")
def seeded_vit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Random ViT-B-32 weights, 300 MB: written once per session, and removed at its end."""
    path = offline_model.save_seeded_vit(tmp_path_factory.mktemp("vit") / offline_model.WEIGHTS_NAME)
    yield path
    path.unlink()


@pytest.fixture
def fake_hub() -> Iterator[Callable[..., FakeHub]]:
    """fake_hub(path, mode): a hub that serves the file `path` as every model's weights, until the test ends."""
    with contextlib.ExitStack() as stack:
        yield lambda path, mode="normal": stack.enter_context(FakeHub({offline_model.WEIGHTS_NAME: path}, mode))
