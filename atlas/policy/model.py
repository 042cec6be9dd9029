"""The tiny Qwen2.5-VL configuration, and a batched forward through its own modules.

transformers runs the vision tower window by window; on a CPU, training batches pictures of one grid instead. The
modules and weights are transformers' own: `tests/training/test_model.py` holds the two ways equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gog_edge.exporting.torchvision_shim import import_torchvision
from gog_edge.policy.manifest import VisionSpec

import_torchvision()  # before transformers, which imports torchvision where it is installed

from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration  # noqa: E402
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index  # noqa: E402

PATCH, MERGE = 14, 2
CELL = PATCH * MERGE
MIN_PIXELS, MAX_PIXELS = 4 * CELL * CELL, 66 * CELL * CELL  # 4:3 pictures become 252 x 196: 63 tokens
CROP_PIXELS = 16 * CELL * CELL  # what a gaze shows again: at most 16 tokens
IMAGE_MEAN, IMAGE_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PROCESSOR = {  # preprocessor_config.json of the checkpoint
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_mean": IMAGE_MEAN,
    "image_std": IMAGE_STD,
    "min_pixels": MIN_PIXELS,
    "max_pixels": MAX_PIXELS,
    "crop_max_pixels": CROP_PIXELS,
    "patch_size": PATCH,
    "merge_size": MERGE,
    "temporal_patch_size": 2,
}


PIXEL_SPEC = VisionSpec(
    depth=4,
    hidden=128,
    heads=4,
    intermediate=384,
    out_hidden=192,
    patch=PATCH,
    merge=MERGE,
    temporal=2,
    window=4 * CELL,
    full_attention=(1, 3),
    rope_theta=10_000.0,
    norm_eps=1e-6,
    mean=IMAGE_MEAN,
    std=IMAGE_STD,
    min_pixels=MIN_PIXELS,
    max_pixels=MAX_PIXELS,
    crop_max_pixels=CROP_PIXELS,
)


def atlas_config(vocab_size: int, special: dict[str, int]) -> Qwen2_5_VLConfig:
    """About 4 million parameters. `special` maps Qwen's special tokens to ids.

    The height and width sections of m-rope sit at higher frequencies than in the 7B ([16, 24, 24] at theta 1e6), since
    nine columns are all there is to tell apart.
    """
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 12]},
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": special["<|im_end|>"],
            "pad_token_id": special["<|endoftext|>"],
        },
        vision_config={
            "depth": PIXEL_SPEC.depth,
            "hidden_size": PIXEL_SPEC.hidden,
            "intermediate_size": PIXEL_SPEC.intermediate,
            "num_heads": PIXEL_SPEC.heads,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "window_size": PIXEL_SPEC.window,
            "fullatt_block_indexes": list(PIXEL_SPEC.full_attention),
            "out_hidden_size": PIXEL_SPEC.out_hidden,
        },
        image_token_id=special["<|image_pad|>"],
        video_token_id=special["<|video_pad|>"],
        vision_start_token_id=special["<|vision_start|>"],
        vision_end_token_id=special["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def build_model(config: Qwen2_5_VLConfig, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """Fresh weights in float32."""
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    return model.float()


def half_precision() -> torch.autocast:
    """bfloat16 where the processor has it; where it would be emulated, float32 is fifteen times faster."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())


