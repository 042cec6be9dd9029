"""A second throw-away head: what stands under each picture token, read from inside the decoder.

The decoder alone can know absolute places (picture tokens see where the picture began), so it is taught to work them
out in its lower layers, and to keep there which place words mean the flag: the layers above need only look them up.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from atlas.policy.dense import token_truth, words_loss
from atlas.policy.pool import Shard
from atlas.policy.teacher import SNAP
from atlas.scenes import RELATIONS

BINS = 41  # 0..280 pixels in steps of SNAP
TAP = 2  # the layer after which places are read


class AbsoluteHead(nn.Module):
    """[.., hidden] -> logits of the four sides [.., 4, BINS] and of the relations [.., 14]."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, 4 * BINS)
        self.words = nn.Linear(hidden, len(RELATIONS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the four sides and of the relations."""
        y = self.norm(x.float())
        return self.out(y).unflatten(-1, (4, BINS)), self.words(y)


def absolute_loss(head: AbsoluteHead, states: Tensor, shard: Shard) -> tuple[Tensor, dict[str, float]]:
    """Loss over picture tokens [B, T, hidden], the mean side error in pixels and the share of relations right."""
    owner, box, _ = token_truth(shard)
    height, width = shard.pictures.shape[1:3]
    limit = torch.tensor([width, height, width, height])
    target = (torch.minimum(box.clamp(min=0), limit) / SNAP).round().long()
    mask = owner >= 0
    sides, words = head(states)
    logits, truth = sides[mask], target[mask]
    loss = F.cross_entropy(logits.flatten(0, 1), truth.flatten())
    error = (logits.detach().argmax(-1) - truth).abs().float().mean().item() * SNAP
    extra, right = words_loss(words, shard, owner)
    return loss + 2 * extra, {"px": error, "words": right}
