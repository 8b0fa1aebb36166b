"""Pixels of images as headless Chromium shows them: the reference for decoding.

with shown.chromium(profile) as show:
    show([data, ...])  # [(H, W, 3) uint8 on white, or None where nothing is shown, ...]
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from tests.support import browser

SCRIPT = """
(async files => Promise.all(files.map(async file => {
  const image = new Image(), url = URL.createObjectURL(new Blob([Uint8Array.fromBase64(file)]));
  image.src = url;
  try {
    await new Promise((resolve, reject) => { image.onload = resolve; image.onerror = reject; });
    const width = image.naturalWidth, height = image.naturalHeight;
    const canvas = new OffscreenCanvas(width, height), context = canvas.getContext("2d", {willReadFrequently: true});
    context.fillStyle = "white";
    context.fillRect(0, 0, width, height);
    context.drawImage(image, 0, 0);
    const pixels = context.getImageData(0, 0, width, height).data;
    return [width, height, new Uint8Array(pixels.buffer).toBase64()];
  } catch (error) { return String(error.type || error); } finally { URL.revokeObjectURL(url); }
})))
"""
Show = Callable[[Sequence[bytes]], list[np.ndarray | None]]


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[Show]:
    """`profile`: an empty folder. Images of a call are decoded together: about 50 small ones at a time are best."""
    program = browser.find()
    assert program, "no Chromium here"
    with browser.opened(program, profile) as page:
        page.open("about:blank")

        def show(files: Sequence[bytes]) -> list[np.ndarray | None]:
            encoded = [base64.b64encode(data).decode() for data in files]
            return [_pixels(answer) for answer in page.run(f"({SCRIPT})({encoded})")]

        yield show


def _pixels(answer: list | str) -> np.ndarray | None:
    if isinstance(answer, str):
        return None
    width, height, data = answer
    return np.frombuffer(base64.b64decode(data), np.uint8).reshape(height, width, 4)[..., :3]
