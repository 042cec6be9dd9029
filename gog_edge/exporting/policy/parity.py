"""Does the exported policy say what transformers says? Measured over whole conversations, live against from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from tokenizers import Tokenizer

from gog_edge.engines.base import Floats
from gog_edge.errors import CheckpointError, MalformedAction
from gog_edge.exporting.policy.adapter import Adapter
from gog_edge.exporting.policy.checkpoint import Checkpoint
from gog_edge.exporting.quantization import dequantise, quantise
from gog_edge.exporting.recording import least_cosine, recorded
from gog_edge.exporting.torchvision_shim import import_torchvision
from gog_edge.policy.dialect.actions import Frame
from gog_edge.policy.dialect.dialect import Dialect
from gog_edge.policy.dialect.loader import load_dialect
from gog_edge.policy.manifest import DIALECT, Blocks, PolicyManifest, VisionSpec, WeightForms
from gog_edge.policy.model import PolicyModel
from gog_edge.policy.session import Session
from gog_edge.policy.vision import ImageTokens, smart_resize
from gog_edge.types import Box, GazeSearch, Pixels, Size

Turn: TypeAlias = Sequence[str | Pixels]  # what the user says, in order; the chat strings are put around it


@dataclass(frozen=True, slots=True)
class Gate:
    """How near the graphs must come to transformers with the same, rounded weights."""

    max_abs: float  # difference of logits, and of image tokens
    min_cosine: float  # of image tokens, and of logits
    prefill_cosine: float  # of what the graph for many tokens leaves in the cache, beside the checkpoint's own weights
    same_tokens: bool  # and so the same boxes

    def passes(self, found: Difference) -> bool:
        """Whether what was found is near enough."""
        near = max(found.vision_max_abs, found.logits_max_abs) <= self.max_abs
        alike = min(found.vision_min_cosine, found.logits_min_cosine) >= self.min_cosine
        return near and alike and (found.greedy_differ == 0 or not self.same_tokens)



# In int4 the engine rounds activations too, to 8 bits: directions count there, and tokens may differ.
GATES = {
    "fp32": Gate(1e-3, 0.9999, 1.0, same_tokens=True),
    "fp16": Gate(1e-3, 0.9999, 1.0, same_tokens=True),
    "int4": Gate(np.inf, 0.98, 0.95, same_tokens=False),
}


@dataclass(frozen=True, slots=True)
class ParityEpisode:
    """A conversation to be held on both sides: a turn, an answer, a turn, an answer."""

    system: str
    turns: tuple[Turn, ...]
    max_tokens: int = 16  # generated after each turn


@dataclass(frozen=True, slots=True)
class Difference:
    """How far the exported policy is from one reference."""

    vision_max_abs: float  # features for the decoder's first layers included
    vision_min_cosine: float
    logits_max_abs: float
    logits_min_cosine: float
    top1_agreement: float  # share of positions where the likeliest token is the same
    greedy_differ: int  # tokens that transformers, from scratch, would have chosen differently
    boxes_min_iou: float  # of the boxes in turns that hold one, read from both sides' tokens; 1 where there is none


@dataclass(frozen=True, slots=True)
class ParityReport:
    """What was measured; `passed` says whether it is within the precision's gate."""

    precision: str
    episodes: int
    pictures: int
    positions: int  # places where logits were compared: ends of prefills and appends, and decode steps
    greedy_tokens: int
    boxes: int  # turns in which the policy looked at a region
    logits_range: float  # greatest absolute logit, to read the differences
    # From transformers with weights rounded alike: what the graphs do. The one for many tokens is left out: its weights
    # are rounded otherwise than those that go on from its cache.
    graphs: Difference
    rounding: Difference  # from transformers with the checkpoint's own weights: what the precision costs; stated only
    prefill_min_cosine: float  # of the keys or values of any layer; 1 where there is no such graph
    native: Difference | None = None  # as `graphs`, of the graph for our own operators; None: none ran here

    @property
    def passed(self) -> bool:
        """Within the precision's gate."""
        gate = GATES[self.precision]
        filled = self.prefill_min_cosine >= gate.prefill_cosine
        return filled and all(found is None or gate.passes(found) for found in (self.graphs, self.native))

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {**asdict(self), "passed": self.passed}


