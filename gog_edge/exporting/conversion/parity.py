"""Numerical comparison of converted graphs with the bundle's own: pictures, texts and a scripted conversation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnxruntime as ort

from gog_edge.bundle import DEFAULT_BUNDLE, Bundle, Sample, read_samples
from gog_edge.engines.base import DecoderEngine, Floats, GraphEngine
from gog_edge.engines.manifest import CACHE_FOLDER, DECODER, IMAGE, TEXT, VISION
from gog_edge.engines.onnx import unsupported_reason
from gog_edge.engines.onnx.decoder import OrtDecoder
from gog_edge.engines.onnx.device_decoder import ConvertedDecoder
from gog_edge.engines.onnx.session import OrtGraph, open_session
from gog_edge.errors import ArtifactError, BackendError, CheckpointError
from gog_edge.exporting.conversion.convert import Kind
from gog_edge.exporting.recording import min_cosine_similarity, record_logits
from gog_edge.picture import decode_picture
from gog_edge.policy.dialect.loader import DIALECT_FILE, load_dialect
from gog_edge.policy.manifest import DECODER_GRAPH, ChatFormat, TextSpec
from gog_edge.policy.model import Decoder, PolicyModel
from gog_edge.policy.session import Session
from gog_edge.policy.vision import ImageTokens, VisionEncoder
from gog_edge.retrieval.encoder import Encoder
from gog_edge.types import Pixels, Vectors

T = TypeVar("T")

MAX_SAMPLES = 3  # sample pictures that are encoded, whole and cropped
MAX_PIXELS = 2**17  # of a picture for the vision tower: enough for several windows; large models need seconds for each
ANSWER_TOKENS = 4  # of each generated answer; every token is a step, which takes seconds with large models
DRAFT_TOKENS = 6  # of the speculative step


@dataclass(frozen=True, slots=True)
class ConversionLimits:
    """Largest differences that are accepted between a policy's converted graphs and its own."""

    vision_cosine: float  # smallest cosine similarity of any image token
    logits_cosine: float  # smallest cosine similarity of the logits at any position
    divergence: float  # Kullback-Leibler divergence in nats, mean over the positions
    regret: float  # nats: largest loss of log probability, in the bundle's own graphs, by the other's greedy choice


EMBEDDING_COSINE = 0.999  # of an encoder: fp16 alone gives 0.999999. A pack must be searchable with either.

# Far above what fp16 gives over 6 layers (divergence 5e-6, cosines 0.99999), since errors grow with depth, and below
# what defects give (one layer's attention scale off by a half: divergence 0.08, cosine 0.975). In int4 the bundle's own
# graphs quantize activations to 8 bits and the converted ones do not. This difference is 7e-4, 0.9991, and 0.9997 for
# image tokens over 6 layers; 7e-3, 0.9936, 0.9989 and a regret of 0.19 over the 28 layers of a 7B with random weights.
LIMITS = {
    "fp32": ConversionLimits(0.999, 0.999, 1e-3, 0.1),
    "fp16": ConversionLimits(0.999, 0.999, 1e-3, 0.1),
    "int4": ConversionLimits(0.98, 0.98, 0.05, 1.0),
}
_CHECKS = (  # graph, measured figure, its limit
    (VISION, "cosine", "vision_cosine"), (DECODER, "logits_cosine", "logits_cosine"),
    (DECODER, "divergence", "divergence"), (DECODER, "regret", "regret"),
    (IMAGE, "cosine", "embedding_cosine"), (TEXT, "cosine", "embedding_cosine"),
)  # fmt: skip


def check_comparable(bundle: Bundle, kind: Kind) -> None:
    """Raise BackendError if the installed ONNX Runtime cannot run the bundle's own graphs."""
    reason = unsupported_reason(ort.__version__) if isinstance(bundle.policy, Path) else ""
    if reason:
        raise BackendError(
            f"the converted graphs cannot be compared here: {reason}; build with --no-parity, and compare them on any "
            f"machine with a newer release: gog-edge export check BUNDLE --engine-graphs {kind}"
        )


def measure_converted(bundle: Bundle, converted: Mapping[str, Path], kind: Kind, *, context: int) -> dict[str, Any]:
    """Run converted graphs and the bundle's own on the same pictures, texts and conversation.

    Args:
        bundle: the bundle whose graphs were converted. Its samples are the input; without samples, the atlas's are.
        converted: graphs to measure, by the names decoder, vision, image and text.
        kind: what they were converted for.
        context: tokens that the decoder's KV cache has room for.

    Returns:
        The object "parity" of `engines.json`: figures of each graph, and the limits that `check_converted` applies.

    Raises:
        ArtifactError: a part of the bundle or a sample cannot be read.
        BackendError: ONNX Runtime cannot load a graph.
        BudgetExceeded: the conversation does not fit into the context.
    """
    samples = bundle.samples or read_samples(DEFAULT_BUNDLE / "samples")
    views, texts = _views(samples[:MAX_SAMPLES]), _texts(samples)
    report: dict[str, Any] = {"kind": kind, "limits": {"embedding_cosine": EMBEDDING_COSINE}}
    if isinstance(bundle.policy, Path) and {DECODER, VISION} & converted.keys():
        report |= _measure_policy(bundle.policy, converted, context, views, texts, report["limits"])
    if {IMAGE, TEXT} & converted.keys():
        report |= _measure_encoder(bundle.encoder, converted, views, texts)
    return report


