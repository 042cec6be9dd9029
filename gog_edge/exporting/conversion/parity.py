"""One conversation that does with a cache all that serving does: said by one decoder, said after it by another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from gog_edge.bundle import DEFAULT_BUNDLE, Bundle, Sample, read_samples
from gog_edge.engines.base import DecoderEngine, Floats, GraphEngine
from gog_edge.engines.manifest import DECODER, IMAGE, TEXT, VISION
from gog_edge.engines.onnx.decoder import OrtDecoder
from gog_edge.engines.onnx.device_decoder import LiftedDecoder
from gog_edge.engines.onnx.prepacked import CACHE
from gog_edge.engines.onnx.session import OrtGraph, open_session, too_old
from gog_edge.errors import BackendError, CheckpointError
from gog_edge.exporting.conversion.convert import Kind
from gog_edge.exporting.recording import least_cosine, recorded
from gog_edge.picture import decode_picture
from gog_edge.policy.dialect.loader import load_dialect
from gog_edge.policy.manifest import DECODER_GRAPH, DIALECT, ChatFormat, TextSpec
from gog_edge.policy.model import Decoder, PolicyModel
from gog_edge.policy.session import Session
from gog_edge.policy.vision import ImageTokens, VisionEncoder
from gog_edge.retrieval.encoder import Encoder
from gog_edge.types import Pixels

ANSWER = 4  # tokens of an answer: each is a step of its own, and those of large models take seconds
GUESSES = 6  # tokens of a draft


@dataclass(frozen=True, slots=True)
class Talk:
    """What is said to the policy."""

    system: str
    texts: Sequence[str]  # taken in turns
    images: Sequence[ImageTokens]  # a whole picture and a crop

    def text(self, turn: int) -> str:
        """What is asked in a turn."""
        return self.texts[turn % len(self.texts)]


@dataclass(slots=True)
class Script:
    """A chooser that takes the likeliest token, and on a second reading says the same tokens again."""

    never: frozenset[int]  # an end token would end the first reading, and not the second
    tokens: list[int] = field(default_factory=list)
    place: int = 0

    def choose(self, logits: Floats, said: Sequence[int]) -> int:
        """The next token, written down if it is new."""
        if self.place == len(self.tokens):
            allowed = logits.copy()
            allowed[list(self.never)] = -np.inf
            self.tokens.append(int(allowed.argmax()))
        self.place += 1
        return self.tokens[self.place - 1]


def hold(decoder: Decoder, talk: Talk, script: Script, engine: DecoderEngine | None = None) -> Floats:
    """Hold the conversation on the decoder's own engine or another -> logits [rows, vocab] of all steps, in order.

    Prompt with a picture; decoding; a passage that is taken back; a crop after it; a draft of several rows; a fork
    that goes on, and the first conversation beside it.
    """
    twin, recorder = recorded(decoder, engine)
    chat = decoder.manifest.chat
    script.place = 0
    session = Session(twin, recorder.new_cache())
    session.append_markup(chat.system_open)
    session.append_text(talk.system)
    session.append_markup(chat.system_close)
    _ask(session, chat, talk.text(0), talk.images[0])
    _answer(session, chat, script)
    mark = session.mark()
    _ask(session, chat, talk.text(1))
    session.prefill()
    session.rollback(mark)
    _ask(session, chat, talk.text(2), talk.images[-1])
    session.look_ahead(decoder.encode(talk.text(2))[:GUESSES])
    _ask(session, chat, talk.text(3))
    _answer(session, chat, script)
    fork = Session(twin, recorder.new_cache())
    fork.fork_from(session)
    for branch, turn in ((fork, 4), (session, 5)):
        _ask(branch, chat, talk.text(turn))
        _answer(branch, chat, script)
    return np.concatenate([logits for _, logits in recorder.steps])


def _ask(session: Session, chat: ChatFormat, text: str, image: ImageTokens | None = None) -> None:
    session.append_markup(chat.user_open)
    if image is not None:
        session.append_markup(chat.image_open)
        session.append_image(image)
        session.append_markup(chat.image_close)
    session.append_text(text)
    session.append_markup(chat.user_close)
    session.append_markup(chat.assistant_open)


def _answer(session: Session, chat: ChatFormat, script: Script) -> None:
    session.generate(max_tokens=ANSWER, chooser=script)
    session.append_markup(chat.assistant_close)


PICTURES = 3  # samples that are looked at, whole and in part
MOST_PIXELS = 2**17  # of a picture that a tower sees: several windows, and large models take seconds for each


@dataclass(frozen=True, slots=True)
class Limit:
    """How near a policy's rewritten graphs must come; embeddings of the encoder have one limit for all."""

    vision_cosine: float  # least of any image token
    logits_cosine: float  # least of any position
    divergence: float  # Kullback-Leibler, nats, mean over the positions: what the policy may say otherwise
    regret: float  # nats, the most: by how much what the other would say is less likely, as the bundle's own sees it


