"""A Hugging Face checkpoint folder of Qwen2.5-VL or Qwen3-VL, with a PEFT adapter merged into it if there is one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import isclose, prod
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le
from tokenizers import Tokenizer

from gog_edge.engines.base import Array
from gog_edge.errors import CheckpointError
from gog_edge.exporting.policy.adapter import Adapter
from gog_edge.exporting.policy.config import QWEN3, QWEN25, SUPPORTED, ModelConfig, build_known
from gog_edge.exporting.policy.merging import Merger
from gog_edge.exporting.policy.weights import WeightFiles, check_finite
from gog_edge.files import open_tokenizer, read_bounded, read_json, sha256_of
from gog_edge.policy.manifest import CHAT_TEMPLATE, TOKENIZER, GenerationDefaults, TextSpec
from gog_edge.policy.vision import VisionSpec

__all__ = ["DEFAULT_MAX_PIXELS", "QWEN25", "QWEN3", "SUPPORTED", "Checkpoint"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
DEFAULT_MIN_PIXELS = 56 * 56
DEFAULT_MAX_PIXELS = 28 * 28 * 1280
BICUBIC = 3  # Pillow's number of the filter
EMBEDDINGS, HEAD = "language_model.embed_tokens.weight", "lm_head.weight"

Pixels = Annotated[int, Ge(1), Le(2**30)]
Channel = Annotated[float, Ge(-10), Le(10)]
Deviation = Annotated[float, Gt(0), Le(10)]


@dataclass(frozen=True, slots=True)
class SizeFields:
    """The object `size` of an image processor: areas in pixels, despite the names."""

    shortest_edge: Pixels | None = None
    longest_edge: Pixels | None = None


@dataclass(frozen=True, slots=True)
class ProcessorFields:
    """The keys of an image processor that this package reads or checks."""

    size: SizeFields = SizeFields()
    min_pixels: Pixels | None = None
    max_pixels: Pixels | None = None
    crop_max_pixels: Pixels | None = None  # a key that only this project writes
    image_mean: tuple[Channel, Channel, Channel] | None = None
    image_std: tuple[Deviation, Deviation, Deviation] | None = None
    patch_size: int | None = None
    merge_size: int | None = None
    temporal_patch_size: int | None = None
    do_resize: bool = True
    do_rescale: bool = True
    do_normalize: bool = True
    do_convert_rgb: bool = True
    resample: int = BICUBIC
    rescale_factor: float = 1 / 255


@dataclass(frozen=True, slots=True)
class GenerationFields:
    """The keys of generation_config.json that this package reads."""

    do_sample: bool = False
    temperature: Annotated[float, Ge(0), Le(100)] = 1.0
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    top_k: Annotated[int, Ge(0), Le(2**24)] = 0
    repetition_penalty: Annotated[float, Gt(0), Le(100)] = 1.0


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose tensors are read on request, with an adapter merged if there is one."""

    folder: Path
    model: ModelConfig
    weights: WeightFiles
    adapter: Adapter | None = None

    @classmethod
    def open(cls, folder: Path, adapter: Path | None = None) -> Checkpoint:
        """Read the config, the names and shapes of the tensors, and a PEFT folder to merge.

        Raises:
            CheckpointError: a file is missing or damaged, files contradict each other, or the model or the adapter is
                not supported.
        """
        model = ModelConfig.open(folder)
        weights = WeightFiles.open(folder)
        checkpoint = cls(folder, model, weights, Adapter.open(adapter) if adapter else None)
        last = f"language_model.layers.{model.text.num_hidden_layers - 1}.mlp.down_proj.weight"
        if last in weights:  # a wrong number of layers is reported before a model of that size is built
            weights.check_shapes(model.tensor_shapes(tied=checkpoint.base_is_tied))
        else:
            weights.read(last)
        if checkpoint.adapter is not None:
            _ = checkpoint.merger  # checks that the adapter fits
        return checkpoint

    # --- weights ---------------------------------------------------------------------------------

    @cached_property
    def base_is_tied(self) -> bool:
        """Return whether the base model's head shares the weights of the embeddings; a saved head that differs wins."""
        return self.model.asks_to_tie and (HEAD not in self.weights or self.weights.equal(HEAD, EMBEDDINGS))

    @cached_property
    def merger(self) -> Merger | None:
        """Return what merges the adapter. Raises CheckpointError if the adapter does not fit the model."""
        return None if self.adapter is None else Merger(self.adapter, self.model, tied=self.base_is_tied)

    @cached_property
    def parameters(self) -> int:
        """Return the number of parameters; a tied head counts once."""
        return sum(prod(shape) for shape in self.model.tensor_shapes(tied=self.text.tied).values())

    def vision_weights(self) -> Callable[[str], Array]:
        """Return a function that reads a tensor of the vision tower by its name within the tower."""
        return lambda name: self.tensor(f"visual.{name}")

    def decoder_weights(self) -> Callable[[str], Array]:
        """Return a function that reads a tensor of the decoder by its name; `lm_head.weight` is the head."""
        return lambda name: self.tensor(name if name == HEAD else f"language_model.{name}")

    def tensor(self, name: str) -> Array:
        """Return one tensor by its name within the model as float32, with the adapter merged.

        Raises:
            CheckpointError: it does not exist, cannot be read, or has values that are NaN or infinite.
        """
        if self.merger is None:
            return self._base(name)
        merged = self.merger.merge(name, self._base)
        check_finite(merged, f"'{self.merger.adapter.folder}', merged into '{self.folder}': '{name}'")
        return merged

    def _base(self, name: str) -> Array:
        return self.weights.read(EMBEDDINGS if name == HEAD and self.base_is_tied else name)

    @cached_property
    def sha256(self) -> str:
        """Return a hash of the names and contents of config, tokenizer, weights and adapter."""
        paths = [*self.weights.paths, self.model.path, self.folder / TOKENIZER]
        hashes = {path.name: sha256_of(path) for path in sorted(paths, key=lambda path: path.name) if path.is_file()}
        if self.adapter is not None:
            hashes |= {f"adapter/{path.name}": sha256_of(path) for path in self.adapter.files}
        return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()

    # --- settings --------------------------------------------------------------------------------

    @property
    def config(self) -> dict[str, Any]:
        """Return config.json."""
        return self.model.raw

    @property
    def architecture(self) -> str:
        """Return the name of the architecture, one of SUPPORTED."""
        return self.model.architecture

    @property
    def is_qwen3(self) -> bool:
        """Return whether this is Qwen3-VL; otherwise it is Qwen2.5-VL."""
        return self.model.is_qwen3

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what was ignored in the folder and in the adapter, for the person who exports."""
        return self.weights.notes + (self.merger.notes if self.merger else ())

    @cached_property
    def vision(self) -> VisionSpec:
        """Return the shapes of the vision tower and the settings of the image processor.

        Raises:
            CheckpointError: the processor has a setting that this version does not support.
        """
        tower, pixels = self.model.vision, self._processor()
        max_pixels = pixels.max_pixels or pixels.size.longest_edge or DEFAULT_MAX_PIXELS
        min_pixels = pixels.min_pixels or pixels.size.shortest_edge or DEFAULT_MIN_PIXELS
        if min_pixels > max_pixels:
            raise CheckpointError(
                f"'{self.folder}': the image processor's min_pixels = {min_pixels} exceeds max_pixels = {max_pixels}; "
                "copy its configuration again"
            )
        return VisionSpec(
            depth=tower.depth,
            hidden=tower.hidden_size,
            heads=tower.num_heads,
            intermediate=tower.intermediate_size,
            out_hidden=tower.out_hidden_size,
            patch=tower.patch_size,
            merge=tower.spatial_merge_size,
            temporal=tower.temporal_patch_size,
            window=0 if self.is_qwen3 else tower.window_size,
            full_attention=tuple(range(tower.depth)) if self.is_qwen3 else tower.fullatt_block_indexes,
            position_side=self.model.position_side,
            deepstack=self.model.deepstack,
            rope_theta=self.model.vision_rope_theta,
            norm_eps=1e-6,
            mean=pixels.image_mean or ((0.5, 0.5, 0.5) if self.is_qwen3 else CLIP_MEAN),
            std=pixels.image_std or ((0.5, 0.5, 0.5) if self.is_qwen3 else CLIP_STD),
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            crop_max_pixels=pixels.crop_max_pixels or max_pixels,
        )

    @cached_property
    def text(self) -> TextSpec:
        """Return the shape of the decoder, with the adapter merged: a head that it changes alone is no longer tied."""
        return self.model.text_spec(tied=self.base_is_tied if self.merger is None else self.merger.is_tied)

    @property
    def max_positions(self) -> int:
        """Return the number of tokens that the checkpoint was trained for."""
        return self.model.text.max_position_embeddings

    @property
    def image_token(self) -> int:
        """Return the id of the placeholder token for image embeddings."""
        return self.model.top.image_token_id

    @cached_property
    def eos(self) -> tuple[int, ...]:
        """Return the ids of the tokens that end a turn. Raises CheckpointError if no file names them."""
        given = self._generation.get("eos_token_id")
        ids = given if given is not None else self.model.eos_token_id
        if ids is None or ids == []:
            raise CheckpointError(f"'{self.folder}' has no eos_token_id; add it to generation_config.json")
        listed = ids if isinstance(ids, list) else [ids]
        vocab = self.model.text.vocab_size
        if not all(type(token) is int and 0 <= token < vocab for token in listed):
            raise CheckpointError(
                f"'{self.folder}': eos_token_id must be ids of tokens from 0 to {vocab - 1}, got {ids!r}; correct "
                "generation_config.json"
            )
        return tuple(listed)

    @cached_property
    def generation(self) -> GenerationDefaults:
        """Return the checkpoint's default sampling parameters. Raises CheckpointError for values out of range."""
        path = self.folder / "generation_config.json"
        raw: GenerationFields = build_known(GenerationFields, self._generation, path, "")
        if not raw.do_sample:
            return GenerationDefaults(repetition_penalty=float(raw.repetition_penalty))
        return GenerationDefaults(
            temperature=float(raw.temperature) or 1.0, top_p=float(raw.top_p), top_k=raw.top_k,
            repetition_penalty=float(raw.repetition_penalty),
        )  # fmt: skip

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer. Raises CheckpointError if it is missing, damaged, or has more tokens than the model."""
        path = self.folder / TOKENIZER
        if not path.is_file():
            raise CheckpointError(f"'{self.folder}' has no {TOKENIZER}; save its fast tokenizer there")
        tokenizer, vocab = open_tokenizer(path, what="checkpoint", error=CheckpointError), self.model.text.vocab_size
        largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
        if largest >= vocab:
            raise CheckpointError(
                f"'{path}' has a token with the id {largest}, the model has {vocab} (vocab_size in config.json); copy "
                "both files from the same checkpoint"
            )
        return tokenizer

    @cached_property
    def chat_template(self) -> str:
        """Return the Jinja source of the chat template. Raises CheckpointError if no file contains it."""
        path = self.folder / CHAT_TEMPLATE
        if path.is_file():
            try:
                return read_bounded(path).decode()
            except UnicodeDecodeError as exc:
                raise CheckpointError(f"'{path}' is not UTF-8 ({exc}); copy the one of its base model") from exc
        for name in ("chat_template.json", "tokenizer_config.json"):
            template = _default_template(_read(self.folder, name).get("chat_template"))
            if template is not None:
                return template
        raise CheckpointError(f"'{self.folder}' has no {CHAT_TEMPLATE}; copy the one of its base model")

    @cached_property
    def _generation(self) -> dict[str, Any]:
        return _read(self.folder, "generation_config.json")

    def _processor(self) -> ProcessorFields:
        """Return the image processor's settings, from either of the files that releases use."""
        path = self.folder / "processor_config.json"
        combined = _read(self.folder, path.name).get("image_processor")
        if combined is None:
            path = self.folder / "preprocessor_config.json"
            combined = _read(self.folder, path.name)
        if not isinstance(combined, Mapping):
            raise CheckpointError(f"'{path}': image_processor must be an object, got {combined!r}; copy it again")
        size = combined.get("size")
        if isinstance(size, Mapping):
            known = {key: value for key, value in size.items() if key in ("shortest_edge", "longest_edge")}
            combined = {**combined, "size": {key: value for key, value in known.items() if value is not None}}
        pixels: ProcessorFields = build_known(ProcessorFields, combined, path, "")
        tower = self.model.vision
        for key, value, expected in (
            ("patch_size", pixels.patch_size, tower.patch_size),
            ("merge_size", pixels.merge_size, tower.spatial_merge_size),
            ("temporal_patch_size", pixels.temporal_patch_size, tower.temporal_patch_size),
            *((key, getattr(pixels, key), True) for key in ("do_resize", "do_rescale", "do_normalize")),
            ("do_convert_rgb", pixels.do_convert_rgb, True), ("resample", pixels.resample, BICUBIC),
        ):  # fmt: skip
            if value not in (None, expected):
                raise CheckpointError(
                    f"'{path}': {key} must be {str(expected).lower()} for this model, got {value!r}; copy the file of "
                    "its base model"
                )
        if not isclose(pixels.rescale_factor, 1 / 255, rel_tol=1e-4):
            raise CheckpointError(f"'{path}': rescale_factor must be 1/255, got {pixels.rescale_factor!r}")
        return pixels


def _read(folder: Path, name: str) -> dict[str, Any]:
    """Return the object of a JSON file, or an empty one if the file does not exist."""
    path = folder / name
    return read_json(path, what="checkpoint", error=CheckpointError) if path.exists() else {}


def _default_template(value: Any) -> str | None:
    """Return the chat template of a JSON file: a string, or the one called "default" of a list of named ones."""
    if isinstance(value, list):
        named = [row for row in value if isinstance(row, dict) and row.get("name") == "default"]
        value = named[0].get("template") if named else None
    return value if isinstance(value, str) else None
