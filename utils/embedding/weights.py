"""A model's identity and weights: found on this machine or fetched from the hub, and never random ones."""

from __future__ import annotations

import contextlib
import hashlib
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import read_json

_SCHEMES = ("hf-hub:", "local-dir:")
_CONFIG_NAME = "open_clip_config.json"
_HUB_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
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
_REMEDY = (
    "use weights on this machine instead: --clip-model-name local-dir:PATH (a folder with open_clip_config.json and "
    "open_clip_model.safetensors), or --clip-pretrained PATH of a checkpoint"
)


def identify(model_name: str, pretrained: str) -> dict[str, str]:
    """Identify a model without loading it: by name and tag, or local files by their SHA-256.

    Next to hashes, "model_name" and "pretrained" are for people only. Raises UserError for missing local files.
    """
    scheme, name = _split(model_name)
    if scheme == "local-dir:":
        config, checkpoint = _find_local(Path(name))
        return {
            "model_name": model_name,
            "pretrained": "",
            "config_sha256": _sha256(config),
            "weights_sha256": _sha256(checkpoint),
        }
    if scheme == "hf-hub:":
        return {"model_name": model_name, "pretrained": ""}
    name = name.replace("/", "-")  # open_clip reads ViT-B/32 as ViT-B-32
    if Path(pretrained).is_file():
        return {"model_name": name, "pretrained": pretrained, "weights_sha256": _sha256(Path(pretrained))}
    if not pretrained:
        raise UserError(
            f"CLIP_PRETRAINED is empty, which would mean random weights; name a tag of {name}, or {_REMEDY}"
        )
    return {"model_name": name, "pretrained": pretrained.lower().replace("-", "_")}


def is_image_only(model_name: str) -> bool:
    """Whether a local-dir model declares its text tower untrained ("image_only": true in its config)."""
    scheme, name = _split(model_name)
    config = Path(name) / _CONFIG_NAME
    return scheme == "local-dir:" and config.is_file() and bool(read_json(config, "model config").get("image_only"))


def locate(model_name: str, pretrained: str) -> tuple[str, str | None, dict[str, Any]]:
    """Arguments for open_clip: model name, checkpoint (tag or path) and options.

    Files from the hub are in its cache afterwards. Raises UserError for unknown names and tags, missing local files
    and an unreachable hub.
    """
    scheme, name = _split(model_name)
    if scheme == "local-dir:":
        _find_local(Path(name))
        return model_name, None, {}
    if scheme == "hf-hub:":
        _fetch(name, [_CONFIG_NAME])
        _fetch(name, _HUB_NAMES)
        return model_name, None, {}
    import open_clip

    name = name.replace("/", "-")
    if name not in open_clip.list_models():
        raise UserError(
            f"CLIP_MODEL_NAME {name!r} is unknown to open_clip; use one of its names, hf-hub: or local-dir:"
        )
    if Path(pretrained).is_file():
        return name, pretrained, {}
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if not tag:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UserError(f"CLIP_PRETRAINED {pretrained!r} is no tag of {name} (known: {known}) and no file; {_REMEDY}")
    if tag.get("hf_hub"):
        repo, file_name = tag["hf_hub"].rsplit("/", 1)
        _fetch(repo, [str(Path(file_name).with_suffix(".safetensors")), file_name] if file_name else _HUB_NAMES)
    return name, pretrained, _quick_gelu(name, pretrained, tag)


def _quick_gelu(name: str, pretrained: str, tag: dict[str, Any]) -> dict[str, Any]:
    """Run a tag with the activation it was trained with; open_clip only warns of a mismatch."""
    import open_clip

    wants, has = tag.get("quick_gelu", False), (open_clip.get_model_config(name) or {}).get("quick_gelu", False)
    if has and not wants:
        raise UserError(
            f"{pretrained} was trained without QuickGELU, {name} has it; use {name.replace('-quickgelu', '')}"
        )
    return {"force_quick_gelu": True} if wants else {}


@contextlib.contextmanager
def one_line_errors(model_name: str, pretrained: str) -> Iterator[None]:
    """Turn open_clip's errors about damaged or mismatched weights into a UserError."""
    try:
        yield
    except (RuntimeError, ValueError, OSError, KeyError, EOFError, ImportError, TypeError) as error:
        raise _cannot_load(f"{model_name} {pretrained}".strip(), error) from error
    except Exception as error:
        # safetensors and pickle have their own error types, which may not be importable here
        if type(error).__module__.split(".")[0] in ("safetensors_rust", "_pickle", "pickle", "torch"):
            raise _cannot_load(f"{model_name} {pretrained}".strip(), error) from error
        raise


def _cannot_load(what: str, error: Exception) -> UserError:
    return UserError(
        f"model {what} cannot be loaded: {_first_line(error)}; repair or download its weights again, or {_REMEDY}"
    )


def _first_line(error: Exception) -> str:
    return (next(iter(str(error).splitlines()), "") or type(error).__name__)[:300]


def _split(model_name: str) -> tuple[str, str]:
    scheme = next((scheme for scheme in _SCHEMES if model_name.startswith(scheme)), "")
    name = model_name[len(scheme) :]
    if not name:
        raise UserError(
            f"CLIP_MODEL_NAME {model_name!r} names no model; use ViT-B-32, hf-hub:ORG/NAME or local-dir:PATH"
        )
    return scheme, name


def _find_local(folder: Path) -> tuple[Path, Path]:
    """(config, checkpoint) of a local-dir model: the files that open_clip takes, found without importing it."""
    config = folder / _CONFIG_NAME
    if not config.is_file():
        raise UserError(f"local-dir:{folder} has no {_CONFIG_NAME}; {_REMEDY}")
    found = sorted(path for path in folder.glob("*") if path.suffix in (".safetensors", ".bin", ".pth"))
    ranks = {name: rank for rank, name in enumerate(_CHECKPOINT_NAMES)}
    if not found:
        raise UserError(f"local-dir:{folder} has no weights, and random ones are never used; {_REMEDY}")
    return config, min(found, key=lambda path: (ranks.get(path.name, len(ranks)), path.suffix != ".safetensors"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        if hasattr(hashlib, "file_digest"):
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()  # Python 3.10
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def _fetch(repo: str, names: Sequence[str]) -> None:
    """Bring the first of the files `names` that the hub's `repo` has into the hub's cache, or find it there.

    One request with one time limit asks for each name first: left alone, hf_hub_download retries a silent hub for 13
    minutes. A download that stalls ends after six read timeouts (HF_HUB_DOWNLOAD_TIMEOUT, 10 s each).
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
        reason = _network_fault(error, constants.ENDPOINT) or _first_line(error)
        raise UserError(f"weights of {repo} cannot be fetched: {reason}; try again later, or {_REMEDY}") from error


def _network_fault(error: BaseException | None, endpoint: str) -> str:
    """The fault of the network at the root of an error, for people; "" for any other error."""
    while error:
        if isinstance(error, socket.gaierror):
            return f"no network, the hub's name ({endpoint}) does not resolve"
        if isinstance(error, ConnectionRefusedError):
            return f"the hub at {endpoint} refuses connections"
        if isinstance(error, TimeoutError):
            return f"the hub at {endpoint} stopped answering"
        error = error.__cause__ or error.__context__
    return ""
