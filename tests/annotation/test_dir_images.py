"""utils/annotation/dir_images.py: images into folders, from the cache or the web."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from PIL import Image

from tests.support.annotation_data import fill_cache, id_of, image_bytes, names_in
from tests.support.servers import PhotoServer, Server, closed_port, send
from utils.annotation import dir_images
from utils.annotation.dir_images import DirImages
from utils.annotation.neighbor_dirs import file_digest
from utils.errors import UserError
from utils.images.cache import ImageCache
from utils.images.copies import write_review_copy
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
        assert list(images.start(IDS, tmp_path / "folder")()) == IDS
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
        assert list(images.start(IDS[:1], tmp_path / "folder")()) == IDS[:1]
    assert images.n_downloaded == 1


def test_what_cannot_be_loaded_is_left_out_and_counted(tmp_path, server):
    server.files.pop(f"{IDS[2]}.jpg")
    server.files[f"{IDS[3]}.jpg"] = image_bytes(3)[:200]
    with originals(server.url) as images:
        assert list(images.start(IDS, tmp_path / "folder")()) == [IDS[0], IDS[1], IDS[4], IDS[5]]
    assert images.failures == {"http_status": 1, "truncated": 1}


def test_nothing_more_is_fetched_for_a_main_image_that_failed(tmp_path, server):
    server.files.pop(f"{IDS[0]}.jpg")
    with originals(server.url, n_workers=1) as images:
        assert list(images.start(IDS, tmp_path / "folder")()) == []
    assert images.failures == {"http_status": 1}
    assert server.requests.total() == 1


def test_an_image_without_a_url_is_left_out(tmp_path):
    with DirImages(ImageCache("", 0), lambda ids: ["" for _ in ids], LIMITS, 10**6, 2, 0) as images:
        assert list(images.start(IDS, tmp_path / "folder")()) == []
    assert images.failures == {"bad_record": 1}


class Slow(Server):
    """Answers when the test allows it; counts the requests that wait at the same time."""

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


def test_the_digests_are_those_of_the_files_written(tmp_path, server):
    fill_cache(IDS[:2], tmp_path / "cache")
    with originals(server.url, tmp_path / "cache") as images:
        digests = images.start(IDS, tmp_path / "folder")()
    for rank, id_ in enumerate(IDS):
        assert digests[id_] == file_digest(tmp_path / "folder" / f"{rank}_{id_}.jpg")


NO_NETWORK = f"http://127.0.0.1:{closed_port()}"


def test_reviewers_get_copies_that_every_file_manager_shows(tmp_path, server):
    webp, cut = image_bytes(0, "WEBP", side=90), image_bytes(1, "WEBP", side=90)[:-30]
    server.files[f"{IDS[2]}.jpg"] = image_bytes(2, "TIFF")
    for id_, data in zip(IDS, (webp, cut)):
        path = tmp_path / "cache" / id_[:2] / f"{id_}.webp"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    limits = DownloadLimits(5, 1, 10**6, True, True)
    cache = ImageCache(str(tmp_path / "cache"), 0)
    with DirImages(cache, lambda ids: [f"{server.url}/{i}.jpg" for i in ids], limits, 10**6, 4, 0, 64) as images:
        digests = images.start(IDS[:4], tmp_path / "folder")()
    assert names_in(tmp_path / "folder") == [f"{rank}_{id_}.jpg" for rank, id_ in enumerate(IDS[:4])]
    for rank, id_ in enumerate(IDS[:4]):
        path = tmp_path / "folder" / f"{rank}_{id_}.jpg"
        with Image.open(path) as image:
            assert image.format == "JPEG" and image.width == (64 if rank == 0 else 8)
        assert digests[id_] == file_digest(path)
    assert (tmp_path / "folder" / f"1_{IDS[1]}.jpg").read_bytes() == image_bytes(1)  # damaged in the cache
    assert (images.n_copied, images.n_downloaded) == (1, 3)


def test_an_image_that_kills_its_decoder_costs_itself_alone(tmp_path, server, monkeypatch):
    fill_cache(IDS[:1], tmp_path / "cache")
    with originals(server.url, tmp_path / "cache", n_workers=1) as images:
        monkeypatch.setattr(dir_images, "write_review_copy", die_of_the_second)
        assert list(images.start(IDS[:4], tmp_path / "folder")()) == [IDS[0], IDS[1], IDS[3]]
    assert images.failures == {"bad_image": 1}
    assert len(names_in(tmp_path / "folder")) == 3


def die_of_the_second(source: Path, stem: Path, max_side: int, max_pixels: int) -> Path:
    if stem.name.startswith("2_"):
        stem.with_suffix(".jpg").write_bytes(b"half a copy")
        os._exit(1)
    return write_review_copy(source, stem, max_side, max_pixels)


def test_without_a_network_a_few_failures_are_enough(tmp_path, server):
    many = [id_of(f"many {i}") for i in range(200)]
    with originals(NO_NETWORK, n_workers=8) as images:
        waits = [images.start([id_], tmp_path / str(i)) for i, id_ in enumerate(many)]
        with pytest.raises(
            UserError, match=r"no network: \d+ downloads in a row failed .*connection: .*IMAGE_CACHE_DIR"
        ):
            for wait in waits:
                wait()


def test_any_answer_shows_that_there_is_a_network(tmp_path, server):
    urls = [NO_NETWORK, server.url, f"{server.url}/gone"]  # 404 is an answer
    kinds = [(0, *[1, 0, 2][i % 3 :]) for i in range(25)]
    order = [id_of(f"kind {i}/{j}/{kind}") for i, of in enumerate(kinds) for j, kind in enumerate(of)]
    url_of = dict(zip(order, (urls[kind] for of in kinds for kind in of)))
    limits = DownloadLimits(5, 1, 10**6, True, True)
    with DirImages(ImageCache("", 0), lambda ids: [url_of[i] for i in ids], limits, 10**6, 1, 0) as images:
        for i, id_ in enumerate(order):
            images.start([id_], tmp_path / str(i))()
    assert images.failures["connection"] > 16


@pytest.mark.parametrize(("n", "ends"), [(3, False), (4, True)])
def test_a_long_silence_counts_as_no_network_but_one_slow_host_does_not(tmp_path, monkeypatch, n, ends):
    monkeypatch.setattr(dir_images, "MAX_QUIET_S", 0)
    with originals(NO_NETWORK, n_workers=1) as images:
        for i in range(n):
            wait = images.start([IDS[i]], tmp_path / str(i))
            if ends and i == n - 1:
                with pytest.raises(UserError, match="no network"):
                    wait()
            else:
                assert wait() == {}


def test_a_full_disk_is_an_os_error_of_who_waits(tmp_path, server):
    (tmp_path / "file").touch()
    with originals(server.url) as images, pytest.raises(OSError, match="file"):
        images.start(IDS, tmp_path / "file" / "folder")()
