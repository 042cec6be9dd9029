"""The parts of open_clip's own transformers as plain arrays, from which `clip.graph` writes graphs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor, nn

from gog_edge.engines.base import Floats
from gog_edge.errors import CheckpointError

Model: TypeAlias = Any  # modules whose attributes have no static types


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer: value @ weight.T + bias."""

    weight: Floats  # [out, in]
    bias: Floats | None  # [out]


@dataclass(frozen=True, slots=True)
class Norm:
    """A layer norm."""

    scale: Floats  # [width]
    bias: Floats  # [width]
    epsilon: float


@dataclass(frozen=True, slots=True)
class Block:
    """A pre-norm block: x + out(attention(inward(first(x)))), then x + down(activation(up(second(x)))).

    Layer scales are multiplied into `out` and `down`.
    """

    first: Norm
    inward: Linear  # [3 * width, width]: queries, keys, values
    out: Linear
    second: Norm
    up: Linear
    activation: str  # "gelu", "gelu_tanh" or "quick_gelu"
    down: Linear


@dataclass(frozen=True, slots=True)
class Transformer:
    """A stack of blocks."""

    blocks: tuple[Block, ...]
    heads: int

    @property
    def width(self) -> int:
        """Return the length of a row."""
        return len(self.blocks[0].out.weight)


@dataclass(frozen=True, slots=True)
class ImageTower:
    """A vision transformer: it pools the class token's row, or the mean of the patches' rows."""

    side: tuple[int, int]  # pixels of a picture: height, width
    patch: tuple[int, int]
    kernel: Linear  # [width, 3 * height * width of a patch]
    token: Floats  # [width], the class token
    positions: Floats  # [1 + patches, width], the class token's first
    before: Norm | None  # applied before the blocks
    body: Transformer
    mean: bool  # whether the mean of the patches is pooled
    after: Norm  # applied to each row, before the mean
    projection: Linear  # [dim, width]


@dataclass(frozen=True, slots=True)
class TextTower:
    """A text transformer, which pools the row of one token."""

    table: Floats  # [vocabulary, width]
    positions: Floats  # [context, width]
    body: Transformer
    causal: bool
    pool: str  # which token's row is pooled: "argmax" of the ids, "eos", "first" or "last"
    eos: int
    after: Norm
    projection: Linear | None  # [dim, width]


def read_image_tower(model: Model) -> ImageTower:
    """Read the image tower of a CLIP or CustomTextCLIP.

    Raises:
        CheckpointError: the tower has parts that `clip.graph` cannot write.
    """
    from open_clip.transformer import VisionTransformer

    visual = model.visual
    if type(visual) is not VisionTransformer:
        raise CheckpointError(f"its image tower is a {_kind(visual)}, not open_clip's own VisionTransformer")
    remainders = [side % patch for side, patch in zip(visual.image_size, visual.patch_size, strict=True)]
    mean = visual.pool_type == "avg"
    if visual.attn_pool is not None or visual.pool_type == "none" or (mean and visual.final_ln_after_pool):
        raise CheckpointError("its image tower pools by attention, or normalizes after pooling")
    if any(remainders):
        raise CheckpointError(f"its patches of {visual.patch_size} pixels do not fill pictures of {visual.image_size}")
    return ImageTower(
        side=visual.image_size,
        patch=visual.patch_size,
        kernel=Linear(_array(visual.conv1.weight.flatten(1)), None),
        token=_array(visual.class_embedding),
        positions=_array(visual.positional_embedding),
        before=None if isinstance(visual.ln_pre, nn.Identity) else _norm(visual.ln_pre),
        body=_transformer(visual.transformer),
        mean=mean,
        after=_norm(visual.ln_post),
        projection=Linear(_array(visual.proj.T), None),
    )


def read_text_tower(model: Model) -> TextTower:
    """Read the text tower of a CLIP or CustomTextCLIP.

    Raises:
        CheckpointError: the tower has parts that `clip.graph` cannot write.
    """
    from open_clip.transformer import TextTransformer

    text: Model = getattr(model, "text", model)  # in a CLIP, the parts of the text tower are its own attributes
    if text is not model and type(text) is not TextTransformer:
        raise CheckpointError(f"its text tower is a {_kind(text)}, not open_clip's own TextTransformer")
    pool = model.text_pool_type if text is model else text.pool_type
    if getattr(text, "cls_emb", None) is not None or getattr(text, "use_pad_mask", False) or pool == "none":
        raise CheckpointError("its text tower has a class token, masks padding or does not pool")
    return TextTower(
        table=_array(text.token_embedding.weight),
        positions=_array(text.positional_embedding),
        body=_transformer(text.transformer),
        causal=text.attn_mask is not None,
        pool=pool,
        eos=model.text_eos_id if text is model else text.eos_id,
        after=_norm(text.ln_final),
        projection=_projection(text.text_projection),
    )


def _kind(module: Model) -> str:
    trunk = getattr(module, "trunk", None)  # open_clip wraps the models of timm
    return type(module).__name__ if trunk is None else f"{type(trunk).__name__} of timm"


def _transformer(module: Model) -> Transformer:
    blocks: Iterable[Model] = module.resblocks
    return Transformer(tuple(_block(block) for block in blocks), module.resblocks[0].attn.num_heads)


def _block(module: Model) -> Block:
    from open_clip.transformer import ResidualAttentionBlock

    if type(module) is not ResidualAttentionBlock:
        raise CheckpointError(f"its blocks are {_kind(module)}, not open_clip's ResidualAttentionBlock")
    attention = module.attn
    return Block(
        first=_norm(module.ln_1),
        inward=Linear(_array(attention.in_proj_weight), _array(attention.in_proj_bias)),
        out=_scaled(attention.out_proj, module.ls_1),
        second=_norm(module.ln_2),
        up=_linear(module.mlp.c_fc),
        activation=_activation(module.mlp.gelu),
        down=_scaled(module.mlp.c_proj, module.ls_2),
    )


def _activation(module: Model) -> str:
    from open_clip.transformer import QuickGELU

    if isinstance(module, QuickGELU):
        return "quick_gelu"
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    raise CheckpointError(f"its activation is {_kind(module)}, not GELU or QuickGELU")


def _scaled(module: Model, scale: Model) -> Linear:
    """Return a linear layer with its learned output scale, if there is one, multiplied in."""
    linear = _linear(module)
    if isinstance(scale, nn.Identity):
        return linear
    gamma = _array(scale.gamma)
    return Linear(linear.weight * gamma[:, None], None if linear.bias is None else linear.bias * gamma)


def _projection(module: Model) -> Linear | None:
    if module is None:
        return None
    return _linear(module) if isinstance(module, nn.Linear) else Linear(_array(module.T), None)


def _linear(module: Model) -> Linear:
    return Linear(_array(module.weight), None if module.bias is None else _array(module.bias))


def _norm(module: Model) -> Norm:
    if not isinstance(module, nn.LayerNorm) or module.bias is None:
        raise CheckpointError(f"its norms are {_kind(module)}, not layer norms with a bias")
    return Norm(_array(module.weight), _array(module.bias), module.eps)


def _array(tensor: Tensor) -> Floats:
    return np.asarray(tensor.detach().float().numpy())
