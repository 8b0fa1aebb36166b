"""Measure a start of embed.py with nothing to do and a large store: seconds, and memory of the largest process.

    python tests/benchmarks/bench_start.py [--records 100000]

Makes a store of synthetic records of 512 dimensions, and starts embed.py on a list of five of them and on all of them:
as the last run left the collection, and as if it had been touched since, when all of it is looked at. Chroma's graph is
made with less effort than usual, and takes the same room. Prints a table and, as the last line, the figures as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a script

from utils.embedding import weights
from utils.ids import to_ids
from utils.store import collection
from utils.store.store import Store

EMBED = Path(__file__).resolve().parents[2] / "embed.py"
DIMENSION, BATCH = 512, 5_000
STORE = Path("data/chroma")
FLAGS = ["--clip-model-name", "local-dir:model", "--logs-dir-path", "", "--image-cache-dir-path", ""]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=100_000)
    n_records = parser.parse_args(argv).records
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        making = multiprocessing.get_context("spawn").Process(target=make_store, args=(n_records,))
        making.start()  # not in this process, whose memory those that it starts would count as their own
        making.join()
        for name, is_touched in (("as it was left", False), ("touched", True)):
            for n_items in (5, n_records):
                if is_touched:
                    collection.seen_path(STORE, "images").unlink()
                figures[f"{name}, list of {n_items}"] = start(f"{n_items}.jsonl")
    for what, (seconds, megabytes) in figures.items():
        print(f"{what:32} {seconds:6.2f} s {megabytes:6.0f} MB")
    print(json.dumps(figures))
    return 0


def make_store(n_records: int) -> None:
    model = Path("model")
    model.mkdir()
    (model / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"embed_dim": DIMENSION}}))
    (model / "open_clip_model.safetensors").write_bytes(b"weights")
    identity = {**weights.find("local-dir:model", "").identity, "dimension": DIMENSION}
    items = [{"url": f"https://photos.example/{number}.jpg"} for number in range(n_records)]
    lines = [json.dumps(item) + "\n" for item in items]
    Path("5.jsonl").write_text("".join(lines[:5]))
    Path(f"{n_records}.jsonl").write_text("".join(lines))
    rng = np.random.default_rng(0)
    with contextlib.closing(Store(STORE, "images")) as store:
        store.remember_model(identity)
        for start in range(0, n_records, BATCH):
            part = items[start : start + BATCH]
            ids = to_ids([str(uuid.uuid5(uuid.NAMESPACE_URL, item["url"])) for item in part])
            vectors = rng.normal(size=(len(part), DIMENSION)).astype(np.float32)
            store.journal.append(ids, part, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
        hnsw = {"space": "cosine", "ef_construction": 20}
        collection.open_client(STORE).create_collection("images", metadata=identity, configuration={"hnsw": hnsw})
        store.finish()


def start(items: str) -> tuple[float, float]:
    """Seconds, and MB of the largest process of one run."""
    before = time.perf_counter()
    process = subprocess.Popen([sys.executable, EMBED, items, *FLAGS], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, process.stderr and process.stderr.read()
    return time.perf_counter() - before, usage.ru_maxrss / 1e3


if __name__ == "__main__":
    sys.exit(main())
