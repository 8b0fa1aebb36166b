from __future__ import annotations

import dataclasses
import itertools
import os
import queue
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.support.photos import encode, load
from tests.support.servers import PhotoServer
from utils.embedding import fetcher as fetcher_module
from utils.embedding.fetch_worker import FetchSettings, Job
from utils.embedding.fetcher import Fetcher
from utils.errors import ImageError, UserError
from utils.images.cache import ImageCache
from utils.images.preprocess import Preprocess
from utils.web import machine
from utils.web.download import DownloadLimits

PREPROCESS = Preprocess((32, 32), "shortest", "bicubic", 0)
ID = "00000000-0000-5000-8000-{:012d}"


def settings_of(cache_dir: Path | str = "") -> FetchSettings:
    limits = DownloadLimits(timeout_s=20, attempts=1, max_bytes=10**7, allow_local=True, respect_noai=True)
    return FetchSettings(limits, 10**8, str(cache_dir), 10**9, PREPROCESS)


def jobs_of(urls: list[str]) -> list[Job]:
    return [Job(index, ID.format(index), url) for index, url in enumerate(urls)]


def play(job: Job, _settings: FetchSettings, cache: ImageCache, decoding) -> np.ndarray:
    """A loader for jobs whose url names the event to play."""
    what = job.url.rpartition("/")[2]
    if what == "dies downloading":
        os._exit(4)
    with decoding():
        if what == "dies decoding":
            os._exit(3)
        if what.startswith("killed"):
            marker = Path(what.rpartition(" ")[2].replace(":", "/"))
            if not marker.exists() or what.startswith("killed always"):
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        if what == "hangs":
            threading.Event().wait()
        if what == "fails":
            raise ImageError("timeout", "too slow")
        if what == "breaks":
            raise ValueError("odd\nbytes")
        if what == "no files":
            raise UserError("too many open files")
        if what == "no route":
            raise ImageError("connection", "no route: Network is unreachable")
        if what == "full":
            cache.full = "it is full"
    return np.full((2, 2, 3), job.key % 250, np.uint8), 0


class FewThreads:
    """play(), in a worker process that can start at most this many threads."""

    def __init__(self, most: int) -> None:
        self.most = most

    def __call__(self, *args) -> np.ndarray:
        return play(*args)

    def __setstate__(self, state: dict[str, int]) -> None:  # unpickled in the worker, before it starts its threads
        numbers, start = itertools.count(), threading.Thread.start

        def start_few(thread: threading.Thread) -> None:
            if next(numbers) >= state["most"]:
                raise RuntimeError("can't start new thread")
            start(thread)

        threading.Thread.start = start_few  # type: ignore


def fetch_all(urls: list[str], n_threads: int = 4, load=play) -> dict[int, str]:
    """Job -> "" or its failure's text."""
    with Fetcher(jobs_of(urls), settings_of(), n_threads, 0, 1000, load) as fetcher:
        results = list(fetcher)
    assert len(results) == len(urls)
    for result in results:
        assert result.error or (result.pixels == result.job.key % 250).all()
    return {result.job.key: str(result.error or "") for result in results}


def test_a_decoder_that_dies_costs_its_image_only():
    urls = [f"http://h{i % 7}/ok" for i in range(120)]
    urls[10] = urls[60] = "http://h/dies decoding"
    urls[20], urls[30] = "http://h/fails", "http://h/breaks"
    failures = {key: text for key, text in fetch_all(urls).items() if text}
    assert failures == {
        10: "bad_image: its decoder's process died (3)",
        60: "bad_image: its decoder's process died (3)",
        20: "timeout: too slow",
        30: "bad_image: ValueError: odd\nbytes",
    }


def test_a_decoder_that_hangs_costs_its_image_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fetcher_module, "MAX_DECODE_S", 0.2)
    urls = [f"http://h{i % 7}/ok" for i in range(60)]
    urls[10] = "http://h/hangs"
    failures = {key: text for key, text in fetch_all(urls).items() if text}
    assert failures == {10: "bad_image: its decoder's process took more than 0.2 s"}


