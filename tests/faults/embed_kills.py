"""Kill embed.py repeatedly at random moments, and check each time that all acknowledged records are still there.

    python -m tests.faults.embed_kills [--kills 100] [--seed 0] [--light]

Kills the whole process group and the main process alone in turn; the index is flushed every few records. --light does
without the model, whose imports take most of a short run's time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.support import offline_model
from tests.support.photos import PHOTOS, variations
from tests.support.servers import PhotoServer
from utils.store import collection as collections
from utils.store.vectors import Journal, read_records

REPOSITORY = Path(__file__).resolve().parents[2]
MAIN = "import utils.store.store, embed; utils.store.store.INDEX_EVERY = 8; embed.cli.run(embed.main)"
LIGHT = "from tests.faults import light_encoder; light_encoder.install(); "
Stored = dict[bytes, bytes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--light", action="store_true", help="with an encoder that needs no torch")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = offline_model.build(Path(folder, "model"))
        flags = ["--clip-model-name", f"local-dir:{model}"]
        kill_embed(Path(folder), LIGHT * args.light + MAIN, flags, args.kills, args.seed)


def kill_embed(
    folder: Path, code: str, flags: list[str], n_kills: int, seed: int, n_photos: int = len(PHOTOS)
) -> dict[str, int]:
    """Kills, records lost, lists finished; asserts that each list ends as in an uninterrupted run."""
    count = {"kills": 0, "lists finished": 0, "acknowledged records checked": 0}
    rng = random.Random(seed)
    with PhotoServer({photo.name: photo.data for photo in variations(PHOTOS[:n_photos])}) as server:
        (folder / "list.json").write_text(json.dumps([{"url": f"{server.url}/{name}"} for name in server.files]))
        started = time.monotonic()
        assert wait(start(folder, code, flags, "whole")) == 0
        lifetime_s = time.monotonic() - started
        whole, number = read_collection(folder / "whole"), 0
        while count["kills"] < n_kills:
            store, acknowledged = f"store{number}", Stored()
            while count["kills"] < n_kills:
                process = start(folder, code, flags, store)
                is_killed = kill_after(process, rng.uniform(0, 1.1) * lifetime_s, count["kills"] % 2 == 0)
                count["kills"] += is_killed
                acknowledged = check_journal(folder / store, acknowledged)
                count["acknowledged records checked"] += len(acknowledged)
                if not is_killed:
                    break
            assert wait(start(folder, code, flags, store)) == 0
            check_collection(folder / store, whole)
            check_journal(folder / store, acknowledged)
            count["lists finished"] += 1
            print(count, flush=True)
            number += 1
    return count


def start(folder: Path, code: str, flags: list[str], store: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", code, *flags, "--download-workers", "4"]
    command += ["--formatted-data-path", "list.json", "--chromadb-path", store, "--failed-data-path", f"{store}.json"]
    command += ["--image-cache-dir-path", "", "--logs-dir-path", "", "--download-allow-local", "--batch-size", "4"]
    with (folder / f"{store}.log").open("ab") as log:
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)


def wait(process: subprocess.Popen[bytes]) -> int:
    return process.wait(timeout=600)


def kill_after(process: subprocess.Popen[bytes], seconds: float, is_group: bool) -> bool:
    """Whether the process was still running, and is killed now."""
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
    records = read_journal(store / "journal")
    assert len(dict(records)) == len(records), "an id is stored twice"
    assert before.items() <= dict(records).items(), "an acknowledged vector is lost"
    return dict(records)


def read_journal(folder: Path) -> list[tuple[bytes, bytes]]:
    """(id, vector) of each record, from a copy of the files: opening the journal itself would repair it."""
    with tempfile.TemporaryDirectory() as copy:
        for file in folder.glob("images.sqlite3*"):
            if not file.name.endswith("-shm"):
                shutil.copy(file, copy)
        journal = Journal(Path(copy, "images.sqlite3"))
        records = [
            pair for ids, _, vectors in read_records(journal.path, journal.rows) for pair in zip(ids.tolist(), vectors)
        ]
        journal.close()
    return [(id_, vector.tobytes()) for id_, vector in records]


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
