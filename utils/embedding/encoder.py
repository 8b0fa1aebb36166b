"""The CLIP model in memory: images, or a text, into unit vectors."""

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

# Batches in the model at once on a CPU of several cores, each with its share of them. One batch on all of them waits at
# every layer for the slowest, and beside download processes one always is: two streams give 1.2 to 1.4 times as many
# images/s (ViT-B/32, fp32, two cores; the neighbor busy or not).
CPU_STREAMS = 2
# Images that go through a convolutional tower at once on a CPU: the layers of eight stay in its caches, those of more
# come from memory (EfficientNet-Lite0, fp32, one thread: 33 ms an image, 42 in a batch of 32).
CPU_CONVOLVED = 8
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
# What a lower precision must reach on every image of a first batch, against fp32: ViT-B/32 in bf16 stays above 0.9999
# on real photos, while EfficientNet-Lite0 falls to 0.993.
MIN_COSINE = 0.999
_NATIVE_BF16 = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # of torch.cpu; they may go, and fp32 is safe


class Encoder:
    """A loaded model. `dimension` and `preprocess` are the model's, `precision` is what it runs in.

    `streams` threads may encode at once, and do it best so; each calls take_share() first.
    """

    def __init__(self, model: Any, model_name: str, device: torch.device, precision: str, is_settled: bool) -> None:
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
        # Convolutional towers run 1.6 x as fast in channels_last (fp32, CPU); a ViT's one patch layer does not care.
        is_convolutional = sum(isinstance(layer, torch.nn.Conv2d) for layer in model.visual.modules()) > 1
        self._layout = torch.channels_last if is_convolutional else torch.contiguous_format
        self._at_once = CPU_CONVOLVED if is_convolutional and device.type == "cpu" else None
        # Kept until the first batch has shown whether the lower precision stays true to it.
        self._settling = threading.Lock()
        self._reference = None if is_settled or precision == "fp32" else model
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
        """(B, H, W, 3) uint8 -> (B, D) float32, L2-normalized. Out of GPU memory halves the batch, and says so."""
        n = self._at_once or len(pixels)
        parts = [self._encode(self._model, pixels[start : start + n]) for start in range(0, len(pixels), n)]
        return np.concatenate(parts)

    def encode_each(self, pixels: np.ndarray) -> np.ndarray:
        """encode(), in which an image that the model fails on costs itself only: its vector is NaN."""
        try:
            return self.encode(pixels)
        except RuntimeError as error:
            LOG.debug("a forward pass of %d images failed: %s", len(pixels), error)
        if len(pixels) == 1:
            return np.full((1, self.dimension or 1), np.nan, np.float32)
        each = [self.encode_each(one[None]) for one in pixels]
        return np.concatenate([np.broadcast_to(vector, (1, self.dimension or 1)) for vector in each])

    def settle_precision(self, pixels: np.ndarray, may_fall_back: bool) -> None:
        """Hold the lower precision against fp32 on a first batch, once. If it is not true enough, fall back and say so.

        Raises UserError instead where the user asked for that precision.
        """
        with self._settling:
            if self._reference is not None:
                self._compare(self._reference, pixels, may_fall_back)
            self._reference = None

    def _compare(self, reference: Any, pixels: np.ndarray, may_fall_back: bool) -> None:
        exact = self._encode(reference.to(self.device, memory_format=self._layout), pixels)
        worst = float((exact * self.encode(pixels)).sum(axis=1).min())
        if not worst >= MIN_COSINE:  # NaN too
            finding = f"{self.precision} moves vectors of this model to cosine {worst:.4f} of fp32's"
            if not may_fall_back:
                raise UserError(f"{finding}, below {MIN_COSINE}; use --precision fp32 or auto")
            LOG.info("%s, below %s: fp32 is used", finding, MIN_COSINE)
            self._model, self.precision = reference, "fp32"

    def encode_text(self, prompt: str) -> np.ndarray:
        """The prompt's embedding, (D,) float32, L2-normalized. Raises UserError for a model without a text tower."""
        import open_clip
        import torch

        if weights.is_image_only(self._model_name):
            raise UserError(f"{self._model_name} is image-only: its text tower means nothing; use another sampler")
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
            LOG.warning("out of GPU memory with %d images at once; lower BATCH_SIZE. Halving it here", len(pixels))
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
        on_gpu = self.device.type == "cuda"  # bytes travel there, a quarter of what floats are
        batch = (host.pin_memory() if on_gpu else host).to(self.device, non_blocking=on_gpu)
        mean, std = self._scale
        # One copy that changes type and layout, the rest in place: half the time of doing one after another.
        return batch.permute(0, 3, 1, 2).to(torch.float32, memory_format=self._layout).sub_(mean).div_(std)


def load(model_name: str, pretrained: str, device: str = "auto", precision: str = "auto", settled: str = "") -> Encoder:
    """Load a model with its trained weights; `settled` is the precision that its collection has been found to bear.

    Raises UserError for unknown names, missing or damaged weights, a hub out of reach, an unknown device or precision.
    """
    # torch's threads then sleep while they wait for each other, which leaves the core to the download processes: on a
    # busy machine 0.11 instead of 0.15 CPU s an image (ViT-B/32, fp32, two cores). Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
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
    fastest = "fp32" if settled == "fp32" else fastest_precision(target)
    chosen = fastest if precision == "auto" else precision
    return Encoder(model, model_name, torch.device(target), chosen, is_settled=chosen == settled)


def fastest_precision(device: str) -> str:
    """The fastest precision that the hardware has: bf16 where native (3.5 x fp32 on such CPUs), else fp16 on CUDA."""
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
