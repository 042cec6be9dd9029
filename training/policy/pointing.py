"""Where the decoder looks while it writes a box: the heads of one group are taught to attend to the flag that is meant.

Next-token loss alone has to find the right flag and read its place at once, and finds neither for a long time. Told
where to attend, the heads learn to match the place word with the flag; reading its sides then is a small step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

from training.policy.absolute import TAP
from training.policy.batches import Look

POINTING_LAYER = TAP + 1  # reads what the lower layers were taught to lay down


def pointing_loss(model: Any, entering: Tensor, positions: Tensor, looks: Sequence[tuple[int, Look]]) -> Tensor:
    """Mean negative log of the attention that falls on the meant flag's tokens, 0 where nothing is looked at.

    Args:
        entering: hidden states that enter the layer [B, L, hidden].
        positions: m-rope positions [3, B, L].
        looks: row of the batch, and what is looked at by which of its tokens.
    """
    if not looks:
        return entering.new_zeros(())
    language = model.model.language_model
    layer = language.layers[POINTING_LAYER]
    attention = layer.self_attn
    batch, length, _ = entering.shape
    group, dim = attention.num_key_value_groups, attention.head_dim
    x = layer.input_layernorm(entering)
    q = attention.q_proj(x)[..., : group * dim].view(batch, length, group, dim).transpose(1, 2)
    k = attention.k_proj(x)[..., :dim].view(batch, length, 1, dim).transpose(1, 2)
    q, k = apply_rotary_pos_emb(q, k, *language.rotary_emb(x, positions))
    scores = (q @ k.transpose(-1, -2)).float() * attention.scaling  # [B, group, L, L]
    rows = torch.cat([torch.full((len(look.writers),), row) for row, look in looks])
    writers = torch.cat([torch.tensor(look.writers) for _, look in looks])
    meant = torch.zeros(len(rows), length, dtype=torch.bool)
    at = 0
    for _, look in looks:
        meant[at : at + len(look.writers), list(look.targets)] = True
        at += len(look.writers)
    chosen = scores[rows, :, writers]  # [n, group, L]
    chosen = chosen.masked_fill((torch.arange(length) > writers[:, None])[:, None], -torch.inf)
    on_flag = chosen.masked_fill(~meant[:, None], -torch.inf).logsumexp(-1)
    return (chosen.logsumexp(-1) - on_flag).mean()
