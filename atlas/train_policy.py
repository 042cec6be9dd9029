"""Stage 1 of the paper, behaviour alignment: teach the decoder. A run that was cut off is taken up again; after one
that came to its end, the same command with another --mix begins the next stage from its weights.

    python -m atlas.train_policy runs/pool runs/policy --tokenizer runs/tokenizer --flags flag-icons-7.5.0.tgz \
        --tower runs/vision/state.pt --mix ground=0.5,episodes=0.5 --steps 3000
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from atlas.countries import from_geonames
from atlas.flags import load_flag_icons
from atlas.policy.absolute import TAP, AbsoluteHead, absolute_loss
from atlas.policy.batches import Attended, Encoder, collate, decode_states, embed, token_loss
from atlas.policy.lessons import Lessons
from atlas.policy.model import PROCESSOR, add_look_back_heads, atlas_config, build_model, half_precision
from atlas.policy.pointing import BOX_HEADS, COPY_HEADS, attention_loss, naming_loss
from atlas.policy.pool import Shard, stream
from atlas.policy.schedule import cosine_rate, save_state
from atlas.policy.tokens import SPECIAL, save_tokenizer
from atlas.policy.worlds import gather_names
from atlas.scenes import MAX_FLAGS
from gog_edge.files import write_json
from gog_edge.policy.dialect.loader import load_dialect

CHUNK_TOKENS = 4096  # computed at once: short trajectories are not padded to the longest of a whole step


def parse_mix(text: str) -> dict[str, float]:
    """'ground=0.5,episodes=0.5' as a mapping."""
    return {name: float(share) for name, _, share in (part.partition("=") for part in text.split(","))}


class Trainer:
    """Model, heads and optimiser of one run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
        special = {name: self.tokenizer.token_to_id(name) for name in SPECIAL}
        self.config = atlas_config(self.tokenizer.get_vocab_size(), special)
        self.pad = special["<|endoftext|>"]
        self.model = build_model(self.config)
        self.head = AbsoluteHead(self.config.text_config.hidden_size)
        if args.tower:
            self.model.model.visual.load_state_dict(torch.load(args.tower, weights_only=True)["tower"])
        self.step = 0
        saved = args.out / "state.pt"
        self.resumed = torch.load(saved, weights_only=True) if saved.exists() else None
        if args.start and not self.resumed:
            self.model = type(self.model).from_pretrained(args.start, attn_implementation="sdpa").float()
        if self.resumed:
            weights = self.resumed["model"]
            if args.tower:  # a newer tower replaces the one that was saved
                weights = {key: value for key, value in weights.items() if "visual" not in key}
            self.model.load_state_dict(weights, strict=False)
            self.head.load_state_dict(self.resumed["head"], strict=False)
        if args.look_back:
            add_look_back_heads(self.model)
        for parameter in self.model.model.visual.parameters():
            parameter.requires_grad_(args.tower_learns)
        self.parameters = [p for p in [*self.model.parameters(), *self.head.parameters()] if p.requires_grad]
        # Tokens that are seldom meant are pushed about all the time; heads that copy need them to stay what they are.
        names = self.model.get_input_embeddings().weight
        rest = [parameter for parameter in self.parameters if parameter is not names]
        groups = [{"params": rest, "share": 1.0}, {"params": [names], "share": args.embedding_share}]
        self.optimizer = torch.optim.AdamW(groups, lr=args.rate, weight_decay=0.05, betas=(0.9, 0.98))
        if self.resumed and self.resumed.get("step", args.steps) < args.steps:  # cut off; else a new stage begins
            self.optimizer.load_state_dict(self.resumed["optimizer"])
            self.step = self.resumed["step"]
        dialect = load_dialect("atlas")
        names = gather_names(from_geonames(load_flag_icons(args.flags)[1]))
        self.lessons = Lessons(Encoder(self.tokenizer, dialect.system_prompt), dialect, names, args.seed + self.step)
        self.rng = np.random.default_rng([args.seed + self.step, 41])
        self.mix = parse_mix(args.mix)

    def train_step(self, shard: Shard) -> dict[str, float]:
        """One step over a batch of pictures, each with a lesson of its own: a step of one lesson undoes the others."""
        for group in self.optimizer.param_groups:
            group["lr"] = cosine_rate(self.step, self.args.steps, self.args.rate * group["share"])
        shares = np.array(list(self.mix.values()))
        lessons = self.rng.choice(list(self.mix), len(shard), p=shares / shares.sum())
        encoded = self.lessons.batch(shard, lessons.tolist())
        figures: dict[str, float] = {}
        for lesson in self.mix:
            rows = np.flatnonzero(lessons == lesson)
            rows = rows[np.argsort([len(encoded[row].ids) for row in rows], kind="stable")]
            chunk = max(8, CHUNK_TOKENS // len(encoded[rows[-1]].ids)) if len(rows) else 1
            for start in range(0, len(rows), chunk):
                part = rows[start : start + chunk]
                pictures = Shard(*(getattr(shard, name)[part] for name in Shard.__slots__))
                read = self._backward([encoded[row] for row in part], pictures, len(part) / len(shard))
                for key, value in read.items():
                    key = f"{lesson}.{key}"
                    figures[key] = figures.get(key, 0) + value * len(part) / len(rows)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return figures

    def _backward(self, encoded: list[Any], shard: Shard, share: float) -> dict[str, float]:
        batch = collate(encoded, self.pad)
        with half_precision():
            embeds, pictures = embed(self.model, batch, tower_learns=self.args.tower_learns)
            states, after = decode_states(self.model, embeds, batch.positions)
            loss, guess, truth = token_loss(self.model, states, batch.labels)
            looked, copied = (self._attention(heads, after, batch.positions, meant) for heads, meant in (
                (BOX_HEADS, batch.looks), (COPY_HEADS, batch.copies)))  # fmt: skip
            said = (batch.ids != self.pad) & (batch.ids != self.config.image_token_id)
            naming, named = naming_loss(self.model, after, batch.ids, said)
        figures = {"named": named, "loss": loss.item(), "right": (guess == truth).float().mean().item()}
        figures |= {"look": looked.item()} if batch.looks.valid.any() else {}
        figures |= {"copied": copied.item()} if batch.copies.valid.any() else {}
        loss = loss + 0.3 * looked + 0.3 * copied + 0.2 * naming
        if pictures:
            places = [min(place for r, place in pictures if r == row) for row in range(len(encoded))]
            count = shard.pictures.shape[1] * shard.pictures.shape[2] // 784
            at = torch.stack([after[TAP][row, place : place + count] for row, place in enumerate(places)])
            extra, read = absolute_loss(self.head, at, shard)
            figures |= read
            loss = loss + 0.5 * extra
        (share * loss).backward()
        return figures

    def _attention(self, heads: Sequence[tuple[int, int]], after: list[Any], positions: Any, meant: Attended) -> Any:
        """Mean attention loss of several groups of heads."""
        losses = [attention_loss(self.model, (layer, group), after[layer - 1], positions, meant)
                  for layer, group in heads]  # fmt: skip
        return torch.stack(losses).mean()

    def save(self) -> None:
        """State to resume from, and the checkpoint in Hugging Face form."""
        parts = {"model": self.model, "head": self.head, "optimizer": self.optimizer}
        save_state(
            self.args.out / "state.pt", {name: part.state_dict() for name, part in parts.items()} | {"step": self.step}
        )
        folder = self.args.out / "checkpoint"
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(folder)
        save_tokenizer(self.tokenizer, folder)
        write_json(folder / "preprocessor_config.json", PROCESSOR)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pool", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--flags", type=Path, required=True, help="npm package flag-icons 7.5.0, tarball or folder")
    parser.add_argument("--start", type=Path, help="checkpoint folder to go on from where OUT holds no state yet")
    parser.add_argument("--tower", type=Path, help="state.pt of atlas.train_vision")
    parser.add_argument("--tower-learns", action="store_true", help="train the vision tower too")
    parser.add_argument("--look-back", action="store_true", help="start with heads that look at the tokens before")
    parser.add_argument("--mix", default="ground=0.5,episodes=0.5", help="shares of lessons; see policy.lessons.Lesson")
    parser.add_argument("--most-flags", type=int, default=MAX_FLAGS, help="leave out busier pictures")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--embedding-share", type=float, default=0.1, help="the embeddings' part of the rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=250, help="steps")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(args)
    recent: dict[str, float] = {}
    began = time.monotonic()
    for shard in stream(args.pool, seed=args.seed + trainer.step, batch=args.batch, skip=1, most=args.most_flags):
        if trainer.step >= args.steps:
            break
        for key, value in trainer.train_step(shard).items():
            recent[key] = 0.95 * recent.get(key, value) + 0.05 * value
        if trainer.step % 50 == 0:
            row = {"step": trainer.step, "seconds": round(time.monotonic() - began)}
            print(json.dumps(row | {key: round(value, 4) for key, value in sorted(recent.items())}), flush=True)
        if trainer.step % args.save_every == 0 or trainer.step == args.steps:
            trainer.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
