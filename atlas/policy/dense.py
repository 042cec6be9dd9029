"""The dense stage: grounding does not start by itself from next-token loss, so the tower is taught it directly.

Each merged token learns, through a head that is thrown away, whether it lies in a flag, where that flag's sides are as
seen from the token, which place, order and size words mean that flag, and how many flags there are. Offsets are
relative: rotary attention knows only relative positions; absolute ones are the decoder's to add.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from atlas.policy.model import CELL
from atlas.policy.pool import Shard
from atlas.scenes import MAX_FLAGS, RELATIONS

OFFSET_UNIT = 2.0 * CELL  # pixels


class DenseHead(nn.Module):
    """[.., hidden] -> inside 1 + sides 4 + relations 14 + count 6."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, 1 + 4 + len(RELATIONS) + MAX_FLAGS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits of inside, sides in OFFSET_UNIT, logits of relations, logits of the count."""
        y = self.out(self.norm(x.float()))
        return y[..., 0], y[..., 1:5], y[..., 5 : 5 + len(RELATIONS)], y[..., 5 + len(RELATIONS) :]


def token_truth(shard: Shard) -> tuple[Tensor, Tensor, Tensor]:
    """Which flag each token lies in [B, T] (-1: none), its box [B, T, 4], the token centres [T, 2]; pixels."""
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


def words_loss(words: Tensor, shard: Shard, owner: Tensor) -> tuple[Tensor, float]:
    """Loss of relation logits [B, T, 14] over tokens in flags (`owner` >= 0), and the share that is right."""
    meant = torch.from_numpy(shard.relations)  # [B, R]
    target = (meant[:, None, :] == owner[..., None]).float()
    weight = (meant[:, None, :] >= 0).float() * (owner >= 0).float()[..., None]
    total = weight.sum().clamp(min=1)
    loss = (F.binary_cross_entropy_with_logits(words, target, reduction="none") * weight).sum() / total
    right = (((words > 0) == (target > 0.5)).float() * weight).sum() / total
    return loss, right.item()


def dense_loss(head: DenseHead, tokens: Tensor, shard: Shard) -> tuple[Tensor, dict[str, float]]:
    """Loss of one batch, and figures: mean side error in pixels, share of relations right, share of counts right."""
    inside, sides, words, count = head(tokens)
    owner, box, centres = token_truth(shard)
    mask = owner >= 0
    target = (box - torch.cat([centres, centres], -1)) / OFFSET_UNIT
    weights = mask.float()
    total = weights.sum().clamp(min=1)
    side_loss = (F.smooth_l1_loss(sides, target, reduction="none", beta=0.1).sum(-1) * weights).sum() / total
    word_loss, right = words_loss(words, shard, owner)
    counts = torch.from_numpy(shard.counts) - 1
    count_loss = F.cross_entropy(count.flatten(0, 1), counts[:, None].expand(-1, count.shape[1]).flatten())
    inside_loss = F.binary_cross_entropy_with_logits(inside, weights)
    loss = inside_loss + 2 * side_loss + 2 * word_loss + 0.3 * count_loss
    with torch.no_grad():
        error = ((sides - target).abs().mean(-1) * weights).sum() / total * OFFSET_UNIT
        counted = (count.mean(1).argmax(-1) == counts).float().mean()
    figures = {"side_px": error.item(), "words": right, "count": counted.item(), "loss": loss.item()}
    return loss, figures
