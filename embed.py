"""Stage 1: embed the images of a list or folder with CLIP, and store id, embedding and metadata in Chroma.

    python embed.py [LIST_OR_FOLDER]

Reads FORMATTED_DATA_PATH and the images; writes the collection in CHROMADB_PATH, the image cache and FAILED_DATA_PATH.
A second run continues a stopped run and adds the items that are new in the list.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import config
from utils import cli
from utils.embedding import ray_run, run, weights
from utils.embedding.run import Plan
from utils.errors import UserError
from utils.images.cache import ImageCache
from utils.items.folder import is_same_file, note_named
from utils.items.formatted import restore_item, to_metadata
from utils.items.sources import open_source
from utils.items.worklist import DUPLICATE, FAILED, KNOWN, LASTING, STORED, TODO, Worklist
from utils.lock import hold, lock_path
from utils.log import LOG, counted, printable, start_log
from utils.store.model import describe, same_model
from utils.store.server import Server, choose
from utils.store.store import Store
from utils.web.download import DownloadLimits
from utils.web.guard import behind_proxy
from utils.web.urls import is_local

CONSTANTS = """FORMATTED_DATA_PATH URL_FIELD ID_FIELD CHROMADB_PATH CHROMA_SERVER_URL CHROMA_SERVER_HEADERS_ENV
    COLLECTION_NAME FAILED_DATA_PATH IMAGE_CACHE_DIR_PATH IMAGE_CACHE_MAX_BYTES LOGS_DIR_PATH CLIP_MODEL_NAME
    CLIP_PRETRAINED DEVICE PRECISION BATCH_SIZE DOWNLOAD_WORKERS DOWNLOAD_WORKERS_PER_HOST DOWNLOAD_TIMEOUT_S
    DOWNLOAD_ATTEMPTS DOWNLOAD_MAX_BYTES DOWNLOAD_ALLOW_LOCAL DOWNLOAD_RESPECT_NOAI MAX_IMAGE_PIXELS EMBED_RAY_ADDRESS
    EMBED_RAY_ACTORS EMBED_RAY_CPUS_PER_ACTOR"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__, config, CONSTANTS.split())
    parser.add_argument("input", nargs="?", metavar="LIST_OR_FOLDER", help="used instead of FORMATTED_DATA_PATH")
    parser.add_argument("--retry-failed", action="store_true", help="also retry permanent failures")
    parser.add_argument("--refresh-metadata", action="store_true", help="update stored metadata that the list changed")
    parser.add_argument("--refresh-changed", action="store_true", help="embed changed files of a folder again")
    parser.add_argument("--prune", action="store_true", help="remove stored records that are no longer in the list")
    parser.add_argument("--verify", action="store_true", help="compare list, journal and collection; embed nothing")
    args = parser.parse_args(argv)
    args.formatted_data_path = args.input or args.formatted_data_path
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    start_log("embed", args.logs_dir_path)
    source = open_source(Path(args.formatted_data_path).expanduser(), args.url_field, args.id_field)
    work = Worklist(source, Path(args.failed_data_path))
    with open_store(args) as store:
        model = check_model(store, args)
        work.settle(store.known, args.retry_failed, args.download_allow_local, args.download_respect_noai)
        if args.verify:
            return print_verification(work, store)
        if source.is_folder:
            follow_files(work, store, args)
        elif not args.download_allow_local:
            check_local_addresses(work)
        if args.refresh_metadata and not source.is_folder:
            refresh_metadata(work, store)
        if args.prune:
            prune(work, store)
        with cli.stoppable() as stop, saving(work, store):
            embed_missing(work, store, model, args)
        n_extra = len(np.setdiff1d(extra_ids(work, store), store.journal.gone))
    print_summary(work, n_extra, args)
    return stop.code or (0 if work.count(STORED, KNOWN) or not len(work) else 1)


@contextlib.contextmanager
def open_store(args: argparse.Namespace) -> Iterator[Store]:
    """Open the store and lock it for the block."""
    path, name = Path(args.chromadb_path), args.collection_name
    place = choose(args.chromadb_path, args.chroma_server_url, args.chroma_server_headers_env)
    with hold(lock_path(path), f"the store {path}"), contextlib.closing(Store(path, name, place)) as store:
        yield store


