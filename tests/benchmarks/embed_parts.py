"""The parts that bench_embed.py measures besides embed.py, each in a process of its own.

    python tests/benchmarks/embed_parts.py PART ARGUMENTS-AS-JSON

prints what the function PART returns, as JSON.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a script

BATCH = 32
MAX_PIXELS = 100_000_000


# --- the parts of the work, each alone --------------------------------------------------------------------------------
def hardware() -> tuple[str, str]:
    """The device that embed.py chooses, and the precision that is usually fastest there."""
    import torch

    from utils.embedding import encoder

    device = encoder._find_device("auto")
    return device, encoder.native_precisions(torch.device(device))[0]


def forward(model: tuple[str, str], precision: str, n_batches: int) -> dict[str, float]:
    """encode_image alone, in as many streams as embed.py has, batches ready in memory: images/s, and CPU seconds an
    image of all threads together."""
    import torch

    from utils.embedding import encoder as encoders

    known = {"precision": precision, "processor": encoders.processor(torch.device(encoders._find_device("auto")))}
    encoder = encoders.load(*model, precision=precision, known=known)
    size = BATCH if encoder.device.type == "cpu" else 256
    pixels = np.random.default_rng(0).integers(0, 256, (size, *encoder.preprocess.size, 3), np.uint8)
    module = encoder._modules[precision]
    images = encoder._prepare(pixels).to(next(module.visual.parameters()).dtype)

    def encode(_: int) -> None:
        with torch.inference_mode():
            module.encode_image(images).cpu()

    with ThreadPoolExecutor(encoder.streams, initializer=encoder.take_share) as streams:
        list(streams.map(encode, range(encoder.streams)))
        n_batches = -(-n_batches // encoder.streams) * encoder.streams
        start, cpu = time.perf_counter(), time.process_time()
        list(streams.map(encode, range(n_batches)))
    n = n_batches * size
    return {"rate": n / (time.perf_counter() - start), "cpu_s": (time.process_time() - cpu) / n}


def decode(folder: str, side: int, n: int) -> dict[str, float]:
    """CPU seconds an image from bytes to the model's input, as embed.py decodes."""
    from utils.images.decode import decode as decode_image
    from utils.images.preprocess import Preprocess, to_pixels

    data = [path.read_bytes() for path in sorted(Path(folder).glob("*.jpg"))]
    preprocess = Preprocess((side, side), "shortest", "bicubic", 0)

    def once(number: int) -> None:
        image = decode_image(io.BytesIO(data[number % len(data)]), MAX_PIXELS, min_side=side)
        to_pixels(image, preprocess)

    once(0)
    cpu = time.process_time()
    for number in range(n):
        once(number)
    return {"cpu_s": (time.process_time() - cpu) / n}


def download(urls: list[str]) -> dict[str, float]:
    """CPU seconds an image of utils.web.download, one connection."""
    from utils.web.download import DownloadLimits, fetch

    limits = DownloadLimits(15, 2, 50_000_000, allow_local=True, respect_noai=True)
    fetch(urls[0], limits).close()
    cpu = time.process_time()
    for url in urls:
        fetch(url, limits).close()
    return {"cpu_s": (time.process_time() - cpu) / len(urls)}


def fetch(urls: list[str], side: int, n_threads: int) -> dict[str, float]:
    """Downloading and decoding alone, with embed.py's own workers: images/s from the first to the last result."""
    from utils.embedding.fetch_worker import FetchSettings, Job
    from utils.embedding.fetcher import Fetcher
    from utils.images.preprocess import Preprocess
    from utils.web.download import DownloadLimits

    limits = DownloadLimits(15, 2, 50_000_000, allow_local=True, respect_noai=True)
    settings = FetchSettings(limits, MAX_PIXELS, "", 0, Preprocess((side, side), "shortest", "bicubic", 0))
    jobs = (Job(key, "", url) for key, url in enumerate(urls))
    times = []
    with Fetcher(jobs, settings, n_threads, 0, len(urls)) as fetcher:
        for result in fetcher:
            if result.error is None:
                times.append(time.perf_counter())
    # The first to arrive came at once; a last few of the web hang.
    first, last = len(times) // 10, len(times) * 9 // 10
    return {"rate": (last - first) / (times[last] - times[first])}


