"""Stage 6: learn a projection of the embeddings from the annotations, and make a collection with better neighbors.

    python ann_train.py [--apply]

Reads ANNOTATED_DATA_PATH and the collection. Writes ANN_PROJECTION_PATH and the collection ANN_TRAINED_COLLECTION_NAME
if the projection ranks held-out groups better than the embeddings do. Otherwise it prints why, and exits with code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import config
from utils import cli
from utils.annotation.neighbors import normalize
from utils.annotation.records import read_annotated
from utils.errors import UserError
from utils.lock import hold, lock_path
from utils.log import bar, counted, start_log
from utils.processes import Child
from utils.store import collection, index
from utils.store.model import describe, same_model
from utils.store.server import Place, choose
from utils.training import evaluation
from utils.training.projection import Group, Projection, leading, project, read_projection, write_projection

SEED = 0
BLAS_THREADS = "OMP_NUM_THREADS"  # numpy's BLAS reads it once, when it is loaded


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    names = """ANNOTATED_DATA_PATH CHROMADB_PATH CHROMA_SERVER_URL CHROMA_SERVER_HEADERS_ENV COLLECTION_NAME
        ANN_PROJECTION_PATH ANN_TRAINED_COLLECTION_NAME LOGS_DIR_PATH"""
    parser = cli.parser(__doc__, config, names.split())
    parser.add_argument("--apply", action="store_true", help="learn nothing; project the current collection")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    start_log("ann_train", args.logs_dir_path)
    place = choose(args.chromadb_path, args.chroma_server_url, args.chroma_server_headers_env)
    model = check_collections(place, args.collection_name, args.ann_trained_collection_name)
    learned = read_fitting(model, args) if args.apply else learn(*read_groups(place, args), model)
    if learned is None:
        return 1
    n_images = write(place, learned, args)
    name = args.ann_trained_collection_name
    print(f"{counted(n_images, 'image')} in collection {name}; the other stages use it with --collection-name {name}")
    return 0


def check_collections(place: Place, name: str, trained_name: str) -> dict[str, Any]:
    """The model facts of collection `name`. Raises UserError if it is a trained collection, or the other is not."""
    collection.check_name(trained_name)
    with collection.reading(place, name) as images:
        model = dict(images.metadata or {})
    if collection.DERIVED in model:
        raise UserError(f"collection {name} is made by ann_train.py; set COLLECTION_NAME to a collection of embed.py")
    if trained_name == name:
        raise UserError(f"ANN_TRAINED_COLLECTION_NAME and COLLECTION_NAME are both {name}; they must differ")
    may_be = (collection.MissingError, collection.UnreadableError)  # it will be created or rebuilt
    with contextlib.suppress(*may_be), collection.reading(place, trained_name) as images:
        if collection.DERIVED not in (images.metadata or {}):
            raise UserError(f"collection {trained_name} was not made by ann_train.py; set ANN_TRAINED_COLLECTION_NAME")
    return model


def read_fitting(model: dict[str, Any], args: argparse.Namespace) -> Projection:
    """The projection of an earlier run. Raises UserError if it was learned on vectors of another model."""
    learned = read_projection(Path(args.ann_projection_path))
    if not same_model(learned.model, model):
        raise UserError(
            f"projection {args.ann_projection_path} is for vectors of {describe(learned.model)}, but collection "
            f"{args.collection_name} was made with {describe(model)}; run python ann_train.py without --apply"
        )
    return learned


def read_groups(place: Place, args: argparse.Namespace) -> tuple[np.ndarray, list[Group], list[str]]:
    """(the collection's vectors (N, D) of unit length; the annotated groups, as rows of them; their main ids).

    Images that are no longer in the collection are skipped, and so are groups without their main image.
    """
    records = read_annotated(Path(args.annotated_data_path))
    with collection.reading(place, args.collection_name) as images:
        ids = collection.read_ids(images)
        load_vectors = collection.spool_vectors(images, ids)
    row_of = {id_: row for row, id_ in enumerate(ids)}
    there = [record for record in records if record["pos"][0] in row_of]
    if n_gone := len(records) - len(there):
        print(f"{counted(n_gone, 'group')} left out: the main image is not in collection {args.collection_name}")

    def rows(ids: list[str]) -> list[int]:
        return [row_of[id_] for id_ in ids if id_ in row_of]

    groups = [(rows(record["pos"]), rows(record["neg"])) for record in there]
    return normalize(load_vectors()), groups, [record["pos"][0] for record in there]


def learn(vectors: np.ndarray, groups: list[Group], mains: list[str], model: dict[str, Any]) -> Projection | None:
    """Learn a projection and print its held-out gain. Returns None, and prints the reason, if the gain is too small."""
    refusal = evaluation.refuse_groups(groups)
    if refusal:
        print(f"nothing written: {refusal}")
        return None
    used = np.unique([row for group in groups for side in group for row in side])
    local = [
        (np.searchsorted(used, kept).tolist(), np.searchsorted(used, deleted).tolist()) for kept, deleted in groups
    ]
    judged, basis = vectors[used], leading(vectors)
    with one_blas_thread():
        gain, recipe, matrix = Child().call(evaluation.train, judged, local, basis, SEED)
    if not gain.is_enough:
        print(f"nothing written: {gain}; {evaluation.NEEDED}")
        return None
    print(gain)
    return Projection(matrix, model, mains, {**gain._asdict(), **recipe._asdict()})


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Child processes of the block multiply with one thread: for small matrices, more threads take 20 x the CPU."""
    before = os.environ.get(BLAS_THREADS)
    os.environ[BLAS_THREADS] = "1"
    try:
        yield
    finally:
        os.environ.pop(BLAS_THREADS)
        os.environ.update({BLAS_THREADS: before} if before else {})


def write(place: Place, learned: Projection, args: argparse.Namespace) -> int:
    """Write the collection and the file; both stay the old ones until the new ones are complete. Returns the number of
    images."""
    name, path = args.ann_trained_collection_name, Path(args.ann_projection_path)
    transform = functools.partial(project, matrix=learned.matrix)
    facts = {**learned.model, collection.DERIVED: learned.digest}
    with contextlib.ExitStack() as stack:
        if isinstance(place, Path):
            stack.enter_context(hold(lock_path(place), f"the store {place}", collection.WAIT_S))
        progress = stack.enter_context(bar(None, name, "image"))
        n_images = index.call(
            index.derive, place, args.collection_name, name, transform, facts, progress=progress.update
        )
        if not args.apply:
            write_projection(path, learned)
        index.call(index.promote, place, name)
    return n_images


if __name__ == "__main__":
    cli.run(main)
