"""Measure Ray against the single process, two actors against one, and the memory of a Chroma server's writer.

    python tests/benchmarks/bench_scale.py [overhead] [latency] [writer] [--n N]

overhead: one actor with all cores against the single process, in turns, medians; images a second once a quarter is
stored, that is without starting and loading. latency: photos that take 200 ms to come, two downloads at a time in an
actor, so that the network binds and not the cores that all share here; one actor against two. writer: resident memory
of a process that stores records on a Chroma server. All with the small offline model. The last line is all as JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a script, it lacks the repository

from tests.benchmarks.embed_runs import count_stored
from tests.support import offline_model
from tests.support.chroma_server import ChromaServer
from tests.support.photos import PHOTOS, variations
from tests.support.servers import PhotoServer
from utils.store.server import choose
from utils.store.store import Store

ROOT = Path(__file__).resolve().parents[2]
LATENCY_S = 0.2
ROUNDS = 3
CASES = ("overhead", "latency", "writer")
N_RECORDS, PAGE, DIMENSION = 40_000, 500, 128


class SlowServer(PhotoServer):
    """Any number of names are the photos, each after `latency_s`."""

    latency_s = 0.0

    def answer(self, request) -> None:
        time.sleep(self.latency_s)
        request.path = "/" + request.path.rpartition("/")[2]
        super().answer(request)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"one of {', '.join(CASES)}; default: all")
    parser.add_argument("--n", type=int, default=900, help="images a run")
    args = parser.parse_args()
    args.cases = args.cases or CASES
    if unknown := set(args.cases) - set(CASES):
        parser.error(f"unknown: {', '.join(unknown)}")
    figures: dict[str, float | list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if "writer" in args.cases:
            figures["writer_mb"] = measure_writer(Path(folder))
        if set(args.cases) - {"writer"}:
            model = f"local-dir:{offline_model.build(Path(folder) / 'model')}"
            figures |= measure_embedding(args, Path(folder), model)
    print(json.dumps(figures))


def measure_embedding(args: argparse.Namespace, folder: Path, model: str) -> dict[str, float | list[float]]:
    figures: dict[str, float | list[float]] = {}
    photos = list(itertools.islice(variations(list(PHOTOS)[:2]), 32))
    with SlowServer({photo.name: photo.data for photo in photos}) as web:
        if "overhead" in args.cases:
            whole = (*on_ray(1), "--embed-ray-cpus-per-actor", str(os.cpu_count()))
            turns = [
                (rate(web, folder / f"single{i}", model, args.n), rate(web, folder / f"ray{i}", model, args.n, *whole))
                for i in range(ROUNDS)
            ]
            single, ray = map(statistics.median, zip(*turns))
            ratio = statistics.median(alone / other for alone, other in turns)
            print(f"single process {single:.1f} images/s, Ray with one actor {ray:.1f}: {ratio:.2f} x the time")
            figures["overhead"] = ratio
        if "latency" in args.cases:
            web.latency_s = LATENCY_S
            few = ("--download-workers", "2")
            one = rate(web, folder / "one", model, args.n, *on_ray(1), *few)
            two = rate(web, folder / "two", model, args.n, *on_ray(2), *few)
            print(f"{LATENCY_S} s latency: one actor {one:.1f} images/s, two {two:.1f}: {two / one:.2f} x as fast")
            figures["latency"] = two / one
    return figures


def on_ray(n_actors: int) -> tuple[str, ...]:
    return "--embed-ray-address", "local", "--embed-ray-actors", str(n_actors)


def rate(web: SlowServer, folder: Path, model: str, n: int, *flags: str) -> float:
    """Images a second that reach the journal, from when it has a quarter of them to the end."""
    (folder / "data").mkdir(parents=True)
    names = [name for _, name in zip(range(n), itertools.cycle(web.files))]
    items = [{"url": f"{web.url}/{i}/{name}"} for i, name in enumerate(names)]
    (folder / "data" / "formatted.json").write_text(json.dumps(items))
    flags = ("--clip-model-name", model, "--download-allow-local", "--precision", "fp32", *flags)
    command = [sys.executable, str(ROOT / "embed.py"), *flags, "--image-cache-dir-path", ""]
    journal = folder / "data" / "chroma" / "journal" / "images.sqlite3"
    steps = [(0.0, 0)]  # (when, records in the journal)
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        while run.poll() is None:
            if (stored := count_stored(journal)) > steps[-1][1]:
                steps.append((time.perf_counter(), stored))
            time.sleep(0.02)
    assert run.returncode == 0
    steady = [step for step in steps if step[1] >= steps[-1][1] / 4]
    (began, before), (ended, after) = steady[0], steady[-1]
    return (after - before) / (ended - began)


def measure_writer(folder: Path) -> list[float]:
    """Resident MB after each quarter of the records, and when all are on the server."""
    found = []
    vectors = np.random.default_rng(0).standard_normal((PAGE, DIMENSION), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    with ChromaServer(folder / "served") as chroma:
        store = Store(folder / "store", "images", choose("", chroma.url, ""))
        store.remember_model({"model_name": "none", "dimension": DIMENSION})
        start = time.perf_counter()
        for n in range(PAGE, N_RECORDS + 1, PAGE):
            ids = np.frombuffer(b"".join(uuid.uuid4().bytes for _ in range(PAGE)), "V16")
            store.append(ids, [{"url": f"http://photos.invalid/{uuid.uuid4()}"} for _ in range(PAGE)], vectors)
            if n % (N_RECORDS // 4) == 0:
                found.append(resident_mb())
                print(f"{n} records journaled: {found[-1]:.0f} MB resident")
        store.finish()
        store.close()
        found.append(resident_mb())
        print(f"all on the server after {time.perf_counter() - start:.0f} s: {found[-1]:.0f} MB resident")
    return found


def resident_mb() -> float:
    """Of this process; Linux only."""
    return int(re.findall(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1e3


if __name__ == "__main__":
    main()