def test_many_decoders_that_die_cost_nothing_that_waits():
    urls = ["http://h/ok"] * 5 + ["http://g/dies decoding"] * 5
    failures = fetch_all(urls, n_threads=10)
    assert {key for key, text in failures.items() if text} == set(range(5, 10))


def test_a_job_that_kills_its_process_elsewhere_is_given_up_in_the_end():
    failures = fetch_all(["http://h/dies downloading", *["http://g/ok"] * 6], n_threads=1)
    assert {key for key, text in failures.items() if text} == {0}


def test_processes_that_cannot_work_at_all_are_an_error_and_not_the_images_fault():
    with pytest.raises(UserError, match="end as soon as they start"):
        fetch_all(["http://h/dies downloading"] * 60, n_threads=1)


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_an_image_is_tried_again_if_its_process_was_killed_once(tmp_path: Path):
    path = str(tmp_path / "marker").replace("/", ":")
    failures = fetch_all([*["http://h/ok"] * 9, f"http://g/killed {path}", *["http://h/ok"] * 9])
    assert not any(failures.values())
    failures = fetch_all([*["http://h/ok"] * 9, f"http://g/killed always {path}", *["http://h/ok"] * 9])
    assert {key: text for key, text in failures.items() if text} == {9: "bad_image: its decoder's process died (-9)"}


def test_a_process_that_starts_few_threads_works_with_these(caplog: pytest.LogCaptureFixture):
    assert not any(fetch_all(["http://h/ok"] * 40, 8, FewThreads(2)).values())
    assert sum("download threads of a process could start" in record.message for record in caplog.records) == 1


def test_processes_that_start_no_thread_fail_no_image():
    with pytest.raises(UserError, match="end as soon as they start"):
        fetch_all(["http://h/ok"] * 40, 8, FewThreads(0))


def test_a_fault_of_the_machine_ends_the_run():
    with pytest.raises(UserError, match="too many open files"):
        fetch_all([*["http://h/ok"] * 20, "http://h/no files", *["http://h/ok"] * 20])


def test_hosts_without_a_route_fail_alone_while_the_network_works(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "MIN_SUSPECTS_S", 0)
    monkeypatch.setattr(machine, "machine_fault", lambda: "")
    failures = fetch_all(["http://h/ok", *["http://h/no route"] * (machine.MIN_SUSPECTS + 5)])
    assert [text for text in failures.values() if text] == ["connection: no route: Network is unreachable"] * 55


def test_a_machine_without_network_ends_the_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "machine_fault", lambda: "this machine has no route")
    with pytest.raises(UserError, match="downloads in a row failed: this machine has no route"):
        fetch_all(["http://h/no route"] * 60)


def test_a_list_that_breaks_on_the_way_is_raised_where_results_are_read():
    def jobs():
        yield jobs_of(["http://h/ok"])[0]
        raise UserError("line 2 is not JSON")

    with Fetcher(jobs(), settings_of(), 1, 0, 10, play) as fetcher, pytest.raises(UserError, match="line 2"):
        list(fetcher)


def test_jobs_may_come_later_too():
    later: queue.SimpleQueue[Job] = queue.SimpleQueue()

    def jobs():
        yield jobs_of(["http://h/ok"])[0]
        while later.empty():
            yield None
        yield later.get()

    with Fetcher(jobs(), settings_of(), 1, 0, 10, play) as fetcher:
        results = iter(fetcher)
        assert next(results).job.key == 0
        later.put(jobs_of(["http://h/ok"] * 2)[1])
        fetcher.wake()
        assert [result.job.key for result in results] == [1]


def test_no_job_is_begun_while_enough_results_wait():
    begun = []

    def jobs():
        for job in jobs_of(["http://h/ok"] * 4000):
            begun.append(job.key)
            yield job

    with Fetcher(jobs(), settings_of(), 2, 0, 4, play) as fetcher:
        iterator = iter(fetcher)
        for _ in range(10):
            next(iterator)
        assert len(begun) <= 10 + 4 + 2 + 16 * 2 + 1


def test_leaving_it_early_ends_the_processes():
    with Fetcher(jobs_of(["http://h/ok"] * 100), settings_of(), 2, 0, 4, play) as fetcher:
        next(iter(fetcher))
    assert not any(worker.process.is_alive() for worker in fetcher._workers)


