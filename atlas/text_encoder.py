"""Train the atlas's sentence encoder from random weights, on questions and the paragraphs that answer them.

    python -m atlas.text_encoder OUT --facts gog_edge/data/atlas/packs/atlas/countries.json

OUT becomes a sentence-transformers folder (a BERT of 4 layers, mean pooling, prompts "query: " and "passage: ") for
`gog-edge export text`. A fifth of the countries is held out. OUT/work contains the state of the run: the same command
resumes an interrupted run. It takes eight to ten minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gog_edge.cli.common import command_imports

with command_imports(__name__):
    import numpy as np
    import torch
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from tokenizers import Tokenizer
    from torch.nn import functional

    from atlas.countries import Country, load_countries
    from atlas.text.model import embed, new_model, save, train_tokenizer, with_batches
    from atlas.text.pairs import (
        PASSAGE_PREFIX,
        QUERY_PREFIX,
        NameGenerator,
        Pair,
        make_batch,
        seen_countries,
        training_texts,
    )
    from gog_edge.errors import GogEdgeError

STEPS = 500
RATE = 1e-3
WARM_UP = 50  # steps
TEMPERATURE = 0.05
WEIGHT_DECAY = 0.01
MAX_GRADIENT_NORM = 1.0
SAVE_EVERY = 60.0  # seconds
TOKENIZER_BATCHES = 40


class Run:
    """A training run that can be resumed from `state.pt` in its folder."""

    def __init__(self, folder: Path, countries: Sequence[Country], *, steps: int, seed: int) -> None:
        """Start a run, or resume the one in the folder.

        Args:
            folder: For tokenizer.json and state.pt.
            countries: Of the atlas; the held-out ones are not used.
            steps: Of the whole run.
            seed: Of weights and batches.
        """
        self._folder, self._steps, self._seed = folder, steps, seed
        self._real = seen_countries(countries)
        self._names = {country.iso: country.name for country in self._real}
        self._generator = NameGenerator([name for country in self._real for name in (country.name, country.capital)])
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer = self._open_tokenizer()
        torch.manual_seed(seed)
        self.model = new_model(self.tokenizer.get_vocab_size())
        self._optimiser = torch.optim.AdamW(self.model.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY)
        self.step, self.seconds, self.loss = 0, 0.0, math.nan
        self._resume()

    def _open_tokenizer(self) -> Tokenizer:
        path = self._folder / "tokenizer.json"
        if path.is_file():
            return with_batches(Tokenizer.from_file(str(path)))
        texts = training_texts(self._real, self._names, self._generator, TOKENIZER_BATCHES)
        tokenizer = train_tokenizer(texts)
        tokenizer.save(str(path))
        return tokenizer

    def _resume(self) -> None:
        path = self._folder / "state.pt"
        if path.is_file():
            state = torch.load(path, weights_only=True)
            self.model.load_state_dict(state["model"])
            self._optimiser.load_state_dict(state["optimiser"])
            self.step, self.seconds = state["step"], state["seconds"]

    def save_state(self) -> None:
        """Write state.pt atomically."""
        beside = self._folder / "state.pt.part"
        torch.save({"model": self.model.state_dict(), "optimiser": self._optimiser.state_dict(), "step": self.step,
                    "seconds": self.seconds}, beside)  # fmt: skip
        beside.replace(self._folder / "state.pt")

    def train(self, progress: Progress) -> None:
        """Train the remaining steps."""
        task = progress.add_task("contrastive", total=self._steps, completed=self.step, loss=math.nan)
        kept = time.monotonic()
        while self.step < self._steps:
            begin = time.monotonic()
            loss = self._learn(self._batch())
            self.loss = loss if math.isnan(self.loss) else 0.95 * self.loss + 0.05 * loss
            self.step += 1
            self.seconds += time.monotonic() - begin
            progress.update(task, completed=self.step, loss=self.loss)
            if time.monotonic() - kept > SAVE_EVERY:
                self.save_state()
                kept = time.monotonic()
        self.save_state()

    def _batch(self) -> list[Pair]:
        """Return the batch of this step; it depends on seed and step only."""
        return make_batch(np.random.default_rng([self._seed, self.step]), self._real, self._names, self._generator)

    def _learn(self, pairs: Sequence[Pair]) -> float:
        """Take one step of the symmetric InfoNCE loss over the batch and return the loss."""
        share = min(1.0, (self.step + 1) / WARM_UP) * (0.51 + 0.49 * math.cos(math.pi * self.step / self._steps))
        for group in self._optimiser.param_groups:
            group["lr"] = RATE * share
        self.model.train()
        queries = embed(self.model, self.tokenizer, [QUERY_PREFIX + pair.query for pair in pairs])
        passages = embed(self.model, self.tokenizer, [PASSAGE_PREFIX + pair.passage for pair in pairs])
        logits = queries @ passages.T / TEMPERATURE
        right = torch.arange(len(pairs))
        loss = 0.5 * (functional.cross_entropy(logits, right) + functional.cross_entropy(logits.T, right))
        self._optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        self._optimiser.step()
        return float(loss.item())


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the atlas's sentence encoder.")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the sentence-transformers checkpoint")
    parser.add_argument("--facts", type=Path, required=True, help="countries.json of the atlas pack")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True),
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    try:
        run = Run(args.out / "work", load_countries(args.facts), steps=args.steps, seed=args.seed)
        with _progress() as progress:
            run.train(progress)
        save(run.model, run.tokenizer, args.out)
    except GogEdgeError as exc:
        sys.stderr.write(f"text_encoder: {exc}\n")
        return 1
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    print(json.dumps({"steps": run.step, "loss": round(run.loss, 4), "seconds": round(run.seconds, 1),
                      "parameters": parameters}))  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
