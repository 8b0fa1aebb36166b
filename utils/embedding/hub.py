"""Weights from the Hugging Face hub, into its cache, within a bounded time."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import requests

SILENT_S = 30  # a download that brings nothing for this long is given up


class HubError(Exception):
    """The hub cannot be reached, or does not have it."""


def fetch(repo: str, names: Sequence[str]) -> None:
    """Bring the first of the files `names` that the hub's `repo` has into the hub's cache, or find it there.

    The hub's own client retries a silent hub for 13 minutes. So one byte is asked for first, with one time limit, and
    then a download that brings nothing for SILENT_S is given up. Raises HubError.
    """
    from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import build_hf_headers

    if any(isinstance(try_to_load_from_cache(repo, name), str) for name in names):
        return
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("they are not in the cache, and HF_HUB_OFFLINE is set")
        for name in names:
            headers = {**build_hf_headers(), "Range": "bytes=0-0"}
            url, timeout_s = hf_hub_url(repo, name), constants.HF_HUB_DOWNLOAD_TIMEOUT
            with requests.get(url, headers=headers, timeout=timeout_s, stream=True) as answer:
                if answer.status_code != 404:
                    answer.raise_for_status()
                    _download(repo, name)
                    return
        raise OSError(f"{constants.ENDPOINT} has none of {', '.join(names)}")
    except Exception as error:  # the hub client's own error types differ from version to version
        raise HubError(next(iter(str(error).splitlines()), "") or type(error).__name__) from error


def _download(repo: str, name: str) -> None:
    import huggingface_hub

    huggingface_hub.utils.logging.set_verbosity_error()
    failures: list[Exception] = []

    def work() -> None:
        try:
            huggingface_hub.hf_hub_download(repo, name)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=work, daemon=True)  # one that hangs does not keep the script from ending
    thread.start()
    arrived, since = -1, time.monotonic()
    while thread.is_alive():
        thread.join(0.2)
        if (size := _bytes_arriving()) != arrived:
            arrived, since = size, time.monotonic()
        elif time.monotonic() - since > SILENT_S:
            raise TimeoutError(f"nothing arrived for {SILENT_S} s")
    if failures:
        raise failures[0]


def _bytes_arriving() -> int:
    """Size of the unfinished downloads in the hub's cache."""
    from huggingface_hub import constants

    total = 0
    for path in Path(constants.HF_HUB_CACHE).glob("models--*/blobs/*.incomplete"):
        with contextlib.suppress(OSError):  # renamed at this moment: it is finished
            total += path.stat().st_size
    return total
