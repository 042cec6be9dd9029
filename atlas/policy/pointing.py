"""Where the decoder looks while it writes: some of its heads are taught to attend to what the next token is read from.

Next-token loss alone has to find the right flag, or the right name, and read it at once, and finds neither for a long
time. Told where to attend, the heads learn to match; told to name what they attend to, they bring back rare tokens as
surely as frequent ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from atlas.policy.absolute import TAP
from atlas.policy.batches import Attended
from atlas.policy.model import rotate

# (layer, group of heads that share keys and values). Boxes are read from what the lower layers were taught to lay down.
# A group carries only head_dim numbers of a token, too few to tell thousands of tokens apart: several copy together.
BOX_HEADS = ((TAP + 1, 0),)
COPY_HEADS = ((TAP + 1, 1), (TAP + 2, 1), (TAP + 3, 1))


def attention_loss(
    model: Any, heads: tuple[int, int], entering: Tensor, positions: Tensor, attended: Attended
) -> Tensor:
    """Mean negative log of the attention that falls on the meant tokens; 0 where nothing is meant.

    Args:
        heads: layer and group of heads.
        entering: hidden states that enter the layer [B, L, hidden].
        positions: m-rope positions [3, B, L].
        attended: what is meant by which tokens.
    """
    if not attended.valid.any():
        return entering.new_zeros(())
    number, group = heads
    language = model.model.language_model
    layer = language.layers[number]
    attention = layer.self_attn
    dim, size = attention.head_dim, attention.num_key_value_groups * attention.head_dim
    x = layer.input_layernorm(entering)
    cos, sin = language.rotary_emb(x, positions)
    own, shared = slice(group * size, (group + 1) * size), slice(group * dim, (group + 1) * dim)
    k = rotate(F.linear(x, attention.k_proj.weight[shared], attention.k_proj.bias[shared]), cos, sin)
    row = torch.arange(len(x))[:, None]
    q = F.linear(x[row, attended.writers], attention.q_proj.weight[own], attention.q_proj.bias[own])
    q = rotate(
        q.unflatten(-1, (-1, dim)), cos[row, attended.writers, None], sin[row, attended.writers, None]
    )  # [B, W, heads of the group, dim]
    scores = torch.einsum("bwhd,bld->bwhl", q, k).float() * attention.scaling
    later = torch.arange(x.shape[1]) > attended.writers[..., None]  # [B, W, L]
    scores = scores.masked_fill(later[:, :, None], -torch.inf)[attended.valid]  # [n, heads, L]
    meant = scores.masked_fill(~attended.targets[attended.valid][:, None], -torch.inf)
    return (scores.logsumexp(-1) - meant.logsumexp(-1)).mean()


def naming_loss(model: Any, after: Sequence[Tensor], ids: Tensor, said: Tensor) -> tuple[Tensor, float]:
    """What COPY_HEADS would bring from a token must name it by itself: cross-entropy, and the share named right.

    One place of each different token, so that the frequent ones do not drown the rest.

    Args:
        after: hidden states after each layer, each [B, L, hidden].
        ids: tokens [B, L].
        said: bool [B, L], True at text (not pictures, not padding).
    """
    places = said.flatten().nonzero()[:, 0]
    places = places[torch.randperm(len(places))]
    names, first = np.unique(ids.flatten()[places].numpy(), return_index=True)
    places = places[torch.from_numpy(first)]
    language = model.model.language_model
    brought = torch.zeros(())
    for number, group in COPY_HEADS:
        layer = language.layers[number]
        attention = layer.self_attn
        dim, heads = attention.head_dim, attention.num_key_value_groups
        x = layer.input_layernorm(after[number - 1].flatten(0, 1)[places])
        shared, own = slice(group * dim, (group + 1) * dim), slice(group * heads * dim, (group + 1) * heads * dim)
        v = F.linear(x, attention.v_proj.weight[shared], attention.v_proj.bias[shared])
        brought = brought + F.linear(v, attention.o_proj.weight[:, own].unflatten(1, (heads, dim)).sum(1))
    logits, truth = model.lm_head(language.norm(brought)).float(), torch.from_numpy(names)
    return F.cross_entropy(logits, truth), (logits.argmax(-1) == truth).float().mean().item()
