"""Blocks of image towers, changed in place to take less time and compute the same vectors, up to rounding."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    Function = Callable[..., torch.Tensor]

# Class of an activation -> its name in oneDNN and the factor of its input: QuickGELU(x) is swish(1.702 * x) / 1.702.
_FUSIBLE = {"GELU": ("gelu", 1.0), "GELUTanh": ("gelu", 1.0), "QuickGELU": ("swish", 1.702)}
_FEW_TOKENS = 64  # with fewer, torch's softmax takes twice as long in bf16 as in fp32
_MANY_TOKENS = 300  # with more, torch's attention in one kernel is as fast, and needs no matrix of tokens x tokens


def is_convolutional(tower: Any) -> bool:
    """Whether a tower has more convolutions than a ViT's patch embedding."""
    from torch.nn import Conv2d

    return sum(isinstance(module, Conv2d) for module in tower.modules()) > 1


def skip_unused_tokens(tower: Any) -> None:
    """Let the last block of open_clip's ViT compute the class token only, if the vector comes from that token alone.

    The forward pass of ViT-B/32 takes 0.93 of the time (bf16, CPU).
    """
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

    if type(tower) is not VisionTransformer or tower.pool_type != "tok" or tower.attn_pool is not None:
        return
    last = tower.transformer.resblocks[-1]
    if type(last) is ResidualAttentionBlock:
        last.forward = functools.partial(_class_token, last)


def _class_token(block: Any, tokens: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
    """The output of open_clip's ResidualAttentionBlock for the first token: (B, N, D) -> (B, 1, D)."""
    normed = block.ln_1(tokens)
    first = tokens[:, :1] + block.ls_1(block.attention(normed[:, :1], normed, normed, attn_mask))
    return first + block.ls_2(block.mlp(block.ln_2(first)))


def fuse(tower: Any) -> None:
    """Let oneDNN run the products of a tower in bf16 on a CPU, with packed weights and the activation in the product.

    These are patch embeddings, attention and MLPs of open_clip and timm. torch.compile emits the same operations, but
    needs a C++ compiler. Other attention of timm is computed in steps, not in one kernel, if there are few tokens. The
    forward pass takes 0.8 of the time (ViT-B/32, SigLIP B/16, DINOv2-S/14).
    """
    import torch
    from timm.layers import PatchEmbed

    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return
    modules = list(tower.modules())
    has_patches = not is_convolutional(tower)
    n_patches = next((module.num_patches for module in modules if type(module) is PatchEmbed), None)
    for module in modules:
        if fused := _fused(module, has_patches):
            module.forward = fused
            module._modules.clear()  # frees the weights that are now packed
            module._parameters.clear()
        elif hasattr(module, "fused_attn") and n_patches and n_patches < _MANY_TOKENS:
            module.fused_attn = False


def _fused(module: Any, has_patches: bool) -> Callable[..., Any] | None:
    """The faster forward() of a module, or None."""
    from timm.layers import Attention, Mlp
    from torch.nn import Conv2d, Dropout, Identity, Linear, MultiheadAttention, Sequential

    kind = type(module)
    layers = [layer for layer in module.children() if not isinstance(layer, Dropout | Identity)]
    if kind in (Sequential, Mlp):
        match layers:
            case [Linear() as first, activation, Linear() as second] if type(activation).__name__ in _FUSIBLE:
                return _mlp(first, activation, second)
    elif kind is MultiheadAttention and module._qkv_same_embed_dim and module.batch_first and module.bias_k is None:
        attend = _attention(module.in_proj_weight, module.in_proj_bias, module.out_proj, module.num_heads)
        return lambda query, key, value, **_: (attend(query, key), None)
    elif kind is Attention and layers == [module.qkv, module.proj]:
        attend = _attention(module.qkv.weight, module.qkv.bias, module.proj, module.num_heads)
        return lambda tokens, **_: attend(tokens, tokens)
    elif kind is Conv2d and has_patches and module.kernel_size == module.stride and not any(module.padding):
        return _patches(module)
    return None


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, activation: str = "none", variant: str = "") -> Function:
    import torch

    product = torch.ops.mkldnn._linear_pointwise
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    bias = None if bias is None else bias.detach()
    return lambda tokens: product(tokens, packed, bias, activation, [], variant)


def _mlp(first: Any, activation: Any, second: Any) -> Function:
    """A function that computes Linear, activation, Linear: (..., D) -> (..., D)."""
    kind = type(activation).__name__
    name, factor = _FUSIBLE[kind]
    variant = "tanh" if kind == "GELUTanh" else getattr(activation, "approximate", "none")
    bias = None if first.bias is None else first.bias * factor
    wide, narrow = _linear(first.weight * factor, bias, name, variant), _linear(second.weight / factor, second.bias)
    return lambda tokens: narrow(wide(tokens))


def _attention(weight: torch.Tensor, bias: torch.Tensor | None, out: Any, n_heads: int) -> Function:
    """A function that computes multi-head attention without a mask: queries (B, M, D), keys (B, N, D) -> (B, M, D).

    `weight` (3 D, D) and `bias` (3 D,) make queries, keys and values. The values come from the tokens of the keys.
    """
    import torch

    width = len(weight) // 3
    scale = (width // n_heads) ** -0.5
    biases = (None, None) if bias is None else (bias[:width] * scale, bias[width:])
    to_queries, to_keys = _linear(weight[:width] * scale, biases[0]), _linear(weight[width:], biases[1])
    project = _linear(out.weight, out.bias)

    def attend(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        (q,) = to_queries(queries).unflatten(-1, (1, n_heads, -1)).permute(2, 0, 3, 1, 4)
        k, v = to_keys(keys).unflatten(-1, (2, n_heads, -1)).permute(2, 0, 3, 1, 4)
        if keys.shape[1] > _MANY_TOKENS:
            attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=1)
        else:
            dtype = torch.float32 if keys.shape[1] < _FEW_TOKENS else None
            attended = (q @ k.transpose(-1, -2)).softmax(-1, dtype).to(v.dtype) @ v
        return project(attended.transpose(1, 2).flatten(2))

    return attend


def _patches(convolution: Any) -> Function:
    """A function that computes a patch embedding: (B, C, H, W) -> (B, D, rows, columns)."""
    high, wide = convolution.kernel_size
    project = _linear(convolution.weight.flatten(1), convolution.bias)

    def embed(images: torch.Tensor) -> torch.Tensor:
        n, channels, height, width = images.shape
        rows, columns = height // high, width // wide
        tiles = images[..., : rows * high, : columns * wide].reshape(n, channels, rows, high, columns, wide)
        return project(tiles.permute(0, 2, 4, 1, 3, 5).reshape(n, rows, columns, -1)).permute(0, 3, 1, 2)

    return embed
