"""Small collections with images, for the tests of the two annotation stages."""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from utils.annotation import neighbor_dirs
from utils.annotation.neighbor_dirs import DirWriter
from utils.store.collection import open_client

CHROMA, CACHE, ROOT, ANNOTATED = (
    Path("data/chroma"),
    Path("data/images"),
    Path("data/dirrify"),
    Path("data/annotated.json"),
)


def id_of(url: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, url))


def image_bytes(seed: int, format_: str = "JPEG", side: int = 8) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, format_)
    return file.getvalue()


def make_collection(
    vectors: np.ndarray,
    urls: Sequence[str],
    path: Path = CHROMA,
    fields: Sequence[Mapping[str, Any]] | None = None,
    hnsw: Mapping[str, Any] | None = None,
    name: str = "images",
) -> list[str]:
    """A Chroma collection as any program could make it. Returns the ids in the order of `urls`."""
    ids = [id_of(url) for url in urls]
    client: Any = open_client(path)
    configuration = {"hnsw": {"space": "cosine", **(hnsw or {})}}
    collection = client.create_collection(name, configuration=configuration, embedding_function=None)
    metadata = [{"url": url, **(fields[i] if fields else {})} for i, url in enumerate(urls)]
    for start in range(0, len(ids), 5_000):
        page = slice(start, start + 5_000)
        collection.add(ids=ids[page], embeddings=vectors[page], metadatas=metadata[page])
    return ids


def fill_cache(ids: Sequence[str], folder: Path = CACHE, n_images: int = 0, side: int = 8) -> None:
    """An image for each id: image_bytes(its index), or, to be quick, one of n_images in turn."""
    images = [image_bytes(seed, side=side) for seed in range(n_images or len(ids))]
    for i, id_ in enumerate(ids):
        path = folder / id_[:2] / f"{id_}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(images[i % len(images)])


def random_vectors(n: int, dimension: int = 16, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((n, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def make_dir(writer: DirWriter, images: Mapping[str, bytes | None]) -> None:
    """One directory of a root; images: id -> bytes by rank, the main image first; None if it could not be loaded, b""
    if it is deleted already."""
    main = next(iter(images))
    writer.stage(main).mkdir()
    digests = {id_: "of an image that is deleted already" for id_, image in images.items() if image is not None}
    for rank, (id_, image) in enumerate(images.items()):
        if image:
            path = writer.stage(main) / neighbor_dirs.image_name(rank, id_, ".jpg")
            path.write_bytes(image)
            digests[id_] = neighbor_dirs.file_digest(path)
    writer.commit(list(images), digests)


def read_samples(root: Path = ROOT) -> dict[str, list[str]]:
    return json.loads((root / "samples.json").read_text())


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under `folder`, by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