EMBEDDING_COSINE = 0.999  # half precision alone gives 0.999999; packs that were built with either must serve both

# Far above what half precision gave over 6 layers (divergence 5e-6, cosines 0.99999), since errors grow with layers,
# and below what faults give (the scale of one layer's attention off by a half: divergence 0.08, cosine 0.975). In int4
# the bundle's own graphs round what they multiply to 8 bits, and the rewritten ones do not: they differ by that (7e-4,
# 0.9991, image tokens 0.9997 over 6 layers; 7e-3, 0.9936, 0.9989 over the 28 of a 7B of random weights, regret 0.19).
LIMITS = {
    "fp32": Limit(0.999, 0.999, 1e-3, 0.1),
    "fp16": Limit(0.999, 0.999, 1e-3, 0.1),
    "int4": Limit(0.98, 0.98, 0.05, 1.0),
}
_BOUNDS = (  # graph, figure, limit
    (VISION, "cosine", "vision_cosine"), (DECODER, "logits_cosine", "logits_cosine"),
    (DECODER, "divergence", "divergence"), (DECODER, "regret", "regret"),
    (IMAGE, "cosine", "embedding_cosine"), (TEXT, "cosine", "embedding_cosine"),
)  # fmt: skip


def check_comparable(bundle: Bundle, kind: Kind) -> None:
    """Raise BackendError where ONNX Runtime here is too old for the bundle's own graphs."""
    trouble = too_old(ort.__version__) if isinstance(bundle.policy, Path) else ""
    if trouble:
        raise BackendError(
            f"the graphs cannot be compared here: {trouble}; build with --no-parity, and compare them on any machine "
            f"with a newer one: python -m export.check_lifted BUNDLE --kind {kind}"
        )


def measure_lifted(bundle: Bundle, lifted: Mapping[str, Path], kind: Kind, *, context: int) -> dict[str, Any]:
    """Run rewritten graphs and the bundle's own over the same pictures, texts and conversation.

    Args:
        bundle: whose graphs they were made from, and whose samples are looked at; the atlas's where it has none.
        lifted: of the names decoder, vision, image and text, those to measure; a decoder needs no vision beside it.
        kind: what they were rewritten for.
        context: tokens that the decoder's cache holds.

    Returns:
        A plain object for `engines.json`: figures of each graph, and the limits that `check_lifted` holds them to.

    Raises:
        ArtifactError: a part of the bundle or a sample cannot be read.
        BackendError: ONNX Runtime cannot load a graph.
        BudgetExceeded: the conversation does not fit the context.
    """
    samples = bundle.samples or read_samples(DEFAULT_BUNDLE / "samples")
    views = _views(samples[:PICTURES])
    report: dict[str, Any] = {"kind": kind, "limits": {"embedding_cosine": EMBEDDING_COSINE}}
    if isinstance(bundle.policy, Path) and {DECODER, VISION} & lifted.keys():
        report |= _measure_policy(bundle.policy, lifted, kind, context, views, _texts(samples), report["limits"])
    if {IMAGE, TEXT} & lifted.keys():
        report |= _measure_encoder(bundle.encoder, lifted, views, _texts(samples))
    return report


def check_lifted(report: Mapping[str, Any]) -> None:
    """Raise CheckpointError with the figure that misses its limit, if one does."""
    limits = report["limits"]
    for graph, figure, name in _BOUNDS:
        found = report.get(graph, {}).get(figure)
        if found is None:
            continue
        least = figure.endswith("cosine")
        if not (found >= limits[name] if least else found <= limits[name]):  # so written that what is no number fails
            raise CheckpointError(
                f"the {graph} rewritten as '{report['kind']}' differs from the bundle's own: {figure} is {found:.5g}, "
                f"{'at least' if least else 'at most'} {limits[name]} was expected; report this"
            )