def add_look_back_heads(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Let the heads of the first layer's first key-value group look 1, 2 and 3 tokens back from the start.

    Copying needs two things at once, a head that brings the token before and one above it that looks for it; from
    small data neither comes alone. Only query and key biases are set: rotated by the distance, they agree best there.
    """
    attention = model.model.language_model.layers[0].self_attn
    dim, strength, pairs = attention.head_dim, 6.0, 6
    frequencies = model.model.language_model.rotary_emb.inv_freq[:pairs]
    with torch.no_grad():
        attention.k_proj.bias[:dim] = 0
        attention.k_proj.bias[:pairs] = strength
        for head in range(attention.num_key_value_groups):
            bias = attention.q_proj.bias[head * dim : (head + 1) * dim]
            angle = -(head + 1) * frequencies
            bias.zero_()
            bias[:pairs] = strength * angle.cos()
            bias[dim // 2 : dim // 2 + pairs] = strength * angle.sin()


@dataclass(frozen=True, slots=True)
class GridLayout:
    """What the tower needs to know of one grid of patches: all in window order."""

    order: Tensor  # [cells] int64: window order of the merged cells
    restore: Tensor  # [cells] int64: its inverse
    cos: Tensor  # [patches, head_dim] float32
    sin: Tensor  # [patches, head_dim] float32
    window_mask: Tensor  # [patches, patches] bool: True within one window


@cache
def grid_layout(tower: nn.Module, rows: int, columns: int) -> GridLayout:
    """Layout of a grid of `rows` x `columns` patches."""
    grid = torch.tensor([[1, rows, columns]])
    config: Any = tower.config
    positions = get_vision_position_ids(grid, MERGE)
    order, bounds = get_vision_window_index(
        grid, spatial_merge_size=MERGE, window_size=config.window_size, patch_size=PATCH
    )
    cos, sin = tower.rotary_pos_emb(torch.zeros(1), positions)
    patches = rows * columns

    def reorder(x: Tensor) -> Tensor:
        return x.reshape(patches // 4, 4, -1)[order].reshape(patches, -1)

    window = torch.bucketize(torch.arange(patches), bounds[1:], right=True)
    return GridLayout(order, torch.argsort(order), reorder(cos), reorder(sin), window[:, None] == window[None, :])


def patchify(pictures: Tensor) -> Tensor:
    """[B, H, W, 3] uint8 -> [B, patches, 588] float32, normalised, in the merge-block order of Qwen2-VL."""
    batch, height, width, _ = pictures.shape
    x = ((pictures.float() / 255 - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)).permute(0, 3, 1, 2)
    rows, columns = height // CELL, width // CELL
    x = x.reshape(batch, 3, rows, MERGE, PATCH, columns, MERGE, PATCH).permute(0, 2, 5, 3, 6, 1, 4, 7)
    return x.reshape(batch, rows * columns * 4, 3 * PATCH * PATCH)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [..., dim], whose halves are the pairs' parts."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def encode_pictures(tower: Any, pictures: Tensor) -> Tensor:
    """[B, H, W, 3] uint8 -> merged tokens [B, cells, out_hidden] in raster order. H and W are multiples of 28."""
    batch, height, width, _ = pictures.shape
    layout = grid_layout(tower, height // PATCH, width // PATCH)
    x = patchify(pictures)
    patches = x.shape[1]
    x = x.reshape(batch, patches // 4, 4, -1)[:, layout.order].reshape(batch, patches, -1)
    # The two frames of a still picture are equal, so that their kernels may be added.
    weight = tower.patch_embed.proj.weight.sum(2).flatten(1)
    x = F.linear(x, weight)
    heads = tower.config.num_heads
    for index, block in enumerate(tower.blocks):
        qkv = block.attn.qkv(block.norm1(x)).reshape(batch, patches, 3, heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(qkv[0], layout.cos, layout.sin), rotate(qkv[1], layout.cos, layout.sin)
        mask = None if index in tower.fullatt_block_indexes else layout.window_mask
        attended = F.scaled_dot_product_attention(q, k, qkv[2], attn_mask=mask)
        x = x + block.attn.proj(attended.transpose(1, 2).reshape(batch, patches, -1))
        x = x + block.mlp(block.norm2(x))
    return tower.merger(x).reshape(batch, patches // 4, -1)[:, layout.restore]


def picture_tensor(pixels: np.ndarray) -> Tensor:
    """[..., H, W, 3] uint8 array as a tensor without copying."""
    return torch.from_numpy(np.ascontiguousarray(pixels))
