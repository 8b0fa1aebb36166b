"""A real `chroma run` on a free loopback port, which tests may kill and start again."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import requests

from tests.support.servers import closed_port

START_S = 30


class ChromaServer:
    """Serves the folder `path` at `url` from start() to kill() or the end of the `with` block."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.port = closed_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it answers."""
        code = "import sys; from chromadb.cli.cli import app; sys.argv[0] = 'chroma'; app()"
        arguments = ["run", "--path", str(self.path), "--host", "127.0.0.1", "--port", str(self.port)]
        with open(self.path.with_suffix(".log"), "ab") as log:
            self._process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=log, stderr=log)
        until = time.monotonic() + START_S
        while True:
            try:
                requests.get(f"{self.url}/api/v2/heartbeat", timeout=5).raise_for_status()
                return
            except requests.RequestException:
                if time.monotonic() > until or self._process.poll() is not None:
                    raise
                time.sleep(0.05)

    def kill(self, is_graceful: bool = False) -> None:
        """End the server by SIGKILL, like a crash, or by SIGTERM, like a restart of the machine."""
        if self._process:
            (self._process.terminate if is_graceful else self._process.kill)()
            self._process.wait()
            self._process = None

    def __enter__(self):  # -> Self, which typing has from Python 3.11 on
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