def store(dimension: int, n: int) -> dict[str, float]:
    """Records/s of the store alone, journal and index, in batches as embed.py brings them."""
    from utils.store.store import Store

    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((n, dimension)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    with tempfile.TemporaryDirectory() as folder:
        opened = Store(Path(folder), "images")
        opened.remember_model({"model_name": "none", "pretrained": ""})
        start = time.perf_counter()
        for first in range(0, n, BATCH):
            batch = vectors[first : first + BATCH]
            ids = np.frombuffer(rng.bytes(16 * len(batch)), "V16")
            opened.append(ids, [{"url": f"http://photos.example/{first + k}"} for k in range(len(batch))], batch)
        opened.finish()
        seconds = time.perf_counter() - start
        opened.close()
    return {"rate": n / seconds}


# --- what one would do without embed.py -------------------------------------------------------------------------------
def loop(model: tuple[str, str], urls: list[str]) -> dict[str, float]:
    """The plain loop that a user would write, images/s until the collection holds all; the model is loaded before."""
    import open_clip
    import requests
    import torch
    from PIL import Image

    device = "cuda" if torch.cuda.is_available() else "cpu"
    clip, _, preprocess = open_clip.create_model_and_transforms(model[0], pretrained=model[1] or None)
    clip.eval().to(device)

    def embed(collection: Any, batch: list[str]) -> None:
        images = [Image.open(io.BytesIO(requests.get(url, timeout=15).content)).convert("RGB") for url in batch]
        with torch.no_grad():
            vectors = clip.encode_image(torch.stack([preprocess(image) for image in images]).to(device))
        vectors /= vectors.norm(dim=-1, keepdim=True)
        collection.add(ids=batch, embeddings=vectors.cpu().numpy(), metadatas=[{"url": url} for url in batch])

    return _rate(embed, urls, None)


def chroma_function(model: tuple[str, str], urls: list[str]) -> dict[str, float]:
    """The same loop with Chroma's own embedding function."""
    import requests
    import torch
    from chromadb.utils.embedding_functions import OpenCLIPEmbeddingFunction
    from PIL import Image

    device = "cuda" if torch.cuda.is_available() else "cpu"
    function = OpenCLIPEmbeddingFunction(model_name=model[0], checkpoint=model[1], device=device)

    def embed(collection: Any, batch: list[str]) -> None:
        images = [Image.open(io.BytesIO(requests.get(url, timeout=15).content)).convert("RGB") for url in batch]
        metadata = [{"url": url} for url in batch]
        collection.add(ids=batch, images=[np.asarray(image) for image in images], metadatas=metadata)

    return _rate(embed, urls, function)


def _rate(embed: Any, urls: list[str], function: Any) -> dict[str, float]:
    import chromadb

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        client = chromadb.PersistentClient(folder, chromadb.Settings(anonymized_telemetry=False))
        collection = client.create_collection("images", embedding_function=function)
        embed(collection, urls[:4])  # warm
        start = time.perf_counter()
        for first in range(4, len(urls), BATCH):
            embed(collection, urls[first : first + BATCH])
        assert collection.count() == len(urls)
        return {"rate": (len(urls) - 4) / (time.perf_counter() - start)}


# --- fidelity ---------------------------------------------------------------------------------------------------------
def fidelity(model: tuple[str, str], folder: str, store: str, ids: list[str]) -> dict[str, float]:
    """What embed.py stored against fp32 and full decoding: cosines, and the overlap of the 20 nearest neighbors."""
    from utils.embedding import encoder
    from utils.images.decode import decode as decode_image
    from utils.images.preprocess import to_pixels
    from utils.store import collection

    found = collection.read_vectors(collection.open_collection(Path(store), "images"), ids)
    exact = encoder.load(*model, precision="fp32")
    paths = sorted(Path(folder).glob("*.jpg"))
    vectors = []
    for first in range(0, len(paths), BATCH):
        batch = [decode_image(io.BytesIO(path.read_bytes()), MAX_PIXELS) for path in paths[first : first + BATCH]]
        vectors.append(exact.encode(np.stack([to_pixels(image, exact.preprocess) for image in batch])))
    reference = np.concatenate(vectors)
    cosines = (reference * found).sum(axis=1) / np.linalg.norm(found, axis=1)
    overlaps = [len(ours & theirs) / len(ours) for ours, theirs in zip(_nearest(found), _nearest(reference))]
    return {
        "min_cosine": float(cosines.min()),
        "mean_cosine": float(cosines.mean()),
        "overlap_at_20": float(np.mean(overlaps)),
    }


def _nearest(vectors: np.ndarray) -> Iterator[set[int]]:
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -np.inf)
    return (set(row.tolist()) for row in np.argsort(-similarity, axis=1)[:, :20])


_ALL = (hardware, forward, decode, download, fetch, store, loop, chroma_function, fidelity)
PARTS = {part.__name__: part for part in _ALL}

if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    print(json.dumps(PARTS[sys.argv[1]](**json.loads(sys.argv[2]))))
