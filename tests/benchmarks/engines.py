"""Other ways to turn a list of URLs into vectors: contenders of bench_embed.py, each run in a process of its own.

    python tests/benchmarks/engines.py NAME ARGUMENTS-AS-JSON

embeds a list with the function NAME and prints the number of vectors as JSON. `tuned` is what a competent person writes
in forty lines; `daft` and `ray_data` are engines (tests/requirements-extra.txt). All take bf16 where it is native.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

BATCH, N_THREADS = 32, 32
Model = tuple[str, str]  # open_clip's name and pretrained


def available() -> list[str]:
    return ["tuned", *(name for name, package in (("daft", "daft"), ("ray_data", "ray")) if find_spec(package))]


def load(model: Model, precision: str) -> tuple[Any, Any]:
    import open_clip

    precision = "pure_bf16" if precision == "bf16" else precision
    clip, _, preprocess = open_clip.create_model_and_transforms(model[0], pretrained=model[1], precision=precision)
    return clip.eval(), preprocess


def encode(clip: Any, images: Any, precision: str) -> Any:
    import torch

    with torch.inference_mode():
        images = torch.stack(images).to(torch.bfloat16 if precision == "bf16" else torch.float32)
        return torch.nn.functional.normalize(clip.encode_image(images).float(), dim=-1).numpy()


def tuned(model: Model, urls: list[str], precision: str) -> int:
    """Threads download and prepare one batch ahead of the model; the collection takes each batch."""
    import chromadb
    import requests
    from PIL import Image

    clip, preprocess = load(model, precision)
    sessions = threading.local()

    def fetch(url: str) -> Any:
        if not hasattr(sessions, "session"):
            sessions.session = requests.Session()
        return preprocess(Image.open(io.BytesIO(sessions.session.get(url, timeout=15).content)).convert("RGB"))

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, ThreadPoolExecutor(N_THREADS) as pool:
        collection = chromadb.PersistentClient(folder).create_collection(
            "images", embedding_function=None, configuration={"hnsw": {"space": "cosine"}}
        )
        batches = [urls[first : first + BATCH] for first in range(0, len(urls), BATCH)]
        ahead = [pool.submit(fetch, url) for url in batches[0]]
        for batch, following in zip(batches, [*batches[1:], []]):
            fetched, ahead = ahead, [pool.submit(fetch, url) for url in following]
            vectors = encode(clip, [future.result() for future in fetched], precision)
            collection.add(ids=batch, embeddings=vectors, metadatas=[{"url": url} for url in batch])
        return collection.count()


def daft(model: Model, urls: list[str], precision: str) -> int:
    """Daft downloads and decodes; a class in processes, one for each core, prepares and encodes; parquet."""
    import daft as engine
    import numpy as np
    import torch
    from PIL import Image

    @engine.cls(max_concurrency=os.cpu_count(), use_process=True)
    class Embedder:
        def __init__(self) -> None:
            torch.set_num_threads(1)
            self.clip, self.preprocess = load(model, precision)

        @engine.method.batch(return_dtype=engine.DataType.list(engine.DataType.float32()), batch_size=BATCH)
        def embed(self, images: Any) -> Any:
            prepared = [self.preprocess(Image.fromarray(np.asarray(image))) for image in images.to_pylist()]
            return list(encode(self.clip, prepared, precision))

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        images = engine.col("url").download(max_connections=N_THREADS).decode_image(mode="RGB")
        rows = engine.from_pydict({"url": urls}).into_batches(BATCH)
        rows.select(engine.col("url"), Embedder().embed(images).alias("vector")).write_parquet(folder)
        return engine.read_parquet(f"{folder}/**/*.parquet").count_rows()


def ray_data(model: Model, urls: list[str], precision: str) -> int:
    """Ray Data: tasks with threads download and prepare, an actor for each core encodes; parquet."""
    import numpy as np
    import ray
    import requests
    import torch
    from PIL import Image

    class Fetch:
        def __init__(self) -> None:
            import open_clip

            self.session, self.pool = threading.local(), ThreadPoolExecutor(N_THREADS)
            config = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
            self.preprocess = open_clip.image_transform(224, is_train=False, **config)

        def one(self, url: str) -> Any:
            if not hasattr(self.session, "session"):
                self.session.session = requests.Session()
            image = Image.open(io.BytesIO(self.session.session.get(url, timeout=15).content))
            return self.preprocess(image.convert("RGB")).numpy()

        def __call__(self, rows: Any) -> Any:
            return rows | {"image": np.stack(list(self.pool.map(self.one, rows["url"])))}

    class Embed:
        def __init__(self) -> None:
            torch.set_num_threads(1)
            self.clip, _ = load(model, precision)

        def __call__(self, rows: Any) -> Any:
            vectors = encode(self.clip, list(torch.from_numpy(rows["image"])), precision)
            return {"url": rows["url"], "vector": vectors}

    ray.init(log_to_driver=False, include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        n_cores = os.cpu_count() or 1
        rows = ray.data.from_items([{"url": url} for url in urls], override_num_blocks=-(-len(urls) // BATCH))
        fetched = rows.map_batches(Fetch, batch_size=BATCH, concurrency=1, num_cpus=0.5)
        encoded = fetched.map_batches(Embed, batch_size=BATCH, concurrency=n_cores, num_cpus=0.7)
        encoded.write_parquet(folder)
        return ray.data.read_parquet(folder).count()


ENGINES = {engine.__name__: engine for engine in (tuned, daft, ray_data)}

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    os.environ |= {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "DAFT_PROGRESS_BAR": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    print(json.dumps(ENGINES[sys.argv[1]](**json.loads(sys.argv[2]))))
