"""Run a script and kill its process at the N-th change that it makes to the files in a folder.

    python -m tests.faults.killed N FOLDER SCRIPT [FLAG ...]

Python announces every open, rename and removal before it does it, so any moment between two of them can be had.
"""

from __future__ import annotations

import itertools
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.link"}


def main() -> None:
    n, folder, script = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    sys.argv = sys.argv[3:]
    sys.path.insert(0, str(Path(script).parent))
    die_at(n, folder)
    runpy.run_path(script, run_name="__main__")


def die_at(n: int, folder: Path) -> None:
    """Kill this process at its `n`-th change, from now on, to the files in `folder`."""
    numbers, inside = itertools.count(1), str(folder.resolve())

    def watch(event: str, args: tuple[Any, ...]) -> None:
        opens = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if not (opens or event in CHANGES) or not isinstance(args[0], str | os.PathLike):
            return
        if str(Path(args[0]).absolute()).startswith(inside) and next(numbers) == n:
            os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

    sys.addaudithook(watch)


if __name__ == "__main__":
    main()
