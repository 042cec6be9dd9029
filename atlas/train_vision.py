"""Stage 0: train the vision tower to localise flags with dense supervision. Resumable.

    python -m atlas.train_vision runs/pool runs/vision --steps 1500
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from gog_edge.cli.common import command_imports, command_main

with command_imports(__name__):
    import torch

    from atlas.policy.losses import DenseHead, dense_loss
    from atlas.policy.model import atlas_config, build_model, encode_pictures, half_precision, picture_tensor
    from atlas.policy.pool import stream
    from atlas.training import Progress, cosine_rate, save_state

SAVE_EVERY = 200  # steps
# The vision tower does not depend on the vocabulary, so that any distinct ids will do.
_SPECIAL_IDS = {
    name: index
    for index, name in enumerate(
        ("<|endoftext|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    )
}


@command_main
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pool", type=Path, help="folder of atlas.make_pool")
    parser.add_argument("out", type=Path, help="folder for the state to resume from, state.pt")
    parser.add_argument("--steps", type=int, default=1500, help="(default %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="pictures per step (default %(default)s)")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate (default %(default)s)")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    tower = build_model(atlas_config(64, _SPECIAL_IDS)).model.visual
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
    progress = Progress()
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
        progress.update(step, figures)
        if step % SAVE_EVERY == 0 or step == args.steps:
            parts = {"tower": tower, "head": head, "optimizer": optimizer}
            save_state(state, {name: part.state_dict() for name, part in parts.items()} | {"step": step})
    return 0


if __name__ == "__main__":
    sys.exit(main())
