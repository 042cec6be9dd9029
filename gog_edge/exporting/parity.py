"""Does the exported policy say what transformers says? Measured over whole conversations, live against from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from tokenizers import Tokenizer

from gog_edge.engines.base import DecoderEngine, Floats, KvCache
from gog_edge.errors import CheckpointError
from gog_edge.exporting.torchvision_operators import import_torchvision
from gog_edge.policy.manifest import PolicyManifest
from gog_edge.policy.model import PolicyModel
from gog_edge.policy.session import Session
from gog_edge.types import Pixels

Turn: TypeAlias = Sequence[str | Pixels]  # what the user says, in order; the chat strings are put around it

LIMITS = {"fp32": 1e-3}  # greatest difference of logits, and of image tokens
MIN_COSINE = 0.9999


@dataclass(frozen=True, slots=True)
class ParityEpisode:
    """A conversation to be held on both sides: a turn, an answer, a turn, an answer."""

    system: str
    turns: tuple[Turn, ...]
    max_tokens: int = 16  # generated after each turn


@dataclass(frozen=True, slots=True)
class ParityReport:
    """What was measured; `passed` says whether it is within the limit."""

    episodes: int
    pictures: int
    positions: int  # places where logits were compared: ends of prefills and appends, and decode steps
    vision_max_abs: float
    vision_min_cosine: float
    logits_max_abs: float
    logits_range: float  # greatest absolute logit, to read the figure above
    greedy_tokens: int
    greedy_differ: int  # tokens that transformers, from scratch, would have chosen differently
    limit: float

    @property
    def passed(self) -> bool:
        """Within the limit, and every token the same."""
        near = max(self.vision_max_abs, self.logits_max_abs) <= self.limit
        return near and self.vision_min_cosine >= MIN_COSINE and self.greedy_differ == 0

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {**asdict(self), "passed": self.passed}


@dataclass(slots=True)
class _Recorder:
    """A decoder engine that remembers the logits of every step by the index of the token they follow."""

    engine: DecoderEngine
    logits: dict[int, Floats] = field(default_factory=dict)

    @property
    def capacity(self) -> int:
        return self.engine.capacity

    def new_cache(self) -> KvCache:
        return self.engine.new_cache()

    def step(self, cache: KvCache, embeds: Floats, cos: Floats, sin: Floats, past: int) -> Floats:
        logits = self.engine.step(cache, embeds, cos, sin, past)
        self.logits[past + len(embeds) - 1] = logits.copy()
        return logits


@dataclass(slots=True)
class _Held:
    """One conversation as the live session held it."""

    tokens: list[int]
    pictures: list[Pixels]
    embeds: list[Floats]  # of the pictures
    generated: list[int]  # indices of generated tokens within `tokens`
    logits: dict[int, Floats]


class Reference:
    """The checkpoint in transformers, float32 on the CPU, everything computed from scratch."""

    def __init__(self, checkpoint: Path, manifest: PolicyManifest) -> None:
        import_torchvision()
        from transformers import Qwen2_5_VLForConditionalGeneration
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
        self._model = model.eval()
        spec = manifest.vision
        self._image_token = manifest.image_token
        self._processor: Any = Qwen2VLImageProcessorPil(
            size={"shortest_edge": spec.min_pixels, "longest_edge": spec.max_pixels},
            image_mean=list(spec.mean), image_std=list(spec.std), patch_size=spec.patch,
            temporal_patch_size=spec.temporal, merge_size=spec.merge,
        )

    @torch.no_grad()
    def tokens_of(self, picture: Pixels) -> Floats:
        """One picture's tokens [n, hidden]."""
        inputs = self._processor([picture], return_tensors="pt")
        output = self._model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
        return np.asarray(output.pooler_output.numpy(), np.float32)

    @torch.no_grad()
    def logits_of(self, tokens: Sequence[int], pictures: Sequence[Pixels]) -> Floats:
        """Logits [n, vocab] of a whole conversation in one pass, positions included."""
        ids = torch.tensor([list(tokens)])
        inputs = self._processor(list(pictures), return_tensors="pt") if pictures else {}
        kinds = (ids == self._image_token).int()
        output = self._model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds,
                             use_cache=False, **inputs)
        return np.asarray(output.logits[0].numpy(), np.float32)