def _views(samples: Sequence[Sample]) -> list[Pixels]:
    """Each picture whole, and the middle of it as a policy might crop it."""
    views: list[Pixels] = []
    for sample in samples:
        pixels = decode_picture(sample.picture.read_bytes()).pixels
        height, width = pixels.shape[:2]
        views += [pixels, pixels[height // 4 : -(-3 * height // 4), width // 3 : -(-2 * width // 3)]]
    return views


def _texts(samples: Sequence[Sample]) -> list[str]:
    return [text for sample in samples for text in (sample.title, *sample.questions)]


def _measure_policy(folder: Path, lifted: Mapping[str, Path], kind: Kind, context: int, views: Sequence[Pixels],
                    texts: Sequence[str], limits: dict[str, float]) -> dict[str, Any]:
    own_graphs: Any = _Graphs(folder, {})  # what a policy asks of built engines
    model = PolicyModel.open(folder, context=context, engines=own_graphs)
    limits |= asdict(LIMITS[model.manifest.precision])
    spec, decoder = model.manifest.vision, model.decoder
    most = min(spec.max_pixels, MOST_PIXELS, max(spec.min_pixels, context // 8 * spec.factor**2))
    images = [model.vision.encode(view, most) for view in views]
    talk = Talk(load_dialect(folder / DIALECT).system_prompt, texts, images[:2])
    script = Script(decoder.eos | {decoder.image_token})
    own = hold(decoder, talk, script) if DECODER in lifted else None
    del model
    report: dict[str, Any] = {}
    if own is not None:
        del decoder.engine  # the memory holds one
        # In four bits ONNX Runtime multiplies with weights as they are stored: it takes no more memory than the first.
        decoder.engine = LiftedDecoder(open_session(lifted[DECODER]), lifted[DECODER])
        report[DECODER] = {"tokens": len(script.tokens), **_compare_logits(own, hold(decoder, talk, script))}
    del decoder
    if VISION in lifted:
        tower = VisionEncoder(_Graphs(folder, lifted).open_graph(VISION), spec)
        report[VISION] = _compare_rows(_rows(images), _rows([tower.encode(view, most) for view in views]))
    return report


def _measure_encoder(folder: Path, lifted: Mapping[str, Path], views: Sequence[Pixels],
                     texts: Sequence[str]) -> dict[str, Any]:
    own = Encoder.open(folder)
    graphs: Any = _Graphs(folder, lifted)  # what an encoder asks of built engines
    new = Encoder.open(folder, engines=graphs)
    report: dict[str, Any] = {}
    if IMAGE in lifted:
        report[IMAGE] = _compare_rows(own.embed_images(views), new.embed_images(views))
    if TEXT in lifted:
        report[TEXT] = _compare_rows(own.embed_texts(texts), new.embed_texts(texts))
    return report


@dataclass(frozen=True, slots=True)
class _Graphs:
    """A folder's own graphs, but for those that were rewritten; nothing is kept beside them for this processor.

    The decoder's graph for many tokens is left out: its weights are rounded otherwise.
    """

    folder: Path
    lifted: Mapping[str, Path]

    def open_graph(self, name: str) -> GraphEngine:
        if name in self.lifted:  # as it stands: ONNX Runtime 1.31's optimiser crashes on a text tower in half precision
            return OrtGraph(self.lifted[name], optimised=True)
        return OrtGraph(self.folder / f"{name}.onnx")

    def open_decoder(self, _: TextSpec, context: int) -> DecoderEngine:
        return OrtDecoder(self.folder / DECODER_GRAPH, capacity=context)

    def cache(self) -> Path:
        return self.folder / CACHE


def _rows(images: Sequence[ImageTokens]) -> Floats:
    """Tokens, and below them features for the decoder's first layers, [n, hidden]."""
    parts = [part for image in images for part in (image.embeds, image.deepstack) if part is not None]
    return np.concatenate([part.reshape(-1, part.shape[-1]) for part in parts])


def _compare_rows(own: Floats, new: Floats) -> dict[str, Any]:
    return {"rows": len(own), "cosine": least_cosine(own, new), "max_abs": float(np.abs(own - new).max())}


def _compare_logits(own: Floats, new: Floats) -> dict[str, Any]:
    mine, theirs = _log_softmax(own), _log_softmax(new)
    divergence = (np.exp(mine) * (mine - theirs)).sum(axis=1)
    regret = own.max(axis=1) - np.take_along_axis(own, new.argmax(axis=1)[:, None], axis=1)[:, 0]
    return {
        "positions": len(own), "logits_cosine": least_cosine(own, new),
        "divergence": float(divergence.mean()), "divergence_max": float(divergence.max()),
        "regret": float(regret.max()), "same_likeliest": float((regret == 0).mean()),
        "max_abs": float(np.abs(own - new).max()), "range": float(np.abs(own).max()),
    }  # fmt: skip


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
