"""Stage 1 of the paper, behaviour alignment: teach the decoder (resumable; run again with another --mix to go on).

    python -m training.train_policy runs/pool runs/policy --tokenizer runs/tokenizer --flags flag-icons-7.5.0.tgz \
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

from gog_edge.files import write_json
from gog_edge.indexing.atlas.countries import from_geonames
from gog_edge.indexing.atlas.flags import load_flag_icons
from gog_edge.indexing.atlas.scenes import MAX_FLAGS
from gog_edge.policy.dialect import load_dialect
from training.policy.absolute import TAP, AbsoluteHead, absolute_loss
from training.policy.batches import Encoder, collate, decode_states, embed, token_loss
from training.policy.lessons import Lessons
from training.policy.model import PROCESSOR, add_look_back_heads, atlas_config, build_model
from training.policy.pointing import pointing_loss
from training.policy.pool import Shard, stream
from training.policy.schedule import cosine_rate, save_state
from training.policy.tokens import SPECIAL, save_tokenizer
from training.policy.worlds import gather_names

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
        self.optimizer = torch.optim.AdamW(self.parameters, lr=args.rate, weight_decay=0.05, betas=(0.9, 0.98))
        dialect = load_dialect("atlas")
        names = gather_names(from_geonames(load_flag_icons(args.flags)[1]))
        self.lessons = Lessons(Encoder(self.tokenizer, dialect.system_prompt), dialect, names, args.seed)
        self.rng = np.random.default_rng([args.seed, 41])
        self.mix = parse_mix(args.mix)

    def train_step(self, shard: Shard) -> dict[str, float]:
        """One step over a batch of pictures."""
        for group in self.optimizer.param_groups:
            group["lr"] = cosine_rate(self.step, self.args.steps, self.args.rate)
        lesson = str(self.rng.choice(list(self.mix), p=np.array(list(self.mix.values())) / sum(self.mix.values())))
        encoded = self.lessons.batch(shard, lesson)  # type: ignore[arg-type]
        order = np.argsort([len(item.ids) for item in encoded])
        figures: dict[str, float] = {}
        chunk = max(8, CHUNK_TOKENS // len(encoded[order[-1]].ids))
        for start in range(0, len(order), chunk):
            rows = order[start : start + chunk]
            part = Shard(*(getattr(shard, name)[rows] for name in Shard.__slots__))
            share = len(rows) / len(order)
            for key, value in self._backward([encoded[row] for row in rows], part, lesson, share).items():
                figures[key] = figures.get(key, 0) + share * value
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return {f"{lesson}.{key}": value for key, value in figures.items()}

    def _backward(self, encoded: list[Any], shard: Shard, lesson: str, share: float) -> dict[str, float]:
        batch = collate(encoded, self.pad)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            embeds, pictures = embed(self.model, batch, tower_learns=self.args.tower_learns)
            states, tapped = decode_states(self.model, embeds, batch.positions, TAP)
            loss, guess, truth = token_loss(self.model, states, batch.labels)
        figures = {"loss": loss.item(), "right": (guess == truth).float().mean().item()}
        if pictures:
            places = [min(place for r, place in pictures if r == row) for row in range(len(encoded))]
            count = shard.pictures.shape[1] * shard.pictures.shape[2] // 784
            at = torch.stack([tapped[row, place : place + count] for row, place in enumerate(places)])
            extra, read = absolute_loss(self.head, at, shard)
            figures |= read
            with torch.autocast("cpu", dtype=torch.bfloat16):
                pointed = pointing_loss(self.model, tapped, batch.positions, batch.looks)
            figures["look"] = pointed.item()
            loss = loss + 0.5 * extra + 0.3 * pointed
        (share * loss).backward()
        return figures

    def save(self) -> None:
        """State to resume from, and the checkpoint in Hugging Face form."""
        save_state(self.args.out / "state.pt", {"model": self.model.state_dict(), "head": self.head.state_dict()})
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
    parser.add_argument("--tower", type=Path, help="state.pt of training.train_vision")
    parser.add_argument("--tower-learns", action="store_true", help="train the vision tower too")
    parser.add_argument("--look-back", action="store_true", help="start with heads that look at the tokens before")
    parser.add_argument("--mix", default="ground=0.5,episodes=0.5", help="shares of lessons; see policy.lessons.Lesson")
    parser.add_argument("--most-flags", type=int, default=MAX_FLAGS, help="leave out busier pictures")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=250, help="steps")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(args)
    recent: dict[str, float] = {}
    began = time.monotonic()
    for shard in stream(args.pool, seed=args.seed, batch=args.batch, skip=1, most=args.most_flags):
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