def check_model(store: Store, args: argparse.Namespace) -> weights.Model:
    """Return the chosen model. Raises UserError if the stored vectors come from another model."""
    model = weights.find(args.clip_model_name, args.clip_pretrained)
    asked = model.identity if store.model else {}
    if store.model and not same_model(store.model, asked):
        model_name, pretrained = (shlex.quote(store.model.get(key, "")) for key in ("model_name", "pretrained"))
        raise UserError(
            f"collection {args.collection_name} was made with {describe(store.model)}, but the settings name "
            f"{describe(asked)}; add --clip-model-name {model_name} --clip-pretrained {pretrained}, or use another "
            "COLLECTION_NAME"
        )
    return model


def check_local_addresses(work: Worklist) -> None:
    """Report items on this machine or its network before the model is loaded: they will all be refused."""
    local = [item["url"] for _, item in work.todo() if is_local(item["url"])]
    if not local:
        return
    finding = f"{counted(len(local), 'item')} on this machine or a private network; the first is {local[0][:200]}"
    if len(local) == work.count(TODO) and not work.count(KNOWN):
        raise UserError(f"{finding}; --download-allow-local (DOWNLOAD_ALLOW_LOCAL) allows them")
    LOG.warning("%s; they fail as blocked_address without --download-allow-local (DOWNLOAD_ALLOW_LOCAL)", finding)


def refresh_metadata(work: Worklist, store: Store) -> None:
    """Replace stored metadata that differs from the list in any field."""
    stored = store.journal.metadata()
    changed = []
    for index, item in work.firsts():
        id_ = work.ids[index].tobytes()
        metadata = to_metadata(item)
        if id_ in stored and _text(stored[id_]) != _text(metadata):  # as text, because 1 == 1.0 == True
            changed.append((id_, metadata))
    change_metadata(store, changed)
    print(f"metadata refreshed: {len(changed)} of {counted(len(stored), 'record')}")


def change_metadata(store: Store, changed: list[tuple[bytes, dict[str, Any]]]) -> None:
    if changed:
        store.change_metadata(np.frombuffer(b"".join(id_ for id_, _ in changed), "V16"), [m for _, m in changed])
        store.finish()


def follow_files(work: Worklist, store: Store, args: argparse.Namespace) -> None:
    """Update the metadata of moved files. Report changed files, or mark them for embedding with --refresh-changed."""
    note_named(Path(args.chromadb_path), work.source.path)
    stored = store.journal.metadata()
    for id_ in store.journal.gone.tolist():  # people deleted these records, and they stay deleted
        stored.pop(id_, None)
    moved, changed = [], list[tuple[int, str]]()
    for index, item in work.firsts():
        id_ = work.ids[index].tobytes()
        before = restore_item(stored[id_]) if work.outcome[index] == KNOWN and id_ in stored else item
        if not is_same_file(before, item):
            changed.append((index, item["url"]))
        elif before != item:
            moved.append((id_, to_metadata(item)))
    change_metadata(store, moved)
    if moved:
        print(f"{counted(len(moved), 'file was', 'files were')} moved; the stored url is updated")
    if changed and args.refresh_changed:
        indexes = [index for index, _ in changed]
        store.remove(work.ids[indexes])
        work.outcome[indexes] = TODO
        print(f"{counted(len(changed), 'file')} changed since the last embedding, and will be embedded again")
    elif changed:
        finding = f"{counted(len(changed), 'file differs', 'files differ')} from what was embedded under the same name"
        print(f"{finding}; the first is {printable(changed[0][1])}; --refresh-changed embeds such files again")
        LOG.debug("changed files: %s", [url for _, url in changed])


def _text(metadata: dict[str, Any]) -> str:
    return json.dumps(metadata, sort_keys=True)


def prune(work: Worklist, store: Store) -> None:
    """Remove stored records that are no longer in the list. Raises UserError if a folder was not readable."""
    if not work.source.is_whole:
        fault = f"folders that are not readable now: {work.source.notes[-1]}"
        raise UserError(f"--prune would remove the records of {fault}")
    if len(extra := extra_ids(work, store)):
        store.remove(extra)
        print(f"pruned: {counted(len(extra), 'record')} no longer in the list")


def extra_ids(work: Worklist, store: Store) -> np.ndarray:
    """Ids (n,) V16 of records in the journal that are not in the list."""
    return np.setdiff1d(store.own, work.ids)


@contextlib.contextmanager
def saving(work: Worklist, store: Store) -> Iterator[None]:
    """Write the failures file and update the index after the block, even if the block was interrupted.

    After an error, only the failures file is written: the disk may be full, so the next run updates the index.
    """
    try:
        yield
    except Exception:
        with contextlib.suppress(OSError):
            work.save()
        raise
    except KeyboardInterrupt:
        work.save()
        store.finish()
        raise
    work.save()
    store.finish()


