"""The CLIP model in memory: unit vectors of images, or of a text."""

from __future__ import annotations

import copy
import os
import threading
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.embedding import weights
from utils.errors import UserError
from utils.images.preprocess import Preprocess
from utils.log import LOG

if TYPE_CHECKING:
    import torch

# Batches in the model at once on a CPU with several cores, each with its share of the cores. A batch on all cores waits
# at every layer for the slowest one, and download processes always slow one: two streams give 1.2 to 1.4 times the
# images/s (ViT-B/32, fp32, two cores, other processes busy or not).
CPU_STREAMS = 2
# Images at once in a convolutional tower on a CPU: the activations of eight fit its caches (EfficientNet-Lite0, fp32,
# one thread: 33 ms per image, 42 in a batch of 32).
CPU_CONVOLVED = 8
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
# Cosine to fp32 that a lower precision must reach on every image of a first batch: on real photos bf16 keeps ViT-B/32
# above 0.9999, and EfficientNet-Lite0 falls to 0.993.
MIN_COSINE = 0.999
_NATIVE_BF16 = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # of torch.cpu; without them fp32 is used
_GRAY = 128  # of an image that every working model can encode


class Encoder:
    """A loaded model, its `dimension`, its `preprocess` and the `precision` that it runs in.

    `streams` threads should encode at once; each calls take_share() first.
    """

    def __init__(self, model: Any, model_name: str, device: torch.device, precision: str, is_checked: bool) -> None:
        import torch

        config = model.visual.preprocess_cfg
        size = config["size"]
        self.preprocess = Preprocess(
            size=tuple(size) if isinstance(size, list | tuple) else (size, size),
            resize_mode=config["resize_mode"],
            interpolation=config["interpolation"],
            fill_color=config["fill_color"],
        )
        self.precision, self.device = precision, device
        self._n_cores = torch.get_num_threads() if device.type == "cpu" else 1
        self.streams = min(CPU_STREAMS, self._n_cores)
        self.dimension = 0  # known after the first forward pass
        self._model_name = model_name
        # Convolutional towers run 1.6 x as fast in channels_last (fp32, CPU); a ViT, with one patch layer, does not.
        is_convolutional = sum(isinstance(layer, torch.nn.Conv2d) for layer in model.visual.modules()) > 1
        self._layout = torch.channels_last if is_convolutional else torch.contiguous_format
        self._at_once = CPU_CONVOLVED if is_convolutional and device.type == "cpu" else None
        # The fp32 model, kept until a first batch has shown whether the lower precision is accurate enough.
        self._checking = threading.Lock()
        self._reference = None if is_checked or precision == "fp32" else model
        model = model if self._reference is None else copy.deepcopy(model)
        self._model = model.to(device, _dtypes()[precision], memory_format=self._layout)
        self._scale = [
            torch.tensor(config[key], device=device).view(1, 3, 1, 1) * 255 for key in ("mean", "std")
        ]  # of pixels 0..255: (pixels - mean) / std

    def take_share(self) -> None:
        """Give this thread its share of the cores."""
        import torch

        if self.streams > 1:
            torch.set_num_threads(self._n_cores // self.streams)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """(B, H, W, 3) uint8 -> (B, D) float32, L2-normalized. Halves a batch that the GPU has no memory for."""
        n = self._at_once or len(pixels)
        parts = [self._encode(self._model, pixels[start : start + n]) for start in range(0, len(pixels), n)]
        return np.concatenate(parts)

    def encode_each(self, pixels: np.ndarray) -> np.ndarray:
        """encode(), with NaN as the vector of each image that the model fails on.

        Only images that fail alone, on a device that still encodes a gray image, count as failing. Raises UserError
        for any other failure: no image is at fault when the device is gone, its memory full or the model broken.
        """
        try:
            vectors = self.encode(pixels)
        except RuntimeError as error:
            LOG.debug("a forward pass of %d images failed: %s", len(pixels), error)
            alone = [self._encode_alone(one[None]) for one in pixels]
            dimension = max(len(vector) for vector in alone)
            vectors = np.stack([np.broadcast_to(vector, dimension) for vector in alone])
        if not np.isfinite(vectors).all():
            self._check_health(pixels[:1])
        return vectors

    def _encode_alone(self, pixels: np.ndarray) -> np.ndarray:
        """The vector (D,) of one image, or (1,) NaN."""
        try:
            return self.encode(pixels)[0]
        except RuntimeError:
            return np.full(1, np.nan, np.float32)

    def _check_health(self, like: np.ndarray) -> None:
        """Raises UserError unless a gray image, shaped like the given (1, H, W, 3), is encoded."""
        try:
            if np.isfinite(self.encode(np.full_like(like, _GRAY))).all():
                return
            fault = "its vectors hold no numbers"
        except RuntimeError as error:
            fault = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"the model no longer works on {self.device}: {fault}; check the device and its free memory, then run "
            "again: everything stored so far is safe"
        )

    def check_precision(self, pixels: np.ndarray, may_fall_back: bool) -> None:
        """Compare a lower precision with fp32 on a first batch, once; fall back to fp32 if it is not accurate enough.

        Raises UserError instead of falling back if the user chose that precision.
        """
        with self._checking:
            if self._reference is not None:
                self._compare(self._reference, pixels, may_fall_back)
            self._reference = None

    def _compare(self, reference: Any, pixels: np.ndarray, may_fall_back: bool) -> None:
        exact = self._encode(reference.to(self.device, memory_format=self._layout), pixels)
        worst = float((exact * self.encode(pixels)).sum(axis=1).min())
        if worst >= MIN_COSINE:  # False for NaN
            return
        finding = f"{self.precision} is not accurate enough for this model (cosine {worst:.4f} to fp32"
        if not may_fall_back:
            raise UserError(f"{finding}, {MIN_COSINE} is required); use --precision fp32 or auto")
        LOG.info("using fp32: %s)", finding)
        self._model, self.precision = reference, "fp32"

    def encode_text(self, prompt: str) -> np.ndarray:
        """The embedding (D,) float32 of a prompt, L2-normalized. Raises UserError for an image-only model."""
        import open_clip
        import torch

        if weights.is_image_only(self._model_name):
            raise UserError(f"{self._model_name} is image-only: it cannot embed a text; use another sampler")
        tokens = open_clip.get_tokenizer(self._model_name)([prompt]).to(self.device)
        with torch.inference_mode():
            vector = self._model.encode_text(tokens).float()
        return torch.nn.functional.normalize(vector, dim=-1)[0].cpu().numpy()

    def _encode(self, model: Any, pixels: np.ndarray) -> np.ndarray:
        import torch

        try:
            return self._forward(model, pixels)
        except torch.OutOfMemoryError:
            if len(pixels) == 1:
                raise
            LOG.warning("out of GPU memory with %d images at once; lower BATCH_SIZE. Trying half of them", len(pixels))
        torch.cuda.empty_cache()
        half = len(pixels) // 2
        return np.concatenate([self._encode(model, pixels[:half]), self._encode(model, pixels[half:])])

    def _forward(self, model: Any, pixels: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            images = self._prepare(pixels).to(next(model.parameters()).dtype)
            vectors = torch.nn.functional.normalize(model.encode_image(images).float(), dim=-1)
        self.dimension = vectors.shape[1]
        return vectors.cpu().numpy()

    def _prepare(self, pixels: np.ndarray) -> torch.Tensor:
        """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 on the device, normalized, in the model's layout."""
        import torch

        host = torch.from_numpy(pixels)
        on_gpu = self.device.type == "cuda"  # bytes are sent, a quarter of the size of floats
        batch = (host.pin_memory() if on_gpu else host).to(self.device, non_blocking=on_gpu)
        mean, std = self._scale
        # One copy changes type and layout, the rest is in place: half the time of separate steps.
        return batch.permute(0, 3, 1, 2).to(torch.float32, memory_format=self._layout).sub_(mean).div_(std)


def load(model_name: str, pretrained: str, device: str = "auto", precision: str = "auto", checked: str = "") -> Encoder:
    """Load a model with its trained weights. `checked`: the precision already found accurate, "" for none.

    Raises UserError for unknown names, missing or damaged weights, an unreachable hub, unknown device or precision.
    """
    # Both are read at import. Sleeping threads leave the core to the download processes: 0.11 instead of 0.15 CPU s per
    # image on a busy machine (ViT-B/32, fp32, two cores). Plain HTTP keeps the hub's timeouts, which XET has not.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    import open_clip
    import torch

    if precision not in PRECISIONS:
        raise UserError(f"PRECISION {precision!r} is unknown; use one of {', '.join(PRECISIONS)}")
    target = _find_device(device)
    name, checkpoint, options = weights.locate(model_name, pretrained)
    LOG.info("loading %s on %s", model_name, target)
    with warnings.catch_warnings(), weights.one_line_errors(model_name, pretrained):
        warnings.simplefilter("ignore")
        model, _, _ = open_clip.create_model_and_transforms(
            name, pretrained=checkpoint, require_pretrained=True, weights_only=True, **options
        )
    model.eval().requires_grad_(False)
    fastest = "fp32" if checked == "fp32" else fastest_precision(target)
    chosen = fastest if precision == "auto" else precision
    return Encoder(model, model_name, torch.device(target), chosen, is_checked=chosen == checked)


def fastest_precision(device: str) -> str:
    """The hardware's fastest precision: bf16 where native (3.5 x fp32 on such CPUs), else fp16 on CUDA."""
    import torch

    if device.startswith("cuda"):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device == "cpu" and (any(getattr(torch.cpu, name, bool)() for name in _NATIVE_BF16)):
        return "bf16"
    return "fp32"


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


def _dtypes() -> dict[str, torch.dtype]:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
