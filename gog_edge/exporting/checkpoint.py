"""A Hugging Face Qwen2.5-VL checkpoint folder, read without transformers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from gog_edge.engines.base import Array
from gog_edge.errors import CheckpointError
from gog_edge.files import read_json, sha256_of
from gog_edge.policy.manifest import GenerationDefaults, TextSpec, VisionSpec

SUPPORTED = ("Qwen2_5_VLForConditionalGeneration",)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
DEFAULT_MIN_PIXELS = 56 * 56
DEFAULT_MAX_PIXELS = 28 * 28 * 1280

# Where releases of different ages keep the same tensors.
VISION_PREFIXES = ("visual.", "model.visual.")
DECODER_PREFIXES = ("model.", "model.language_model.", "language_model.model.", "")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder; tensors are read when asked for."""

    folder: Path
    config: dict[str, Any]
    shards: dict[str, Path]  # tensor name -> file

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read config and tensor names. CheckpointError names what is missing or not supported."""
        config = _read(folder, "config.json")
        architectures = config.get("architectures") or ["(none named)"]
        if architectures[0] not in SUPPORTED:
            raise CheckpointError(
                f"'{folder}' is a {architectures[0]}; this version exports {', '.join(SUPPORTED)} only"
            )
        shards = {name: path for path in sorted(folder.glob("*.safetensors")) for name in _names(path)}
        if not shards:
            raise CheckpointError(f"'{folder}' holds no .safetensors file; save the checkpoint in that form")
        return cls(folder, config, shards)

    def tensor(self, name: str) -> Array:
        """One tensor as float32. CheckpointError when there is none of that name."""
        if name not in self.shards:
            raise CheckpointError(f"'{self.folder}' has no tensor '{name}'; is the checkpoint complete?")
        with safe_open(self.shards[name], framework="np") as shard:
            return np.asarray(shard.get_tensor(name), np.float32)

    def vision_weights(self) -> Callable[[str], Array]:
        """Tensors of the vision tower by their name within it."""
        prefix = self._prefix(VISION_PREFIXES, "patch_embed.proj.weight")
        return lambda name: self.tensor(prefix + name)

    def decoder_weights(self) -> Callable[[str], Array]:
        """Tensors of the decoder by their name within it; `lm_head.weight` is the head."""
        prefix = self._prefix(DECODER_PREFIXES, "embed_tokens.weight")
        head = self._prefix(("", "model.", "language_model."), "lm_head.weight") if not self.text.tied else ""
        return lambda name: self.tensor((head if name == "lm_head.weight" else prefix) + name)

    def _prefix(self, prefixes: tuple[str, ...], name: str) -> str:
        for prefix in prefixes:
            if prefix + name in self.shards:
                return prefix
        raise CheckpointError(f"'{self.folder}' has no tensor '{prefixes[0]}{name}'; is the checkpoint complete?")

    @cached_property
    def vision(self) -> VisionSpec:
        """Shapes of the tower, and what the processor does before it."""
        tower, pixels = self._section("vision_config"), self._processor()
        _require(self.folder, "vision hidden_act", tower.get("hidden_act", "silu"), "silu")
        budget = pixels.get("size") or {}
        most = pixels.get("max_pixels") or budget.get("longest_edge") or DEFAULT_MAX_PIXELS
        return VisionSpec(
            depth=tower["depth"],
            hidden=tower["hidden_size"],
            heads=tower["num_heads"],
            intermediate=tower["intermediate_size"],
            out_hidden=tower["out_hidden_size"],
            patch=tower.get("patch_size", 14),
            merge=tower.get("spatial_merge_size", 2),
            temporal=tower.get("temporal_patch_size", 2),
            window=tower.get("window_size", 112),
            full_attention=tuple(tower.get("fullatt_block_indexes", (7, 15, 23, 31))),
            rope_theta=float((tower.get("rope_parameters") or {}).get("rope_theta", 10_000.0)),
            norm_eps=1e-6,
            mean=tuple(pixels.get("image_mean") or CLIP_MEAN),
            std=tuple(pixels.get("image_std") or CLIP_STD),
            min_pixels=pixels.get("min_pixels") or budget.get("shortest_edge") or DEFAULT_MIN_PIXELS,
            max_pixels=most,
            crop_max_pixels=pixels.get("crop_max_pixels") or most,  # ours: no other program writes this key
        )

    @cached_property
    def text(self) -> TextSpec:
        """Shapes of the decoder."""
        text = self._section("text_config")
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        _require(self.folder, "hidden_act", text.get("hidden_act", "silu"), "silu")
        _require(self.folder, "use_sliding_window", bool(text.get("use_sliding_window")), False)
        _require(self.folder, "rope_type", rope.get("rope_type", rope.get("type", "default")), "default", "mrope")
        heads = text["num_attention_heads"]
        head_dim = text.get("head_dim") or text["hidden_size"] // heads
        section = tuple(rope.get("mrope_section", ()))
        if sum(section) != head_dim // 2:
            raise CheckpointError(
                f"'{self.folder}': mrope_section {list(section)} does not sum to half of head_dim {head_dim}"
            )
        return TextSpec(
            hidden=text["hidden_size"],
            layers=text["num_hidden_layers"],
            heads=heads,
            kv_heads=text.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            intermediate=text["intermediate_size"],
            vocab=text["vocab_size"],
            norm_eps=float(text.get("rms_norm_eps", 1e-6)),
            rope_theta=float(rope.get("rope_theta") or text.get("rope_theta", 1_000_000.0)),
            mrope_section=section,
            tied=bool(self.config.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        )

    @property
    def max_positions(self) -> int:
        """The longest conversation the checkpoint was made for."""
        return int(self._section("text_config").get("max_position_embeddings", 32_768))

    @property
    def image_token(self) -> int:
        """Id whose place an image's embeddings take."""
        return int(self.config.get("image_token_id", 151_655))

    @cached_property
    def eos(self) -> tuple[int, ...]:
        """Ids that end a turn."""
        ids = self._generation.get("eos_token_id") or self._section("text_config").get("eos_token_id")
        if ids is None:
            raise CheckpointError(f"'{self.folder}' names no eos_token_id; add it to generation_config.json")
        return tuple(ids) if isinstance(ids, list) else (int(ids),)

    @cached_property
    def generation(self) -> GenerationDefaults:
        """How the checkpoint asks to be sampled."""
        raw = self._generation
        penalty = float(raw.get("repetition_penalty") or 1.0)
        if not raw.get("do_sample"):
            return GenerationDefaults(repetition_penalty=penalty)
        return GenerationDefaults(float(raw.get("temperature") or 1.0), float(raw.get("top_p") or 1.0), penalty)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, from tokenizer.json."""
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"'{self.folder}' has no tokenizer.json; save its fast tokenizer there")
        return Tokenizer.from_file(str(path))

    @cached_property
    def chat_template(self) -> str:
        """The jinja text of the chat template."""
        path = self.folder / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        for name in ("chat_template.json", "tokenizer_config.json"):
            template = _read(self.folder, name, optional=True).get("chat_template")
            if isinstance(template, str):
                return template
        raise CheckpointError(f"'{self.folder}' has no chat_template.jinja; take the one of its base model")

    @cached_property
    def sha256(self) -> str:
        """Hash over the names and contents of config, tokenizer and weights."""
        names = {path.name for path in self.shards.values()} | {"config.json", "tokenizer.json"}
        listed = {name: sha256_of(self.folder / name) for name in sorted(names) if (self.folder / name).is_file()}
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    @property
    def _generation(self) -> dict[str, Any]:
        return _read(self.folder, "generation_config.json", optional=True)

    def _section(self, name: str) -> dict[str, Any]:
        """A part of config.json; old files keep the decoder's keys at the top."""
        section = self.config.get(name)
        if isinstance(section, dict):
            return section
        if name == "text_config":
            return self.config
        raise CheckpointError(f"'{self.folder}/config.json' has no {name}")

    def _processor(self) -> dict[str, Any]:
        """The image processor's settings, wherever this release keeps them."""
        combined = _read(self.folder, "processor_config.json", optional=True).get("image_processor")
        return combined or _read(self.folder, "preprocessor_config.json", optional=True)


def _read(folder: Path, name: str, *, optional: bool = False) -> dict[str, Any]:
    if optional and not (folder / name).is_file():
        return {}
    return read_json(folder / name, what="checkpoint", error=CheckpointError)


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="np") as shard:
            return list(shard.keys())
    except SafetensorError as exc:
        raise CheckpointError(f"'{path}' is no readable safetensors file ({exc}); copy it again") from exc


def _require(folder: Path, key: str, value: object, *allowed: object) -> None:
    if value not in allowed:
        raise CheckpointError(
            f"'{folder}/config.json' has {key} = {value!r}; this version exports {', '.join(map(repr, allowed))} only"
        )
