"""Stage 0: teach the vision tower where flags are (resumable).

python -m atlas.train_vision runs/pool runs/vision --steps 1500
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from atlas.policy.dense import DenseHead, dense_loss
from atlas.policy.model import atlas_config, build_model, encode_pictures, half_precision, picture_tensor
from atlas.policy.pool import stream
from atlas.policy.schedule import cosine_rate, save_state

# The tower does not depend on the vocabulary; any distinct ids do here.
_IDS = {
    name: index
    for index, name in enumerate(
        ("<|endoftext|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    )
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pool", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    tower = build_model(atlas_config(64, _IDS)).model.visual
    head = DenseHead(tower.config.out_hidden_size)
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.rate, weight_decay=0.01, betas=(0.9, 0.98))
    state = args.out / "state.pt"
    step = 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        tower.load_state_dict(saved["tower"])
        head.load_state_dict(saved["head"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    recent: dict[str, float] = {}
    began = time.monotonic()
    for shard in stream(args.pool, seed=step, batch=args.batch, skip=1):
        if step >= args.steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = cosine_rate(step, args.steps, args.rate)
        with half_precision():
            tokens = encode_pictures(tower, picture_tensor(shard.pictures))
        loss, figures = dense_loss(head, tokens, shard)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        recent = {key: 0.95 * recent.get(key, value) + 0.05 * value for key, value in figures.items()}
        if step % 50 == 0:
            row = {"step": step, "seconds": round(time.monotonic() - began)}
            print(json.dumps(row | {key: round(value, 4) for key, value in recent.items()}), flush=True)
        if step % 200 == 0 or step == args.steps:
            parts = {"tower": tower, "head": head, "optimizer": optimizer}
            save_state(state, {name: part.state_dict() for name, part in parts.items()} | {"step": step})
    return 0


if __name__ == "__main__":
    sys.exit(main())
