"""The manifest of a policy folder: the shapes, chat strings, weight formats and files that its graphs do not state.

The fields of the dataclasses are the keys of `manifest.json`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, MinLen

from gog_edge.engines.base import DecoderShape
from gog_edge.engines.onnx.native import library
from gog_edge.errors import ArtifactError
from gog_edge.files import MODEL_MANIFEST, FileEntry, read_json, verify_files
from gog_edge.policy.vision import VisionSpec
from gog_edge.tables import Count, Dimension, Name, Positive, build, shown

SCHEMA = 1
MANIFEST = MODEL_MANIFEST
VISION_GRAPH = "vision.onnx"
DECODER_GRAPH = "decoder.onnx"
PREFILL_GRAPH = "prefill.onnx"  # optional: the decoder for many tokens at a time, with int8 matmuls

# Optional: both graphs for the package's own CPU operators, with weights in the layout of these operators.
NATIVE_VISION_GRAPH, NATIVE_DECODER_GRAPH = "native_vision.onnx", "native_decoder.onnx"
EMBEDDINGS = "embed_tokens.npy"
EMBEDDING_SCALES = "embed_tokens_scales.npy"  # only with 8-bit embeddings
TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """The strings that a chat template puts around each part of a conversation; extracted and verified at export.

    Only these strings may become special tokens (`<|im_start|>` and the like): text from people, policies and articles
    is always encoded as plain text.
    """

    system_open: str
    system_close: str
    user_open: str
    user_close: str
    assistant_open: str
    assistant_close: str
    image_open: str
    image_token: str  # repeated once for each token of a picture
    image_close: str
    eos: str


@dataclass(frozen=True, slots=True)
class TextSpec(DecoderShape):
    """The shape of the decoder, with what its graph is built from."""

    heads: Dimension  # of queries
    intermediate: Dimension  # width of the feed-forward layers
    norm_eps: Annotated[float, Ge(0)]
    rope_theta: Annotated[float, Gt(0)]
    mrope_section: tuple[Count, Count, Count]  # rotary pairs for time, height and width; sums to head_dim / 2
    mrope_interleaved: bool  # True: the pairs of the three axes alternate (Qwen3-VL); False: in blocks (Qwen2.5-VL)
    qkv_bias: bool
    qk_norm: bool  # RMS normalisation of each head's query and key before the rotary embedding
    tied: bool  # the output head shares the weights of the embedding table

    @property
    def group(self) -> int:
        """Return the number of query heads that share one key-value head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """The sampling parameters that the checkpoint recommends; temperature 0 is greedy."""

    temperature: Annotated[float, Ge(0)] = 0.0
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    top_k: Count = 0  # 0: no limit
    repetition_penalty: Annotated[float, Gt(0)] = 1.0


@dataclass(frozen=True, slots=True)
class WeightQuantization:
    """Symmetric integer weights of `bits` with a float32 scale for each block of `size` inputs; no zero point.

    Without a size each row has one scale, and activations are quantized to int8 by rows too, for integer matmuls.
    """

    bits: Positive
    size: Positive | None


@dataclass(frozen=True, slots=True)
class WeightFormats:
    """How the weights of each part are stored; None: floating point in the precision of the manifest."""

    decoder: WeightQuantization | None = None
    prefill: WeightQuantization | None = None  # of the prefill graph; None: the policy has none
    head: WeightQuantization | None = None
    embeddings: WeightQuantization | None = None
    vision: WeightQuantization | None = None

    def for_native_graphs(self) -> WeightFormats:
        """Return the formats of the native graphs: block-wise also in the vision tower, which is as fast there."""
        return replace(self, vision=self.head)


