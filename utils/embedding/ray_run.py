"""Embed the remaining items of a list on a Ray cluster: actors turn blocks of the list into vectors for one writer.

Ray provides back-pressure and GPU placement, replaces dead actors and repeats their blocks. A block is returned whole
or not at all, with one output row per input row, so that every image gets exactly one outcome.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import os
import signal
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from utils.embedding.ray_actor import CALLS, Embedder, Row
from utils.embedding.run import Plan
from utils.embedding.weights import Model
from utils.errors import ImageError, UserError
from utils.ids import from_ids
from utils.items.formatted import to_metadata
from utils.items.worklist import TODO, Worklist
from utils.log import LOG, bar
from utils.store.store import Store
from utils.web.machine import Suspects

ROOT = Path(__file__).resolve().parents[2]
EXCLUDES = ["data", "tests", ".git", ".venv", "*.pyc"]  # not sent to the workers
BLOCKS_PER_ACTOR = 4  # minimum, so that all actors end at about the same time
MAX_BLOCK = 8  # batches; a dead actor's blocks are repeated, and all pixels of a block may wait in memory


class _Log(io.TextIOBase):
    """Takes what Ray prints on stdout, such as tracebacks of dead workers, and writes it to the log file."""

    def write(self, text: str) -> int:
        LOG.debug(text.rstrip())
        return len(text)


@contextlib.contextmanager
def cluster(address: str) -> Iterator[None]:
    """Start Ray here ("local") or join a cluster, for the block. Raises UserError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    try:
        import ray
    except ImportError:
        raise UserError('EMBED_RAY_ADDRESS is set, but Ray is not installed: pip install "ray[data]"') from None
    on_terminate = signal.getsignal(signal.SIGTERM)
    environment = {"working_dir": str(ROOT), "excludes": EXCLUDES}
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    with contextlib.redirect_stdout(_Log()):
        try:
            host, _, port = address.removeprefix("ray://").rpartition(":")
            if port.isdigit():  # ray.init() would wait for a dead address for many minutes
                socket.create_connection((host.strip("[]"), port), timeout=10).close()
            ray.init(address, runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR, **options)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"no Ray at EMBED_RAY_ADDRESS {address}: {_last_line(error)}") from None
        signal.signal(signal.SIGTERM, on_terminate)  # ray.init() replaced it
        try:
            yield
        finally:
            ray.shutdown()


def embed_todo(work: Worklist, store: Store, asked: Model, plan: Plan, n_actors: int, n_cpus: int) -> None:
    """Embed and store the remaining items of `work` with `n_actors` actors (0: as many as fit) of `n_cpus` cores each.

    Raises UserError.
    """
    n_actors, n_gpus = count_actors(n_actors, n_cpus)
    resources = {"num_gpus": n_gpus} if n_gpus else {"num_cpus": n_cpus}
    rows = (
        Row(index, from_ids(work.ids[index : index + 1])[0], item["url"], json.dumps(to_metadata(item)))
        for index, item in work.todo()
    )
    suspects = Suspects[dict[str, Any]]()
    with bar(work.count(TODO), "embed on Ray", "image") as progress:

        def run(some: Iterable[Row], n: int, n_actors: int) -> None:
            actor = (plan._replace(known=store.model), n_cpus, str(Path.cwd()))
            for columns in embed(some, n, actor, n_actors, resources):
                facts = next(filter(None, columns["facts"]), "")  # "" if all images of the block failed
                if facts and "dimension" not in store.model:
                    store.remember_model({**asked.identity, **json.loads(facts)})
                done = [dict(zip(columns, values)) for values in zip(*columns.values())]
                _keep([known for row in done for known in suspects.add(row, _error(row))], work, store)
                progress.update(len(done))

        # One actor embeds single batches until the precision is chosen; then all actors embed the rest.
        while "dimension" not in store.model and (head := list(itertools.islice(rows, plan.batch_size))):
            run(head, len(head), 1)
        run(rows, work.count(TODO), n_actors)
        _keep(suspects.release(), work, store)


def _keep(rows: list[dict[str, Any]], work: Worklist, store: Store) -> None:
    """Store the vectors, and note each image's outcome."""
    good = [row for row in rows if not row["reason"] and work.outcome[row["key"]] == TODO]
    if good:
        metadata = [json.loads(row["metadata"]) for row in good]
        vectors = np.stack([np.frombuffer(row["vector"], np.float32) for row in good])
        store.append(work.ids[[row["key"] for row in good]], metadata, vectors)
    for row in good:
        work.store(row["key"], row["digest"])
    for row in rows:
        if error := _error(row):
            work.fail(row["key"], row["url"], error)


def _error(row: dict[str, Any]) -> ImageError | None:
    return ImageError(row["reason"], row["detail"]) if row["reason"] else None


def count_actors(n_actors: int, cpus_per_actor: int) -> tuple[int, int]:
    """(number of actors, GPUs of each). Default: one actor per GPU or, without GPUs, per `cpus_per_actor` cores."""
    import ray

    resources = ray.cluster_resources()
    n_gpus = int(resources.get("GPU", 0))
    n_cpus = int(resources.get("CPU", 1))
    if not n_gpus and cpus_per_actor > n_cpus:  # a cluster may grow
        LOG.warning("EMBED_RAY_CPUS_PER_ACTOR is %d, and Ray has %d: waiting for more", cpus_per_actor, n_cpus)
    return n_actors or n_gpus or max(1, n_cpus // cpus_per_actor), 1 if n_gpus else 0


def embed(
    rows: Iterable[Row], n_rows: int, actor: tuple[Plan, int, str], n_actors: int, resources: dict[str, Any]
) -> Iterator[dict[str, list[Any]]]:
    """Embed blocks of the rows with Embedder actors; yield each block as columns.

    `actor` has the arguments of an Embedder, and `resources` the Ray resources of each actor.
    """
    import pyarrow
    import ray
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    batch_size = actor[0].batch_size
    n_block = min(MAX_BLOCK, max(1, n_rows // (batch_size * n_actors * BLOCKS_PER_ACTOR))) * batch_size
    blocks: Any = []
    rest = iter(rows)
    while block := list(itertools.islice(rest, n_block)):  # into Ray's store, which spills to disk
        blocks.append(ray.put(pyarrow.table(dict(zip(Row._fields, map(list, zip(*block)))))))
    if not blocks:
        return
    compute = ray.data.ActorPoolStrategy(
        size=n_actors,
        max_concurrent_calls_per_actor=CALLS,
        max_tasks_in_flight_per_actor=CALLS,
        enable_true_multi_threading=True,
    )
    done = ray.data.from_arrow_refs(blocks).map_batches(
        Embedder, fn_constructor_args=actor, batch_size=None, batch_format="pyarrow", compute=compute, **resources
    )
    try:
        table: Any  # prefetching would delay each block until the next one is done
        for table in done.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield table.to_pydict()
    except ray.exceptions.RayError as error:
        raise UserError(f"Ray failed: {_last_line(error)}; run again: everything stored so far is safe") from error


def _last_line(error: BaseException) -> str:
    last = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
    return last.removeprefix("utils.errors.UserError: ")
