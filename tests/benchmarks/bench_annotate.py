"""Measure the speed of the annotation stages, against the limit of the machine and against the obvious way to do it.

    python -m tests.benchmarks.bench_annotate [--n 100000] [--folder DIR]

Makes (once, in --folder) a hard collection: N x 512, intrinsic dimension 128, with small cached images. Prints a table,
and one line of JSON last:
dirrify_s, with its parts, and dirrify_mb; recall of its neighbors against brute force in float64;
floor_s: exact numpy search over the same vectors in memory, plus copying the same files; read_s: reading the vectors;
baseline_s: one query, then one download after another, per directory, at 50 ms latency, from 20 directories scaled;
review_s: review copies of --review-dirs directories of 21 from 12-megapixel JPEGs; review_bound_s: as many decoded with
DCT scaling, resized and encoded by a bare pool of processes on all cores, in turns with it; review_share: their ratio;
web_s: ann_dirrify.py without the cache, at the same latency; dirload_1k_s and dirload_10k_s: the whole command.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import numpy as np
import requests
from PIL import Image

from tests.support import photos
from tests.support.annotation_data import fill_cache, id_of, image_bytes, make_collection, make_dir
from tests.support.servers import Server, send
from utils.annotation import neighbor_dirs, neighbors
from utils.annotation.dir_images import DirImages
from utils.annotation.groups import BLOCK
from utils.annotation.neighbor_dirs import DirWriter
from utils.images.cache import ImageCache
from utils.store import collection
from utils.web.download import DownloadLimits

REPOSITORY = Path(__file__).resolve().parents[2]
DIMENSION, INTRINSIC, N_NEAREST, LATENCY_S, N_BASELINE = 512, 128, 20, 0.05, 20
MAX_SIDE = 1600  # of review copies
N_IMAGES = 64  # different images; what is in them does not matter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=100_000, help="images in the collection")
    parser.add_argument("--dirs", type=int, default=1_000, help="directories to make")
    parser.add_argument("--folder", type=Path, default=Path("data/bench_annotate"), help="kept for the next run")
    parser.add_argument("--review-dirs", type=int, default=20, help="directories of 12-megapixel images; 0 = none")
    parser.add_argument("--only-review", action="store_true", help="measure review copies alone")
    args = parser.parse_args()
    if args.only_review:
        print(json.dumps({"cores": os.cpu_count(), **measure_review(args.folder.resolve(), args.review_dirs)}))
        return
    folder = args.folder.resolve() / str(args.n)
    if not (folder / "complete").exists():
        build(folder, args.n)
    os.chdir(folder)
    result = {"n": args.n, "dirs": args.dirs, "cores": os.cpu_count()}
    result |= measure_dirrify(args.dirs) | measure_parts(args.dirs) | measure_web(args.dirs) | measure_dirload()
    result |= measure_review(folder, args.review_dirs) if args.review_dirs else {}
    result["bound_s"] = 2.5 * (result["floor_s"] + result["read_s"]) + 3
    result["speedup"] = result["baseline_s"] / result["web_s"]
    for name, value in result.items():
        print(f"{name:>16} {value:12.4g}" if isinstance(value, float) else f"{name:>16} {value:12}")
    print(json.dumps(result))


def build(folder: Path, n: int) -> None:
    print(f"building {n} x {DIMENSION} in {folder}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.chdir(folder)
    rng = np.random.default_rng(0)
    spread = rng.standard_normal((INTRINSIC, DIMENSION)).astype(np.float32)
    vectors = np.empty((n, DIMENSION), np.float32)
    for start in range(0, n, 10_000):
        vectors[start : start + 10_000] = rng.standard_normal((min(10_000, n - start), INTRINSIC), np.float32) @ spread
    neighbors.normalize(vectors)
    ids = make_collection(vectors, [f"http://images.example/{i}.jpg" for i in range(n)])
    fill_cache(ids, n_images=N_IMAGES, side=48)
    Path("complete").touch()


class Proxy(Server):
    """Answers any URL with an image, after LATENCY_S: the web, as far as a client of a proxy can tell."""

    def __init__(self) -> None:
        super().__init__()
        self._http.socket.listen(256)  # the default queue of 5 drops connections
        self._images = [image_bytes(seed, side=48) for seed in range(N_IMAGES)]

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        time.sleep(LATENCY_S)
        number = int(Path(urllib.parse.urlsplit(request.path).path).stem)
        send(request, 200, self._images[number % N_IMAGES], {"Content-Type": "image/jpeg"})


def command(script: str, *flags: object, proxy: str = "") -> tuple[float, float]:
    """Seconds and peak MB of a whole run of a script."""
    environment = {**os.environ, "http_proxy": proxy, "HTTP_PROXY": proxy} if proxy else dict(os.environ)
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, str(REPOSITORY / script), *map(str, flags)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, script
    return time.perf_counter() - start, usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


@contextlib.contextmanager
def timed(result: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    result[name] = time.perf_counter() - start


def measure_dirrify(n_dirs: int) -> dict[str, float]:
    shutil.rmtree("data/dirrify", ignore_errors=True)
    Path("data/history.jsonl").unlink(missing_ok=True)
    seconds, megabytes = command("ann_dirrify.py", "--ann-dirrify-ndirs", n_dirs, "--ann-dirrify-nnearest", N_NEAREST)
    return {"dirrify_s": seconds, "dirrify_mb": megabytes}


def measure_parts(n_dirs: int) -> dict[str, float]:
    """The parts of ann_dirrify.py one after another, and the minimum time of its two main parts."""
    result: dict[str, float] = {}
    samples = neighbor_dirs.read_samples(Path("data/dirrify"))
    with collection.reading(Path("data/chroma"), "images") as images:
        with timed(result, "part_ids_s"):
            ids = collection.read_ids(images)
        with timed(result, "read_s"):
            vectors = collection.read_vectors(images, ids)
    row_of = {id_: row for row, id_ in enumerate(ids)}
    mains = [row_of[main] for main in samples]
    with timed(result, "part_search_s"):
        for start in range(0, len(mains), BLOCK):
            neighbors.nearest(vectors, mains[start : start + BLOCK], N_NEAREST)
    with timed(result, "part_copy_s"), make_dir_images() as images:
        Path("data/copies").mkdir()
        for wait in [images.start(listed, Path("data/copies") / main) for main, listed in samples.items()]:
            wait()
    shutil.rmtree("data/copies")
    with timed(result, "floor_s"):
        search(vectors, mains, np.float32)
        copy_files(samples)
    shutil.rmtree("data/copies")
    truth = search(vectors, mains, np.float64)
    found = [{row_of[id_] for id_ in listed[1:]} for listed in samples.values()]
    result["recall"] = sum(len(set(a.tolist()) & b) for a, b in zip(truth, found)) / (len(mains) * N_NEAREST)
    return result


def measure_review(folder: Path, n_dirs: int) -> dict[str, float]:
    """The best of three turns of each."""
    shutil.rmtree(folder / "review", ignore_errors=True)
    paths = [folder / "review" / "cache" / id_[:2] / f"{id_}.jpg" for id_ in (id_of(f"12 MP {n}") for n in range(21))]
    noise = np.random.default_rng(0).integers(-8, 8, (3000, 4000, 1))
    for number, path in enumerate(paths):
        photo = photos.load(photos.PHOTOS[number % 8]).resize((4000, 3000), Image.Resampling.BICUBIC)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((np.asarray(photo) + noise).clip(0, 255).astype(np.uint8)).save(path, quality=90)
    limits, cache = DownloadLimits(15, 2, 10**7, False, True), ImageCache(str(folder / "review" / "cache"), 0)
    ids, found = [path.stem for path in paths], dict[str, float]()
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        list(pool.map(bare_review_copy, paths))  # started
        with DirImages(cache, lambda ids: [""] * len(ids), limits, 10**8, 8, 0, MAX_SIDE) as images:
            images.start(ids, folder / "review" / "warm")()
            for turn in range(3):
                with timed(result := {}, "review_bound_s"):
                    list(pool.map(bare_review_copy, paths * n_dirs))
                with timed(result, "review_s"):
                    names = [folder / "review" / f"{turn} {number}" for number in range(n_dirs)]
                    for wait in [images.start(ids, name) for name in names]:
                        wait()
                found = {name: min(seconds, found.get(name, seconds)) for name, seconds in result.items()}
    shutil.rmtree(folder / "review")
    return found | {"review_share": found["review_bound_s"] / found["review_s"]}


def bare_review_copy(path: Path) -> int:
    with Image.open(path) as image:
        image.draft("RGB", (MAX_SIDE, MAX_SIDE * 3 // 4))
        file = io.BytesIO()
        image.resize((MAX_SIDE, MAX_SIDE * 3 // 4), reducing_gap=2).save(file, "JPEG", quality=85)
    return len(file.getvalue())


def make_dir_images() -> DirImages:
    limits = DownloadLimits(15, 2, 10**7, False, True)
    return DirImages(ImageCache("data/images", 0), lambda ids: [""] * len(ids), limits, 10**8, 8, 0)


def search(vectors: np.ndarray, mains: list[int], dtype: type) -> list[np.ndarray]:
    """Brute force: the nearest of each main, most similar first."""
    result = []
    for start in range(0, len(mains), 100):
        block: np.ndarray = vectors[mains[start : start + 100]].astype(dtype)
        products = np.concatenate([block @ part.astype(dtype, copy=False).T for part in np.array_split(vectors, 10)], 1)
        for main, row in zip(mains[start : start + 100], products):
            row[main] = -2
            nearest = np.argpartition(-row, N_NEAREST)[:N_NEAREST]
            result.append(nearest[np.argsort(-row[nearest])])
    return result


def copy_files(samples: neighbor_dirs.Samples) -> None:
    for main, listed in samples.items():
        folder = Path("data/copies") / main
        folder.mkdir(parents=True)
        for id_ in listed:
            shutil.copyfile(f"data/images/{id_[:2]}/{id_}.jpg", folder / f"{id_}.jpg")


def measure_web(n_dirs: int) -> dict[str, float]:
    """Seconds without the cache, and with one query and one download after another."""
    result: dict[str, float] = {}
    shutil.rmtree("data/web", ignore_errors=True)
    samples = neighbor_dirs.read_samples(Path("data/dirrify"))
    with Proxy() as proxy:
        flags = ["--image-cache-dir-path", "", "--ann-dirrify-dir-path", "data/web", "--ann-history-path", ""]
        result["web_s"], _ = command("ann_dirrify.py", "--ann-dirrify-ndirs", n_dirs, *flags, proxy=proxy.url)
        images = collection.open_collection(Path("data/chroma"), "images")
        session = requests.Session()
        images.query(query_embeddings=collection.read_vectors(images, list(samples)[:1]), n_results=1)  # warm
        with timed(result, "baseline_s"):
            for main in list(samples)[:N_BASELINE]:
                vector = images.get(ids=[main], include=["embeddings"])["embeddings"]
                got = images.query(query_embeddings=vector, n_results=N_NEAREST + 1, include=["metadatas"])
                folder = Path("data/web") / f"baseline {main}"
                folder.mkdir()
                for rank, metadata in enumerate((got["metadatas"] or [])[0]):
                    answer = session.get(str(metadata["url"]), proxies={"http": proxy.url}, timeout=15)
                    (folder / f"{rank}.jpg").write_bytes(answer.content)
    result["baseline_s"] *= n_dirs / N_BASELINE
    shutil.rmtree("data/web")
    return result


def measure_dirload() -> dict[str, float]:
    result = {}
    for name, n_dirs in {"dirload_1k_s": 1_000, "dirload_10k_s": 10_000}.items():
        root = Path(f"data/reviewed{n_dirs}")
        if not root.exists():
            make_reviewed(root, n_dirs)
        Path("data/annotated.json").unlink(missing_ok=True)
        result[name], _ = command("ann_dirload.py", root)
    return result


def make_reviewed(root: Path, n_dirs: int) -> None:
    """A root in which a third of the neighbors was deleted."""
    image = image_bytes(0)
    with DirWriter(root, {}, "") as writer:
        for number in range(n_dirs):
            listed = [id_of(f"{number}/{rank}") for rank in range(N_NEAREST + 1)]
            make_dir(writer, {id_: b"" if rank % 3 == 1 else image for rank, id_ in enumerate(listed)})


if __name__ == "__main__":
    main()
