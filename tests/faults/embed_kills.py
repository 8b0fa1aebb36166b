"""Kill embed.py again and again at random moments, and look each time whether what it acknowledged is still there.

    python -m tests.faults.embed_kills [--kills 100] [--seed 0]

Kills the whole process group and the main process alone in turn; the index is flushed every few records.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests import offline_model
from tests.photos import PHOTOS, variations
from tests.servers import PhotoServer
from utils import collection as collections
from utils.journal import STORE, read_frames

REPOSITORY = Path(__file__).resolve().parents[2]
MAIN = "import utils.store, embed; utils.store.INDEX_EVERY = 8; embed.cli.run(embed.main)"
Stored = dict[bytes, bytes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = offline_model.build(Path(folder, "model"))
        print(kill_embed(Path(folder), f"local-dir:{model}", args.kills, args.seed))


def kill_embed(folder: Path, model_name: str, n_kills: int, seed: int, n_photos: int = len(PHOTOS)) -> dict[str, int]:
    """Kills, records lost, lists finished; asserts that each list ends as in an uninterrupted run."""
    count = {"kills": 0, "lists finished": 0, "acknowledged records checked": 0}
    rng = random.Random(seed)
    with PhotoServer({photo.name: photo.data for photo in variations(PHOTOS[:n_photos])}) as server:
        (folder / "list.json").write_text(json.dumps([{"url": f"{server.url}/{name}"} for name in server.files]))
        started = time.monotonic()
        assert wait(start(folder, model_name, "whole")) == 0
        lifetime_s = time.monotonic() - started
        whole, number = read_collection(folder / "whole"), 0
        while count["kills"] < n_kills:
            store, acknowledged = f"store{number}", Stored()
            while count["kills"] < n_kills:
                process = start(folder, model_name, store)
                is_killed = kill_after(process, rng.uniform(0, 1.1) * lifetime_s, count["kills"] % 2 == 0)
                count["kills"] += is_killed
                acknowledged = check_journal(folder / store, acknowledged)
                count["acknowledged records checked"] += len(acknowledged)
                if not is_killed:
                    break
            assert wait(start(folder, model_name, store)) == 0
            check_collection(folder / store, whole)
            check_journal(folder / store, acknowledged)
            count["lists finished"] += 1
            number += 1
    return count


def start(folder: Path, model_name: str, store: str) -> subprocess.Popen[bytes]:
    flags = ["--formatted-data-path", "list.json", "--chromadb-path", store, "--failed-data-path", f"{store}.json"]
    flags += ["--image-cache-dir-path", "", "--logs-dir-path", "", "--download-allow-local", "--batch-size", "4"]
    command = [sys.executable, "-c", MAIN, *flags, "--clip-model-name", model_name, "--download-workers", "4"]
    with (folder / f"{store}.log").open("ab") as log:
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)


def wait(process: subprocess.Popen[bytes]) -> int:
    return process.wait(timeout=600)


def kill_after(process: subprocess.Popen[bytes], seconds: float, is_group: bool) -> bool:
    """Whether the process was still there to be killed."""
    try:
        assert process.wait(seconds) == 0
        return False
    except subprocess.TimeoutExpired:
        pass
    if is_group and hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()
    return True


def check_journal(store: Path, before: Stored) -> Stored:
    """All of what is acknowledged now; what was before is among it, bit for bit, and nothing twice."""
    frames = [frame for frame in read_frames(store / "journal/images/vectors.bin") if frame.kind == STORE]
    records = [pair for frame in frames for pair in zip(frame.ids.tolist(), (v.tobytes() for v in frame.vectors))]
    assert len(dict(records)) == len(records), "an id is stored twice"
    assert before.items() <= dict(records).items(), "an acknowledged vector is lost"
    return dict(records)


def read_collection(store: Path) -> tuple[list[str], np.ndarray, list[dict]]:
    with collections.reading(store, "images") as collection:
        ids = collections.read_ids(collection)
        return ids, collections.read_vectors(collection, ids), collections.read_metadata(collection, ids)


def check_collection(store: Path, whole: tuple[list[str], np.ndarray, list[dict]]) -> None:
    ids, vectors, metadata = read_collection(store)
    assert (ids, metadata) == (whole[0], whole[2])
    assert (vectors * whole[1]).sum(axis=1).min() >= 0.9999


if __name__ == "__main__":
    main()
