"""Makes the folders of neighbor_dirs, so that a run that is killed anywhere can be continued."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path
from typing import Any

from utils.annotation import neighbor_dirs
from utils.annotation.history import now
from utils.annotation.neighbor_dirs import MARKER, SAMPLES, Samples, dir_name, is_unfinished, part_path
from utils.log import LOG

LIST_EVERY_S = 1.0  # samples.json is written anew each time: for a thousand directories that is a megabyte


class DirWriter:
    """Makes a root, or goes on with one that was not finished. Use it as a context: leaving it early keeps the marker.

    samples: what is complete and listed, or about to be.
    same_data: an unfinished run is continued with the data that it was begun with (else its mains may differ).
    begun: when the run began, UTC, ISO 8601.
    """

    def __init__(self, root: Path, settings: dict[str, Any], data: str) -> None:
        """`root` has passed neighbor_dirs.check. data: fingerprint of what directories are made of, settings apart."""
        self.root = root
        self.samples: Samples = {}
        self.same_data, self.begun = True, now()
        self._n_listed, self._listed_at = 0, time.monotonic()
        root.mkdir(parents=True, exist_ok=True)
        neighbor_dirs.remove_parts(root)
        if is_unfinished(root):
            marker = neighbor_dirs.read_marker(root)
            self.same_data, self.begun = marker["data"] == data, marker["begun"]
            self._resume()
        else:
            neighbor_dirs.write_marker(root, settings, data, self.begun)

    def __enter__(self) -> DirWriter:
        return self

    def __exit__(self, *_error: object) -> None:
        self._list()
        neighbor_dirs.remove_parts(self.root)
        if not self.samples:  # as if it had not been tried: other settings may be
            (self.root / MARKER).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.root.rmdir()
        elif is_unfinished(self.root):
            LOG.warning("%s is not finished (%d directories); the same command goes on", self.root, len(self.samples))

    def stage(self, main: str) -> Path:
        """The hidden folder to fill with the images of one directory; its parent exists, it does not."""
        return part_path(self.root, main)

    def commit(self, main: str, listed: list[str]) -> None:
        """Give the staged folder its name. It is listed within LIST_EVERY_S, or when the context is left.

        The images are not synced: a power cut may leave empty files, which ann_dirload.py takes for what they are.
        """
        os.replace(self.stage(main), self.root / dir_name(len(self.samples), main))
        self.samples[main] = listed
        if time.monotonic() - self._listed_at > LIST_EVERY_S:
            self._list()

    def drop(self, main: str) -> None:
        """Take the staged folder away: its main image could not be loaded."""
        shutil.rmtree(self.stage(main))

    def finish(self) -> None:
        """All done: list the rest, and take the marker away."""
        self._list()
        neighbor_dirs.remove_parts(self.root)
        if self.samples:
            (self.root / MARKER).unlink()

    def _list(self) -> None:
        self._listed_at = time.monotonic()
        if len(self.samples) > self._n_listed:
            neighbor_dirs.write_samples(self.root, self.samples)
            self._n_listed = len(self.samples)

    def _resume(self) -> None:
        if (self.root / SAMPLES).exists():
            self.samples = neighbor_dirs.read_samples(self.root)
            self._n_listed = len(self.samples)
        for index, main, listed in sorted(neighbor_dirs.read_complete(self.root)):
            if main not in self.samples and index == len(self.samples):
                self.samples[main] = listed
        self._list()
