"""A Hugging Face checkpoint folder of Qwen2.5-VL or Qwen3-VL, read without transformers."""

from __future__ import annotations

import hashlib
import json
import math
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
from gog_edge.exporting.policy.adapter import Adapter
from gog_edge.files import read_json, sha256_of
from gog_edge.policy.manifest import GenerationDefaults, TextSpec
from gog_edge.policy.vision import VisionSpec

QWEN25, QWEN3 = "Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration"
SUPPORTED = (QWEN25, QWEN3)
INDEX = "model.safetensors.index.json"
FLOATS = ("F32", "F16", "BF16")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
DEFAULT_MIN_PIXELS = 56 * 56
DEFAULT_MAX_PIXELS = 28 * 28 * 1280

# Prefixes that different releases of transformers use for the same tensors.
VISION_PREFIXES = ("visual.", "model.visual.")
DECODER_PREFIXES = ("model.", "model.language_model.", "language_model.model.", "")
HEAD_PREFIXES = ("", "model.", "language_model.")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose tensors are read on request, with an adapter merged if there is one."""

    folder: Path
    config: dict[str, Any]
    shards: dict[str, Path]  # tensor name -> file
    adapter: Adapter | None = None

    @classmethod
    def open(cls, folder: Path, adapter: Path | None = None) -> Checkpoint:
        """Read the config and the names of the tensors, and a PEFT folder to merge.

        Raises CheckpointError if a file is missing or truncated, or the model is not supported.
        """
        config = _read(folder, "config.json")
        architectures = config.get("architectures") or ["(not given)"]
        if architectures[0] not in SUPPORTED:
            raise CheckpointError(
                f"'{folder}' has the architecture {architectures[0]}; this version exports only "
                f"{' and '.join(SUPPORTED)}"
            )
        if config.get("quantization_config"):
            method = config["quantization_config"].get("quant_method", "unknown")
            raise CheckpointError(
                f"'{folder}' is already quantized ({method}); export the floating-point checkpoint that it was created "
                "from, with --precision int4"
            )
        shards = {name: path for path in sorted(folder.glob("*.safetensors")) for name in _tensor_names(path)}
        if not shards:
            raise CheckpointError(f"'{folder}' has no .safetensors file; save the checkpoint in that format")
        _check_complete(folder, shards)
        return cls(folder, config, shards, Adapter.open(adapter) if adapter else None)

    def tensor(self, name: str) -> Array:
        """Return one tensor as float32. Raises CheckpointError if it does not exist or is not floating point."""
        if name not in self.shards:
            raise CheckpointError(f"'{self.folder}' has no tensor '{name}'; is the checkpoint complete?")
        with safe_open(self.shards[name], framework="np") as shard:
            dtype = shard.get_slice(name).get_dtype()
            if dtype not in FLOATS:
                raise CheckpointError(
                    f"'{self.shards[name]}': '{name}' must be one of {', '.join(FLOATS)}, got {dtype}; export a "
                    "floating-point checkpoint"
                )
            return np.asarray(shard.get_tensor(name), np.float32)

    @cached_property
    def parameters(self) -> int:
        """Return the number of parameters; a tied head counts once."""
        count = 0
        for path in set(self.shards.values()):
            with safe_open(path, framework="np") as shard:
                count += sum(math.prod(shard.get_slice(name).get_shape()) for name in shard.keys())  # noqa: SIM118
        return count

    def vision_weights(self) -> Callable[[str], Array]:
        """Return a function that reads a tensor of the vision tower by its name within the tower."""
        prefix = self._prefix(VISION_PREFIXES, "patch_embed.proj.weight")
        return lambda name: self._merged(f"visual.{name}", prefix + name)

    def decoder_weights(self) -> Callable[[str], Array]:
        """Return a function that reads a tensor of the decoder by its name; `lm_head.weight` is the head."""
        prefix = self._prefix(DECODER_PREFIXES, "embed_tokens.weight")
        head = self._prefix(HEAD_PREFIXES, "lm_head.weight") if not self.text.tied else ""

        def weights(name: str) -> Array:
            if name == "lm_head.weight":
                return self._merged(name, head + name)
            return self._merged(f"language_model.{name}", prefix + name)

        return weights

    def _merged(self, module: str, name: str) -> Array:
        weight = self.tensor(name)
        return weight if self.adapter is None else self.adapter.merge(module, weight)

    def _prefix(self, prefixes: tuple[str, ...], name: str) -> str:
        for prefix in prefixes:
            if prefix + name in self.shards:
                return prefix
        raise CheckpointError(f"'{self.folder}' has no tensor '{prefixes[0]}{name}'; is the checkpoint complete?")

    @property
    def is_qwen3(self) -> bool:
        """Return whether this is Qwen3-VL; otherwise it is Qwen2.5-VL."""
        return bool(self.config["architectures"][0] == QWEN3)

    @cached_property
    def vision(self) -> VisionSpec:
        """Return the shapes of the vision tower and the settings of the image processor.

        Raises:
            CheckpointError: the tower has a setting that this version does not support, or a section is missing.
        """
        tower, pixels = self._section("vision_config"), self._processor()
        activation = "gelu_pytorch_tanh" if self.is_qwen3 else "silu"
        _require(self.folder, "vision hidden_act", tower.get("hidden_act", activation), activation)
        budget = pixels.get("size") or {}
        max_pixels = pixels.get("max_pixels") or budget.get("longest_edge") or DEFAULT_MAX_PIXELS
        depth = tower["depth"]
        return VisionSpec(
            depth=depth,
            hidden=tower["hidden_size"],
            heads=tower["num_heads"],
            intermediate=tower["intermediate_size"],
            out_hidden=tower["out_hidden_size"],
            patch=tower.get("patch_size", 16 if self.is_qwen3 else 14),
            merge=tower.get("spatial_merge_size", 2),
            temporal=tower.get("temporal_patch_size", 2),
            window=0 if self.is_qwen3 else tower.get("window_size", 112),
            full_attention=tuple(
                range(depth) if self.is_qwen3 else tower.get("fullatt_block_indexes", (7, 15, 23, 31))
            ),
            position_side=_position_side(self.folder, tower["num_position_embeddings"]) if self.is_qwen3 else 0,
            deepstack=tuple(tower["deepstack_visual_indexes"]) if self.is_qwen3 else (),
            rope_theta=float((tower.get("rope_parameters") or {}).get("rope_theta", 10_000.0)),
            norm_eps=1e-6,
            mean=tuple(pixels.get("image_mean") or ((0.5,) * 3 if self.is_qwen3 else CLIP_MEAN)),
            std=tuple(pixels.get("image_std") or ((0.5,) * 3 if self.is_qwen3 else CLIP_STD)),
            min_pixels=pixels.get("min_pixels") or budget.get("shortest_edge") or DEFAULT_MIN_PIXELS,
            max_pixels=max_pixels,
            crop_max_pixels=pixels.get("crop_max_pixels") or max_pixels,  # a key that only this project writes
        )

    @cached_property
    def text(self) -> TextSpec:
        """Return the shape of the decoder.

        Raises:
            CheckpointError: the decoder has a setting that this version does not support.
        """
        text = self._section("text_config")
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        _require(self.folder, "hidden_act", text.get("hidden_act", "silu"), "silu")
        _require(self.folder, "use_sliding_window", bool(text.get("use_sliding_window")), False)
        _require(self.folder, "rope_type", rope.get("rope_type", rope.get("type", "default")), "default", "mrope")
        if self.is_qwen3:
            _require(self.folder, "attention_bias", bool(text.get("attention_bias")), False)
            _require(self.folder, "mrope_interleaved", rope.get("mrope_interleaved", True), True)
        heads = text["num_attention_heads"]
        head_dim = text.get("head_dim") or text["hidden_size"] // heads
        section = tuple(rope.get("mrope_section", ()))
        if sum(section) != head_dim // 2:
            raise CheckpointError(
                f"'{self.folder}': mrope_section must sum to half of head_dim = {head_dim}, got {list(section)}; copy "
                "config.json again"
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
            rope_theta=float(rope.get("rope_theta") or text.get("rope_theta", 5e6 if self.is_qwen3 else 1e6)),
            mrope_section=section,
            mrope_interleaved=self.is_qwen3,
            qkv_bias=not self.is_qwen3,
            qk_norm=self.is_qwen3,
            deepstack=len(self.vision.deepstack),
            tied=bool(self.config.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        )

    @property
    def max_positions(self) -> int:
        """Return the number of tokens that the checkpoint was trained for."""
        return int(self._section("text_config").get("max_position_embeddings", 32_768))

    @property
    def image_token(self) -> int:
        """Return the id of the placeholder token for image embeddings."""
        return int(self.config.get("image_token_id", 151_655))

    @cached_property
    def eos(self) -> tuple[int, ...]:
        """Return the ids of the tokens that end a turn. Raises CheckpointError if no file names them."""
        ids = self._generation.get("eos_token_id") or self._section("text_config").get("eos_token_id")
        if ids is None:
            raise CheckpointError(f"'{self.folder}' has no eos_token_id; add it to generation_config.json")
        return tuple(ids) if isinstance(ids, list) else (int(ids),)

    @cached_property
    def generation(self) -> GenerationDefaults:
        """Return the checkpoint's default sampling parameters."""
        raw = self._generation
        penalty = float(raw.get("repetition_penalty") or 1.0)
        if not raw.get("do_sample"):
            return GenerationDefaults(repetition_penalty=penalty)
        return GenerationDefaults(
            temperature=float(raw.get("temperature") or 1.0),
            top_p=float(raw.get("top_p") or 1.0),
            top_k=int(raw.get("top_k") or 0),
            repetition_penalty=penalty,
        )

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of tokenizer.json. Raises CheckpointError if the file does not exist."""
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"'{self.folder}' has no tokenizer.json; save its fast tokenizer there")
        return Tokenizer.from_file(str(path))

    @cached_property
    def chat_template(self) -> str:
        """Return the Jinja source of the chat template. Raises CheckpointError if no file contains it."""
        path = self.folder / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        for name in ("chat_template.json", "tokenizer_config.json"):
            template = _read(self.folder, name, optional=True).get("chat_template")
            if isinstance(template, str):
                return template
        raise CheckpointError(f"'{self.folder}' has no chat_template.jinja; copy the one of its base model")

    @cached_property
    def sha256(self) -> str:
        """Return a hash of the names and contents of config, tokenizer, weights and adapter."""
        names = {path.name for path in self.shards.values()} | {"config.json", "tokenizer.json"}
        hashes = {name: sha256_of(self.folder / name) for name in sorted(names) if (self.folder / name).is_file()}
        if self.adapter is not None:
            hashes |= {f"adapter/{path.name}": sha256_of(path) for path in self.adapter.files}
        return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()

    @property
    def _generation(self) -> dict[str, Any]:
        return _read(self.folder, "generation_config.json", optional=True)

    def _section(self, name: str) -> dict[str, Any]:
        """Return a section of config.json; in old files, the decoder's keys are at the top level."""
        section = self.config.get(name)
        if isinstance(section, dict):
            return section
        if name == "text_config":
            return self.config
        raise CheckpointError(f"'{self.folder}/config.json' has no {name}; copy it again")

    def _processor(self) -> dict[str, Any]:
        """Return the image processor's settings, from either of the files that releases use."""
        combined = _read(self.folder, "processor_config.json", optional=True).get("image_processor")
        return combined or _read(self.folder, "preprocessor_config.json", optional=True)