def embed_missing(work: Worklist, store: Store, model: weights.Model, args: argparse.Namespace) -> None:
    """Embed and store the remaining items, in this process or on Ray."""
    if not work.count(TODO):
        return
    folders = (str(work.source.path.resolve()),) if work.source.is_folder else ()
    if args.download_allow_local and not args.chroma_server_url:  # others may write to a server
        note_named(Path(args.chromadb_path), Path(Path.cwd().anchor))  # lets later stages read this run's files
    plan = make_plan(store, folders, args)
    if not args.embed_ray_address:
        run.embed_todo(work, store, model, plan)
        return
    with ray_run.cluster(args.embed_ray_address):
        ray_run.embed_todo(work, store, model, plan, args.embed_ray_actors, args.embed_ray_cpus_per_actor)


def make_plan(store: Store, folders: tuple[str, ...], args: argparse.Namespace) -> Plan:
    """Collect the settings of the run. Files in and below `folders` need no DOWNLOAD_ALLOW_LOCAL."""
    limits = DownloadLimits(
        args.download_timeout_s,
        args.download_attempts,
        args.download_max_bytes,
        args.download_allow_local,
        args.download_respect_noai,
        folders,
    )
    return Plan(
        (args.clip_model_name, args.clip_pretrained, args.device, args.precision),
        store.model,
        limits,
        args.max_image_pixels,
        (args.image_cache_dir_path, args.image_cache_max_bytes),
        args.download_workers,
        args.download_workers_per_host,
        args.batch_size,
    )


def print_verification(work: Worklist, store: Store) -> int:
    """Compare list, journal and collection, and print the result. Returns the exit code: 0 if nothing differs."""
    compared, differing = store.compare()
    held = len(store.known) - len(store.journal.gone)
    no_longer = len(np.setdiff1d(store.known, work.ids))
    n_failed = len(work.failures)  # items of this list that failed in an earlier run
    n_missing = work.count(TODO, FAILED, LASTING) - n_failed
    rows = {
        "input": f"{counted(len(work), 'item')}, {counted(work.count(DUPLICATE), 'duplicate')} among them",
        "failed": f"{n_failed}",
        "journal": f"{len(store.known)}, {no_longer} of them no longer in the input",
        "collection": f"{store.count}",
        "vectors compared": f"{compared}",
        "differences": f"{len(differing) + abs(store.count - held) + n_missing}",
    }
    for name, value in rows.items():
        print(f"{name:18} {value}")
    if rows["differences"] == "0":
        return 0
    if differing and not isinstance(store.place, Server):
        print(f"to rebuild the collection from the journal, delete {store.path / 'chroma.sqlite3'} and run again")
    return 1


def print_summary(work: Worklist, n_extra: int, args: argparse.Namespace) -> None:
    print(
        f"{len(work)} items = {work.count(STORED)} stored + {work.count(KNOWN)} already there + "
        f"{work.count(DUPLICATE)} duplicates + {work.count(FAILED)} failed now + {work.count(LASTING)} failed before + "
        f"{work.count(TODO)} not reached"
    )
    if reasons := work.reasons():
        counts = ", ".join(f"{reason} {n}" for reason, n in reasons)
        print(f"failures, listed in {args.failed_data_path}: {counts}")
    if bad := next((entry for entry in work.failures.values() if entry["reason"] == "bad_record"), None):
        print(f"the first bad record is item {bad['index']}: {bad['detail']}")
    for note in work.source.notes:
        print(note)
    if work.count(LASTING):
        print("--retry-failed also retries the items that failed before")
    n_identical, n_most, url = work.identical()
    if n_identical:
        most = f"the most frequent, {n_most} times: {printable(url[:200])}"
        print(f"{n_identical} images of this run are byte-identical to another image; {most}")
    if n_extra:
        print(f"{counted(n_extra, 'stored record')} no longer in the list; --prune removes such records")
    if args.image_cache_dir_path:
        files, size = ImageCache(args.image_cache_dir_path, 0).size()
        print(f"image cache {args.image_cache_dir_path}: {counted(files, 'file')}, {size / 1e6:.1f} MB")
    if work.count(STORED) and behind_proxy():
        print("a proxy was used, so the proxy alone checked the addresses that host names resolved to")


if __name__ == "__main__":
    cli.run(main, at_once=True)
