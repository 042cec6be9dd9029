"""A second throw-away head: where the flag under each picture token is, read from inside the decoder.

The decoder alone can know absolute places (picture tokens see where the picture began), so it is taught to work them
out in its lower layers, from the first step on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.policy.dense import token_truth
from training.policy.pool import Shard
from training.policy.teacher import SNAP

BINS = 41  # 0..280 pixels in steps of SNAP
TAP = 2  # the layer after which places are read


class AbsoluteHead(nn.Module):
    """[.., hidden] -> logits of the four sides [.., 4, BINS]."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, 4 * BINS)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the four sides."""
        return self.out(self.norm(x.float())).unflatten(-1, (4, BINS))


def absolute_loss(head: AbsoluteHead, states: Tensor, shard: Shard) -> tuple[Tensor, float]:
    """Loss over picture tokens [B, T, hidden] that lie in a flag, and the mean error in pixels."""
    owner, box, _ = token_truth(shard)
    height, width = shard.pictures.shape[1:3]
    limit = torch.tensor([width, height, width, height])
    target = (torch.minimum(box.clamp(min=0), limit) / SNAP).round().long()
    mask = owner >= 0
    logits = head(states[mask])
    truth = target[mask]
    loss = F.cross_entropy(logits.flatten(0, 1), truth.flatten())
    error = (logits.detach().argmax(-1) - truth).abs().float().mean().item() * SNAP
    return loss, error
