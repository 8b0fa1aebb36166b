"""utils/embedding/blocks.py: the faster blocks compute what those of open_clip and timm do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip.transformer
import pytest
import timm.layers
import torch

from tests.support import offline_model
from utils.embedding import blocks, networks, weights
from utils.files import write_json

TOWERS: dict[str, dict[str, Any]] = {
    "class token": {},
    "class token after layer scale": {"ls_init_value": 0.5},
    "class token, normalized after pooling": {"final_ln_after_pool": True},
    "mean of the tokens": {"pool_type": "avg"},
    "attentional pooling": {"attentional_pool": True, "attn_pooler_heads": 2},
    "class token, other blocks": {"qk_norm": True},
}


def save_tower(folder: Path, changes: dict[str, Any]) -> Any:
    """Save a small seeded ViT with changed settings to a folder, and return open_clip's own network."""
    model_cfg = offline_model.SMALL_VIT["model_cfg"]
    model_cfg = {**model_cfg, "vision_cfg": {**model_cfg["vision_cfg"], **changes}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = open_clip.CLIP(**model_cfg).eval()
    offline_model.save_weights(clip.state_dict(), folder / offline_model.WEIGHTS_NAME)
    write_json(folder / offline_model.CONFIG_NAME, {**offline_model.SMALL_VIT, "model_cfg": model_cfg})
    return clip


@pytest.mark.parametrize("changes", TOWERS.values(), ids=list(TOWERS))
def test_vectors_are_those_of_open_clip_however_the_tower_pools(tmp_path, changes):
    theirs = save_tower(tmp_path, changes)
    ours = networks.load(weights.find(f"local-dir:{tmp_path}", "")).module
    images = torch.rand(3, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.allclose(ours.encode_image(images), theirs.encode_image(images), atol=1e-5)


def test_the_last_block_computes_the_class_token_only(tmp_path):
    save_tower(tmp_path, {})
    tower = networks.load(weights.find(f"local-dir:{tmp_path}", "")).module.visual
    with torch.inference_mode():
        assert tower.transformer(torch.rand(3, 17, 64)).shape == (3, 1, 64)


def mlps() -> dict[str, torch.nn.Module]:
    """MLPs (fp32) as open_clip and timm build them, 64 -> 128 -> 64."""

    def sequence(activation: torch.nn.Module, bias: bool = True) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(64, 128, bias), activation, torch.nn.Linear(128, 64, bias))

    layers = timm.layers
    return {
        "GELU": sequence(torch.nn.GELU()),
        "GELU, no bias": sequence(torch.nn.GELU(), bias=False),
        "GELU by tanh": sequence(torch.nn.GELU(approximate="tanh")),
        "QuickGELU": sequence(open_clip.transformer.QuickGELU()),
        "timm GELU": layers.Mlp(64, 128, act_layer=layers.get_act_layer("gelu"), drop=0.1),
        "timm GELU by tanh": layers.Mlp(64, 128, act_layer=layers.get_act_layer("gelu_tanh")),
        "timm QuickGELU": layers.Mlp(64, 128, act_layer=layers.get_act_layer("quick_gelu")),
    }


HAS_BF16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="needs a CPU on which oneDNN supports bf16")


@needs_bf16
@pytest.mark.parametrize("name", mlps())
def test_a_fused_mlp_is_as_near_to_fp32_as_the_mlp_in_bf16(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mlp, tokens = mlps()[name].eval(), torch.randn(3, 5, 64)
    tower = torch.nn.ModuleDict({"mlp": mlp}).requires_grad_(False)
    expected, tower = mlp(tokens), tower.bfloat16()
    before = tower["mlp"](tokens.bfloat16())
    blocks.fuse_mlps(tower)
    assert not list(tower["mlp"].children())
    error = (tower["mlp"](tokens.bfloat16()) - expected).abs().mean()
    assert error < 1.2 * (before - expected).abs().mean()


@needs_bf16
@pytest.mark.parametrize("layers", [[torch.nn.ReLU()], [torch.nn.GELU(), torch.nn.LayerNorm(64)]])
def test_other_layers_stay(layers):
    tower = torch.nn.ModuleDict({"mlp": torch.nn.Sequential(torch.nn.Linear(64, 64), *layers, torch.nn.Linear(64, 64))})
    blocks.fuse_mlps(tower)
    assert len(tower["mlp"]) == len(layers) + 2
