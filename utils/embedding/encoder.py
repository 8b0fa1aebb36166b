"""The loaded model. It encodes images and text to unit vectors, in the fastest precision that is accurate enough."""

from __future__ import annotations

import copy
import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.embedding import blocks, networks, weights
from utils.errors import UserError
from utils.log import LOG

if TYPE_CHECKING:
    import torch

# Batches that the model encodes at once on a CPU with several cores, each on its share of the cores. A batch on all
# cores waits at every layer for the slowest core, and download processes always slow one down. Two streams give 1.2 to
# 1.4 times the images/s (ViT-B/32, fp32, two cores, other processes busy or not).
CPU_STREAMS = 2
# Images per pass of a convolutional tower on a CPU: the activations of eight images fit the CPU's caches
# (EfficientNet-Lite0, fp32, one thread: 33 ms per image, but 42 ms in a batch of 32).
CPU_CONVOLVED = 8
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
# A lower precision must reach this cosine to fp32 on every checked image. On real photos, ViT-B/32 in bf16 stays above
# 0.9999, and EfficientNet-Lite0 falls to 0.993.
MIN_COSINE = 0.999
# Number of images that decide the precision: N_CHECKED if they show that nearly all other images are accurate too, else
# MAX_CHECKED. The errors (1 - cosine) of photos are about lognormal. With N_CHECKED images, the mean of the log errors
# plus T_CHECKED standard deviations bounds 99.5% of all other errors (Student's t with 7 degrees of freedom).
N_CHECKED, MAX_CHECKED, T_CHECKED = 8, 32, 3.5
TIMING_S, N_ROUNDS = 2, 2  # total time for timing, and rounds: other processes may disturb one round
CLEARLY = 1.5  # a precision that is this many times as fast in the first pass needs no timing
_NATIVE_BF16 = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # of torch.cpu; if neither is true, fp32 is used
_GRAY = 128  # gray level of an image that every working model can encode


