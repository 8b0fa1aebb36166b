"""Load the network of a model with its trained weights, by open_clip or timm, and read its image settings."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from utils.embedding import blocks, weights
from utils.embedding.weights import HUB, LOCAL, REMEDY, TIMM, Model
from utils.errors import UserError
from utils.images.preprocess import Preprocess

_TIMM_NAMES = ("model.safetensors", "pytorch_model.bin")
_REMEDY = f"repair or download its weights again, or {REMEDY}"
# In place of torch's own advice, which is to run the code in a pickled model or TorchScript.
_NOT_TENSORS = "its weights are not tensors alone, as torch.save(model.state_dict(), PATH) and safetensors write them"


class Network(NamedTuple):
    """A frozen torch module in fp32 on the CPU. `mean` and `std` normalize pixels from 0 to 1.

    `tag` is CLIP_PRETRAINED or, if this is "", the tag that timm chose.
    """

    module: Any
    preprocess: Preprocess
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tag: str


def load(model: Model) -> Network:
    """Load a network. Raises UserError for unknown names and tags, missing or damaged weights, an unreachable hub."""
    with warnings.catch_warnings(), _without_random_weights():
        warnings.simplefilter("ignore")
        network = _load_timm(model) if model.scheme == TIMM else _load_open_clip(model)
    network.module.eval().requires_grad_(False)
    return network


def _without_random_weights() -> contextlib.AbstractContextManager[Any]:
    """Skip the initialization of weights that loading replaces anyway. This halves the time to load ViT-B/32.

    Source: the documentation of torch.overrides.TorchFunctionMode.
    """
    from torch.overrides import TorchFunctionMode

    class WithoutInit(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if getattr(function, "__module__", "") == "torch.nn.init":
                return kwargs["tensor"] if "tensor" in kwargs else args[0]
            return function(*args, **kwargs)

    return WithoutInit()


# --- open_clip --------------------------------------------------------------------------------------------------------
def _load_open_clip(model: Model) -> Network:
    import open_clip

    name, checkpoint, options = _locate(model)
    with one_line_errors(f"model {model}", _REMEDY):
        module, _, _ = open_clip.create_model_and_transforms(
            name, pretrained=checkpoint, require_pretrained=True, weights_only=True, **options
        )
    blocks.skip_unused_tokens(module.visual)
    config = module.visual.preprocess_cfg
    size = config["size"]
    preprocess = Preprocess(
        size=tuple(size) if isinstance(size, list | tuple) else (size, size),
        resize_mode=config["resize_mode"],
        interpolation=config["interpolation"],
        fill_color=config["fill_color"],
    )
    return Network(module, preprocess, config["mean"], config["std"], model.pretrained)


def _locate(model: Model) -> tuple[str, str | None, dict[str, Any]]:
    """Arguments for open_clip: model name, checkpoint (tag or path), options. Downloads a hub's files to its cache."""
    if model.scheme == LOCAL:
        return model.scheme + model.name, None, {}
    if model.scheme == HUB:
        weights.fetch(model.name, [weights.CONFIG_NAME])
        weights.fetch(model.name, weights.HUB_NAMES)
        return model.scheme + model.name, None, {}
    import open_clip

    name, pretrained = model.name, model.pretrained
    if name not in open_clip.list_models():
        raise UserError(
            f"CLIP_MODEL_NAME {name!r} is unknown to open_clip; use one of its names, hf-hub:, local-dir: or timm:"
        )
    if model.checkpoint:
        return name, pretrained, {}
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if not tag:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UserError(f"CLIP_PRETRAINED {pretrained!r} is not a tag of {name} (known: {known}) or a file; {REMEDY}")
    if tag.get("hf_hub"):
        repo, file_name = tag["hf_hub"].rsplit("/", 1)
        names = [str(Path(file_name).with_suffix(".safetensors")), file_name] if file_name else weights.HUB_NAMES
        weights.fetch(repo, names)
    return name, pretrained, _quick_gelu(name, pretrained, tag)


def _quick_gelu(name: str, pretrained: str, tag: dict[str, Any]) -> dict[str, Any]:
    """Options that make a tag run with the activation it was trained with; open_clip only warns of a mismatch."""
    import open_clip

    wants, has = tag.get("quick_gelu", False), (open_clip.get_model_config(name) or {}).get("quick_gelu", False)
    if has and not wants:
        raise UserError(
            f"{pretrained} was trained without QuickGELU, but {name} has it; use {name.replace('-quickgelu', '')}"
        )
    return {"force_quick_gelu": True} if wants else {}


