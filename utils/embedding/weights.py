"""The model that the settings name: its local files, its identity, and its weights in the hub's cache."""

from __future__ import annotations

import functools
import hashlib
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from utils.errors import UserError
from utils.files import read_json

HUB, LOCAL, TIMM = "hf-hub:", "local-dir:", "timm:"
HUB_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
CONFIG_NAME = "open_clip_config.json"
# open_clip's order of preference among several checkpoints in a local-dir.
_CHECKPOINT_NAMES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
REMEDY = (
    "use weights on this machine instead: --clip-model-name local-dir:PATH (a folder with open_clip_config.json and "
    "open_clip_model.safetensors), or --clip-pretrained PATH of a checkpoint"
)


@dataclass(frozen=True)
class Model:
    """A model that the settings name. `name` has no scheme; `pretrained` is a tag, the path of a checkpoint, or "".

    `files` has its local files, by the key that their hash has in the identity.
    """

    scheme: str
    name: str
    pretrained: str
    files: dict[str, Path] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.scheme}{self.name} {self.pretrained}".strip()

    @property
    def checkpoint(self) -> Path | None:
        return self.files.get("weights_sha256")

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        """The name, the tag, and the SHA-256 of each local file. Hashing takes a second per 1 to 2 GB."""
        hashes = {key: _sha256(path) for key, path in self.files.items()}
        return {"model_name": self.scheme + self.name, "pretrained": self.pretrained, **hashes}

    @property
    def is_image_only(self) -> bool:
        """Whether the model has no text tower, or an untrained one ("image_only": true in a local-dir's config)."""
        config = self.files.get("config_sha256")
        return self.scheme == TIMM or bool(config and read_json(config, "model config").get("image_only"))


def find(model_name: str, pretrained: str) -> Model:
    """Find the model of CLIP_MODEL_NAME and CLIP_PRETRAINED, without loading it or hashing its files.

    Raises UserError if no model is named, if local files are missing, and if the weights would be random.
    """
    scheme = next((scheme for scheme in (HUB, LOCAL, TIMM) if model_name.startswith(scheme)), "")
    name = model_name[len(scheme) :]
    if not name:
        raise UserError(
            f"CLIP_MODEL_NAME {model_name!r} names no model; use ViT-B-32, hf-hub:ORG/NAME, local-dir:PATH or timm:NAME"
        )
    if scheme == LOCAL:
        name = str(Path(name).expanduser())  # no shell expands local-dir:~/model
        config, checkpoint = _find_local(Path(name))
        return Model(scheme, name, "", {"config_sha256": config, "weights_sha256": checkpoint})
    if scheme == HUB:
        return Model(scheme, name, "")
    files = {"weights_sha256": Path(pretrained)} if Path(pretrained).is_file() else {}
    if scheme == TIMM:
        name, _, tag = name.partition(".")
        return Model(scheme, name, pretrained or tag, files)
    name = name.replace("/", "-")  # open_clip reads ViT-B/32 as ViT-B-32
    if not pretrained:
        raise UserError(f"CLIP_PRETRAINED is empty, which would mean random weights; name a tag of {name}, or {REMEDY}")
    return Model(scheme, name, pretrained if files else pretrained.lower().replace("-", "_"), files)


def _find_local(folder: Path) -> tuple[Path, Path]:
    """(config, checkpoint) of a local-dir model: the files that open_clip would use, found without importing it."""
    config = folder / CONFIG_NAME
    if not config.is_file():
        raise UserError(f"local-dir:{folder} has no {CONFIG_NAME}; {REMEDY}")
    found = sorted(path for path in folder.glob("*") if path.suffix in (".safetensors", ".bin", ".pth"))
    ranks = {name: rank for rank, name in enumerate(_CHECKPOINT_NAMES)}
    if not found:
        kinds = ".safetensors, .bin or .pth; random weights are never used"
        raise UserError(f"local-dir:{folder} has no weights, {kinds}; {REMEDY}")
    return config, min(found, key=lambda path: (ranks.get(path.name, len(ranks)), path.suffix != ".safetensors"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        if hasattr(hashlib, "file_digest"):
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()  # Python 3.10
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def fetch(repo: str, names: Sequence[str]) -> None:
    """Download the first of the files `names` that `repo` has to the hub's cache, unless one is there already.

    For each name, a single request with a time limit comes first, because hf_hub_download retries a silent hub for 13
    minutes. A download that stalls ends after six read timeouts (HF_HUB_DOWNLOAD_TIMEOUT, 10 s each). Raises UserError.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    if any(isinstance(huggingface_hub.try_to_load_from_cache(repo, name), str) for name in names):
        return
    huggingface_hub.utils.logging.set_verbosity_error()
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("they are not in the hub's cache, and HF_HUB_OFFLINE is set")
        for name in names:
            try:
                url = huggingface_hub.hf_hub_url(repo, name)
                huggingface_hub.get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            except errors.EntryNotFoundError:
                continue
            huggingface_hub.hf_hub_download(repo, name)
            return
        raise OSError(f"{constants.ENDPOINT} has none of {', '.join(names)}")
    except Exception as error:  # the client's error types differ between its versions
        reason = _network_fault(error, constants.ENDPOINT) or first_line(error)
        raise UserError(f"weights of {repo} cannot be fetched: {reason}; try again later, or {REMEDY}") from error


def _network_fault(error: BaseException | None, endpoint: str) -> str:
    """Describe the network fault at the root of an error; "" for any other error."""
    while error:
        if isinstance(error, socket.gaierror):
            return f"no network: the hub's name ({endpoint}) does not resolve"
        if isinstance(error, ConnectionRefusedError):
            return f"the hub at {endpoint} refuses connections"
        if isinstance(error, TimeoutError):
            return f"the hub at {endpoint} stopped answering"
        error = error.__cause__ or error.__context__
    return ""


def first_line(error: BaseException) -> str:
    return (next(iter(str(error).splitlines()), "") or type(error).__name__)[:300]
