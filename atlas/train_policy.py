r"""Stage 1: train the decoder on trajectories of the teacher (the paper's behaviour alignment).

    python -m atlas.train_policy runs/pool runs/policy --tokenizer runs/tokenizer --flags flag-icons-7.5.0.tgz \
        --tower runs/vision/state.pt --mix ground=0.5,episodes=0.5 --steps 3000

An interrupted run resumes with the same command. After a finished run, the same command with another --mix starts the
next stage from its weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from gog_edge.cli.common import command_imports, command_main

with command_imports(__name__):
    import numpy as np
    import torch
    from tokenizers import Tokenizer

    from atlas.countries import from_geonames
    from atlas.flags import load_flag_icons
    from atlas.policy.batches import (
        AttentionTargets,
        TokenizedTrajectory,
        TrajectoryTokenizer,
        collate,
        decode_states,
        embed,
    )
    from atlas.policy.losses import (
        BOX_HEADS,
        COPY_HEADS,
        TAP_LAYER,
        DecoderBoxHead,
        attention_loss,
        copy_output_loss,
        decoder_box_loss,
        token_loss,
    )
    from atlas.policy.model import (
        CELL,
        PIXEL_SPEC,
        PROCESSOR,
        atlas_config,
        build_model,
        half_precision,
        init_previous_token_heads,
    )
    from atlas.policy.pool import Shard, stream
    from atlas.policy.tasks import Task, TaskSampler
    from atlas.policy.tokenizer import SPECIAL, save_tokenizer, token_id
    from atlas.policy.worlds import gather_names
    from atlas.scenes import MAX_FLAGS
    from atlas.training import Progress, cosine_rate, save_state
    from gog_edge.files import write_json
    from gog_edge.policy.dialect.loader import load_dialect

CHUNK_TOKENS = 4096  # tokens computed at once; limits the padding of short trajectories


def parse_mix(text: str) -> dict[str, float]:
    """Parse the shares of the tasks: 'ground=0.5,episodes=0.5' gives {'ground': 0.5, 'episodes': 0.5}."""
    mix = {}
    for part in text.split(","):
        task, _, share = part.partition("=")
        if task not in get_args(Task):
            raise argparse.ArgumentTypeError(f"a task must be one of {', '.join(get_args(Task))}, got '{task}'")
        mix[task] = float(share)
    return mix


class Trainer:
    """Model, auxiliary head and optimiser of one run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
        special = {name: token_id(self.tokenizer, name) for name in SPECIAL}
        self.pad, self.image = special["<|endoftext|>"], special["<|image_pad|>"]
        self.model: Any = build_model(atlas_config(self.tokenizer.get_vocab_size(), special))
        self.head = DecoderBoxHead(PIXEL_SPEC.out_hidden)  # which is also the hidden size of the decoder
        if args.tower:
            self.model.model.visual.load_state_dict(torch.load(args.tower, weights_only=True)["tower"])
        self.step = 0
        saved = args.out / "state.pt"
        resumed = torch.load(saved, weights_only=True) if saved.exists() else None
        if args.start and not resumed:
            loaded: Any = type(self.model).from_pretrained(args.start, attn_implementation="sdpa")
            self.model = loaded.float()
        if resumed:
            weights = resumed["model"]
            if args.tower:  # --tower replaces the saved tower
                weights = {key: value for key, value in weights.items() if "visual" not in key}
            self.model.load_state_dict(weights, strict=False)
            self.head.load_state_dict(resumed["head"], strict=False)
        if args.look_back:
            init_previous_token_heads(self.model)
        for parameter in self.model.model.visual.parameters():
            parameter.requires_grad_(args.tower_learns)
        self.parameters = [p for p in [*self.model.parameters(), *self.head.parameters()] if p.requires_grad]
        self.optimizer = self._optimizer()
        if resumed and resumed.get("step", args.steps) < args.steps:  # interrupted; otherwise a new stage begins
            self.optimizer.load_state_dict(resumed["optimizer"])
            self.step = resumed["step"]
        dialect = load_dialect("atlas")
        names = gather_names(from_geonames(load_flag_icons(args.flags)[1]))
        tokenizer = TrajectoryTokenizer(self.tokenizer, dialect.system_prompt)
        self.tasks = TaskSampler(tokenizer, dialect, names, args.seed + self.step)
        self.rng = np.random.default_rng([args.seed + self.step, 41])

    def _optimizer(self) -> torch.optim.Optimizer:
        """Return AdamW with a lower learning rate for the embeddings.

        Every step moves the embeddings of rare tokens although they seldom occur, while the copy heads depend on them.
        """
        embeddings = self.model.get_input_embeddings().weight
        rest = [parameter for parameter in self.parameters if parameter is not embeddings]
        groups = [
            {"params": rest, "share": 1.0},
            {"params": [embeddings], "share": self.args.embedding_share},
        ]
        return torch.optim.AdamW(groups, lr=self.args.rate, weight_decay=0.05, betas=(0.9, 0.98))

    def train_step(self, shard: Shard) -> dict[str, float]:
        """Take one step over a batch of pictures; return its figures by "task.figure".

        Each picture gets a random task, because a step of one task alone undoes what the others have learned.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = cosine_rate(self.step, self.args.steps, self.args.rate * group["share"])
        mix = self.args.mix
        shares = np.array(list(mix.values()))
        tasks = self.rng.choice(list(mix), len(shard), p=shares / shares.sum())
        trajectories = self.tasks.batch(shard, tasks.tolist())
        figures: dict[str, float] = {}
        for task in mix:
            rows = np.flatnonzero(tasks == task)
            rows = rows[np.argsort([len(trajectories[row].ids) for row in rows], kind="stable")]
            chunk = max(8, CHUNK_TOKENS // len(trajectories[rows[-1]].ids)) if len(rows) else 1
            for start in range(0, len(rows), chunk):
                part = rows[start : start + chunk]
                chosen = [trajectories[row] for row in part]
                for key, value in self._backward(chosen, shard.rows(part), len(part) / len(shard)).items():
                    name = f"{task}.{key}"
                    figures[name] = figures.get(name, 0) + value * len(part) / len(rows)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return figures

    def _backward(self, trajectories: list[TokenizedTrajectory], shard: Shard, share: float) -> dict[str, float]:
        """Add the gradients of some trajectories, weighted with `share`; return their figures."""
        batch = collate(trajectories, self.pad)
        with half_precision():
            embeds, pictures = embed(self.model, batch, train_tower=self.args.tower_learns)
            states, after = decode_states(self.model, embeds, batch.positions)
            loss, predicted, truth = token_loss(self.model, states, batch.labels)
            gaze = self._attention_loss(BOX_HEADS, after, batch.positions, batch.gaze_targets)
            copied = self._attention_loss(COPY_HEADS, after, batch.positions, batch.copy_targets)
            is_text = (batch.ids != self.pad) & (batch.ids != self.image)
            output, identified = copy_output_loss(self.model, after, batch.ids, is_text)
        figures = {"named": identified, "loss": loss.item(), "right": (predicted == truth).float().mean().item()}
        figures |= {"look": gaze.item()} if batch.gaze_targets.valid.any() else {}
        figures |= {"copied": copied.item()} if batch.copy_targets.valid.any() else {}
        loss = loss + 0.3 * gaze + 0.3 * copied + 0.2 * output
        if pictures:
            first = [min(place for r, place in pictures if r == row) for row in range(len(trajectories))]
            count = shard.pictures.shape[1] * shard.pictures.shape[2] // CELL**2
            at = torch.stack([after[TAP_LAYER][row, place : place + count] for row, place in enumerate(first)])
            box_loss, box_figures = decoder_box_loss(self.head, at, shard)
            figures |= box_figures
            loss = loss + 0.5 * box_loss
        (share * loss).backward()
        return figures

    def _attention_loss(
        self, heads: Sequence[tuple[int, int]], after: list[Any], positions: Any, targets: AttentionTargets
    ) -> Any:
        """Return the mean attention loss of several groups of heads."""
        losses = [attention_loss(self.model, (layer, group), after[layer - 1], positions, targets)
                  for layer, group in heads]  # fmt: skip
        return torch.stack(losses).mean()

    def save(self) -> None:
        """Write the state to resume from, and the checkpoint in the format of Hugging Face."""
        parts: dict[str, Any] = {"model": self.model, "head": self.head, "optimizer": self.optimizer}
        state = {name: part.state_dict() for name, part in parts.items()}
        save_state(self.args.out / "state.pt", state | {"step": self.step})
        folder = self.args.out / "checkpoint"
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(folder)
        save_tokenizer(self.tokenizer, folder)
        write_json(folder / "preprocessor_config.json", PROCESSOR)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pool", type=Path, help="folder of atlas.make_pool")
    parser.add_argument("out", type=Path, help="folder for the state to resume from, and for the checkpoint")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of atlas.train_tokenizer")
    parser.add_argument("--flags", type=Path, required=True, help="npm package flag-icons 7.5.0, tarball or folder")
    parser.add_argument("--start", type=Path, help="checkpoint folder to start from if OUT contains no state")
    parser.add_argument("--tower", type=Path, help="state.pt of atlas.train_vision; replaces the vision tower")
    parser.add_argument("--tower-learns", action="store_true", help="train the vision tower too")
    parser.add_argument("--look-back", action="store_true", help="initialise the previous-token heads")
    parser.add_argument("--mix", type=parse_mix, default="ground=0.5,episodes=0.5",
                        help=f"shares of the tasks {', '.join(get_args(Task))} (default %(default)s)")  # fmt: skip
    parser.add_argument("--most-flags", type=int, default=MAX_FLAGS, help="leave out scenes of more flags")
    parser.add_argument("--steps", type=int, default=3000, help="(default %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="pictures per step (default %(default)s)")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="highest learning rate (default %(default)s)")
    parser.add_argument("--embedding-share", type=float, default=0.1,
                        help="learning rate of the embeddings, relative to --rate (default %(default)s)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of tasks and order (default %(default)s)")
    parser.add_argument("--save-every", type=int, default=250, help="steps (default %(default)s)")
    return parser.parse_args(argv)


@command_main
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = parse_arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(args)
    progress = Progress()
    for shard in stream(args.pool, seed=args.seed + trainer.step, batch=args.batch, skip=1, most=args.most_flags):
        if trainer.step >= args.steps:
            break
        progress.update(trainer.step + 1, trainer.train_step(shard))
        if trainer.step % args.save_every == 0 or trainer.step == args.steps:
            trainer.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
