"""Measure how close embed.py gets to the limit of this machine, and the usual ways for comparison. Runs offline.

    python tests/benchmarks/bench_embed.py            # five to six minutes on two cores
    python tests/benchmarks/bench_embed.py --quick    # one short round, without the web and memory: about two
    python tests/benchmarks/bench_embed.py --whole    # only whole runs against other engines, three rounds: twelve

Photos of 640x480 and of 12 megapixels come from a near server (30 ms) and from a web with slow, gone and hanging URLs.
The contenders take turns; medians over the rounds. `limit` is the bound of this machine: its cores divided by the CPU
seconds an image of download, decoding and forward pass together; on a GPU, the smallest of the rates alone.
Rates are marginal: imports and loading the model are left out. `--whole` compares whole runs, from the start of the
process to its end, at 64 and 1,000 images, with the engines of engines.py that are installed. Prints a table and, as
the last line, all as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a script

import config
from tests.benchmarks import engines
from tests.benchmarks.embed_runs import Run, children_cpu_s, embed
from tests.support import offline_model, photos
from utils.files import write_json
from utils.items.formatted import item_id

PARTS, SERVER, ENGINES = (
    Path(__file__).with_name(name) for name in ("embed_parts.py", "image_server.py", "engines.py")
)
SIDE, BATCH = 224, 32
FEW = 2 * BATCH
WHOLE = (64, 1_000)  # images of whole runs
SIZES = {"640x480": (640, 480), "12MP": (4000, 3000)}
N_PHOTOS = {"640x480": 38, "12MP": 10}  # distinct ones, served again and again
SMALL = (320, 240)  # for the runs that measure memory: what counts there is how many
WEB_S, WEB_STEADY = 60, (0.55, 1.0)  # hanging URLs hold connections for 30 s: what is steady begins after that
TINY: dict[str, Any] = {  # a model that takes no time and the same input
    "model_cfg": {
        "embed_dim": 512,
        "vision_cfg": {"image_size": SIDE, "layers": 1, "width": 64, "head_width": 32, "patch_size": 112},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 1, "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"},
}
Figures = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        del os.environ[name]
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        bench = Bench(Path(folder), 5 if args.quick else args.seconds)
        if args.whole:
            with bench.serving():
                figures = bench.whole(args.rounds or 3)
            print_whole(figures)
            print(json.dumps(figures))
            return 0
        with bench.serving():
            figures = bench.compare(1 if args.quick else args.rounds or 2)
            if not args.quick:
                bench.add_web(figures)
                figures["peak_mb"] = bench.peak_mb(1_000, 8_000)
            figures["fidelity"] = bench.fidelity()
    figures["ratios"] = ratios(figures)
    print_table(figures)
    print(json.dumps(figures))
    return 0


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round, no web, no peak memory")
    parser.add_argument("--whole", action="store_true", help="only whole runs of embed.py and other engines")
    parser.add_argument("--rounds", type=int, help="default: 2, with --whole 3")
    parser.add_argument("--seconds", type=float, default=9, help="what one measurement should take")
    return parser.parse_args(argv)


class Bench:
    """Files in `folder`, the servers, and measurements of about `seconds` each."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.seconds = folder, seconds
        self.vit = ("ViT-B-32", str(offline_model.save_seeded_vit(folder / "vit.safetensors")))
        self.lite = (f"local-dir:{offline_model.build(folder / 'lite')}", "")
        self.hosts: list[str] = []
        self.port = self.n_runs = 0
        self.device, self.precision = part("hardware")
        self.flags = ["--batch-size", "256"] if self.device == "cuda" else []
        make_photos(folder / "photos")

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        command = [sys.executable, str(SERVER), str(self.folder / "photos")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdin and server.stdout
            told = json.loads(server.stdout.readline())
            self.hosts, self.port = told["hosts"], told["port"]
            try:
                yield
            finally:
                server.stdin.close()

    def urls(self, kind: str, size: str, n: int) -> list[str]:
        hosts = self.hosts if kind == "web" else self.hosts[:1]
        return [f"http://{hosts[k % len(hosts)]}:{self.port}/{kind}/{size}/{k}" for k in range(n)]

    def embed(self, model: tuple[str, str], urls: list[str], limit_s: float | None = None, keep: bool = False) -> Run:
        self.n_runs += 1
        folder = self.folder / f"run{self.n_runs}"
        run = embed(folder, model, urls, *self.flags, limit_s=limit_s)
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
        return run

    def compare(self, n_rounds: int) -> Figures:
        """Run rounds of all contenders and parts; returns medians and derived figures, key -> size -> figure."""
        names = ("fp32", self.precision if self.precision != "fp32" else "bf16")
        forward = {name: part("forward", model=self.vit, precision=name, n_batches=2)["rate"] for name in names}
        found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        loads = []
        for number in range(n_rounds):
            for size in SIZES:
                for key, value in self.turn(size, forward[self.precision]).items():
                    found[key][size].append(value)
                    print(f"round {number + 1}, {size}: {key} {value:.4g}", file=sys.stderr, flush=True)
            loads.append(round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None)
        everything = {key: [value for values in sizes.values() for value in values] for key, sizes in found.items()}
        medians = {
            key: {size: statistics.median(values) for size, values in sizes.items()} for key, sizes in found.items()
        }
        figures: Figures = {"machine": machine(), "cores": cores(), "device": self.device, "precision": self.precision}
        figures |= {"load": loads, "forward": forward} | medians
        figures["forward"][self.precision] = statistics.median(everything["forward"])
        figures["forward_cpu_s"] = statistics.median(everything["forward_cpu_s"])
        figures["store"] = part("store", dimension=512, n=5_000)["rate"]
        figures["embed"] = {f"near {size}": rate for size, rate in figures["embed"].items()}
        add_limits(figures)
        return figures

    def whole(self, n_rounds: int) -> Figures:
        """Whole runs in turns: contender -> number of images -> medians of its seconds and CPU seconds; and forward."""
        names = ["embed.py", *engines.available()]
        seconds: dict[str, dict[int, list[float]]] = {name: defaultdict(list) for name in names}
        cpu_s: dict[str, dict[int, list[float]]] = {name: defaultdict(list) for name in names}
        forward = []
        for number in range(n_rounds):
            forward.append(part("forward", model=self.vit, precision=self.precision, n_batches=8))
            for n in WHOLE:
                for name in names:
                    found = self.run_whole(name, self.urls("near", "640x480", n))
                    seconds[name][n].append(found[0])
                    cpu_s[name][n].append(found[1])
                    print(f"round {number + 1}: {name}, {n} images: {found[0]:.1f} s", file=sys.stderr, flush=True)
        few, many = WHOLE
        figures: Figures = {"machine": machine(), "cores": cores(), "precision": self.precision}
        figures["forward"] = {key: statistics.median(one[key] for one in forward) for key in ("rate", "cpu_s")}
        figures["contenders"] = {}
        for name in names:
            whole = {n: statistics.median(seconds[name][n]) for n in WHOLE}
            cpu = {n: statistics.median(cpu_s[name][n]) for n in WHOLE}
            figures["contenders"][name] = {
                "marginal": (many - few) / (whole[many] - whole[few]),
                "cpu_s": (cpu[many] - cpu[few]) / (many - few),
                **{f"whole {n}": whole[n] for n in WHOLE},
            }
        return figures

    def run_whole(self, name: str, urls: list[str]) -> tuple[float, float]:
        """Seconds and CPU seconds of a whole run; the CPU of processes that outlive it (Ray's) is not counted."""
        if name == "embed.py":
            run = self.embed(self.vit, urls)
            return run.end - run.start, run.cpu_s
        start, cpu_s = time.perf_counter(), children_cpu_s()
        arguments = json.dumps({"model": self.vit, "urls": urls, "precision": self.precision})
        done = subprocess.run([sys.executable, str(ENGINES), name, arguments], capture_output=True, text=True)
        if done.returncode or json.loads(done.stdout.splitlines()[-1]) != len(urls):
            raise RuntimeError(f"{name} failed:\n{done.stderr}")
        return time.perf_counter() - start, children_cpu_s() - cpu_s

    def turn(self, size: str, forward: float) -> dict[str, float]:
        """Measure everything once, for photos of one size."""
        folder = str(self.folder / "photos" / size)
        ahead = part(
            "forward", model=self.vit, precision=self.precision, n_batches=self.n_images(forward) // 2 // BATCH
        )
        found = {"forward": ahead["rate"], "forward_cpu_s": ahead["cpu_s"]}
        found["decode_cpu_s"] = part("decode", folder=folder, side=SIDE, n=100 if size == "640x480" else 30)["cpu_s"]
        found["download_cpu_s"] = part("download", urls=self.urls("near", size, 100))["cpu_s"]
        n_fetched = 600 if size == "640x480" else 120
        n_fetched *= max(1, cores() // 2)
        found["fetch"] = part(
            "fetch", urls=self.urls("near", size, n_fetched), side=SIDE, n_threads=config.DOWNLOAD_WORKERS
        )["rate"]
        n = self.n_images(min(ahead["rate"], found["fetch"]))
        # What no number of images adds to: a run of so few that each of the model's streams has one batch.
        alone = self.embed(self.vit, self.urls("near", size, FEW))
        run = self.embed(self.vit, self.urls("near", size, n + FEW))
        found["embed"] = n / (run.tail_s - alone.tail_s)
        found["embed_cpu_s"] = (run.cpu_s - alone.cpu_s) / n
        found["loop"] = part("loop", model=self.vit, urls=self.urls("near", size, n // 3 + 4))["rate"]
        if size == "640x480":
            found["chroma_function"] = part(
                "chroma_function", model=self.vit, urls=self.urls("near", size, n // 3 + 4)
            )["rate"]
        return found

    def n_images(self, rate: float) -> int:
        """The number of images that take `seconds`: whole batches, at least four."""
        return max(4, round(rate * self.seconds / BATCH)) * BATCH

    def add_web(self, figures: Figures) -> None:
        size = "640x480"
        n = round(WEB_S * 2 * min(figures["embed"][f"near {size}"], figures["fetch"][size]))
        run = self.embed(self.vit, self.urls("web", size, n), limit_s=WEB_S)
        figures["embed"][f"web {size}"] = run.steady_rate(*WEB_STEADY)

    def peak_mb(self, *sizes: int) -> dict[str, float | None]:
        """Peak memory of embed.py, workers included, at different numbers of images."""
        model = (f"local-dir:{make_tiny_model(self.folder / 'tiny')}", "")
        found = {}
        for n in sizes:
            peak = self.embed(model, self.urls("near", "small", n)).peak_bytes
            found[str(n)] = peak and peak / 1e6
        return found

    def fidelity(self) -> Figures:
        """Per model and kind of photos: what embed.py stored against fp32 and full decoding."""
        found: Figures = {}
        for name, model in (("ViT-B-32", self.vit), ("EfficientNet-Lite0", self.lite)):
            for kind in (*SIZES, "varied"):
                folder = self.folder / "photos" / kind
                urls = self.urls("near", kind, len(list(folder.iterdir())))
                ids = [str(item_id({"url": url}, config.ID_FIELD)) for url in urls]
                self.embed(model, urls, keep=True)
                store = self.folder / f"run{self.n_runs}" / config.CHROMADB_PATH
                found[f"{name}, {kind}"] = part("fidelity", model=model, folder=str(folder), store=str(store), ids=ids)
        return found


def part(name: str, **arguments: Any) -> Any:
    """The result of a part of embed_parts.py, run in a process of its own."""
    command = [sys.executable, str(PARTS), name, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def make_tiny_model(folder: Path) -> Path:
    import open_clip

    offline_model.save_weights(open_clip.CLIP(**TINY["model_cfg"]).state_dict(), folder / offline_model.WEIGHTS_NAME)
    write_json(folder / offline_model.CONFIG_NAME, TINY)
    return folder


# --- what is served ---------------------------------------------------------------------------------------------------
def make_photos(folder: Path) -> None:
    """FOLDER/SIZE/NUMBER.jpg: the bundled photos tiled to each size, so that they are as detailed as real ones of it,
    and "varied": their variations, scaled to between 450 and 2,000 pixels on the shortest side."""
    images = [photos.load(name) for name in photos.PHOTOS]
    for size, shape in {**SIZES, "small": SMALL}.items():
        (folder / size).mkdir(parents=True)
        for number in range(N_PHOTOS.get(size, 19)):
            save(tiled(images[number % len(images) :] + images[: number % len(images)], shape), folder / size, number)
    (folder / "varied").mkdir()
    for number, image in enumerate(varied(images)):
        save(image, folder / "varied", number)


def tiled(images: list[Image.Image], shape: tuple[int, int]) -> Image.Image:
    canvas = Image.new("RGB", shape)
    side = min(512, max(shape))
    spots = [(left, top) for top in range(0, shape[1], side) for left in range(0, shape[0], side)]
    for number, spot in enumerate(spots):
        canvas.paste(ImageOps.fit(images[number % len(images)], (side, side)), spot)
    return canvas


def varied(images: list[Image.Image]) -> Iterator[Image.Image]:
    rng = np.random.default_rng(0)
    for image in images:
        for change in list(photos.KINDS.values())[::2]:
            one = change(image, rng)
            scale = rng.uniform(450, 2_000) / min(one.size)
            yield one.resize((round(one.width * scale), round(one.height * scale)), Image.Resampling.LANCZOS)


def save(image: Image.Image, folder: Path, number: int) -> None:
    image.save(folder / f"{number:04}.jpg", quality=88)


# --- what follows -----------------------------------------------------------------------------------------------------
def add_limits(figures: Figures) -> None:
    """`limit` per size; on a GPU it is the smallest of the parts' rates, and `binds` names that part."""
    figures["limit"], figures["binds"] = {}, {}
    for size in SIZES:
        rates = {
            "forward": figures["forward"][figures["precision"]],
            "decode on all cores": figures["cores"] / figures["decode_cpu_s"][size],
            "fetch": figures["fetch"][size],
            "store": figures["store"],
        }
        figures["binds"][size] = min(rates, key=lambda name: rates[name])
        cpu = figures["cores"] / parts_cpu_s(figures, size)
        figures["limit"][size] = cpu if figures["device"] == "cpu" else min(rates.values())


def parts_cpu_s(figures: Figures, size: str) -> float:
    """CPU seconds an image of all parts. Unlike rates, these hardly depend on what else the machine does."""
    return figures["decode_cpu_s"][size] + figures["download_cpu_s"][size] + figures["forward_cpu_s"]


def ratios(figures: Figures) -> dict[str, float]:
    near, far = figures["embed"]["near 640x480"], figures["embed"].get("web 640x480")
    found = {
        "near embed / limit": near / figures["limit"]["640x480"],
        "near embed / loop": near / figures["loop"]["640x480"],
        "near embed / chroma_function": near / figures["chroma_function"]["640x480"],
        "12MP embed / limit": figures["embed"]["near 12MP"] / figures["limit"]["12MP"],
        "12MP embed / loop": figures["embed"]["near 12MP"] / figures["loop"]["12MP"],
        "fetch / near embed": figures["fetch"]["640x480"] / near,
        "near CPU s of the parts / of embed": parts_cpu_s(figures, "640x480") / figures["embed_cpu_s"]["640x480"],
    }
    if far:
        found["web embed / limit"] = far / figures["limit"]["640x480"]
    if all(figures.get("peak_mb", {"": None}).values()):
        small, large = figures["peak_mb"].values()
        found["peak memory, 8,000 / 1,000 images"] = large / small
    return found


# The bounds of the ratios, with native bf16 on the CPU and without.
TARGETS = {
    "near embed / limit": (0.90, 0.90),
    "near embed / loop": (4, 1.4),
    "near embed / chroma_function": (6, 2),
    "12MP embed / loop": (6, 3),
    "fetch / near embed": (4, 4),
    "web embed / limit": (0.85, 0.85),
}


def print_table(figures: Figures) -> None:
    print(
        f"{figures['machine']}, {figures['cores']} cores, {figures['device']}; load after each round {figures['load']}"
    )
    rates = ", ".join(f"{name} {rate:.1f}" for name, rate in figures["forward"].items())
    print(
        f"forward alone, images/s: {rates}; embed.py runs {figures['precision']}; store alone {figures['store']:.0f}/s"
    )
    print(f"CPU s an image: forward {figures['forward_cpu_s']:.4f}")
    for size in SIZES:
        print(
            f"  {size}: decode {figures['decode_cpu_s'][size]:.4f}, download {figures['download_cpu_s'][size]:.4f}, "
            f"embed.py in all {figures['embed_cpu_s'][size]:.4f}"
        )
    for size in SIZES:
        shown = {key: figures[key].get(size) for key in ("limit", "fetch", "loop", "chroma_function")}
        shown |= {f"embed, {name.split()[0]}": rate for name, rate in figures["embed"].items() if size in name}
        print(f"images/s, {size}: " + ", ".join(f"{name} {rate:.1f}" for name, rate in shown.items() if rate))
        print(f"  binds, if nothing shares cores: {figures['binds'][size]}")
    for name, ratio in figures["ratios"].items():
        native, other = TARGETS.get(name, (None, None))
        told = f"   at least {native if figures['precision'] != 'fp32' else other}" if native else ""
        print(f"{name:34} {ratio:6.2f}{told}")
    for name, found in figures["fidelity"].items():
        print(f"{name}: " + ", ".join(f"{key} {value:.5f}" for key, value in found.items()))


def print_whole(figures: Figures) -> None:
    """A Markdown table, as in README.md beside this file."""
    forward = figures["forward"]
    print(f"{figures['machine']}, {figures['cores']} cores, {figures['precision']}\n")
    print("| contender | marginal images/s | " + " | ".join(f"{n} images, s" for n in WHOLE) + " | CPU s an image |")
    print("|---|---|---|---|---|")
    print(f"| forward pass alone | {forward['rate']:.1f} | - | - | {forward['cpu_s']:.4f} |")
    for name, found in figures["contenders"].items():
        whole = " | ".join(f"{found[f'whole {n}']:.1f}" for n in WHOLE)
        print(f"| {name} | {found['marginal']:.1f} | {whole} | {found['cpu_s']:.4f} |")


def machine() -> str:
    """The processor, as the system names it."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
