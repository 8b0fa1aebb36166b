"""Measure time and memory of ann_export.py and ann_report.py: 10,000 groups of 21 images from 100,000 x 512.

    python -m tests.benchmarks.bench_export [--folder DIR] [--formats NAME ...] [--groups 10000] [--report-groups 1000]

Makes the collection, the annotations and an image cache of 640x480 photos (once, in --folder), runs the commands, and
prints a table and, as the last line, the figures as JSON: seconds and peak MB of each format and of the report, made
afresh and made again, and seconds until its page is open in a headless browser (the slowest of three; absent without
Chromium). Fails if one is above its limit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.benchmarks.bench_annotate import command
from tests.support import browser, photos
from tests.support.annotation_data import ANNOTATED, CACHE, make_collection
from utils.annotation import neighbors
from utils.annotation.records import Record, write_items
from utils.export import formats

N, DIMENSION, INTRINSIC = 100_000, 512, 128
N_KEPT, SIZE = 11, 21  # images of a group: the first ones, main image included, are kept
NOISE = 0.6  # of an image beside what its group shares: cosines of about 0.7 to the main image
SIDES = (640, 480)  # pixels
LIMITS = {"s": 60, "mb": 1_000, "report_s": 120, "report_again_s": 120, "open_s": 3}
N_OPENED = 3


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    folder = (args.folder or Path(tempfile.gettempdir()) / "bench_export").resolve()
    if not (folder / "complete").exists():
        build(folder)
    os.chdir(folder)
    figures: dict[str, float] = {}
    write_items(ANNOTATED, groups(json.loads(Path("ids.json").read_text()), args.groups))
    for name in args.formats:
        figures |= measure_export(name)
    if args.report_groups:
        write_items(ANNOTATED, groups(json.loads(Path("ids.json").read_text()), args.report_groups))
        figures |= measure_report()
    for name, value in figures.items():
        print(f"{name:20} {value:10.1f}    {within(name)}")
    print(json.dumps({name: round(value, 2) for name, value in figures.items()}))
    return int(any(value > limit_of(name) for name, value in figures.items()))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="kept for the next run (default: in the temporary folder)")
    parser.add_argument("--formats", nargs="*", default=formats.NAMES, choices=formats.NAMES)
    parser.add_argument("--groups", type=int, default=10_000, help="groups to export")
    parser.add_argument("--report-groups", type=int, default=1_000, help="groups to report; 0: no report")
    return parser.parse_args(argv)


def limit_of(name: str) -> float:
    return LIMITS.get(name, LIMITS.get(name.rpartition("_")[2], float("inf")))


def within(name: str) -> str:
    return "" if limit_of(name) == float("inf") else f"at most {limit_of(name)}"


def build(folder: Path) -> None:
    print(f"building {N} x {DIMENSION} in {folder}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.chdir(folder)
    coarse = {"max_neighbors": 4, "ef_construction": 8}  # neither stage asks Chroma's index for neighbors
    fields = [{"title": f"Photo number {i}", "license": "CC-BY", "width": SIDES[0]} for i in range(N)]
    urls = [f"http://photos.example/{i}.jpg" for i in range(N)]
    ids = make_collection(make_vectors(), urls, fields=fields, hnsw=coarse)
    Path("ids.json").write_text(json.dumps(ids))
    originals = [folder / name for name in photos.PHOTOS]
    for path in originals:
        photos.load(path.name).resize(SIDES).save(path, "JPEG", quality=90)
    for i, id_ in enumerate(ids):
        path = CACHE / id_[:2] / f"{id_}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.hardlink_to(originals[i % len(originals)])  # copies would be 7 GB
    Path("complete").touch()


def make_vectors() -> np.ndarray:
    """Runs of SIZE rows share a direction, in INTRINSIC of all dimensions; one row in 50 is a copy of its neighbor."""
    rng = np.random.default_rng(0)
    shared = rng.standard_normal((N // SIZE + 1, INTRINSIC), np.float32)
    points = shared[np.arange(N) // SIZE] + NOISE * rng.standard_normal((N, INTRINSIC), np.float32)
    points[1::50] = points[0::50]
    return neighbors.normalize(points @ rng.standard_normal((INTRINSIC, DIMENSION), np.float32))


def groups(ids: list[str], n: int) -> list[Record]:
    """Side by side over all images; what goes round a second time overlaps, a little shifted, with the first."""
    listed = [[ids[(SIZE * number + k) % N] for k in range(SIZE)] for number in range(n)]
    return [{"pos": group[:N_KEPT], "neg": group[N_KEPT:]} for group in listed]


def measure_export(name: str) -> dict[str, float]:
    seconds, megabytes = command("ann_export.py", "--ann-export-format", name)
    return {f"{name}_s": seconds, f"{name}_mb": megabytes}


def measure_report() -> dict[str, float]:
    shutil.rmtree("data/report", ignore_errors=True)
    seconds, megabytes = command("ann_report.py")
    again, _ = command("ann_report.py")
    page = Path("data/report/report.html")
    result = {"report_s": seconds, "report_mb": megabytes, "report_again_s": again}
    result["page_mb"] = page.stat().st_size / 1e6
    program = browser.find()
    return result | ({"open_s": max(seconds_to_open(program, page) for _ in range(N_OPENED))} if program else {})


def seconds_to_open(program: str, page: Path) -> float:
    """Seconds from the request for the page to its first frame after the load event, in a new browser."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name, browser.opened(program, Path(name)) as tab:
        start = time.perf_counter()
        tab.open(page.resolve().as_uri())
        tab.run("new Promise(resolve => requestAnimationFrame(() => setTimeout(resolve)))")
        return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
