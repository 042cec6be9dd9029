"""The strings around turns and pictures, so that a live session only ever appends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gog_edge.engines.onnx.native import library
from gog_edge.errors import ArtifactError
from gog_edge.files import MODEL_MANIFEST, FileEntry, read_json, verify_files


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """What a chat template puts around each part; found and proved at export, kept in the policy's manifest.

    Special tokens (`<|im_start|>` and the like) stand in these strings as text: only these strings may become special
    tokens, never what a person, a policy or an article says.
    """

    system_open: str
    system_close: str
    user_open: str
    user_close: str
    assistant_open: str
    assistant_close: str
    image_open: str
    image_token: str  # stands once for each merged token of a picture
    image_close: str
    eos: str


SCHEMA = 1
MANIFEST = MODEL_MANIFEST
VISION_GRAPH = "vision.onnx"
DECODER_GRAPH = "decoder.onnx"
PREFILL_GRAPH = "prefill.onnx"  # fills the cache for many tokens; not in every policy

# Both graphs for operators of our own, with weights of their own; not in every policy.
NATIVE_VISION_GRAPH, NATIVE_DECODER_GRAPH = "native_vision.onnx", "native_decoder.onnx"
EMBEDDINGS = "embed_tokens.npy"
EMBEDDING_SCALES = "embed_tokens_scales.npy"  # beside 8-bit embeddings
TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
DIALECT = "dialect.toml"


@dataclass(frozen=True, slots=True)
class VisionSpec:
    """The vision tower and what is done to pixels before it."""

    depth: int
    hidden: int
    heads: int
    intermediate: int
    out_hidden: int  # = hidden size of the decoder
    patch: int  # pixels a side
    merge: int  # patches a side that become one token
    temporal: int  # copies of a still picture in one patch
    window: int  # pixels a side of a local-attention window; 0: every block sees the whole picture
    full_attention: tuple[int, ...]  # blocks that see the whole picture where there are windows
    rope_theta: float
    norm_eps: float
    mean: tuple[float, float, float]  # of pixels scaled to 0..1
    std: tuple[float, float, float]
    min_pixels: int
    max_pixels: int
    crop_max_pixels: int  # of what a gaze shows again
    position_side: int = 0  # the learned table of positions is so many places a side; 0: there is none
    deepstack: tuple[int, ...] = ()  # blocks whose features also enter the decoder, after its first layers

    @property
    def factor(self) -> int:
        """Pixels a side of one token: resized pictures are multiples of it."""
        return self.patch * self.merge

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    @property
    def patch_dim(self) -> int:
        """Numbers in one flat patch."""
        return 3 * self.temporal * self.patch * self.patch


@dataclass(frozen=True, slots=True)
class TextSpec:
    """The decoder."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, ...]  # rotary pairs that turn with time, height, width; sums to head_dim / 2
    mrope_interleaved: bool  # the pairs of the three axes alternate (Qwen3-VL), or stand in blocks (Qwen2.5-VL)
    qkv_bias: bool
    qk_norm: bool  # each head's query and key are normalised before they are turned
    deepstack: int  # layers whose output gets a picture's features added
    tied: bool  # the head is the embedding table

    @property
    def group(self) -> int:
        """Heads of the query that share keys and values."""
        return self.heads // self.kv_heads


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """How the checkpoint asks to be sampled; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps all
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class Blocks:
    """Whole numbers of `bits`, a float32 scale for each `size` of them along the input; no zero point.

    Without a size a whole row has one scale, and so has each row of what it is multiplied with, in 8 bits: products of
    whole numbers.
    """

    bits: int
    size: int | None


@dataclass(frozen=True, slots=True)
class WeightForms:
    """How the weights of each part are stored; None is floating point of the manifest's precision."""

    decoder: Blocks | None = None
    prefill: Blocks | None = None  # of the decoder's other graph, for many tokens at a time; None: there is none
    head: Blocks | None = None
    embeddings: Blocks | None = None
    vision: Blocks | None = None

    def native(self) -> WeightForms:
        """As graphs for operators of our own have them, which multiply blocks as quickly as rows."""
        return replace(self, vision=self.head)


@dataclass(frozen=True, slots=True)
class PolicyManifest:
    """Everything the runtime must know that the graphs do not say."""

    name: str
    architecture: str  # as the checkpoint's config.json names it
    engine: str  # "ort"
    precision: str  # "fp32", "fp16" or "int4"
    weights: WeightForms
    lowering: str  # which decoder form was written, and why
    vision: VisionSpec
    text: TextSpec
    chat: ChatFormat
    image_token: int  # id whose place an image's embeddings take
    eos: tuple[int, ...]
    box_frame: str  # as the dialect names it: what the numbers of a box mean
    max_context: int  # tokens of one conversation
    generation: GenerationDefaults
    source_sha256: str  # of the checkpoint
    parity: dict[str, Any] = field(default_factory=dict)
    files: tuple[FileEntry, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The object that `manifest.json` holds."""
        return {"schema": SCHEMA, "kind": "policy", **asdict(self)}

    @property
    def native(self) -> bool:
        """Whether it has graphs for operators of our own."""
        return any(entry.path == NATIVE_DECODER_GRAPH for entry in self.files)

    @property
    def native_here(self) -> bool:
        """Whether that is what this processor runs."""
        return self.native and library() is not None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> PolicyManifest:
        """Inverse of `to_json`; ArtifactError names what is missing."""
        if value.get("schema") != SCHEMA or value.get("kind") != "policy":
            raise ArtifactError(
                f"policy: manifest has schema {value.get('schema')!r} and kind {value.get('kind')!r}, "
                f"expected {SCHEMA} and 'policy'; export the checkpoint again with this version"
            )
        fields = {key: item for key, item in value.items() if key not in ("schema", "kind")}
        try:
            vision, text = _tuples(fields.pop("vision")), _tuples(fields.pop("text"))
            return cls(
                vision=VisionSpec(**vision),
                text=TextSpec(**text),
                chat=ChatFormat(**_tuples(fields.pop("chat"))),
                eos=tuple(fields.pop("eos")),
                weights=WeightForms(**{k: v and Blocks(**v) for k, v in fields.pop("weights").items()}),
                generation=GenerationDefaults(**fields.pop("generation")),
                files=tuple(FileEntry(**entry) for entry in fields.pop("files")),
                **fields,
            )
        except (KeyError, TypeError) as exc:
            raise ArtifactError(f"policy: manifest does not fit this version ({exc}); export it again") from exc


def _tuples(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}


def read_manifest(folder: Path, *, full: bool = False) -> PolicyManifest:
    """Read a policy folder's manifest and check its files against it.

    Raises ArtifactError when a file is missing or altered; `full` hashes even large files.
    """
    manifest = PolicyManifest.from_json(read_json(folder / MANIFEST, what="policy"))
    verify_files(folder, manifest.files, what="policy", full=full)
    return manifest
