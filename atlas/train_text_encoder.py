"""Train the atlas's sentence encoder from random weights, on questions and the paragraphs that answer them.

    python -m atlas.train_text_encoder runs/text --facts gog_edge/data/atlas/packs/atlas/countries.json

OUT becomes a sentence-transformers folder (a BERT of 4 layers, mean pooling, prompts "query: " and "passage: ") for
`gog-edge export text`. A fifth of the countries is held out. OUT/work contains the state of the run: the same command
resumes an interrupted run. It takes eight to ten minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gog_edge.cli.common import command_imports, command_main

with command_imports(__name__):
    import numpy as np
    import torch
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
    from atlas.training import Progress, cosine_decay, save_state

STEPS = 500
RATE = 1e-3
WARM_UP = 50  # steps
FLOOR = 0.02  # of RATE, at the last step
TEMPERATURE = 0.05
WEIGHT_DECAY = 0.01
MAX_GRADIENT_NORM = 1.0
SAVE_EVERY = 50  # steps
TOKENIZER_BATCHES = 40


class TextEncoderTraining:
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
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY)
        self.step, self.seconds = 0, 0.0
        self.progress = Progress()
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
            self._optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]

    def train(self, stop: int | None = None) -> None:
        """Train up to the last step, or to the step `stop`, and save the state."""
        last = self._steps if stop is None else min(stop, self._steps)
        while self.step < last:
            started = time.monotonic()
            loss = self._train_step(self._batch())
            self.step += 1
            self.seconds += time.monotonic() - started
            self.progress.update(self.step, {"loss": loss})
            if self.step % SAVE_EVERY == 0 or self.step == last:
                self._save()

    def _save(self) -> None:
        parts = {"model": self.model.state_dict(), "optimizer": self._optimizer.state_dict()}
        save_state(self._folder / "state.pt", parts | {"step": self.step, "seconds": self.seconds})

    def _batch(self) -> list[Pair]:
        """Return the batch of this step; it depends on seed and step only."""
        return make_batch(np.random.default_rng([self._seed, self.step]), self._real, self._names, self._generator)

    def _train_step(self, pairs: Sequence[Pair]) -> float:
        """Take one step of the symmetric InfoNCE loss over the batch and return the loss."""
        rate = RATE * min(1.0, (self.step + 1) / WARM_UP) * cosine_decay(self.step / self._steps, FLOOR)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        queries = embed(self.model, self.tokenizer, [QUERY_PREFIX + pair.query for pair in pairs])
        passages = embed(self.model, self.tokenizer, [PASSAGE_PREFIX + pair.passage for pair in pairs])
        logits = queries @ passages.T / TEMPERATURE
        targets = torch.arange(len(pairs))
        loss = 0.5 * (functional.cross_entropy(logits, targets) + functional.cross_entropy(logits.T, targets))
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        self._optimizer.step()
        return float(loss.item())


@command_main
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the sentence-transformers checkpoint")
    parser.add_argument("--facts", type=Path, required=True, help="countries.json of the atlas pack")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the whole run (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="number of cores (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default %(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    run = TextEncoderTraining(args.out / "work", load_countries(args.facts), steps=args.steps, seed=args.seed)
    run.train()
    save(run.model, run.tokenizer, args.out)
    line: dict[str, float] = {"steps": run.step, "seconds": round(run.seconds, 1)}
    line |= {key: round(value, 4) for key, value in run.progress.averages.items()}
    print(json.dumps(line | {"parameters": sum(parameter.numel() for parameter in run.model.parameters())}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
