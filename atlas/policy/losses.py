"""Losses of the policy's training: next-token loss, and auxiliary losses that teach where flags are and what to copy.

The heads of the auxiliary losses (`DenseHead`, `DecoderBoxHead`) are discarded after training. atlas/README.md says why
each loss was needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from atlas.policy.batches import IGNORE, LENGTH_STEP, AttentionTargets
from atlas.policy.model import CELL, rotate
from atlas.policy.pool import Shard
from atlas.policy.teacher import BOX_GRID
from atlas.scenes import MAX_FLAGS, RELATIONS

OFFSET_UNIT = 2.0 * CELL  # pixels
BINS = 41  # coordinates 0..280 pixels in steps of BOX_GRID
TAP_LAYER = 2  # the decoder layer whose output the DecoderBoxHead reads
# (layer, key-value group) of the attention heads with supervised attention. Boxes are read from what TAP_LAYER was
# taught to encode. The value vector of one group has only head_dim numbers, too few to distinguish thousands of
# tokens, so that several groups copy together.
BOX_HEADS = ((TAP_LAYER + 1, 0),)
COPY_HEADS = ((TAP_LAYER + 1, 1), (TAP_LAYER + 2, 1), (TAP_LAYER + 3, 1))


def token_loss(model: Any, states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the next-token loss over labelled positions, and predictions and labels there, each [n].

    Args:
        model: with an `lm_head`.
        states: final hidden states [B, L, hidden].
        labels: [B, L]; IGNORE at positions without loss.
    """
    target = labels[:, 1:].flatten()
    places = (target != IGNORE).nonzero()[:, 0]
    spare = -len(places) % (8 * LENGTH_STEP)  # limits the number of different shapes, see `collate`
    padded = F.pad(places, (0, spare))
    logits = model.lm_head(states[:, :-1].flatten(0, 1)[padded])[: len(places)].float()
    truth = target[places]
    return F.cross_entropy(logits, truth), logits.argmax(-1), truth


# --- the vision tower ---------------------------------------------------------------------------


class DenseHead(nn.Module):
    """Predicts from each picture token: in a flag (1), sides (4), relations (14), number of flags (6)."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, 1 + 4 + len(RELATIONS) + MAX_FLAGS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Map [.., hidden] to logits of "in a flag", sides in OFFSET_UNIT, logits of relations and of the count."""
        y = self.out(self.norm(x.float()))
        return y[..., 0], y[..., 1:5], y[..., 5 : 5 + len(RELATIONS)], y[..., 5 + len(RELATIONS) :]