# --- timm -------------------------------------------------------------------------------------------------------------
def _load_timm(model: Model) -> Network:
    """Load the network with its classifier, so that timm itself rejects weights that do not fit; then remove it."""
    import timm

    config = _timm_config(model)
    overlay: dict[str, Any] = {}
    with one_line_errors(f"model {model}", _REMEDY):
        if model.checkpoint:
            state = timm.models.load_state_dict(str(model.checkpoint), weights_only=True)
            classifier = state.get(f"{config.classifier}.weight")
            overlay = {"state_dict": state, "num_classes": 0 if classifier is None else len(classifier)}
        elif config.hf_hub_id:
            names = [config.hf_hub_filename] if config.hf_hub_filename else _TIMM_NAMES
            weights.fetch(config.hf_hub_id, names)
        n_classes = overlay.get("num_classes", config.num_classes)
        name = model.name if model.checkpoint else f"{model.name}.{config.tag}"
        module: Any = timm.create_model(name, pretrained=True, num_classes=n_classes, pretrained_cfg_overlay=overlay)
        module.reset_classifier(0)
    module.pretrained_cfg.pop("state_dict", None)  # else it stays in memory
    preprocess, mean, std = _timm_preprocess(model, module)
    return Network(module, preprocess, mean, std, model.pretrained or config.tag)


def _timm_config(model: Model) -> Any:
    """timm's settings for the model and its tag. Raises UserError if timm has no such model, tag or weights."""
    import timm

    if not timm.is_model(model.name):
        raise UserError(f"CLIP_MODEL_NAME timm:{model.name} is unknown to timm; see timm.list_models()")
    tag = "" if model.checkpoint else model.pretrained
    known = [name.partition(".")[2] for name in timm.list_pretrained(f"{model.name}.*")]
    if tag and tag not in known:
        raise UserError(
            f"CLIP_PRETRAINED {tag!r} is not a tag of timm:{model.name} (known: {', '.join(known) or 'none'}) or a "
            'file; add --clip-pretrained "" for timm\'s own weights, or the PATH of a checkpoint'
        )
    config: Any = timm.get_pretrained_cfg(f"{model.name}.{tag}" if tag else model.name)
    if not (model.checkpoint or config.hf_hub_id):
        raise UserError(
            f"timm:{model.name} has no weights on the hub, and random weights are never used; add --clip-pretrained "
            f"TAG (known: {', '.join(known) or 'none'}) or PATH of a checkpoint"
        )
    return config


def _timm_preprocess(model: Model, module: Any) -> tuple[Preprocess, tuple[float, ...], tuple[float, ...]]:
    """timm's own evaluation transform as (Preprocess, mean, std). Raises UserError if Preprocess cannot express it."""
    import timm.data

    config = timm.data.resolve_model_data_config(module)
    steps = timm.data.create_transform(**config, is_training=False).transforms
    names, resize, crop = [type(step).__name__ for step in steps], steps[0], steps[1]
    interpolation = getattr(getattr(resize, "interpolation", None), "value", "")
    is_known = names == ["Resize", "CenterCrop", "MaybeToTensor", "Normalize"] and config["input_size"][0] == 3
    if not is_known or interpolation not in ("bicubic", "bilinear"):
        raise UserError(
            f"timm:{model.name} needs a preprocessing of images that is not supported ({', '.join(names)}; "
            f"{config['interpolation']}); use another model"
        )
    is_square = isinstance(resize.size, int)
    preprocess = Preprocess(
        size=tuple(crop.size),
        resize_mode="shortest" if is_square else "squash",
        interpolation=interpolation,
        fill_color=0,
        resize=(resize.size, resize.size) if is_square else tuple(resize.size),
    )
    return preprocess, config["mean"], config["std"]


@contextlib.contextmanager
def one_line_errors(what: str, remedy: str) -> Iterator[None]:
    """Turn any error of the libraries that load `what` into a UserError; the log file has its traceback."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())  # the second line names the keys that a checkpoint lacks
        fault = _NOT_TENSORS if "weights_only" in text else text[:300] or type(error).__name__
        raise UserError(f"{what} cannot be loaded: {fault}; {remedy}") from error
