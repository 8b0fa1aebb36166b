"""utils/annotation/dir_images.py: images into folders, from the cache or the web."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from tests.support.annotation_data import fill_cache, id_of, image_bytes, names_in
from tests.support.servers import PhotoServer, Server, send
from utils.annotation.dir_images import DirImages
from utils.images.cache import ImageCache
from utils.web.download import DownloadLimits

LIMITS = DownloadLimits(5, 1, 10**6, True, True)
IDS = [id_of(str(i)) for i in range(6)]


@pytest.fixture
def server() -> Iterator[PhotoServer]:
    with PhotoServer({f"{id_}.jpg": image_bytes(i) for i, id_ in enumerate(IDS)}) as server:
        yield server


def originals(url: str, cache: Path | str = "", n_workers: int = 4, per_host: int = 0) -> DirImages:
    return DirImages(
        ImageCache(str(cache), 0), lambda ids: [f"{url}/{i}.jpg" for i in ids], LIMITS, 10**6, n_workers, per_host
    )


def test_cached_images_are_copied_and_the_rest_downloaded(tmp_path, server):
    fill_cache(IDS[:4], tmp_path / "cache")
    with originals(server.url, tmp_path / "cache") as images:
        assert images.start(IDS, tmp_path / "folder")() == IDS
    assert names_in(tmp_path / "folder") == [f"{rank}_{id_}.jpg" for rank, id_ in enumerate(IDS)]
    for i, id_ in enumerate(IDS):
        assert (tmp_path / "folder" / f"{i}_{id_}.jpg").read_bytes() == image_bytes(i)
    assert (images.n_copied, images.n_downloaded) == (4, 2)
    assert server.requests.total() == 2


@pytest.mark.parametrize("damage", [b"", b"<html>", None])
def test_a_cached_image_that_is_damaged_or_gone_is_downloaded(tmp_path, server, damage):
    fill_cache(IDS[:1], tmp_path / "cache")
    (cached,) = (tmp_path / "cache").glob("*/*")
    if damage is None:
        cached.unlink()
        cached.symlink_to(tmp_path / "nowhere")
    else:
        cached.write_bytes(damage)
    with originals(server.url, tmp_path / "cache") as images:
        assert images.start(IDS[:1], tmp_path / "folder")() == IDS[:1]
    assert images.n_downloaded == 1


def test_what_cannot_be_loaded_is_left_out_and_counted(tmp_path, server):
    server.files.pop(f"{IDS[2]}.jpg")
    server.files[f"{IDS[3]}.jpg"] = image_bytes(3)[:200]
    with originals(server.url) as images:
        assert images.start(IDS, tmp_path / "folder")() == [IDS[0], IDS[1], IDS[4], IDS[5]]
    assert images.failures == {"http_status": 1, "truncated": 1}


def test_nothing_more_is_fetched_for_a_main_image_that_failed(tmp_path, server):
    server.files.pop(f"{IDS[0]}.jpg")
    with originals(server.url, n_workers=1) as images:
        assert images.start(IDS, tmp_path / "folder")() == []
    assert images.failures == {"http_status": 1}
    assert server.requests.total() == 1


def test_an_image_without_a_url_is_left_out(tmp_path):
    with DirImages(ImageCache("", 0), lambda ids: ["" for _ in ids], LIMITS, 10**6, 2, 0) as images:
        assert images.start(IDS, tmp_path / "folder")() == []
    assert images.failures == {"bad_record": 1}


class Slow(Server):
    """Answers when told to; counts how many requests wait at once."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.waiting = self.most = 0

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        with self._lock:
            self.waiting += 1
            self.most = max(self.most, self.waiting)
        self.go.wait(30)
        with self._lock:
            self.waiting -= 1
        send(request, 200, image_bytes(0))


def test_no_more_connections_to_a_host_than_allowed(tmp_path):
    with Slow() as server, originals(server.url, n_workers=6, per_host=2) as images:
        server.go.set()
        assert len(images.start(IDS, tmp_path / "folder")()) == len(IDS)
        assert 1 <= server.most <= 2


def test_leaving_does_not_wait_for_a_host_that_hangs(tmp_path):
    with Slow() as server:
        with pytest.raises(KeyboardInterrupt), originals(server.url) as images:
            images.start(IDS, tmp_path / "folder")
            while not server.waiting:
                time.sleep(0.001)
            start = time.monotonic()
            raise KeyboardInterrupt
        assert time.monotonic() - start < 2
        server.go.set()


def test_a_full_disk_is_an_os_error_of_who_waits(tmp_path, server):
    (tmp_path / "file").touch()
    with originals(server.url) as images, pytest.raises(OSError, match="file"):
        images.start(IDS, tmp_path / "file" / "folder")()