def measure_parity(folder: Path, checkpoint: Path, episodes: Sequence[ParityEpisode] | None = None, *,
                   threads: int | None = None) -> ParityReport:
    """Hold the episodes on both sides and compare. Random ones are made when none are given."""
    model = PolicyModel.open(folder, threads=threads)
    chosen = random_episodes(model) if episodes is None else episodes
    reference = Reference(checkpoint, model.manifest)
    vision, cosine, error, scale, positions, tokens, differ = 0.0, 1.0, 0.0, 0.0, 0, 0, 0
    held = [hold(model, episode) for episode in chosen]
    for talk in held:
        for picture, embeds in zip(talk.pictures, talk.embeds, strict=True):
            expected = reference.tokens_of(picture)
            vision = max(vision, float(np.abs(expected - embeds).max()))
            cosine = min(cosine, _cosine(expected, embeds))
        logits = reference.logits_of(talk.tokens[: max(talk.logits) + 1], talk.pictures)
        for index, mine in talk.logits.items():
            error = max(error, float(np.abs(logits[index] - mine).max()))
            scale = max(scale, float(np.abs(mine).max()))
        logits[:, model.manifest.image_token] = -np.inf  # never chosen
        # Every choice agrees given the same past, so the whole greedy texts agree, by induction.
        differ += sum(int(logits[index - 1].argmax()) != talk.tokens[index] for index in talk.generated)
        positions, tokens = positions + len(talk.logits), tokens + len(talk.generated)
    return ParityReport(
        episodes=len(held), pictures=sum(len(talk.pictures) for talk in held), positions=positions,
        vision_max_abs=vision, vision_min_cosine=cosine, logits_max_abs=error, logits_range=scale,
        greedy_tokens=tokens, greedy_differ=differ, limit=LIMITS[model.manifest.precision],
    )


def check_passed(report: ParityReport) -> None:
    """Raise CheckpointError with the figures when the report is not within its limit."""
    if not report.passed:
        raise CheckpointError(
            f"the exported graphs differ from transformers by more than {report.limit:g}: image tokens "
            f"{report.vision_max_abs:.2e} (cosine {report.vision_min_cosine:.6f}), logits {report.logits_max_abs:.2e}, "
            f"{report.greedy_differ} of {report.greedy_tokens} greedy tokens; nothing was written: report this"
        )


def hold(model: PolicyModel, episode: ParityEpisode) -> _Held:
    """Hold one conversation in a live session, recording all logits."""
    recorder, chat = _Recorder(model.decoder.engine), model.manifest.chat
    recording = copy(model.decoder)
    recording.engine = recorder
    session = Session(recording, recorder.new_cache())
    held = _Held(session.tokens, [], [], [], recorder.logits)
    session.append_markup(chat.system_open)
    session.append_text(episode.system)
    session.append_markup(chat.system_close)
    for turn in episode.turns:
        _append_turn(session, model, turn, held)
        start = len(session.tokens)
        said = session.generate(max_tokens=episode.max_tokens)
        held.generated.extend(range(start, start + len(said.tokens)))
        session.append_markup(chat.assistant_close)
    return held


def _append_turn(session: Session, model: PolicyModel, turn: Turn, held: _Held) -> None:
    chat = model.manifest.chat
    session.append_markup(chat.user_open)
    for segment in turn:
        if isinstance(segment, str):
            session.append_text(segment)
            continue
        image = model.vision.encode(segment)
        held.pictures.append(segment)
        held.embeds.append(image.embeds)
        session.append_markup(chat.image_open)
        session.append_image(image)
        session.append_markup(chat.image_close)
    session.append_markup(chat.user_close)
    session.append_markup(chat.assistant_open)


def random_episodes(model: PolicyModel, count: int = 3, *, seed: int = 0) -> list[ParityEpisode]:
    """Noise pictures of odd sizes and texts of random tokens: question, crop and text, text alone."""
    random = np.random.default_rng(seed)
    tokenizer, side = model.decoder.tokenizer, model.manifest.vision.factor

    def text(words: int) -> str:
        return random_text(tokenizer, random, words)

    def picture(most: int) -> Pixels:
        height, width = random.integers(2 * side, most * side, 2)
        return random.integers(0, 256, (height, width, 3), np.uint8)

    return [
        ParityEpisode(
            text(12),
            ((picture(10), text(8)), (text(5), picture(5), text(20)), (text(30),), (picture(3), picture(4), "")),
        )
        for _ in range(count)
    ]


def random_text(tokenizer: Tokenizer, random: np.random.Generator, words: int) -> str:
    """Random tokens of the vocabulary as text, special ones left out."""
    ids = random.integers(0, tokenizer.get_vocab_size(with_added_tokens=False), words)
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=True))


def _cosine(first: Floats, second: Floats) -> float:
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return float(((first * second).sum(axis=1) / np.maximum(lengths, 1e-12)).min())
