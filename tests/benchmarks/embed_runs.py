"""Runs of embed.py as a user starts it, observed from outside: the times of storing, and the memory used."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from utils.store.collection import open_collection
from utils.store.vectors import ROW, connect

ROOT = Path(__file__).resolve().parents[2]
POLL_S, MEMORY_EVERY_S = 0.01, 0.5


class Run(NamedTuple):
    """`stored`: (s, records stored by then) for each batch, `start` and `end` of the process, s.

    `cpu_s` of all its processes together (0 on Windows).
    `peak_bytes` of memory of its processes together, but for those that have Chroma in them; None where not Linux.
    """

    stored: list[tuple[float, int]]
    start: float
    end: float
    cpu_s: float
    peak_bytes: int | None

    @property
    def tail_s(self) -> float:
        """Seconds from the first batch to the end of the process, when the collection is complete."""
        return self.end - self.stored[0][0]

    def steady_rate(self, first: float, last: float) -> float:
        """Images/s between two shares of the time during which records were stored."""
        begin, span = self.stored[0][0], self.stored[-1][0] - self.stored[0][0]
        part = [batch for batch in self.stored if first <= (batch[0] - begin) / span <= last]
        return (part[-1][1] - part[0][1]) / (part[-1][0] - part[0][0])


def embed(folder: Path, model: tuple[str, str], urls: list[str], *flags: str, limit_s: float | None = None) -> Run:
    """Run embed.py on `urls` in the new `folder`, stopped after `limit_s` of storing. Default constants but `flags`."""
    (folder / "data").mkdir(parents=True)
    (folder / "data/formatted.json").write_text(json.dumps([{"url": url} for url in urls]))
    command = [sys.executable, str(ROOT / "embed.py"), "--clip-model-name", model[0], "--clip-pretrained", model[1]]
    journal, stored, peaks = folder / "data/chroma/journal/images.sqlite3", [(0.0, 0)], {}
    cpu_before, start = children_cpu_s(), time.perf_counter()
    with (folder / "stderr.txt").open("w") as errors:
        process = subprocess.Popen(
            [*command, "--download-allow-local", *flags], cwd=folder, stdout=subprocess.PIPE, stderr=errors
        )
        looked = 0.0
        while process.poll() is None:
            now = time.perf_counter()
            n = count_stored(journal)
            if n > stored[-1][1]:
                stored.append((now, n))
            if now - looked > MEMORY_EVERY_S:
                looked = now
                peaks |= peak_bytes(process.pid)
            if limit_s and len(stored) > 1 and now - stored[1][0] > limit_s:
                process.terminate()
                limit_s = None
            time.sleep(POLL_S)
    end, cpu_s = time.perf_counter(), children_cpu_s() - cpu_before
    n = stored[-1][1]
    if not n or open_collection(folder / "data/chroma", "images").count() != n:
        raise RuntimeError(f"embed.py stored {n} of {len(urls)}:\n{(folder / 'stderr.txt').read_text()}")
    return Run(stored[1:], start, end, cpu_s, sum(peaks.values()) or None)


def count_stored(journal: Path) -> int:
    """Records in a journal, which another process may be writing."""
    if not journal.with_name(f"{journal.name}-wal").exists():
        return 0
    with contextlib.suppress(sqlite3.Error), contextlib.closing(connect(journal)) as database:
        return (database.execute("SELECT SUM(length(pairs)) FROM batches").fetchone()[0] or 0) // ROW.itemsize
    return 0


def children_cpu_s() -> float:
    """CPU seconds of all child processes that have ended, and of theirs."""
    times = os.times()
    return times.children_user + times.children_system


def peak_bytes(pid: int) -> dict[int, int]:
    """Peak resident memory so far of a process and its children, by process; 0 for those that have loaded Chroma."""
    found = {}
    with contextlib.suppress(OSError):  # another system, or just gone
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        children += [c for t in Path(f"/proc/{pid}/task").iterdir() for c in (t / "children").read_text().split()]
        for one in {pid, *map(int, children)}:
            with contextlib.suppress(OSError, StopIteration):
                is_index = one != pid and "chromadb" in Path(f"/proc/{one}/maps").read_text()
                lines = Path(f"/proc/{one}/status").read_text().splitlines()
                peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
                found[one] = 0 if is_index else peak
    return found
