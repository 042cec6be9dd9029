"""config.json of Qwen2.5-VL and Qwen3-VL in every layout that transformers has written, with its defaults filled in.

transformers 4.49 writes the decoder's keys at the top level, and only those of the vision tower that differ from the
defaults; later releases nest both. What a file does not give is taken from transformers' own classes.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

from annotated_types import Ge, Gt, Le

from gog_edge.errors import CheckpointError
from gog_edge.exporting.torchvision_shim import import_torchvision
from gog_edge.files import read_json
from gog_edge.policy.manifest import TextSpec
from gog_edge.tables import build

T = TypeVar("T")

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
QWEN25, QWEN3 = "Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration"
MODEL_TYPES = {QWEN25: "qwen2_5_vl", QWEN3: "qwen3_vl"}
SUPPORTED = tuple(MODEL_TYPES)

Layers = Annotated[int, Ge(1), Le(1024)]
Width = Annotated[int, Ge(1), Le(2**20)]
Index = Annotated[int, Ge(0), Le(2**24)]
Count = Annotated[int, Ge(1), Le(2**28)]


@dataclass(frozen=True, slots=True)
class VisionFields:
    """The keys of `vision_config` that determine the tower's shape."""

    depth: Layers
    hidden_size: Width
    num_heads: Width
    intermediate_size: Width
    out_hidden_size: Width
    patch_size: Annotated[int, Ge(1), Le(1024)]
    spatial_merge_size: Annotated[int, Ge(1), Le(64)]
    temporal_patch_size: Annotated[int, Ge(1), Le(64)]
    hidden_act: str
    window_size: Annotated[int, Ge(0), Le(2**16)] = 0
    fullatt_block_indexes: tuple[Index, ...] = ()
    num_position_embeddings: Count = 1
    deepstack_visual_indexes: tuple[Index, ...] = ()
    in_channels: int = 3
    in_chans: int = 3  # the name until transformers 4.49


@dataclass(frozen=True, slots=True)
class TextFields:
    """The keys of `text_config` that determine the decoder."""

    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: Layers
    num_attention_heads: Width
    vocab_size: Count
    max_position_embeddings: Count
    rms_norm_eps: Annotated[float, Gt(0), Le(1)]
    hidden_act: str
    num_key_value_heads: Width
    head_dim: Annotated[int, Ge(0), Le(2**16)] = 0  # 0: the hidden size divided by the heads
    use_sliding_window: bool = False
    attention_bias: bool = False
    tie_word_embeddings: bool = False


@dataclass(frozen=True, slots=True)
class RopeFields:
    """The keys of `rope_parameters`, which releases before 5.0 call `rope_scaling`."""

    rope_theta: Annotated[float, Gt(0), Le(1e12)] = 0.0  # 0: given elsewhere
    mrope_section: tuple[Index, ...] = ()
    mrope_interleaved: bool = True
    rope_type: str = ""
    type: str = ""  # the name until transformers 4.43


@dataclass(frozen=True, slots=True)
class TopFields:
    """The keys at the top level that both architectures have."""

    image_token_id: Index
    tie_word_embeddings: bool = False


# Of these no shape of a tensor tells the value, or all of them follow from it: a file without them is not a config.
_REQUIRED_TEXT = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


_READ_ELSEWHERE = ("in_chans", "tie_word_embeddings", "num_key_value_heads")


