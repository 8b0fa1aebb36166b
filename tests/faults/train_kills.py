"""Kill ann_train.py while it replaces the trained collection, which must be the old or the new one each time.

python -m tests.faults.train_kills [--kills 20] [--seed 0]
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.annotation_data import id_of, make_collection, random_vectors
from utils.store import collection
from utils.training.projection import Projection, project, write_projection

REPOSITORY = Path(__file__).resolve().parents[2]
N, DIM = 3_000, 16
MODEL = {"model_name": "some", "pretrained": "tag", "dimension": DIM}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(kill_apply(Path(folder), args.kills, args.seed))


def kill_apply(folder: Path, n_kills: int, seed: int) -> dict[str, int]:
    """Kills, and collections that were the old one and the new one then; asserts that each is one of both, whole."""
    vectors = random_vectors(N, DIM)
    make_collection(vectors, [f"http://photos.invalid/{i}" for i in range(N)], folder / "chroma")
    client: Any = collection.open_client(folder / "chroma")
    client.get_collection("images", embedding_function=None).modify(metadata=MODEL)
    client.close()
    matrices = [np.diag(np.linspace(1, scale, DIM)).astype(np.float32) for scale in (2, 5)]
    projections = [Projection(matrix, MODEL, [], {}) for matrix in matrices]
    write_projection(folder / "projection.npz", projections[0])
    began = time.monotonic()
    assert apply(folder, None) == 0
    whole_s = time.monotonic() - began
    rng, counts, at = random.Random(seed), {"kills": 0, "old": 0, "new": 0}, 0
    while counts["kills"] < n_kills:
        old = read(folder, projections, vectors)
        write_projection(folder / "projection.npz", projections[1 - old])
        if apply(folder, rng.uniform(0.3, 1.1) * whole_s) < 0:
            counts["kills"] += 1
            at = read(folder, projections, vectors)
            counts["old" if at == old else "new"] += 1
    assert apply(folder, None) == 0
    return counts


def apply(folder: Path, kill_after_s: float | None) -> int:
    flags = ["--apply", "--chromadb-path", "chroma", "--ann-projection-path", "projection.npz", "--logs-dir-path", ""]
    command = [sys.executable, str(REPOSITORY / "ann_train.py"), *flags]
    process = subprocess.Popen(command, cwd=folder, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        return process.wait(kill_after_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def read(folder: Path, projections: list[Projection], vectors: np.ndarray) -> int:
    """Which of the projections made the trained collection, which must be whole."""
    with collection.reading(folder / "chroma", "images_trained") as images:
        facts, ids = dict(images.metadata), collection.read_ids(images)
        found = collection.read_vectors(images, ids)
    (made_by,) = [i for i, one in enumerate(projections) if one.digest == facts[collection.DERIVED]]
    rows = {id_of(f"http://photos.invalid/{i}"): i for i in range(N)}
    assert set(ids) == set(rows)
    assert np.abs(found - project(vectors, projections[made_by].matrix)[[rows[id_] for id_ in ids]]).max() < 1e-5
    return made_by


if __name__ == "__main__":
    main()
