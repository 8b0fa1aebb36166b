"""Measure the cost of the journal: its time per record against embedding, and its bytes against the vectors.

    python tests/benchmarks/bench_journal.py [--records 100000] [--images-per-s 70]

Appends batches of 32 records of 512 dimensions, each safe on the disk before the next, opens it again, and
prints a table and, as the last line, the figures as JSON. At most 5% of the time of embedding (here at --images-per-s,
by default what a CPU of two cores with native bf16 does), and at most 1.2 x the raw float32 vectors and metadata.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a script

from utils.store.vectors import Journal

BATCH, DIMENSION = 32, 512
MAX_TIME_SHARE, MAX_BYTES_RATIO = 0.05, 1.2


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        figures = measure(Path(folder), args.records, args.images_per_s)
    print(f"append and fsync of {BATCH} records   {figures['append_ms']:8.2f} ms (median)")
    print(f"share of the time of embedding    {figures['time_share']:8.2%}    at most {MAX_TIME_SHARE:.0%}")
    print(f"CPU share                         {figures['cpu_share']:8.2%}")
    print(f"bytes / (vectors and metadata)    {figures['bytes_ratio']:8.3f}    at most {MAX_BYTES_RATIO}")
    print(f"opened, all ids read              {figures['open_s']:8.2f} s for {args.records} records")
    print(json.dumps(figures))
    return 0 if figures["time_share"] <= MAX_TIME_SHARE and figures["bytes_ratio"] <= MAX_BYTES_RATIO else 1


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--images-per-s", type=float, default=70, help="rate of embedding to compare with (70)")
    parser.add_argument("--folder", help="on the disk to measure (default: the system's temporary folder)")
    return parser.parse_args(argv)


def measure(folder: Path, n_records: int, images_per_s: float) -> dict[str, float]:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((BATCH, DIMENSION)).astype(np.float32)
    path, seconds, raw_bytes = folder / "journal.sqlite3", [], 0
    journal = Journal(path)
    journal.note(model={"model_name": "none"})
    cpu = 0.0
    for first in range(0, n_records, BATCH):
        n = min(BATCH, n_records - first)
        ids = np.frombuffer(rng.bytes(16 * n), "V16")
        metadata = [item(first + k) for k in range(n)]
        raw_bytes += 4 * DIMENSION * n + sum(len(json.dumps(one)) for one in metadata)
        start, cpu_start = time.perf_counter(), time.process_time()
        journal.append(ids, metadata, vectors[:n])
        cpu += time.process_time() - cpu_start
        seconds.append(time.perf_counter() - start)
    journal.close()
    start = time.perf_counter()
    assert len(Journal(path).ids) == n_records
    return {
        "append_ms": 1e3 * statistics.median(seconds),
        "time_share": sum(seconds) / (n_records / images_per_s),
        "cpu_share": cpu / (n_records / images_per_s),
        "bytes_ratio": path.stat().st_size / raw_bytes,
        "open_s": time.perf_counter() - start,
    }


def item(number: int) -> dict[str, str | int]:
    """Metadata like an item's, about 130 bytes."""
    return {
        "url": f"http://photos.example/{number}.jpg",
        "title": f"Photo number {number}",
        "license": "CC-BY",
        "width": 640,
    }


if __name__ == "__main__":
    sys.exit(main())