def _read(folder: Path, name: str, *, optional: bool = False) -> dict[str, Any]:
    if optional and not (folder / name).is_file():
        return {}
    return read_json(folder / name, what="checkpoint", error=CheckpointError)


def _tensor_names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="np") as shard:
            return list(shard.keys())
    except (SafetensorError, OSError) as exc:
        raise CheckpointError(f"cannot read '{path}' as safetensors ({exc}); copy it again") from exc


def _check_complete(folder: Path, shards: dict[str, Path]) -> None:
    """Raise CheckpointError if a tensor that the index of a sharded checkpoint lists is missing."""
    listed = _read(folder, INDEX, optional=True).get("weight_map", {})
    missing = sorted({file for name, file in listed.items() if name not in shards})
    if missing:
        raise CheckpointError(
            f"'{folder}' is incomplete: {INDEX} lists tensors of {', '.join(missing)}; copy these files too"
        )


def _position_side(folder: Path, positions: int) -> int:
    side = math.isqrt(positions)
    if side * side != positions:
        raise CheckpointError(
            f"'{folder}/config.json': num_position_embeddings must be a square number, got {positions}"
        )
    return side


def _require(folder: Path, key: str, value: object, *supported: object) -> None:
    if value not in supported:
        raise CheckpointError(
            f"'{folder}/config.json' has {key} = {value!r}; this version supports only "
            f"{', '.join(map(repr, supported))}"
        )
