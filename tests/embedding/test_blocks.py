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


HAS_BF16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="needs a CPU on which oneDNN supports bf16")


def modules() -> dict[str, torch.nn.Module]:
    """Parts of towers (fp32) as open_clip and timm build them; tokens have 64 values."""

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
        "timm attention": layers.Attention(64, num_heads=4, qkv_bias=True, attn_drop=0.1),
        "timm attention, no bias": layers.Attention(64, num_heads=2),
    }


def check_fused(module: torch.nn.Module, *inputs: torch.Tensor, **options: Any) -> None:
    """Check that a module (fp32) in bf16 has about the same error before and after fuse()."""
    tower = torch.nn.ModuleDict({"module": module.eval()}).requires_grad_(False)

    def output(dtype: torch.dtype) -> torch.Tensor:
        found = tower["module"](*(values.to(dtype) for values in inputs), **options)
        return found[0] if isinstance(found, tuple) else found

    with torch.inference_mode():
        expected, tower = output(torch.float32), tower.bfloat16()
        error = (output(torch.bfloat16) - expected).abs().mean()
        blocks.fuse(tower)
        fused = output(torch.bfloat16)
    assert not list(tower["module"].children()) + list(tower["module"].parameters())
    assert fused.shape == expected.shape
    assert (fused - expected).abs().mean() < 1.2 * error


@needs_bf16
@pytest.mark.parametrize("name", modules())
@pytest.mark.parametrize("n_tokens", [5, 70, 310])
def test_a_fused_module_is_as_near_to_fp32_as_the_module_in_bf16(name, n_tokens):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        check_fused(modules()[name], torch.randn(3, n_tokens, 64))


@needs_bf16
@pytest.mark.parametrize("n_queries", [1, 40])
def test_a_fused_attention_of_open_clip_has_fewer_queries_than_keys_or_as_many(n_queries):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        attention, tokens = torch.nn.MultiheadAttention(64, 4, batch_first=True), torch.randn(3, 40, 64)
        torch.nn.init.normal_(attention.in_proj_bias)
        check_fused(attention, tokens[:, :n_queries], tokens, tokens, need_weights=False)


@needs_bf16
@pytest.mark.parametrize("kernel", [16, (14, 10)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_fused_patch_embedding_leaves_out_incomplete_patches(kernel, bias):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        check_fused(torch.nn.Conv2d(3, 32, kernel, kernel, bias=bias), torch.randn(2, 3, 50, 49))


@needs_bf16
@pytest.mark.parametrize(
    "layers",
    [
        torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64)),
        torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.LayerNorm(64), torch.nn.Linear(64, 64)),
        timm.layers.Attention(64, num_heads=4, qk_norm=True, norm_layer=torch.nn.LayerNorm),
        torch.nn.MultiheadAttention(64, 4, kdim=32, vdim=32, batch_first=True),
        torch.nn.Conv2d(3, 32, 16, 8),
        torch.nn.Sequential(torch.nn.Conv2d(3, 32, 4, 4), torch.nn.Conv2d(32, 32, 2, 2)),
    ],
    ids=[
        "another activation",
        "a layer more",
        "normalized queries",
        "keys of another width",
        "overlap",
        "convolutional",
    ],
)
def test_other_modules_stay(layers):
    before = len(list(layers.parameters()))
    blocks.fuse(torch.nn.ModuleDict({"layers": layers}))
    assert len(list(layers.parameters())) == before


@needs_bf16
@pytest.mark.parametrize(("size", "is_fused"), [(64, False), (384, True)])
def test_other_attention_of_timm_is_computed_in_steps_where_tokens_are_few(size, is_fused):
    settings = {"embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 0}
    tower = timm.create_model("vit_base_patch16_rope_reg1_gap_256", img_size=size, **settings)
    blocks.fuse(tower)
    assert tower.blocks[0].attn.fused_attn == is_fused