@dataclass(frozen=True, slots=True)
class PolicyManifest:
    """The contents of a policy's `manifest.json`."""

    name: Name
    architecture: str  # as in the checkpoint's config.json
    engine: str  # "ort"
    precision: str  # "fp32", "fp16" or "int4"
    weights: WeightFormats
    vision: VisionSpec
    text: TextSpec
    chat: ChatFormat
    image_token: Count  # id that is replaced by the embeddings of an image
    eos: Annotated[tuple[Count, ...], MinLen(1)]  # ids that end a turn
    box_frame: str  # coordinate frame of boxes, as in the dialect
    max_context: Dimension  # tokens of one conversation
    generation: GenerationDefaults
    source_sha256: str  # of the checkpoint
    parity: dict[str, Any] = field(default_factory=dict)  # measured against transformers at export
    files: tuple[FileEntry, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the object that is written to `manifest.json`."""
        return {"schema": SCHEMA, "kind": "policy", **asdict(self)}

    @property
    def has_native(self) -> bool:
        """Return whether the policy has graphs for the package's own CPU operators."""
        return any(entry.path == NATIVE_DECODER_GRAPH for entry in self.files)

    @property
    def runs_native(self) -> bool:
        """Return whether the policy has native graphs and this CPU supports their operators."""
        return self.has_native and library() is not None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> PolicyManifest:
        """Read the object that `to_json` returns.

        Raises:
            ArtifactError: the schema is not supported, or a field is missing or unknown.
        """
        if value.get("schema") != SCHEMA or value.get("kind") != "policy":
            raise ArtifactError(
                f"policy: manifest has schema {shown(value.get('schema'))} and kind {shown(value.get('kind'))}, "
                f"expected {SCHEMA} and 'policy'; export the checkpoint again with this version"
            )
        obsolete = ("lowering",)  # written by older versions, never read
        fields = {key: item for key, item in value.items() if key not in ("schema", "kind", *obsolete)}
        where = "policy: invalid manifest; export it again"
        manifest = build(cls, fields, "", error=ArtifactError, where=where)
        for problem in manifest._problems():
            raise ArtifactError(f"{where}: {problem}")
        return manifest

    def _problems(self) -> Iterator[str]:
        """Yield what is wrong with fields that are valid one by one."""
        text, vision = self.text, self.vision
        if text.heads % text.kv_heads:
            yield f"[text] 'heads' must be a multiple of 'kv_heads', got {text.heads} and {text.kv_heads}"
        if 2 * sum(text.mrope_section) != text.head_dim:
            yield f"[text] 'mrope_section' must sum to half of 'head_dim', got {text.mrope_section} and {text.head_dim}"
        if vision.hidden % vision.heads:
            yield f"[vision] 'hidden' must be a multiple of 'heads', got {vision.hidden} and {vision.heads}"
        if vision.out_hidden != text.hidden:
            yield f"[vision] 'out_hidden' must be the 'hidden' of [text], got {vision.out_hidden} and {text.hidden}"
        if vision.window and vision.window < vision.factor:
            yield f"[vision] 'window' must be 0 or at least {vision.factor} pixels, got {vision.window}"
        if min(vision.max_pixels, vision.crop_max_pixels) < vision.min_pixels:
            yield ("[vision] 'max_pixels' and 'crop_max_pixels' must be at least 'min_pixels', got "
                   f"{vision.max_pixels}, {vision.crop_max_pixels} and {vision.min_pixels}")
        if len(vision.deepstack) != text.deepstack:
            yield f"[vision] 'deepstack' must have the {text.deepstack} items that [text] expects"
        if any(token >= text.vocab for token in (self.image_token, *self.eos)):
            yield f"'image_token' and 'eos' must be below the vocabulary of {text.vocab}"


def read_manifest(folder: Path, *, full: bool = False) -> PolicyManifest:
    """Read a policy folder's manifest and verify its files.

    `full`: hash large files too, which are otherwise compared by size.

    Raises:
        ArtifactError: the manifest cannot be read, or a file is missing or altered.
    """
    manifest = PolicyManifest.from_json(read_json(folder / MANIFEST, what="policy"))
    verify_files(folder, manifest.files, what="policy", full=full)
    return manifest