@dataclass(frozen=True)
class ModelConfig:
    """A config.json that was read and checked, with the object that transformers makes of it."""

    path: Path
    raw: dict[str, Any]
    architecture: str
    library: Any  # Qwen2_5_VLConfig or Qwen3VLConfig
    top: TopFields
    vision: VisionFields
    text: TextFields

    @classmethod
    def open(cls, folder: Path) -> ModelConfig:
        """Read the file and fill in the defaults.

        Raises:
            CheckpointError: it is missing or damaged, the architecture is not supported, or a value is not possible.
        """
        path = folder / CONFIG
        if not path.exists() and (folder / ADAPTER_CONFIG).exists():
            raise CheckpointError(
                f"'{folder}': it is a PEFT adapter: give the base model as CHECKPOINT, and this folder with --adapter"
            )
        raw = read_json(path, what="checkpoint", error=CheckpointError)
        architecture = _architecture(path, raw)
        _refuse_quantized(folder, raw)
        library_class = _config_class(architecture)
        with quiet_transformers():
            return cls._build(path, raw, architecture, library_class)

    @classmethod
    def _build(cls, path: Path, raw: dict[str, Any], architecture: str, library_class: Any) -> ModelConfig:
        sections = {name: kind.config_class for name, kind in library_class.sub_configs_defaults.items()}
        vision_raw = _section(path, raw, "vision_config", default={})
        text_raw = _section(path, raw, "text_config", default=raw)
        missing = [key for key in _REQUIRED_TEXT if text_raw.get(key) is None]
        if missing:
            raise CheckpointError(f"'{path}' has no {missing[0]} of the decoder; copy it again")
        defaults = {name: kind().to_dict() for name, kind in sections.items()}
        vision = build_known(VisionFields, vision_raw, path, "vision_config", defaults["vision_config"])
        text = build_known(TextFields, text_raw, path, "text_config", _without_own(defaults["text_config"]))
        top = build_known(TopFields, raw, path, "", {"image_token_id": library_class.image_token_id})
        rope = _rope_of(text_raw)
        build_known(RopeFields, _object(path, rope, "rope_parameters"), path, "rope_parameters")
        config = cls(path, raw, architecture, _library_config(path, library_class, raw), top, vision, text)
        config._check_values(text_raw, rope)
        config._check_shapes(rope)
        return config

    @property
    def is_qwen3(self) -> bool:
        """Return whether this is Qwen3-VL; otherwise it is Qwen2.5-VL."""
        return self.architecture == QWEN3

    @property
    def asks_to_tie(self) -> bool:
        """Return whether the config says, on either level, that the head shares the weights of the embeddings."""
        return self.top.tie_word_embeddings or self.text.tie_word_embeddings

    @property
    def head_dim(self) -> int:
        """Return the width of the decoder's attention heads."""
        return self.text.head_dim or self.text.hidden_size // self.text.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Return the number of key-value heads; where the file says null, as many as query heads."""
        return int(self.library.text_config.num_key_value_heads)

    @property
    def position_side(self) -> int:
        """Return the side of the square table of learned positions; 0: the tower has none."""
        return math.isqrt(self.vision.num_position_embeddings) if self.is_qwen3 else 0

    @property
    def deepstack(self) -> tuple[int, ...]:
        """Return the tower's blocks whose features are added in the decoder; none in Qwen2.5-VL."""
        return self.vision.deepstack_visual_indexes if self.is_qwen3 else ()

    @property
    def eos_token_id(self) -> Any:
        """Return the value of `eos_token_id` on either level, unchecked."""
        nested = self.raw.get("text_config")
        own = nested.get("eos_token_id") if isinstance(nested, dict) else None
        return own if own is not None else self.raw.get("eos_token_id")

    @property
    def vision_rope_theta(self) -> float:
        """Return the base of the tower's rotary frequencies."""
        given = getattr(self.library.vision_config, "rope_parameters", None) or {}
        return float(given.get("rope_theta", 10_000.0))

    def text_spec(self, *, tied: bool) -> TextSpec:
        """Return the shape of the decoder; `tied`: the head shares the weights of the embeddings."""
        text, rope = self.text, self.library.text_config.rope_parameters
        section = rope["mrope_section"]
        return TextSpec(
            hidden=text.hidden_size,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            intermediate=text.intermediate_size,
            vocab=text.vocab_size,
            norm_eps=float(text.rms_norm_eps),
            rope_theta=float(rope["rope_theta"]),
            mrope_section=(section[0], section[1], section[2]),
            mrope_interleaved=self.is_qwen3,
            qkv_bias=not self.is_qwen3,
            qk_norm=self.is_qwen3,
            deepstack=len(self.deepstack),
            tied=tied,
        )

    def library_config(self, *, tied: bool) -> Any:
        """Return transformers' config object with `tie_word_embeddings` set on both levels."""
        copied = copy.deepcopy(self.library)
        copied.tie_word_embeddings = copied.text_config.tie_word_embeddings = tied
        return copied

    def meta_model(self, *, tied: bool) -> Any:
        """Return transformers' model without weights, on the meta device."""
        import torch
        import transformers

        try:
            with quiet_transformers(), torch.device("meta"):
                return getattr(transformers, self.architecture)(self.library_config(tied=tied)).eval()
        except Exception as exc:  # transformers raises many kinds
            raise self._refusal(exc) from exc

    def tensor_shapes(self, *, tied: bool) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all tensors by their name within the model, see `weights`."""
        state = self._untied_shapes
        return {name: shape for name, shape in state.items() if not (tied and name == "lm_head.weight")}

    @cached_property
    def _untied_shapes(self) -> dict[str, tuple[int, ...]]:
        named = self.meta_model(tied=False).state_dict()
        return {name.removeprefix("model."): tuple(tensor.shape) for name, tensor in named.items()}

    def _check_values(self, text_raw: Mapping[str, Any], rope: Mapping[str, Any]) -> None:
        """Check what this version supports, and that transformers reads the same values."""
        vision, text = self.vision, self.text
        for section, own in (("vision_config", vision), ("text_config", text)):
            for field in fields(own):
                value, read = getattr(own, field.name), getattr(getattr(self.library, section), field.name, None)
                if field.name not in _READ_ELSEWHERE and value and read and value != _as_tuple(read):
                    self._fail(f"has {section}.{field.name} = {value!r}, which transformers reads as {read!r}")
        activation = "gelu_pytorch_tanh" if self.is_qwen3 else "silu"
        self._require("vision_config.hidden_act", vision.hidden_act, activation)
        self._require("vision_config.in_channels", max(vision.in_channels, vision.in_chans), 3)
        self._require("hidden_act", text.hidden_act, "silu")
        self._require("use_sliding_window", text.use_sliding_window, False)
        kind = rope.get("rope_type") or rope.get("type") or "default"
        self._require("rope_type", kind, "default", "mrope")
        if self.is_qwen3:
            self._require("attention_bias", text.attention_bias, False)
            self._require("mrope_interleaved", rope.get("mrope_interleaved", True), True)
        theta = rope.get("rope_theta") or text_raw.get("rope_theta")
        if theta is None and self.is_qwen3:
            self._fail("has no rope_theta, whose default differs between releases of transformers; copy it again")
        if not isinstance(theta or 1.0, (int, float)) or isinstance(theta, bool):
            self._fail(f"has rope_theta = {theta!r}; it must be a number")

    def _check_shapes(self, rope: Mapping[str, Any]) -> None:
        vision, text = self.vision, self.text
        heads = text.num_attention_heads
        for label, whole, part in (
            ("vision_config: hidden_size", vision.hidden_size, vision.num_heads),
            *([] if text.head_dim else [("hidden_size", text.hidden_size, heads)]),
            ("num_attention_heads", heads, self.kv_heads),
        ):
            if whole % part:
                self._fail(f"has {label} = {whole}, which is not a multiple of {part} heads; copy it again")
        if vision.hidden_size // vision.num_heads % 4:
            width = vision.hidden_size // vision.num_heads
            self._fail(f"has vision heads of width {width}; it must be a multiple of 4")
        if vision.out_hidden_size != text.hidden_size:
            self._fail(
                f"has vision_config.out_hidden_size = {vision.out_hidden_size}, but the decoder's hidden_size is "
                f"{text.hidden_size}; copy it again"
            )
        if not self.is_qwen3 and text.head_dim not in (0, text.hidden_size // heads):
            self._fail(f"has head_dim = {text.head_dim}; in {QWEN25} it is hidden_size / num_attention_heads")
        section = rope.get("mrope_section") or []
        if len(section) != 3 or sum(section) != self.head_dim // 2:
            self._fail(
                f"has mrope_section = {list(section)}; its three values must sum to half of head_dim = "
                f"{self.head_dim}: copy config.json again"
            )
        unit = vision.patch_size * vision.spatial_merge_size
        if not self.is_qwen3 and (vision.window_size < unit or vision.window_size % unit):
            self._fail(f"has window_size = {vision.window_size}; it must be a multiple of the {unit} pixels of a token")
        if self.is_qwen3 and self.position_side**2 != vision.num_position_embeddings:
            self._fail(f"has num_position_embeddings = {vision.num_position_embeddings}; it must be a square number")
        deepstack = self.deepstack
        if (
            len(set(deepstack)) != len(deepstack) or any(n >= vision.depth for n in deepstack)
            or len(deepstack) > text.num_hidden_layers
        ):  # fmt: skip
            self._fail(
                f"has deepstack_visual_indexes = {list(deepstack)}; they must be at most {text.num_hidden_layers} "
                f"different blocks below {vision.depth}"
            )
        if self.top.image_token_id >= text.vocab_size:
            self._fail(f"has image_token_id = {self.top.image_token_id}, but vocab_size = {text.vocab_size}")

    def _require(self, key: str, value: object, *supported: object) -> None:
        if value not in supported:
            expected = ", ".join(map(repr, supported))
            self._fail(f"has {key} = {value!r}; this version supports only {expected}")

    def _fail(self, message: str) -> NoReturn:
        raise CheckpointError(f"'{self.path}' {message}")

    def _refusal(self, exc: Exception) -> CheckpointError:
        return _refusal(self.path, exc)


# --- reading -------------------------------------------------------------------------------------


def _architecture(path: Path, raw: Mapping[str, Any]) -> str:
    """Return the name of the architecture, from `architectures` or else from `model_type`."""
    names, model_type = raw.get("architectures"), raw.get("model_type")
    if names is not None and (not isinstance(names, list) or not all(isinstance(name, str) for name in names)):
        raise CheckpointError(f"'{path}': architectures must be a list of names, got {names!r}; copy it again")
    by_type = {kind: name for name, kind in MODEL_TYPES.items()}
    name = names[0] if names else by_type.get(str(model_type), "(not given)")
    if name not in SUPPORTED:
        raise CheckpointError(
            f"'{path.parent}' has the architecture {name}; this version exports only {' and '.join(SUPPORTED)}"
        )
    if model_type not in (None, MODEL_TYPES[name]):
        raise CheckpointError(
            f"'{path}' has model_type = {model_type!r}, but {name} is of type '{MODEL_TYPES[name]}'; copy it again"
        )
    return name


def _refuse_quantized(folder: Path, raw: Mapping[str, Any]) -> None:
    nested = raw.get("text_config")
    for section in (raw, nested if isinstance(nested, dict) else {}):
        given = section.get("quantization_config")
        if given:
            method = given.get("quant_method", "unknown") if isinstance(given, dict) else given
            raise CheckpointError(
                f"'{folder}' is already quantized ({method}); export the floating-point checkpoint that it was created "
                "from, with --precision int4"
            )


def _section(path: Path, raw: Mapping[str, Any], name: str, default: Mapping[str, Any]) -> Mapping[str, Any]:
    return default if raw.get(name) is None else _object(path, raw[name], name)


def _object(path: Path, value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise CheckpointError(f"'{path}': {name} must be an object, got {value!r}; copy it again")
    return value


def _rope_of(text_raw: Mapping[str, Any]) -> Any:
    given = text_raw.get("rope_parameters")
    given = given if given is not None else text_raw.get("rope_scaling")
    return {} if given is None else given


def build_known(
    kind: type[T], raw: Mapping[str, Any], path: Path, name: str, defaults: Mapping[str, Any] | None = None
) -> T:
    """Return an instance of the dataclass `kind` with the values of a JSON object; null counts as not given.

    Args:
        kind: its fields are the keys that are read; others are ignored.
        raw: the object.
        path: the file, for messages.
        name: the object's name in messages.
        defaults: values of keys that `raw` does not have.

    Raises:
        CheckpointError: names the first key that is missing, of a wrong type or out of bounds.
    """
    given = {key: value for key, value in raw.items() if value is not None}
    merged = {key: list(value) if isinstance(value, tuple) else value
              for key, value in {**(defaults or {}), **given}.items() if value is not None}
    return build(kind, merged, name, error=CheckpointError, where=f"'{path}'", known_only=True)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _without_own(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the decoder's defaults for what its config.json need not state."""
    return {key: value for key, value in defaults.items() if key not in (*_REQUIRED_TEXT, "tie_word_embeddings")}


def _config_class(architecture: str) -> Any:
    import_torchvision()
    import transformers

    return getattr(transformers, architecture.replace("ForConditionalGeneration", "Config"))


def _library_config(path: Path, config_class: Any, raw: Mapping[str, Any]) -> Any:
    """Return the object that transformers makes of the file."""
    try:
        return config_class.from_dict(_without_kernels(raw))
    except Exception as exc:  # transformers and huggingface_hub raise many kinds
        raise _refusal(path, exc) from exc


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence progress bars, warnings and messages of transformers about what is checked here."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


def _without_kernels(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a deep copy without the keys that choose an implementation of attention, which may not be installed."""
    kept = {key: value for key, value in raw.items() if "attn_implementation" not in key}
    return {key: _without_kernels(value) if isinstance(value, dict) else copy.deepcopy(value)
            for key, value in kept.items()}  # fmt: skip


def _refusal(path: Path, exc: Exception) -> CheckpointError:
    reason = " ".join((str(exc).strip() or type(exc).__name__).split())[:300]
    return CheckpointError(f"'{path}' is not a config that transformers accepts ({reason}); copy it again")