@dataclass(slots=True)
class _Held:
    """One conversation as the live session held it."""

    tokens: list[int]
    pictures: list[Pixels]
    images: list[ImageTokens]
    turns: list[range]  # indices of generated tokens within `tokens`
    logits: dict[int, Floats]
    states: Floats  # [2 * layers, kv_heads, n, head_dim] of the first turn's prompt, less its last token
    opening: int = 0  # pictures in that prompt


class Reference:
    """The checkpoint in transformers, float32 on the CPU, everything computed from scratch."""

    def __init__(self, checkpoint: Checkpoint, manifest: PolicyManifest) -> None:
        import_torchvision()
        from transformers import Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
        from transformers.utils import logging

        quiet: Any = logging.disable_progress_bar
        quiet()
        kind: Any = Qwen3VLForConditionalGeneration if checkpoint.is_qwen3 else Qwen2_5_VLForConditionalGeneration
        self._model: Any = kind.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
        if checkpoint.adapter is not None:
            self._merge(checkpoint.adapter)
        spec = manifest.vision
        self.image_token = manifest.image_token
        self._processor: Any = Qwen2VLImageProcessorPil(
            size={"shortest_edge": spec.min_pixels, "longest_edge": spec.max_pixels},
            image_mean=list(spec.mean), image_std=list(spec.std), patch_size=spec.patch,
            temporal_patch_size=spec.temporal, merge_size=spec.merge,
        )

    def _merge(self, adapter: Adapter) -> None:
        for name, parameter in self._model.named_parameters():
            released = name.removeprefix("model.")
            parameter.data = torch.from_numpy(adapter.merge(released, parameter.data.numpy()))

    def round(self, precision: str, forms: WeightForms) -> None:
        """Round the weights as the export did."""
        for name, parameter in self._model.named_parameters():
            form = _form_of(name, parameter.dim(), forms)
            if form is None and precision == "fp16" and _form_of(name, parameter.dim(), _ANY) is not None:
                parameter.data = parameter.data.half().float()
            elif form is not None:
                weight = parameter.data.reshape(len(parameter), -1).numpy()
                rounded = dequantise(*quantise(weight, form), form, weight.shape[1])
                parameter.data = torch.from_numpy(rounded).reshape(parameter.shape)

    @torch.no_grad()
    def tokens_of(self, picture: Pixels) -> Floats:
        """One picture's tokens, and below them the features for the decoder's first layers, [(1 + layers) * n, hidden].
        """
        inputs = self._processor([picture], return_tensors="pt")
        output = self._model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
        deeper = getattr(output, "deepstack_features", None) or []
        return np.asarray(torch.cat([output.pooler_output, *deeper]).numpy(), np.float32)

    @torch.no_grad()
    def logits_of(self, tokens: Sequence[int], pictures: Sequence[Pixels]) -> Floats:
        """Logits [n, vocab] of a whole conversation in one pass, positions included."""
        ids = torch.tensor([list(tokens)])
        inputs = self._processor(list(pictures), return_tensors="pt") if pictures else {}
        kinds = (ids == self.image_token).int()
        output = self._model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds,
                             use_cache=False, **inputs)
        return np.asarray(output.logits[0].numpy(), np.float32)

    @torch.no_grad()
    def states_of(self, tokens: Sequence[int], pictures: Sequence[Pixels]) -> Floats:
        """Keys and values of every layer, [2 * layers, kv_heads, n, head_dim], the keys turned to their positions."""
        ids = torch.tensor([list(tokens)])
        inputs = self._processor(list(pictures), return_tensors="pt") if pictures else {}
        output = self._model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1,
                             mm_token_type_ids=(ids == self.image_token).int(), **inputs)
        layers = output.past_key_values.layers
        return np.concatenate([part.numpy() for layer in layers for part in (layer.keys, layer.values)])


_SOME = Blocks(8, 32)
_ANY = WeightForms(decoder=_SOME, head=_SOME, embeddings=_SOME, vision=_SOME)


