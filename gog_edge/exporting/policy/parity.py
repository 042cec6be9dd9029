"""Numerical comparison of an exported policy with transformers, over whole conversations.

The exported policy holds each conversation in a live session with a KV cache; transformers computes it from scratch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from tokenizers import Tokenizer

from gog_edge.engines.base import Floats
from gog_edge.errors import BudgetExceeded, CheckpointError, MalformedAction
from gog_edge.exporting.policy.checkpoint import Checkpoint
from gog_edge.exporting.policy.reference import Reference
from gog_edge.exporting.recording import min_cosine_similarity, record_logits
from gog_edge.policy.dialect.actions import ShownImages
from gog_edge.policy.dialect.dialect import Dialect
from gog_edge.policy.dialect.loader import DIALECT_FILE, load_dialect
from gog_edge.policy.manifest import PolicyManifest
from gog_edge.policy.model import PolicyModel
from gog_edge.policy.session import Session
from gog_edge.policy.vision import ImageTokens, VisionSpec, smart_resize
from gog_edge.types import Box, GazeSearch, Pixels, Size

Turn: TypeAlias = Sequence[str | Pixels]  # content of a user message, in order, without the chat format's strings


@dataclass(frozen=True, slots=True)
class ParityLimits:
    """Largest differences that are accepted between the graphs and transformers with the same rounded weights."""

    max_abs: float  # difference of logits, and of image tokens
    min_cosine: float  # of image tokens, and of logits
    prefill_cosine: float  # of the cache that the prefill graph fills, compared with unrounded weights
    same_tokens: bool  # whether the greedy tokens, and so the boxes, must be equal

    def accept(self, difference: Difference) -> bool:
        """Return whether a difference is within the limits."""
        # Each figure is compared by itself: `max` and `min` would drop a NaN.
        figures_ok = all(value <= self.max_abs for value in (difference.vision_max_abs, difference.logits_max_abs))
        cosines = (difference.vision_min_cosine, difference.logits_min_cosine)
        tokens_ok = difference.greedy_differ == 0 or not self.same_tokens
        return figures_ok and all(value >= self.min_cosine for value in cosines) and tokens_ok


# In int4 the operators quantize activations to 8 bits too: only the direction is compared, and tokens may differ.
LIMITS = {
    "fp32": ParityLimits(1e-3, 0.9999, 1.0, same_tokens=True),
    "fp16": ParityLimits(1e-3, 0.9999, 1.0, same_tokens=True),
    "int4": ParityLimits(np.inf, 0.98, 0.95, same_tokens=False),
}


@dataclass(frozen=True, slots=True)
class ParityEpisode:
    """A conversation: a system prompt, then user turns, each followed by a generated answer."""

    system: str
    turns: tuple[Turn, ...]
    max_tokens: int = 16  # generated after each turn


@dataclass(frozen=True, slots=True)
class Difference:
    """The largest differences between the exported policy and one reference. Field names are keys of the report."""

    vision_max_abs: float  # of image tokens and deepstack features
    vision_min_cosine: float
    logits_max_abs: float
    logits_min_cosine: float
    top1_agreement: float  # fraction of positions with the same most likely token
    greedy_differ: int  # generated tokens that transformers, from scratch, would have chosen differently
    boxes_min_iou: float  # of the boxes in turns that have one, parsed from both sides' tokens; 1 without any


@dataclass(frozen=True, slots=True)
class ParityReport:
    """The result of a parity check. Field names are keys of the manifest."""

    precision: str
    episodes: int
    pictures: int
    positions: int  # positions with compared logits: ends of prefills and appends, and decode steps
    greedy_tokens: int
    boxes: int  # turns in which the policy chose a region
    logits_range: float  # largest absolute logit, for scale
    # Compared with transformers with equally rounded weights: the error of the graphs. Without the prefill graph, whose
    # weights are rounded differently.
    graphs: Difference
    rounding: Difference  # compared with the checkpoint's own weights: the error of the precision; for information
    prefill_min_cosine: float  # of the keys or values of any layer; 1 without a prefill graph
    native: Difference | None = None  # as `graphs`, for the native graphs; None if they did not run
    adapter: float | None = None  # difference of logits between PEFT's unmerged and merged model; None if not merged

    @property
    def passed(self) -> bool:
        """Return whether something was compared, and the report is within the limits of its precision."""
        limits = LIMITS[self.precision]
        prefill_ok = self.prefill_min_cosine >= limits.prefill_cosine
        adapter_ok = self.adapter is None or self.adapter <= LIMITS["fp32"].max_abs
        graphs_ok = all(each is None or limits.accept(each) for each in (self.graphs, self.native))
        return self.positions > 0 and adapter_ok and prefill_ok and graphs_ok

    def to_json(self) -> dict[str, Any]:
        """Return the object "parity" of the manifest."""
        return {**asdict(self), "passed": self.passed}


def check_passed(report: ParityReport) -> None:
    """Raise CheckpointError with the figures if the report is not within its limits."""
    if report.passed:
        return
    limits = LIMITS[report.precision]
    if report.adapter is not None and not report.adapter <= LIMITS["fp32"].max_abs:
        raise CheckpointError(
            f"the logits of peft's merged model differ from those of the unmerged adapter by {report.adapter:.2e}; "
            "nothing was written: save the adapter again with the release of peft that trained it"
        )
    for which, found in (("exported graphs", report.graphs), ("graphs for the native operators", report.native)):
        if found is not None and not limits.accept(found):
            raise CheckpointError(
                f"the {which} differ from transformers by more than {report.precision} allows: image tokens "
                f"{found.vision_max_abs:.2e} (cosine {found.vision_min_cosine:.6f}), logits {found.logits_max_abs:.2e} "
                f"(cosine {found.logits_min_cosine:.6f}), {found.greedy_differ} of {report.greedy_tokens} greedy "
                "tokens; nothing was written: please report this"
            )
    raise CheckpointError(
        f"the prefill graph fills the cache differently from transformers: cosine {report.prefill_min_cosine:.6f}, "
        f"expected at least {limits.prefill_cosine}; nothing was written: please report this"
    )


def measure_parity(
    folder: Path, checkpoint: Checkpoint, episodes: Sequence[ParityEpisode] | None = None, *,
    threads: int | None = None,
) -> ParityReport:
    """Run the episodes with the exported policy and compare them with transformers.

    An adapter is not merged in the reference: PEFT computes its part beside that of the base weights. For formats that
    round weights, PEFT then merges it into the reference, which is compared with the unmerged one before it is rounded.

    Args:
        folder: policy folder.
        checkpoint: what it was exported from.
        episodes: None for random ones.
        threads: for ONNX Runtime; None for all cores.

    Raises:
        ArtifactError, BackendError: the policy cannot be opened.
        CheckpointError: transformers or PEFT cannot load the checkpoint, or something computes NaN.
    """
    # One side at a time: the memory may have room for one model only.
    transcripts, manifest, reader = _run_episodes(folder, episodes, threads)
    reference = Reference(checkpoint, manifest)
    rounding = graphs = _compare(transcripts, reference, reader)
    prefill = _compare_prefill(transcripts, reference) if manifest.weights.prefill else 1.0
    native = adapter = None
    if manifest.precision != "fp32":
        if checkpoint.adapter is not None:
            adapter = _merge_adapter(reference, transcripts)
        if manifest.runs_native:
            reference.round_weights(manifest.precision, manifest.weights.for_native_graphs())
            native = _compare(transcripts, reference, reader)
            del reference
            reference = Reference(checkpoint, manifest)
            reference.merge_adapter()
        reference.round_weights(manifest.precision, manifest.weights)
        has_cpu_layout = manifest.runs_native or manifest.weights.prefill is not None
        plain = _run_episodes(folder, episodes, threads, cpu_layout=False)[0] if has_cpu_layout else transcripts
        graphs = _compare(plain, reference, reader)
    turns = [(transcript, turn) for transcript in transcripts for turn in transcript.turns]
    return ParityReport(
        precision=manifest.precision, episodes=len(transcripts),
        pictures=sum(len(transcript.pictures) for transcript in transcripts),
        positions=sum(len(transcript.logits) for transcript in transcripts),
        greedy_tokens=sum(len(turn) for _, turn in turns),
        boxes=sum(reader.box(transcript.generated(turn), transcript.pictures) is not None
                  for transcript, turn in turns),
        logits_range=_logits_range(transcripts),
        graphs=graphs, rounding=rounding, prefill_min_cosine=prefill, native=native, adapter=adapter,
    )  # fmt: skip


def _logits_range(transcripts: Sequence[Transcript]) -> float:
    """Return the largest absolute logit. Raises CheckpointError if one is NaN or infinite."""
    largest = max(float(np.abs(row).max()) for transcript in transcripts for row in transcript.logits.values())
    if not all(np.isfinite(row).all() for transcript in transcripts for row in transcript.logits.values()):
        raise CheckpointError(
            "the exported policy computes logits that are NaN or infinite, though its weights are finite: its "
            "activations overflow; nothing was written: export an earlier checkpoint"
        )
    return largest


# --- the exported policy's side ------------------------------------------------------------------


@dataclass(slots=True)
class Transcript:
    """One conversation as a live session computed it."""

    tokens: list[int]
    pictures: list[Pixels]
    images: list[ImageTokens]
    turns: list[range]  # indices of generated tokens in `tokens`
    logits: dict[int, Floats]  # by the index of the token they follow
    states: Floats  # [2 * layers, kv_heads, n, head_dim] of the first turn's prompt without its last token
    prompt_pictures: int = 0  # pictures in that prompt

    def generated(self, turn: range) -> list[int]:
        """Return the tokens of one generated answer."""
        return [self.tokens[index] for index in turn]


def run_episode(model: PolicyModel, episode: ParityEpisode) -> Transcript:
    """Run one conversation in a live session and record all logits."""
    chat = model.manifest.chat
    decoder, recorder = record_logits(model.decoder)
    session = Session(decoder, recorder.new_cache())
    transcript = Transcript(session.tokens, [], [], [], {}, np.empty(0, np.float32))
    session.append_template(chat.system_open)
    session.append_text(episode.system)
    session.append_template(chat.system_close)
    for turn in episode.turns:
        _append_turn(session, model, turn, transcript)
        start = len(session.tokens)
        generated = session.generate(max_tokens=episode.max_tokens)
        if not transcript.turns:
            transcript.states = session.snapshot().states[:, :, : start - 1].copy()
            transcript.prompt_pictures = len(transcript.pictures)
        transcript.turns.append(range(start, start + len(generated.tokens)))
        session.append_template(chat.assistant_close)
    transcript.logits = recorder.by_token()
    return transcript


def _append_turn(session: Session, model: PolicyModel, turn: Turn, transcript: Transcript) -> None:
    chat = model.manifest.chat
    session.append_template(chat.user_open)
    for segment in turn:
        if isinstance(segment, str):
            session.append_text(segment)
            continue
        image = model.vision.encode(segment)
        transcript.pictures.append(segment)
        transcript.images.append(image)
        session.append_template(chat.image_open)
        session.append_image(image)
        session.append_template(chat.image_close)
    session.append_template(chat.user_close)
    session.append_template(chat.assistant_open)


def _run_episodes(
    folder: Path, episodes: Sequence[ParityEpisode] | None, threads: int | None, *, cpu_layout: bool = True
) -> tuple[list[Transcript], PolicyManifest, _BoxReader]:
    model = PolicyModel.open(folder, threads=threads, cpu_layout=cpu_layout)
    chosen = random_episodes(model) if episodes is None else episodes
    manifest = model.manifest
    dialect = load_dialect(folder / DIALECT_FILE).for_template(manifest.chat.assistant_open)
    reader = _BoxReader(model.decoder.tokenizer, dialect, manifest.vision, manifest.image_token)
    try:
        return [run_episode(model, episode) for episode in chosen], manifest, reader
    except BudgetExceeded as exc:
        raise CheckpointError(
            f"the conversations of the parity check do not fit the policy's context of {manifest.max_context} tokens; "
            "give a larger --context, or skip the check with --no-parity"
        ) from exc


def random_episodes(model: PolicyModel, count: int = 3, *, seed: int = 0) -> list[ParityEpisode]:
    """Return conversations with noise pictures and random tokens: a question, a crop and text, text, two crops."""
    random = np.random.default_rng(seed)
    tokenizer, factor = model.decoder.tokenizer, model.manifest.vision.factor

    def text(tokens: int) -> str:
        return random_text(tokenizer, random, tokens)

    def picture(max_tokens: int) -> Pixels:
        height, width = random.integers(2 * factor, max_tokens * factor, 2)
        return random.integers(0, 256, (height, width, 3), np.uint8)

    return [
        ParityEpisode(
            text(12),
            ((picture(10), text(8)), (text(5), picture(5), text(20)), (text(30),), (picture(3), picture(4), "")),
        )
        for _ in range(count)
    ]


def random_text(tokenizer: Tokenizer, random: np.random.Generator, tokens: int) -> str:
    """Return the text of random tokens of the vocabulary, without special ones."""
    ids = random.integers(0, tokenizer.get_vocab_size(with_added_tokens=False), tokens)
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=True))


# --- the comparison ------------------------------------------------------------------------------


@dataclass(slots=True)
class _Comparison:
    """The largest differences found so far."""

    vision_max_abs: float = 0.0
    vision_min_cosine: float = 1.0
    logits_max_abs: float = 0.0
    logits_min_cosine: float = 1.0
    positions: int = 0
    agreed: int = 0
    differ: int = 0
    boxes_min_iou: float = 1.0

    def add_picture(self, image: ImageTokens, expected: Floats) -> None:
        """Compare the tokens and deepstack features of one picture."""
        hidden = image.embeds.shape[1]
        parts = [image.embeds] if image.deepstack is None else [image.embeds, image.deepstack.reshape(-1, hidden)]
        rows = np.concatenate(parts)
        self.vision_max_abs = _larger(self.vision_max_abs, float(np.abs(expected - rows).max()))
        self.vision_min_cosine = _smaller(self.vision_min_cosine, min_cosine_similarity(expected, rows))

    def add_logits(self, transcript: Transcript, expected: Floats, reader: _BoxReader) -> None:
        """Compare the logits and generated tokens of one conversation; `expected` [n, vocab]."""
        for index, row in transcript.logits.items():
            cosine = min_cosine_similarity(expected[index][None], row[None])
            self.logits_max_abs = _larger(self.logits_max_abs, float(np.abs(expected[index] - row).max()))
            self.logits_min_cosine = _smaller(self.logits_min_cosine, cosine)
            self.positions += 1
            self.agreed += int(expected[index].argmax() == row.argmax())
        expected[:, reader.image_token] = -np.inf  # never generated
        choices = expected.argmax(axis=1)
        for turn in transcript.turns:
            # If every choice agrees given the same context, the whole greedy texts agree, by induction.
            own, theirs = transcript.generated(turn), [int(choices[index - 1]) for index in turn]
            self.differ += sum(a != b for a, b in zip(own, theirs, strict=True))
            box, other = (reader.box(tokens, transcript.pictures) for tokens in (own, theirs))
            if box is not None and box != other:  # equal boxes without area have an IoU of 0
                self.boxes_min_iou = min(self.boxes_min_iou, box.iou(other) if other is not None else 0.0)

    def difference(self) -> Difference:
        """Return the result. Raises CheckpointError if a figure is NaN or infinite."""
        found = Difference(
            self.vision_max_abs, self.vision_min_cosine, self.logits_max_abs, self.logits_min_cosine,
            self.agreed / max(self.positions, 1), self.differ, self.boxes_min_iou,
        )
        for key, value in asdict(found).items():
            if not np.isfinite(value):
                raise CheckpointError(
                    f"transformers or the exported graphs compute values that are NaN or infinite ({key}), though the "
                    "weights are finite: the activations overflow; export an earlier checkpoint"
                )
        return found


@dataclass(frozen=True, slots=True)
class _BoxReader:
    """A parser of the boxes in generated tokens."""

    tokenizer: Tokenizer
    dialect: Dialect
    vision: VisionSpec
    image_token: int

    def box(self, tokens: Sequence[int], pictures: Sequence[Pixels]) -> Box | None:
        """Return the region that a turn searches, in pixels of the first picture; None for any other action."""
        if not pictures:
            return None
        height, width = pictures[0].shape[:2]
        shown = ShownImages(given=Size(width, height), resized=smart_resize(Size(width, height), self.vision))
        try:
            action = self.dialect.parse(self.tokenizer.decode(list(tokens), skip_special_tokens=False), shown)
        except MalformedAction:
            return None
        return action.box if isinstance(action, GazeSearch) else None


def _compare(transcripts: Sequence[Transcript], reference: Reference, reader: _BoxReader) -> Difference:
    comparison = _Comparison()
    for transcript in transcripts:
        for picture, image in zip(transcript.pictures, transcript.images, strict=True):
            comparison.add_picture(image, reference.image_tokens(picture))
        logits = reference.logits(transcript.tokens[: max(transcript.logits) + 1], transcript.pictures)
        comparison.add_logits(transcript, logits, reader)
    return comparison.difference()


def _compare_prefill(transcripts: Sequence[Transcript], reference: Reference) -> float:
    """Return the smallest cosine of any layer's keys or values after the first turn's prompt."""
    smallest = 1.0
    for transcript in transcripts:
        tokens = transcript.tokens[: transcript.states.shape[2]]
        expected = reference.kv_states(tokens, transcript.pictures[: transcript.prompt_pictures])
        rows, own = (states.reshape(len(expected), -1) for states in (expected, transcript.states))
        smallest = _smaller(smallest, min_cosine_similarity(rows, own))
    return smallest


def _merge_adapter(reference: Reference, transcripts: Sequence[Transcript]) -> float:
    """Merge the reference's adapter; return the largest difference of logits between before and after."""
    conversations = [(transcript.tokens, transcript.pictures) for transcript in transcripts]
    unmerged = [reference.logits(tokens, pictures) for tokens, pictures in conversations]
    reference.merge_adapter()
    largest = 0.0
    for before, (tokens, pictures) in zip(unmerged, conversations, strict=True):
        largest = _larger(largest, float(np.abs(reference.logits(tokens, pictures) - before).max()))
    return largest


def _larger(first: float, second: float) -> float:
    """Return the larger number, or NaN if one is NaN; `max` would return the first."""
    return float(np.maximum(first, second))


def _smaller(first: float, second: float) -> float:
    """Return the smaller number, or NaN if one is NaN; `min` would return the first."""
    return float(np.minimum(first, second))
