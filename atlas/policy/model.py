"""The configuration of the atlas policy (Qwen2.5-VL), and a batched forward pass through its vision tower.

transformers runs the vision tower window by window. Training on a CPU batches pictures of one size instead, with the
modules and weights of transformers; tests/atlas/test_model.py checks that both give the same result.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gog_edge.exporting.torchvision_shim import import_torchvision
from gog_edge.policy.vision import VisionSpec

import_torchvision()  # before transformers, which imports torchvision if it is installed

from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration  # noqa: E402
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index  # noqa: E402

PATCH, MERGE = 14, 2
CELL = PATCH * MERGE
MIN_PIXELS, MAX_PIXELS = 4 * CELL * CELL, 66 * CELL * CELL  # 4:3 pictures are resized to 252 x 196: 63 tokens
CROP_PIXELS = 16 * CELL * CELL  # the crop of a gaze has at most 16 tokens
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
    """Return the configuration of a model of about 4 million parameters.

    The height and width sections of m-rope use higher frequencies than in the 7B ([16, 24, 24] at theta 1e6), because
    only nine columns must be distinguished.

    Args:
        vocab_size: of the tokenizer.
        special: ids of Qwen's special tokens.
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
    """Build the model with random float32 weights."""
    torch.manual_seed(seed)
    model: Any = Qwen2_5_VLForConditionalGeneration
    built: Qwen2_5_VLForConditionalGeneration = model._from_config(config, attn_implementation="sdpa").float()
    return built


def half_precision() -> torch.autocast:
    """Return an autocast to bfloat16 if the processor has AVX-512 BF16; emulation is fifteen times slower than float32.

    Use it as a context manager.
    """
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())


def init_previous_token_heads(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Initialise the heads of the first key-value group of layer 0 to attend to the tokens 1, 2 and 3 back.

    Copying needs an induction circuit: a previous-token head, and a head above it that searches for its output. Little
    data trains neither. Only query and key biases are set: after the rotary embedding their dot product is largest at
    that distance.
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
    """Constants of the vision tower for one grid of patches, in window order."""

    order: Tensor  # [cells] int64, window order of the merged cells
    restore: Tensor  # [cells] int64, the inverse permutation
    cos: Tensor  # [patches, head_dim] float32
    sin: Tensor  # [patches, head_dim] float32
    window_mask: Tensor  # [patches, patches] bool, True within a window


@cache
def grid_layout(tower: Any, rows: int, columns: int) -> GridLayout:
    """Return the constants for a grid of `rows` x `columns` patches."""
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
    """Normalise and split pictures: [B, H, W, 3] uint8 -> [B, patches, 588] float32 in Qwen2-VL's merge-block order."""
    batch, height, width, _ = pictures.shape
    x = ((pictures.float() / 255 - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)).permute(0, 3, 1, 2)
    rows, columns = height // CELL, width // CELL
    x = x.reshape(batch, 3, rows, MERGE, PATCH, columns, MERGE, PATCH).permute(0, 2, 5, 3, 6, 1, 4, 7)
    return x.reshape(batch, rows * columns * 4, 3 * PATCH * PATCH)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding to [..., dim]; pairs are (i, i + dim / 2)."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def encode_pictures(tower: Any, pictures: Tensor) -> Tensor:
    """Run the vision tower: [B, H, W, 3] uint8 -> merged tokens [B, cells, out_hidden] in raster order.

    H and W must be multiples of 28.
    """
    batch, height, width, _ = pictures.shape
    layout = grid_layout(tower, height // PATCH, width // PATCH)
    x = patchify(pictures)
    patches = x.shape[1]
    x = x.reshape(batch, patches // 4, 4, -1)[:, layout.order].reshape(batch, patches, -1)
    # The two frames of a still picture are equal, so the kernels of both can be added.
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
    merged: Tensor = tower.merger(x).reshape(batch, patches // 4, -1)[:, layout.restore]
    return merged


def picture_tensor(pixels: np.ndarray) -> Tensor:
    """Convert a [..., H, W, 3] uint8 array to a tensor, without a copy if it is contiguous."""
    return torch.from_numpy(np.ascontiguousarray(pixels))