def _form_of(name: str, dimensions: int, forms: WeightForms) -> Blocks | None:
    """How the export stores a parameter of transformers; None is floating point."""
    if dimensions < 2 or "pos_embed" in name:
        return None
    if name.startswith("model.visual."):
        return forms.vision
    if "lm_head" in name:
        return forms.head
    return forms.embeddings if "embed_tokens" in name else forms.decoder


@dataclass(slots=True)
class _Tally:
    """The worst of what was compared so far."""

    vision_max_abs: float = 0.0
    vision_min_cosine: float = 1.0
    logits_max_abs: float = 0.0
    logits_min_cosine: float = 1.0
    positions: int = 0
    agreed: int = 0
    differ: int = 0
    boxes_min_iou: float = 1.0

    def add_picture(self, mine: ImageTokens, expected: Floats) -> None:
        """Compare one picture's tokens and features."""
        hidden = mine.embeds.shape[1]
        parts = [mine.embeds] if mine.deepstack is None else [mine.embeds, mine.deepstack.reshape(-1, hidden)]
        whole = np.concatenate(parts)
        self.vision_max_abs = max(self.vision_max_abs, float(np.abs(expected - whole).max()))
        self.vision_min_cosine = min(self.vision_min_cosine, least_cosine(expected, whole))

    def add_logits(self, held: _Held, expected: Floats, reader: _Reader) -> None:
        """Compare the logits and what was said of one conversation; `expected` [n, vocab]."""
        for index, mine in held.logits.items():
            self.logits_max_abs = max(self.logits_max_abs, float(np.abs(expected[index] - mine).max()))
            self.logits_min_cosine = min(self.logits_min_cosine, least_cosine(expected[index][None], mine[None]))
            self.positions += 1
            self.agreed += int(expected[index].argmax() == mine.argmax())
        expected[:, reader.image_token] = -np.inf  # never chosen
        choices = expected.argmax(axis=1)
        for turn in held.turns:
            said, theirs = [held.tokens[at] for at in turn], [int(choices[at - 1]) for at in turn]
            # Every choice agrees given the same past, so the whole greedy texts agree, by induction.
            self.differ += sum(a != b for a, b in zip(said, theirs, strict=True))
            box, other = (reader.box(tokens, held.pictures) for tokens in (said, theirs))
            if box is not None and box != other:  # a box without an area overlaps nothing, itself neither
                self.boxes_min_iou = min(self.boxes_min_iou, box.iou(other) if other is not None else 0.0)

    def difference(self) -> Difference:
        """What was found."""
        return Difference(
            self.vision_max_abs, self.vision_min_cosine, self.logits_max_abs, self.logits_min_cosine,
            self.agreed / max(self.positions, 1), self.differ, self.boxes_min_iou,
        )


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads boxes out of tokens, as the loop would."""

    tokenizer: Tokenizer
    dialect: Dialect
    vision: VisionSpec
    image_token: int

    def box(self, tokens: Sequence[int], pictures: Sequence[Pixels]) -> Box | None:
        """The region that a turn looks at, in pixels of the first picture; None when it does something else."""
        if not pictures:
            return None
        height, width = pictures[0].shape[:2]
        frame = Frame(given=Size(width, height), resized=smart_resize(Size(width, height), self.vision))
        try:
            action = self.dialect.parse(self.tokenizer.decode(list(tokens), skip_special_tokens=False), frame)
        except MalformedAction:
            return None
        return action.box if isinstance(action, GazeSearch) else None


def measure_parity(folder: Path, checkpoint: Checkpoint, episodes: Sequence[ParityEpisode] | None = None, *,
                   threads: int | None = None) -> ParityReport:
    """Hold the episodes on both sides and compare. Random ones are made when none are given."""
    held, manifest, reader = _hold_all(folder, episodes, threads)  # one side at a time: both need the memory
    reference = Reference(checkpoint, manifest)
    rounding = graphs = _compare(held, reference, reader).difference()
    filled = _compare_states(held, reference) if manifest.weights.prefill else 1.0
    native = None
    if manifest.precision != "fp32":
        if manifest.native_here:
            reference.round(manifest.precision, manifest.weights.native())
            native = _compare(held, reference, reader).difference()
            del reference  # two would not fit
            reference = Reference(checkpoint, manifest)
        reference.round(manifest.precision, manifest.weights)
        second = manifest.native_here or manifest.weights.prefill is not None
        plain = _hold_all(folder, episodes, threads, second=False)[0] if second else held
        graphs = _compare(plain, reference, reader).difference()
    said = [(talk, turn) for talk in held for turn in talk.turns]
    return ParityReport(
        precision=manifest.precision, episodes=len(held), pictures=sum(len(talk.pictures) for talk in held),
        positions=sum(len(talk.logits) for talk in held), greedy_tokens=sum(len(turn) for _, turn in said),
        boxes=sum(reader.box([talk.tokens[at] for at in turn], talk.pictures) is not None for talk, turn in said),
        logits_range=max(float(np.abs(mine).max()) for talk in held for mine in talk.logits.values()),
        graphs=graphs, rounding=rounding, prefill_min_cosine=filled, native=native,
    )


def _compare_states(held: Sequence[_Held], reference: Reference) -> float:
    """The least cosine of any layer's keys or values after the first turn's prompt."""
    least = 1.0
    for talk in held:
        count = talk.states.shape[2]
        expected = reference.states_of(talk.tokens[:count], talk.pictures[: talk.opening])
        least = min(least, least_cosine(expected.reshape(len(expected), -1), talk.states.reshape(len(expected), -1)))
    return least


def _compare(held: Sequence[_Held], reference: Reference, reader: _Reader) -> _Tally:
    tally = _Tally()
    for talk in held:
        for picture, image in zip(talk.pictures, talk.images, strict=True):
            tally.add_picture(image, reference.tokens_of(picture))
        logits = reference.logits_of(talk.tokens[: max(talk.logits) + 1], talk.pictures)
        tally.add_logits(talk, logits, reader)
    return tally


def _hold_all(
    folder: Path, episodes: Sequence[ParityEpisode] | None, threads: int | None, *, second: bool = True
) -> tuple[list[_Held], PolicyManifest, _Reader]:
    model = PolicyModel.open(folder, threads=threads, second=second)
    chosen = random_episodes(model) if episodes is None else episodes
    manifest = model.manifest
    dialect = load_dialect(folder / DIALECT).after(manifest.chat.assistant_open)
    reader = _Reader(model.decoder.tokenizer, dialect, manifest.vision, manifest.image_token)
    return [hold(model, episode) for episode in chosen], manifest, reader


def check_passed(report: ParityReport) -> None:
    """Raise CheckpointError with the figures when the report is not within its limit."""
    if report.passed:
        return
    gate = GATES[report.precision]
    for which, found in (("exported graphs", report.graphs), ("graphs for our own operators", report.native)):
        if found is not None and not gate.passes(found):
            raise CheckpointError(
                f"the {which} differ from transformers by more than {report.precision} may: image tokens "
                f"{found.vision_max_abs:.2e} (cosine {found.vision_min_cosine:.6f}), logits {found.logits_max_abs:.2e} "
                f"(cosine {found.logits_min_cosine:.6f}), {found.greedy_differ} of {report.greedy_tokens} greedy "
                "tokens; nothing was written: report this"
            )
    raise CheckpointError(
        f"the graph for many tokens fills the cache otherwise than transformers: cosine {report.prefill_min_cosine:.6f}"
        f", {gate.prefill_cosine} is wanted; nothing was written: report this"
    )


def hold(model: PolicyModel, episode: ParityEpisode) -> _Held:
    """Hold one conversation in a live session, recording all logits."""
    chat = model.manifest.chat
    decoder, recorder = recorded(model.decoder)
    session = Session(decoder, recorder.new_cache())
    held = _Held(session.tokens, [], [], [], {}, np.empty(0, np.float32))
    session.append_markup(chat.system_open)
    session.append_text(episode.system)
    session.append_markup(chat.system_close)
    for turn in episode.turns:
        _append_turn(session, model, turn, held)
        start = len(session.tokens)
        said = session.generate(max_tokens=episode.max_tokens)
        if not held.turns:
            held.states, held.opening = session.snapshot().states[:, :, : start - 1].copy(), len(held.pictures)
        held.turns.append(range(start, start + len(said.tokens)))
        session.append_markup(chat.assistant_close)
    held.logits = recorder.by_token()
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
        held.images.append(image)
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