def token_targets(shard: Shard) -> tuple[Tensor, Tensor, Tensor]:
    """Assign picture tokens to flags by their centres.

    Returns:
        The index of each token's flag [B, T], -1 outside of flags; the box of that flag [B, T, 4] in pixels; the
        centres of the tokens [T, 2] in pixels.
    """
    height, width = shard.pictures.shape[1:3]
    ys, xs = torch.meshgrid(
        torch.arange(height // CELL) * CELL + CELL / 2, torch.arange(width // CELL) * CELL + CELL / 2, indexing="ij"
    )
    centres = torch.stack([xs, ys], -1).reshape(-1, 2)
    boxes = torch.from_numpy(shard.boxes)
    cx, cy = centres[:, 0], centres[:, 1]
    b = boxes[:, :, None, :]
    inside = (b[..., 0] <= cx) & (cx < b[..., 2]) & (b[..., 1] <= cy) & (cy < b[..., 3])  # [B, 6, T]
    owner = torch.where(inside.any(1), inside.float().argmax(1), torch.tensor(-1))
    chosen = torch.gather(boxes, 1, owner.clamp(min=0)[..., None].expand(-1, -1, 4))
    return owner, chosen, centres


def relation_loss(logits: Tensor, shard: Shard, owner: Tensor) -> tuple[Tensor, float]:
    """Return the loss of relation logits [B, T, 14] over tokens in flags (`owner` >= 0), and the accuracy."""
    meant = torch.from_numpy(shard.relations)  # [B, R]
    target = (meant[:, None, :] == owner[..., None]).float()
    weight = (meant[:, None, :] >= 0).float() * (owner >= 0).float()[..., None]
    total = weight.sum().clamp(min=1)
    loss = (F.binary_cross_entropy_with_logits(logits, target, reduction="none") * weight).sum() / total
    correct = (((logits > 0) == (target > 0.5)).float() * weight).sum() / total
    return loss, correct.item()


def dense_loss(head: DenseHead, tokens: Tensor, shard: Shard) -> tuple[Tensor, dict[str, float]]:
    """Return the dense loss of the vision tower.

    Sides are predicted relative to the token's centre, because the rotary attention of the tower knows only relative
    positions.

    Args:
        head: predicts from each token.
        tokens: merged picture tokens [B, T, hidden].
        shard: the pictures with their ground truth.

    Returns:
        The loss, and figures: mean error of a side in pixels, accuracy of relations and of the count.
    """
    inside, sides, words, count = head(tokens)
    owner, box, centres = token_targets(shard)
    mask = owner >= 0
    target = (box - torch.cat([centres, centres], -1)) / OFFSET_UNIT
    weights = mask.float()
    total = weights.sum().clamp(min=1)
    side_loss = (F.smooth_l1_loss(sides, target, reduction="none", beta=0.1).sum(-1) * weights).sum() / total
    word_loss, accuracy = relation_loss(words, shard, owner)
    counts = torch.from_numpy(shard.counts) - 1
    count_loss = F.cross_entropy(count.flatten(0, 1), counts[:, None].expand(-1, count.shape[1]).flatten())
    inside_loss = F.binary_cross_entropy_with_logits(inside, weights)
    loss = inside_loss + 2 * side_loss + 2 * word_loss + 0.3 * count_loss
    with torch.no_grad():
        error = ((sides - target).abs().mean(-1) * weights).sum() / total * OFFSET_UNIT
        count_accuracy = (count.mean(1).argmax(-1) == counts).float().mean()
    figures = {"side_px": error.item(), "words": accuracy, "count": count_accuracy.item(), "loss": loss.item()}
    return loss, figures


# --- the decoder --------------------------------------------------------------------------------


class DecoderBoxHead(nn.Module):
    """Predicts absolute coordinates and relations from the decoder's hidden states at picture tokens.

    Only the decoder can know absolute positions, since its picture tokens attend to the start of the picture. The
    layers above TAP_LAYER then only need to look the coordinates up.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, 4 * BINS)
        self.words = nn.Linear(hidden, len(RELATIONS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map [.., hidden] to logits of the four sides [.., 4, BINS] and of the relations [.., 14]."""
        y = self.norm(x.float())
        return self.out(y).unflatten(-1, (4, BINS)), self.words(y)


def decoder_box_loss(head: DecoderBoxHead, states: Tensor, shard: Shard) -> tuple[Tensor, dict[str, float]]:
    """Return the loss over picture tokens [B, T, hidden], mean error of a side in pixels and accuracy of relations."""
    owner, box, _ = token_targets(shard)
    height, width = shard.pictures.shape[1:3]
    limit = torch.tensor([width, height, width, height])
    target = (torch.minimum(box.clamp(min=0), limit) / BOX_GRID).round().long()
    mask = owner >= 0
    sides, words = head(states)
    logits, truth = sides[mask], target[mask]
    loss = F.cross_entropy(logits.flatten(0, 1), truth.flatten())
    error = (logits.detach().argmax(-1) - truth).abs().float().mean().item() * BOX_GRID
    word_loss, accuracy = relation_loss(words, shard, owner)
    return loss + 2 * word_loss, {"px": error, "words": accuracy}


def attention_loss(
    model: Any, heads: tuple[int, int], entering: Tensor, positions: Tensor, targets: AttentionTargets
) -> Tensor:
    """Return the mean negative log of the attention on the target keys; 0 without targets.

    Args:
        model: Qwen2.5-VL of transformers.
        heads: layer and key-value group of the supervised heads.
        entering: hidden states that enter the layer [B, L, hidden].
        positions: m-rope positions [3, B, L].
        targets: which keys each query should attend to.
    """
    if not targets.valid.any():
        return entering.new_zeros(())
    number, group = heads
    language = model.model.language_model
    layer = language.layers[number]
    attention = layer.self_attn
    dim, size = attention.head_dim, attention.num_key_value_groups * attention.head_dim
    x = layer.input_layernorm(entering)
    cos, sin = language.rotary_emb(x, positions)
    q_part, k_part = slice(group * size, (group + 1) * size), slice(group * dim, (group + 1) * dim)
    k = rotate(F.linear(x, attention.k_proj.weight[k_part], attention.k_proj.bias[k_part]), cos, sin)
    row = torch.arange(len(x))[:, None]
    q = F.linear(x[row, targets.queries], attention.q_proj.weight[q_part], attention.q_proj.bias[q_part])
    q = rotate(
        q.unflatten(-1, (-1, dim)), cos[row, targets.queries, None], sin[row, targets.queries, None]
    )  # [B, W, heads of the group, dim]
    scores = torch.einsum("bwhd,bld->bwhl", q, k).float() * attention.scaling
    later = torch.arange(x.shape[1]) > targets.queries[..., None]  # [B, W, L]
    scores = scores.masked_fill(later[:, :, None], -torch.inf)[targets.valid]  # [n, heads, L]
    wanted = scores.masked_fill(~targets.keys[targets.valid][:, None], -torch.inf)
    return (scores.logsumexp(-1) - wanted.logsumexp(-1)).mean()


def copy_output_loss(model: Any, after: Sequence[Tensor], ids: Tensor, is_text: Tensor) -> tuple[Tensor, float]:
    """Train the value and output projections of COPY_HEADS to identify the token they attend to.

    The heads' output for one token alone, through the final norm and lm_head, must predict that token (the OV circuit
    of Elhage et al. 2021). One random occurrence of each different token is used, so that rare tokens count as much as
    frequent ones.

    Args:
        model: Qwen2.5-VL of transformers.
        after: hidden states after each layer, each [B, L, hidden].
        ids: tokens [B, L].
        is_text: bool [B, L], False at picture tokens and padding.

    Returns:
        The cross-entropy and the accuracy.
    """
    places = is_text.flatten().nonzero()[:, 0]
    places = places[torch.randperm(len(places))]
    tokens, first = np.unique(ids.flatten()[places].numpy(), return_index=True)
    places = places[torch.from_numpy(first)]
    language = model.model.language_model
    output = torch.zeros(())
    for number, group in COPY_HEADS:
        layer = language.layers[number]
        attention = layer.self_attn
        dim, heads = attention.head_dim, attention.num_key_value_groups
        x = layer.input_layernorm(after[number - 1].flatten(0, 1)[places])
        v_part, o_part = slice(group * dim, (group + 1) * dim), slice(group * heads * dim, (group + 1) * heads * dim)
        v = F.linear(x, attention.v_proj.weight[v_part], attention.v_proj.bias[v_part])
        output = output + F.linear(v, attention.o_proj.weight[:, o_part].unflatten(1, (heads, dim)).sum(1))
    logits, truth = model.lm_head(language.norm(output)).float(), torch.from_numpy(tokens)
    return F.cross_entropy(logits, truth), (logits.argmax(-1) == truth).float().mean().item()
