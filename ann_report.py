"""Stage 5: report the progress of the annotation, the quality of the neighbors, and contradictions.

    python ann_report.py [--compare-collection NAME]

Reads ANNOTATED_DATA_PATH, the collection, the image cache and the history; writes report.html, report.json and
thumbnails into ANN_REPORT_DIR_PATH, a folder that can be moved or zipped.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import config
from utils import cli
from utils.annotation import history, neighbors
from utils.annotation.judgments import rank
from utils.annotation.records import Record, read_annotated
from utils.files import replacing, write_json
from utils.images.cache import ImageCache
from utils.images.copies import REPORT_DATA, THUMBNAILS, make_thumbnails, remove_other_thumbnails
from utils.items.folder import named_folders
from utils.items.formatted import restore_item
from utils.log import bar, counted, start_log
from utils.report import page
from utils.report.figures import Figures, ReportData, compare, measure
from utils.report.reviews import ReviewHistory, read_reviews
from utils.store import collection
from utils.store.server import choose
from utils.training.projection import projection_of
from utils.web.urls import find_files, scheme_of

MEASURES = {  # key of the figures -> words
    "average_precision": "average precision, of judged images",
    "ordered_pairs": "pairs in order (a kept image is more similar than a deleted one of its group)",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    names = """ANNOTATED_DATA_PATH CHROMADB_PATH CHROMA_SERVER_URL CHROMA_SERVER_HEADERS_ENV COLLECTION_NAME
        IMAGE_CACHE_DIR_PATH DOWNLOAD_ALLOW_LOCAL MAX_IMAGE_PIXELS ANN_HISTORY_PATH ANN_PROJECTION_PATH
        ANN_REPORT_DIR_PATH LOGS_DIR_PATH"""
    parser = cli.parser(__doc__, config, names.split())
    parser.add_argument(
        "--compare-collection", default="", metavar="NAME", help="collection to compare with (same ids, another model)"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    start_log("ann_report", args.logs_dir_path)
    records = read_annotated(Path(args.annotated_data_path))
    reviews = read_reviews(history.read_events(args.ann_history_path))
    data = read_data(records, reviews, args, args.collection_name)
    figures = measure(data, reviews)
    if args.compare_collection:
        other = read_data(records, reviews, args, args.compare_collection)
        learned = [projection_of(one.model, Path(args.ann_projection_path)) for one in (data, other)]
        trained_on = {main for projection in learned if projection for main in projection.trained_on}
        names = args.collection_name, args.compare_collection
        figures["comparison"] = compare(data, other, names, trained_on)
    write_report(data, figures, Path(args.ann_report_dir_path), args)
    print_summary(Path(args.ann_report_dir_path), figures)
    return 0


def read_data(records: list[Record], reviews: ReviewHistory, args: argparse.Namespace, name: str) -> ReportData:
    judged = {id_ for record in records for id_ in (*record["pos"], *record["neg"])}
    place = choose(args.chromadb_path, args.chroma_server_url, args.chroma_server_headers_env)
    with collection.reading(place, name) as images:
        ids = collection.read_ids(images)
        n_images, ids = len(ids), [id_ for id_ in ids if id_ in judged]
        vectors = neighbors.normalize(collection.read_vectors(images, ids))
        items = dict(zip(ids, map(restore_item, collection.read_metadata(images, ids))))
        ranked = rank(records, {id_: row for row, id_ in enumerate(ids)}, vectors)
        origins = [reviews.origin(record) for record in records]
        return ReportData(records, ranked, n_images, dict(images.metadata or {}), items, origins)


def write_report(data: ReportData, figures: Figures, folder: Path, args: argparse.Namespace) -> None:
    """Write the thumbnails first, so that all files that the page and report.json name exist."""
    ids = page.shown_ids(data, figures)
    urls = {id_: str(data.items[id_].get("url", "")) for id_ in ids if id_ in data.items}
    named = (str(folder.resolve()), *named_folders(Path(args.chromadb_path)))
    folders = None if args.download_allow_local else named
    cache = ImageCache(args.image_cache_dir_path, 0, files=find_files(urls, folders))
    with bar(len(ids), "thumbnails", "image") as progress:
        pictured = make_thumbnails(sorted(ids), cache, folder / THUMBNAILS, args.max_image_pixels, progress.update)
    figures["progress"]["shown_without_picture"] = len(ids) - len(pictured)
    write_json(folder / REPORT_DATA, figures)
    originals = find_originals(ids, data.items, cache, folder)
    with replacing(folder / "report.html") as file:
        page.write_page(file, f"Annotations of {args.collection_name}", data, figures, pictured, originals)
    remove_other_thumbnails(folder / THUMBNAILS, pictured)


def find_originals(ids: Iterable[str], items: Mapping[str, Any], cache: ImageCache, folder: Path) -> dict[str, str]:
    """id -> the http(s) URL of its image, else the path from the page to its file, if it is in the page's folder."""
    folder = folder.resolve()
    found = {}
    for id_ in ids:
        url = items.get(id_, {}).get("url")
        if isinstance(url, str) and scheme_of(url) in ("http", "https"):
            found[id_] = url
        elif (path := cache.find(id_)) and path.resolve().is_relative_to(folder):
            found[id_] = f"./{quote(path.resolve().relative_to(folder).as_posix())}"
    return found


def print_summary(folder: Path, figures: Figures) -> None:
    comparison, agreement = figures.get("comparison"), figures["agreement"]
    print(format_counts(figures["progress"]))
    conflicts = figures["conflicts"]
    print(f"contradictions: {counted(len(conflicts['pairs']), 'pair')}, {counted(len(conflicts['chains']), 'chain')}")
    for key, words in MEASURES.items():
        print(f"{words}: {format_estimate(figures[key])}")
        if comparison:
            other, difference = (format_estimate(comparison[key][which]) for which in ("other", "other_minus_this"))
            print(f"  {comparison['collection']}: {other}, difference {difference}")
    if collection.DERIVED in figures["model"]:
        print(
            "made by ann_train.py: figures about groups that the collection was trained on are no evidence about others"
        )
    if any(figures["not_nearest"].values()):
        print(
            f"not nearest, left out of average precision and figures by rank: {format_counts(figures['not_nearest'])}"
        )
    if comparison:
        left_out = format_counts(comparison["left_out"])
        print(
            f"compared groups {comparison['groups']}, with images of both {comparison['pooled']}; left out: {left_out}"
        )
        if comparison["is_trained_on"]:
            print("a collection was trained on all compared groups: no evidence about other groups")
    if agreement["directories"]:
        share, kappa = page.cell(agreement["equal"]["value"]), page.cell(agreement["kappa"])
        print(f"second looks {agreement['directories']}, share of images judged alike {share}, Cohen's kappa {kappa}")
    print(f"report: {folder / 'report.html'}; figures: {folder / REPORT_DATA}")


def format_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {n:,}" for name, n in counts.items())


def format_estimate(estimate: Figures) -> str:
    value, low, high, n = estimate.values()
    return (
        "no group has both kept and deleted images"
        if value is None
        else f"{value:.3f} [{low:.3f}, {high:.3f}] over {counted(n, 'group')}"
    )


if __name__ == "__main__":
    cli.run(main)