def check_converted(report: Mapping[str, Any]) -> None:
    """Raise CheckpointError naming the first figure of a report that is outside its limit."""
    limits = report["limits"]
    for graph, figure, limit in _CHECKS:
        found = report.get(graph, {}).get(figure)
        if found is None:
            continue
        is_minimum = figure.endswith("cosine")
        passed = found >= limits[limit] if is_minimum else found <= limits[limit]  # false for NaN
        if not passed:
            raise CheckpointError(
                f"the {graph} converted as '{report['kind']}' differs from the bundle's own: {figure} is {found:.5g}, "
                f"expected {'at least' if is_minimum else 'at most'} {limits[limit]}; please report this"
            )


def _views(samples: Sequence[Sample]) -> list[Pixels]:
    """Return each picture, and its centre as a policy might crop it."""
    views: list[Pixels] = []
    for sample in samples:
        pixels = decode_picture(sample.picture.read_bytes()).pixels
        height, width = pixels.shape[:2]
        views += [pixels, pixels[height // 4 : -(-3 * height // 4), width // 3 : -(-2 * width // 3)]]
    return views


def _texts(samples: Sequence[Sample]) -> list[str]:
    return [text for sample in samples for text in (sample.title, *sample.questions)]


# --- measurements --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Graphs:
    """A set of engines of a folder's own graphs, some replaced by converted ones.

    The policy's prefill graph is not used, since its weights are quantized differently, and no cache files are written.
    """

    folder: Path
    converted: Mapping[str, Path]

    def open_graph(self, name: str) -> GraphEngine:
        if name in self.converted:  # without optimization: that of ONNX Runtime 1.31 crashes on an fp16 text tower
            return OrtGraph(self.converted[name], optimized=True)
        return OrtGraph(self.folder / f"{name}.onnx")

    def open_decoder(self, _: TextSpec, context: int) -> DecoderEngine:
        return OrtDecoder(self.folder / DECODER_GRAPH, capacity=context)

    def cache(self) -> Path:
        return self.folder / CACHE_FOLDER


def _measure_policy(
    folder: Path, converted: Mapping[str, Path], context: int, views: Sequence[Pixels], texts: Sequence[str],
    limits: dict[str, float],
) -> dict[str, Any]:
    own_graphs: Any = _Graphs(folder, {})  # has the methods of an EngineSet that a policy uses
    model = PolicyModel.open(folder, context=context, engines=own_graphs)
    limits |= asdict(LIMITS[model.manifest.precision])
    spec, decoder = model.manifest.vision, model.decoder
    max_pixels = min(spec.max_pixels, MAX_PIXELS, max(spec.min_pixels, context // 8 * spec.factor**2))
    images = [model.vision.encode(view, max_pixels) for view in views]
    script = Script(load_dialect(folder / DIALECT_FILE).system_prompt, texts, images[:2])
    sampler = ReplaySampler(decoder.eos | {decoder.image_token})
    own = run_script(decoder, script, sampler) if DECODER in converted else None
    del model
    report: dict[str, Any] = {}
    if own is not None:
        del decoder.engine  # the memory may have room for one decoder only
        # Without prepacked weights, an int4 decoder of ONNX Runtime takes no more memory than the one before.
        decoder.engine = ConvertedDecoder(open_session(converted[DECODER]), converted[DECODER])
        new = run_script(decoder, script, sampler)
        report[DECODER] = {"tokens": len(sampler.tokens), **_compare_logits(own, new)}
    del decoder
    if VISION in converted:
        tower = VisionEncoder(_Graphs(folder, converted).open_graph(VISION), spec)
        encoded = [tower.encode(view, max_pixels) for view in views]
        report[VISION] = _compare_rows(_token_rows(images), _token_rows(encoded))
    return report


def _measure_encoder(
    folder: Path, converted: Mapping[str, Path], views: Sequence[Pixels], texts: Sequence[str]
) -> dict[str, Any]:
    own = Encoder.open(folder)
    graphs: Any = _Graphs(folder, converted)  # has the method of an EngineSet that an encoder uses
    new = Encoder.open(folder, engines=graphs)
    report: dict[str, Any] = {}
    if IMAGE in converted:
        report[IMAGE] = _compare_rows(own.embed_images(views), _embed(new.embed_images, views, own.dim))
    if TEXT in converted:
        report[TEXT] = _compare_rows(own.embed_texts(texts), _embed(new.embed_texts, texts, own.dim))
    return report


def _embed(embed: Callable[[Sequence[T]], Vectors], inputs: Sequence[T], dim: int) -> Vectors:
    """Return the vectors of a converted graph; NaN, which no limit passes, where the encoder refuses them."""
    try:
        return embed(inputs)
    except ArtifactError:
        return np.full((len(inputs), dim), np.nan, np.float32)


def _token_rows(images: Sequence[ImageTokens]) -> Floats:
    """Return image tokens and deepstack features as rows [n, hidden]."""
    parts = [part for image in images for part in (image.embeds, image.deepstack) if part is not None]
    return np.concatenate([part.reshape(-1, part.shape[-1]) for part in parts])


def _compare_rows(own: Floats, new: Floats) -> dict[str, Any]:
    return {"rows": len(own), "cosine": min_cosine_similarity(own, new), "max_abs": float(np.abs(own - new).max())}


def _compare_logits(own: Floats, new: Floats) -> dict[str, Any]:
    own_log, new_log = _log_softmax(own), _log_softmax(new)
    divergence = (np.exp(own_log) * (own_log - new_log)).sum(axis=1)
    regret = own.max(axis=1) - np.take_along_axis(own, new.argmax(axis=1)[:, None], axis=1)[:, 0]
    return {
        "positions": len(own), "logits_cosine": min_cosine_similarity(own, new),
        "divergence": float(divergence.mean()), "divergence_max": float(divergence.max()),
        "regret": float(regret.max()), "same_likeliest": float((regret == 0).mean()),
        "max_abs": float(np.abs(own - new).max()), "range": float(np.abs(own).max()),
    }  # fmt: skip


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


# --- the scripted conversation -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Script:
    """The inputs of the conversation."""

    system: str
    texts: Sequence[str]  # used in rotation
    images: Sequence[ImageTokens]  # a picture and a crop

    def text(self, turn: int) -> str:
        """Return the text of a turn."""
        return self.texts[turn % len(self.texts)]


@dataclass(slots=True)
class ReplaySampler:
    """A sampler that decodes greedily in the first run and repeats the same tokens in the second."""

    excluded: frozenset[int]  # an end token would end the first run, and not the second
    tokens: list[int] = field(default_factory=list)
    position: int = 0  # of the next token in `tokens`

    def sample(self, logits: Floats, generated: Sequence[int]) -> int:
        """Return the next token; record it if it is new."""
        if self.position == len(self.tokens):
            allowed = logits.copy()
            allowed[list(self.excluded)] = -np.inf
            self.tokens.append(int(allowed.argmax()))
        self.position += 1
        return self.tokens[self.position - 1]


def run_script(
    decoder: Decoder, script: Script, sampler: ReplaySampler, engine: DecoderEngine | None = None
) -> Floats:
    """Run the conversation and return the logits [rows, vocab] of all steps, in order; `engine` replaces the decoder's.

    It covers all uses of the KV cache: a prompt with a picture, decoding, a rollback, a crop appended after it, a
    speculative step of several rows, and a fork that continues next to the original session.
    """
    twin, recorder = record_logits(decoder, engine)
    chat = decoder.manifest.chat
    sampler.position = 0
    session = Session(twin, recorder.new_cache())
    session.append_template(chat.system_open)
    session.append_text(script.system)
    session.append_template(chat.system_close)
    _append_turn(session, chat, script.text(0), script.images[0])
    _generate(session, chat, sampler)
    mark = session.savepoint()
    _append_turn(session, chat, script.text(1))
    session.prefill()
    session.rollback(mark)
    _append_turn(session, chat, script.text(2), script.images[-1])
    session.step_with_drafts(decoder.encode(script.text(2))[:DRAFT_TOKENS])
    _append_turn(session, chat, script.text(3))
    _generate(session, chat, sampler)
    fork = Session(twin, recorder.new_cache())
    fork.fork_from(session)
    for branch, turn in ((fork, 4), (session, 5)):
        _append_turn(branch, chat, script.text(turn))
        _generate(branch, chat, sampler)
    return np.concatenate([logits for _, logits in recorder.steps])


def _append_turn(session: Session, chat: ChatFormat, text: str, image: ImageTokens | None = None) -> None:
    session.append_template(chat.user_open)
    if image is not None:
        session.append_template(chat.image_open)
        session.append_image(image)
        session.append_template(chat.image_close)
    session.append_text(text)
    session.append_template(chat.user_close)
    session.append_template(chat.assistant_open)


def _generate(session: Session, chat: ChatFormat, sampler: ReplaySampler) -> None:
    session.generate(max_tokens=ANSWER_TOKENS, sampler=sampler)
    session.append_template(chat.assistant_close)