def test_a_cache_that_is_full_is_said_once(caplog: pytest.LogCaptureFixture):
    fetch_all(["http://h/full", "http://h/ok", "http://h/ok"], n_threads=1)
    assert [record.message for record in caplog.records] == ["no more images are cached: it is full; embedding goes on"]


class SlowHost(PhotoServer):
    """Answers /slow... only after all requests for other paths; notes how many requests were in flight at once."""

    def __init__(self, photo: bytes, n_others: int) -> None:
        super().__init__({})
        self.photo, self.n_others = photo, n_others
        self.in_flight = self.most = 0
        self.all_others, self.counting = threading.Event(), threading.Lock()

    def answer(self, request) -> None:
        with self.counting:
            self.in_flight += 1
            self.most = max(self.most, self.in_flight)
            others = sum(n for name, n in self.requests.items() if "slow" not in name)
        if others >= self.n_others:
            self.all_others.set()
        if "slow" in request.path:
            self.all_others.wait(15)
        self.files = {request.path.lstrip("/"): self.photo}
        with self.counting:
            self.in_flight -= 1
        super().answer(request)


def test_a_slow_host_does_not_hold_up_the_others():
    photo = encode(load("chelsea.png"), "JPEG")
    with SlowHost(photo, 5) as slow:
        port = slow.url.rpartition(":")[2]
        urls = [f"{slow.url}/slow{i}.jpg" for i in range(12)] + [f"http://localhost:{port}/{i}.jpg" for i in range(5)]
        start = time.monotonic()
        with Fetcher(jobs_of(urls), settings_of(), 4, 0, 100) as fetcher:
            results = list(fetcher)
    assert [str(result.error) for result in results if result.error] == []
    assert slow.all_others.is_set() and time.monotonic() - start < 60


def test_a_host_is_asked_for_no_more_than_its_limit_at_once():
    photo = encode(load("chelsea.png"), "JPEG")
    with SlowHost(photo, 0) as server:
        with Fetcher(jobs_of([f"{server.url}/{i}.jpg" for i in range(30)]), settings_of(), 8, 2, 100) as fetcher:
            assert not [result for result in fetcher if result.error]
        assert server.most <= 2


def test_a_damaged_file_in_the_cache_is_fetched_again(tmp_path: Path, photo_server: PhotoServer):
    name = next(name for name in photo_server.files if name.endswith(".jpg"))
    job = jobs_of([f"{photo_server.url}/{name}"])[0]

    def pixels() -> np.ndarray:
        with Fetcher([job], settings_of(tmp_path), 1, 0, 10) as fetcher:
            (result,) = fetcher
        assert result.error is None
        return result.pixels

    first = pixels()
    path = ImageCache(str(tmp_path), 10**9).find(job.id)
    assert path and path.read_bytes() == photo_server.files[name] and photo_server.requests.total() == 1
    pixels()
    assert photo_server.requests.total() == 1
    path.write_bytes(path.read_bytes()[:500])
    assert (pixels() == first).all()
    assert photo_server.requests.total() == 2 and path.read_bytes() == photo_server.files[name]


def test_downloads_begin_before_the_model_is_known_and_decoding_after(photo_server: PhotoServer):
    names = [name for name in photo_server.files if name.endswith(".jpg")][:8]
    settings = dataclasses.replace(settings_of(), preprocess=None)
    with Fetcher(jobs_of([f"{photo_server.url}/{name}" for name in names]), settings, 4, 0, 10) as fetcher:
        while photo_server.requests.total() < 4:  # its threads' number: no more begin
            time.sleep(0.01)
        fetcher.start_decoding(PREPROCESS)
        results = list(fetcher)
    assert [result.error for result in results] == [None] * 8
    assert {result.pixels.shape for result in results} == {(32, 32, 3)}


def test_a_worker_started_anew_knows_the_model_too():
    urls = ["http://h/dies downloading", *["http://g/ok"] * 6]
    settings = dataclasses.replace(settings_of(), preprocess=None)
    with Fetcher(jobs_of(urls), settings, 1, 0, 10, play) as fetcher:
        fetcher.start_decoding(PREPROCESS)
        assert [result.job.key for result in fetcher if result.error] == [0]
