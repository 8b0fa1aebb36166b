"""Stage 5: report how far the annotation is, how good the neighbors are, and where judgments contradict each other.

    python ann_report.py [--compare-collection NAME]

Reads ANNOTATED_DATA_PATH, the collection, the image cache and the history; writes report.html, report.json and
thumbnails into ANN_REPORT_DIR_PATH, a folder that can be moved or zipped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import config
from utils import cli
from utils.annotation import history, neighbors
from utils.annotation.judgments import rank
from utils.annotation.records import Record, read_records
from utils.errors import UserError
from utils.files import replacing, write_json
from utils.images.cache import ImageCache
from utils.images.copies import make_thumbnails, remove_other_thumbnails
from utils.items.formatted import restore_item
from utils.log import bar, start_log
from utils.report import page
from utils.report.figures import Figures, Material, compare, measure
from utils.report.sections import sections, shown_conflicts, shown_records
from utils.store import collection
from utils.store.server import choose


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    names = """ANNOTATED_DATA_PATH CHROMADB_PATH CHROMA_SERVER_URL CHROMA_SERVER_HEADERS_ENV COLLECTION_NAME
        IMAGE_CACHE_DIR_PATH MAX_IMAGE_PIXELS ANN_HISTORY_PATH ANN_REPORT_DIR_PATH LOGS_DIR_PATH"""
    parser = cli.parser(__doc__, config, names.split())
    parser.add_argument(
        "--compare-collection", default="", metavar="NAME", help="judge this collection, too: same ids, another model"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    start_log("ann_report", args.logs_dir_path)
    records = read_records(Path(args.annotated_data_path))
    if not records:
        raise UserError(f"nothing is annotated in {args.annotated_data_path}; run python ann_dirload.py first")
    material = read_material(records, args, args.collection_name)
    past = Path(args.ann_history_path) if args.ann_history_path else None
    figures = measure(material, history.read_events(past))
    if args.compare_collection:
        rival = read_material(records, args, args.compare_collection)
        figures["comparison"] = compare(material, rival, args.compare_collection)
    folder = Path(args.ann_report_dir_path)
    pictured = make_pictures(material, figures, folder, args)
    write_json(folder / "report.json", figures)
    with replacing(folder / "report.html") as file:
        page.write_page(file, f"Annotations of {args.collection_name}", sections(material, figures, pictured))
    remove_other_thumbnails(folder / page.THUMBNAILS, pictured)
    print_summary(folder, figures)
    return 0


def read_material(records: list[Record], args: argparse.Namespace, name: str) -> Material:
    judged = {id_ for record in records for id_ in (*record["pos"], *record["neg"])}
    place = choose(args.chromadb_path, args.chroma_server_url, args.chroma_server_headers_env)
    with collection.reading(place, name) as images:
        ids = collection.read_ids(images)
        n_images, ids = len(ids), [id_ for id_ in ids if id_ in judged]
        vectors = neighbors.normalize(collection.read_vectors(images, ids))
        items = dict(zip(ids, map(restore_item, collection.read_metadata(images, ids))))
        ranked = rank(records, {id_: row for row, id_ in enumerate(ids)}, vectors)
        return Material(records, ranked, n_images, dict(images.metadata or {}), items)


def make_pictures(material: Material, figures: Figures, folder: Path, args: argparse.Namespace) -> set[str]:
    """Ids that have a picture now."""
    ids = {id_ for record in shown_records(material) for id_ in (*record["pos"], *record["neg"])}
    ids.update(id_ for shown in shown_conflicts(figures) for id_ in shown)
    cache = ImageCache(args.image_cache_dir_path, 0)
    with bar(len(ids), "thumbnails", "image") as progress:
        made = make_thumbnails(sorted(ids), cache, folder / page.THUMBNAILS, args.max_image_pixels, progress.update)
    figures["progress"]["shown_without_picture"] = len(ids) - len(made)
    return made


def print_summary(folder: Path, figures: Figures) -> None:
    print(", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in figures["progress"].items()))
    conflicts = figures["conflicts"]
    print(f"contradictions: {len(conflicts['pairs'])} pairs, {len(conflicts['chains'])} chains")
    for key, what in (("average_precision", "average precision"), ("ordered_pairs", "kept above deleted")):
        print(f"{what}, of judged items: {told(figures[key])}")
        if "comparison" in figures:
            found = figures["comparison"][key]
            name = figures["comparison"]["collection"]
            print(f"  {name}: {told(found['other'])}, difference {told(found['other_minus_this'])}")
    print(f"report: {folder / 'report.html'}; figures: {folder / 'report.json'}")


def told(estimate: Figures) -> str:
    value, low, high, n = estimate.values()
    return "no group has both" if value is None else f"{value:.3f} [{low:.3f}, {high:.3f}] over {n} groups"


if __name__ == "__main__":
    cli.run(main)