class Encoder:
    """A loaded model with its `dimension` (0 before its first image), `preprocess` and `precision`.

    `streams` threads should encode at once; each calls take_share() first. `candidates` are the possible precisions,
    the usually fastest first. While `has_choice`, choose_precision() must be called before encode_each().
    """

    def __init__(
        self,
        model: weights.Model,
        network: networks.Network,
        device: torch.device,
        candidates: tuple[str, ...],
        has_choice: bool,
        cosines: dict[str, float],
        clock: Callable[[], float],
    ) -> None:
        import torch

        self.preprocess, self.device, self.tag = network.preprocess, device, network.tag
        self._model, self._clock = model, clock
        self._n_cores = torch.get_num_threads() if device.type == "cpu" else 1
        self.streams = min(CPU_STREAMS, self._n_cores)
        self.dimension = 0
        self.cosines = cosines  # lower precision -> lowest cosine to fp32 seen
        tower = getattr(network.module, "visual", network.module)
        # Convolutional towers run 1.6 x as fast in channels_last (fp32, CPU). A ViT, with one patch layer, does not.
        is_convolutional = blocks.is_convolutional(tower)
        self._layout = torch.channels_last if is_convolutional else torch.contiguous_format
        self._at_once = CPU_CONVOLVED if is_convolutional and device.type == "cpu" else None
        self._scale = [
            torch.tensor(values, device=device).view(1, 3, 1, 1) * 255 for values in (network.mean, network.std)
        ]  # for pixels from 0 to 255: (pixels - mean) / std
        self.candidates, self.precision = candidates, candidates[0]
        self.has_choice, self.has_chosen = has_choice, False
        names = dict.fromkeys(("fp32", *candidates) if has_choice else candidates)
        # Lower precisions are copied from the fp32 module before it moves to the device.
        self._modules = {name: self._converted(network.module, name) for name in reversed(list(names))}

    def take_share(self) -> None:
        """Give this thread its share of the cores."""
        import torch

        if self.streams > 1:
            torch.set_num_threads(self._n_cores // self.streams)

    def encode(self, pixels: np.ndarray, precision: str = "") -> np.ndarray:
        """(B, H, W, 3) uint8 -> (B, D) float32, L2-normalized. Halves a batch that does not fit into GPU memory."""
        n, module = self._at_once or len(pixels), self._modules[precision or self.precision]
        parts = [self._encode(module, pixels[start : start + n]) for start in range(0, len(pixels), n)]
        return np.concatenate(parts)

    def encode_each(self, pixels: np.ndarray, precision: str = "") -> np.ndarray:
        """Like encode(), but the vector of an image is NaN if the model fails on it.

        An image counts as failing only if it also fails alone while the model still encodes a gray image. Raises
        UserError for any other failure: if the device is gone, its memory full or the model broken, no image fails.
        """
        try:
            vectors = self.encode(pixels, precision)
        except RuntimeError as error:
            LOG.debug("a forward pass failed (batch of %d): %s", len(pixels), error)
            alone = [self._encode_alone(one[None], precision) for one in pixels]
            dimension = max(len(vector) for vector in alone)
            vectors = np.stack([np.broadcast_to(vector, dimension) for vector in alone])
        if not np.isfinite(vectors).all():
            self._check_health(pixels[:1])
        return vectors

    def _encode_alone(self, pixels: np.ndarray, precision: str) -> np.ndarray:
        """The vector (D,) of one image, or (1,) NaN."""
        try:
            return self.encode(pixels, precision)[0]
        except RuntimeError:
            return np.full(1, np.nan, np.float32)

    def _check_health(self, like: np.ndarray) -> None:
        """Raises UserError unless the model encodes a gray image with the shape of `like`, (1, H, W, 3)."""
        try:
            if np.isfinite(self.encode(np.full_like(like, _GRAY), next(reversed(self._modules)))).all():
                return
            fault = "its vectors are not finite numbers"
        except RuntimeError as error:
            fault = weights.first_line(error)
        raise UserError(
            f"the model no longer works on {self.device}: {fault}; check the device and its free memory, then run "
            "again; everything stored so far is safe"
        )

    # --- precision ----------------------------------------------------------------------------------------------------
    def choose_precision(self, pixels: np.ndarray, is_last: bool) -> bool:
        """Choose the fastest accurate candidate with the first images (B, H, W, 3) of a run, on all cores.

        Returns False if the choice needs more images, but always chooses if `is_last`. Timing takes at most TIMING_S.
        Raises UserError if the only candidate is not accurate.
        """
        if not self.has_choice:
            self.encode_each(pixels)  # sets self.dimension
            return True
        lower = [name for name in self.candidates if name != "fp32"]
        vectors, seconds = {}, {}
        for name in (*lower, "fp32"):  # the lower precision comes first and pays for the warm-up
            start = self._clock()
            vectors[name] = self.encode_each(pixels, name)
            seconds[name] = self._clock() - start
        usable = np.isfinite(vectors["fp32"]).all(axis=1)
        if not usable.any() and not is_last:
            return False
        errors = {name: 1 - (vectors["fp32"] * vectors[name]).sum(axis=1)[usable] for name in lower}
        self.cosines |= {name: float(1 - found.max(initial=0)) for name, found in errors.items()}  # NaN if any error is
        accurate = [name for name in self.candidates if name == "fp32" or self.cosines[name] >= MIN_COSINE]
        if not accurate:
            raise UserError(
                f"{lower[0]} is not accurate enough for this model (cosine {self.cosines[lower[0]]:.4f} to fp32, "
                f"{MIN_COSINE} is required); use --precision fp32 or auto"
            )
        if len(accurate) == 1:
            seconds = {}
        elif seconds["fp32"] < CLEARLY * seconds[lower[0]]:
            seconds = self._time(pixels, seconds)
        fastest = min(accurate, key=lambda name: seconds.get(name, 0))
        if fastest != "fp32" and not is_last and _bound(errors[fastest]) > 1 - MIN_COSINE:
            return False
        self._choose(fastest, seconds)
        return True

    def _choose(self, precision: str, seconds: dict[str, float]) -> None:
        reasons = [
            f"{name} is not accurate enough for this model (cosine {cosine:.4f})"
            for name, cosine in self.cosines.items()
            if not cosine >= MIN_COSINE  # also if it is NaN
        ]
        for name in seconds.keys() - {precision}:
            times = seconds[name] / seconds[precision]
            reasons.append(f"{name} takes {times:.2f} x as long on {processor(self.device)}")
        LOG.info("using %s: %s", precision, "; ".join(reasons) or f"cosine {self.cosines[precision]:.5f} to fp32")
        self.precision, self.has_choice, self.has_chosen = precision, False, len(self.candidates) > 1
        self._modules = {precision: self._modules[precision]}

    def _time(self, pixels: np.ndarray, first_s: dict[str, float]) -> dict[str, float]:
        """Seconds that each precision takes for the same images, best of N_ROUNDS; {} if the model is too slow to time.

        `first_s`: seconds of each precision's first pass.
        """
        n = min(len(pixels), math.floor(TIMING_S / N_ROUNDS / sum(first_s.values()) * len(pixels)))
        found = dict.fromkeys(first_s, math.inf)
        for _ in range(N_ROUNDS if n else 0):
            for name in found:
                start = self._clock()
                self.encode_each(pixels[:n], name)
                found[name] = min(found[name], self._clock() - start)
        return found if n else {}

    def facts(self) -> dict[str, Any]:
        """The model facts to store with a collection, available after the first image.

        "processor" is the processor on which "precision" was chosen, "" if the user or the hardware left no choice.
        """
        return {
            **({"pretrained": self.tag} if self._model.scheme == weights.TIMM else {}),
            "dimension": self.dimension,
            "precision": self.precision,
            "processor": processor(self.device) if self.has_chosen else "",
            "cosines": json.dumps(self.cosines),
            "preprocess": json.dumps(asdict(self.preprocess)),
        }

    # --- the forward pass ---------------------------------------------------------------------------------------------
    def encode_text(self, prompt: str) -> np.ndarray:
        """Encode a prompt to a vector (D,) float32, L2-normalized.

        Raises UserError for an image-only model and for a tokenizer that cannot be loaded.
        """
        if self._model.is_image_only:
            raise UserError(f"{self._model} is image-only: it cannot embed text; use another sampler")
        import open_clip
        import torch

        remedy = 'try pip install "transformers[sentencepiece]", or use another sampler'
        with networks.one_line_errors(f"the tokenizer of {self._model}", remedy):
            tokens = open_clip.get_tokenizer(self._model.scheme + self._model.name)([prompt]).to(self.device)
        with torch.inference_mode():
            vector = self._modules[self.precision].encode_text(tokens).float()
        return torch.nn.functional.normalize(vector, dim=-1)[0].cpu().numpy()

    def _converted(self, module: Any, precision: str) -> Any:
        """Move the module to the device in a precision. Lower precisions are copies without the text tower."""
        import torch

        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        if precision != "fp32":
            tower = getattr(module, "visual", module)
            others = () if tower is module else (child for child in module.children() if child is not tower)
            memo: dict[int, Any] = {id(child): torch.nn.Identity() for child in others}
            memo |= {id(p): torch.nn.Parameter(p.to(dtype), requires_grad=False) for p in tower.parameters()}
            module = copy.deepcopy(module, memo)
        module = module.to(self.device, dtype, memory_format=self._layout)
        if precision == "bf16" and self.device.type == "cpu":
            blocks.fuse(module)
        return module

    def _encode(self, module: Any, pixels: np.ndarray) -> np.ndarray:
        import torch

        try:
            return self._forward(module, pixels)
        except torch.OutOfMemoryError:
            if len(pixels) == 1:
                raise
            LOG.warning("out of GPU memory with %d images at once; lower BATCH_SIZE. Trying half of them", len(pixels))
        torch.cuda.empty_cache()
        half = len(pixels) // 2
        return np.concatenate([self._encode(module, pixels[:half]), self._encode(module, pixels[half:])])

    def _forward(self, module: Any, pixels: np.ndarray) -> np.ndarray:
        import torch

        tower = getattr(module, "visual", module)
        with torch.inference_mode():
            images = self._prepare(pixels).to(next(tower.parameters()).dtype)
            vectors = getattr(module, "encode_image", module)(images)
            vectors = torch.nn.functional.normalize(vectors.float(), dim=-1)
        self.dimension = vectors.shape[1]
        return vectors.cpu().numpy()

    def _prepare(self, pixels: np.ndarray) -> torch.Tensor:
        """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 on the device, normalized, in the model's layout."""
        import torch

        host = torch.from_numpy(pixels)
        on_gpu = self.device.type == "cuda"  # send bytes, which are a quarter of the size of floats
        batch = (host.pin_memory() if on_gpu else host).to(self.device, non_blocking=on_gpu)
        mean, std = self._scale
        # One copy changes type and layout, the rest happens in place. This takes half the time of separate steps.
        return batch.permute(0, 3, 1, 2).to(torch.float32, memory_format=self._layout).sub_(mean).div_(std)


def load(
    model_name: str,
    pretrained: str,
    device: str = "auto",
    precision: str = "auto",
    known: Mapping[str, Any] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Encoder:
    """Load a model with its trained weights. `known`: the model facts stored with its collection.

    Raises UserError for unknown names, missing or damaged weights, an unreachable hub, unknown device or precision.
    """
    # Libraries read both at import. PASSIVE threads leave their core to the download processes while they wait: 0.11
    # instead of 0.15 CPU s per image on a busy machine (ViT-B/32, fp32, two cores). XET ignores the hub's timeouts.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    import torch

    known = known or {}
    if precision not in PRECISIONS:
        raise UserError(f"PRECISION {precision!r} is unknown; use one of {', '.join(PRECISIONS)}")
    target = torch.device(_find_device(device))
    model = weights.find(model_name, pretrained)
    if model.scheme == weights.TIMM and not model.pretrained:  # the same weights that timm chose before
        model = weights.find(model_name, known.get("pretrained", ""))
    LOG.info("loading %s on %s", model, target)
    network = networks.load(model)
    chosen = known.get("precision", "") if known.get("processor") == processor(target) else ""
    cosines = json.loads(known.get("cosines", "{}"))
    usual = (chosen,) if chosen else native_precisions(target)
    accurate = tuple(name for name in usual if cosines.get(name, 1) >= MIN_COSINE)
    candidates = accurate if precision == "auto" else (precision,)
    has_choice = candidates not in ((chosen,), ("fp32",))
    return Encoder(model, network, target, candidates, has_choice, cosines, clock)


def native_precisions(device: torch.device) -> tuple[str, ...]:
    """The precisions that the hardware supports natively, from the usually fastest one to fp32."""
    import torch

    if device.type == "cuda":
        return ("bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"), "fp32"
    if device.type == "cpu" and (any(getattr(torch.cpu, name, bool)() for name in _NATIVE_BF16)):
        return "bf16", "fp32"
    return ("fp32",)


def processor(device: torch.device) -> str:
    """The name of the GPU or CPU, as the system reports it."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _find_device(device: str) -> str:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"DEVICE {device!r} cannot be used: {reason}; use auto, cpu, cuda or cuda:N") from None
    return device


def _bound(errors: np.ndarray) -> float:
    """The bound that nearly all errors stay below, estimated from the errors (n,) seen; infinite for a single error."""
    if len(errors) < 2:
        return math.inf
    logs = np.log(np.maximum(errors, 1e-8))
    return math.exp(logs.mean() + T_CHECKED * logs.std(ddof=1) * math.sqrt(1 + 1 / len(logs)))
