"""Two photo servers for benchmarks, in one separate process: a near server, and a simulation of the web.

    python tests/benchmarks/image_server.py FOLDER

serves FOLDER/SIZE/*.jpg as http://HOST:PORT/KIND/SIZE/NUMBER, any number, until its standard input closes. It prints
its hosts and their port as JSON: on Linux many addresses of this machine, elsewhere one. What happens to a URL is drawn
from its path, the same in every run. Kind "near": 30 ms. Kind "web": latency lognormal with median 400 ms, 10% 404 or
410, 3% hang until the client gives up. Waiting costs a timer, no thread, so that thousands can wait.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import sys
from pathlib import Path

NEAR_S = 0.030
WEB_MEDIAN_S, WEB_SIGMA = 0.400, 0.8  # sigma of the logarithm: one in twenty takes more than 1.5 s
GONE, HANGING = 0.10, 0.03  # shares
N_HOSTS = 200
Photos = dict[str, list[bytes]]


def fate(path: str) -> tuple[float, int]:
    """Seconds before the answer to a path, and its status; 0 is no answer at all."""
    if path.startswith("/near/"):
        return NEAR_S, 200
    rng = random.Random(path)
    mood, delay = rng.random(), rng.lognormvariate(0, WEB_SIGMA) * WEB_MEDIAN_S
    if mood < HANGING:
        return 0, 0
    return delay, (rng.choice([404, 410]) if mood < HANGING + GONE else 200)


class Connection(asyncio.Protocol):
    """HTTP/1.1 with connections kept alive, as little of it as GET needs."""

    def __init__(self, photos: Photos) -> None:
        self._photos, self._received = photos, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        while b"\r\n\r\n" in self._received:
            head, _, self._received = self._received.partition(b"\r\n\r\n")
            path = head.split(b" ", 2)[1].decode()
            delay, status = fate(path)
            if status:
                asyncio.get_running_loop().call_later(delay, self._answer, path, status)

    def _answer(self, path: str, status: int) -> None:
        _, _, size, number = path.split("/")
        photos = self._photos[size]
        body = photos[int(number) % len(photos)] if status == 200 else b""
        head = f"HTTP/1.1 {status} -\r\nContent-Type: image/jpeg\r\nContent-Length: {len(body)}\r\n\r\n"
        self._transport.write(head.encode() + body)


async def serve(photos: Photos) -> None:
    loop = asyncio.get_running_loop()
    sockets = open_sockets()
    for listening in sockets:
        await loop.create_server(lambda: Connection(photos), sock=listening, backlog=1_000)
    names = [listening.getsockname() for listening in sockets]
    print(json.dumps({"hosts": [name[0] for name in names], "port": names[0][1]}), flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


def open_sockets() -> list[socket.socket]:
    """Listening sockets on one free port of N_HOSTS loopback addresses, or of the one that there is."""
    first = socket.create_server(("127.0.0.1", 0))
    sockets, port = [first], first.getsockname()[1]
    for number in range(1, N_HOSTS):
        try:
            sockets.append(socket.create_server((f"127.7.{number // 250}.{number % 250 + 1}", port)))
        except OSError:  # only Linux has the whole of 127.0.0.0/8
            break
    return sockets


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folders = [folder for folder in Path(sys.argv[1]).iterdir() if folder.is_dir()]
    asyncio.run(serve({f.name: [path.read_bytes() for path in sorted(f.glob("*.jpg"))] for f in folders}))
