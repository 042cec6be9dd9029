"""A LoRA adapter in PEFT's folder format, which is merged into the weights of its base model as they are read.

The format: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from gog_edge.engines.base import Array
from gog_edge.errors import CheckpointError
from gog_edge.files import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# The prefix of PEFT's wrapper; then the prefixes that different releases of transformers use, in the order of matching.
_WRAPPER = "base_model.model."
_PREFIXES = (
    ("model.visual.", "visual."), ("visual.", "visual."), ("model.language_model.", "language_model."),
    ("language_model.model.", "language_model."), ("model.lm_head", "lm_head"), ("lm_head", "lm_head"),
    ("model.", "language_model."),
)  # fmt: skip
_PARTS = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b",
          "lora_embedding_A": "lora_a", "lora_embedding_B": "lora_b"}  # fmt: skip


@dataclass(slots=True)
class _Delta:
    """The change of one weight."""

    lora_a: Array | None = None  # [rank, in]
    lora_b: Array | None = None  # [out, rank]
    replacement: Array | None = None  # PEFT's modules_to_save: replaces the weight


@dataclass(slots=True)
class Adapter:
    """The changes of a LoRA adapter, by module, such as `language_model.layers.0.self_attn.q_proj`."""

    folder: Path
    config: dict[str, Any]
    deltas: dict[str, _Delta]
    _merged: set[str] = field(default_factory=set)

    @classmethod
    def open(cls, folder: Path) -> Adapter:
        """Read a PEFT folder. Raises CheckpointError for settings or tensors that cannot be merged."""
        config = read_json(folder / CONFIG, what="adapter", error=CheckpointError)
        supported = {"peft_type": "LORA", "use_dora": False, "bias": "none", "fan_in_fan_out": False}
        for key, value in supported.items():
            if (config.get(key) or value) != value:
                raise CheckpointError(f"'{folder}/{CONFIG}' has {key} = {config[key]!r}; only {value!r} can be merged")
        deltas: dict[str, _Delta] = {}
        for name, array in _read_tensors(folder / WEIGHTS).items():
            module, part = _parse_name(folder, name)
            setattr(deltas.setdefault(module, _Delta()), part, array)
        return cls(folder, config, deltas)

    @property
    def files(self) -> tuple[Path, ...]:
        """Return the adapter's files."""
        return self.folder / CONFIG, self.folder / WEIGHTS

    def merge(self, name: str, weight: Array) -> Array:
        """Return a base weight with the adapter's change: float32 of its shape, or `weight` itself if there is none.

        Args:
            name: the weight's name, for example `language_model.norm.weight`.
            weight: float32; matrices are [out, in].

        Raises:
            CheckpointError: the change has another shape than the weight, or one of its two factors is missing.
        """
        module, _, suffix = name.rpartition(".")
        delta = self.deltas.get(module)
        if delta is None or suffix != "weight":
            return weight
        self._merged.add(module)
        change = delta.replacement if delta.replacement is not None else self._lora_product(module, delta)
        if change.shape != weight.shape:
            raise CheckpointError(
                f"'{self.folder}' changes {module} with shape {change.shape}, the base model has {weight.shape}; give "
                "the base model that the adapter was trained from"
            )
        return change if delta.replacement is not None else np.asarray(weight + change, np.float32)

    def _lora_product(self, module: str, delta: _Delta) -> Array:
        if delta.lora_a is None or delta.lora_b is None:
            missing = "lora_A" if delta.lora_a is None else "lora_B"
            raise CheckpointError(f"'{self.folder}' has no {missing} for {module}; save the adapter again")
        product = self._scale(module, len(delta.lora_a)) * (delta.lora_b @ delta.lora_a)
        return product.T if module.endswith("embed_tokens") else product

    def check_used(self) -> None:
        """Raise CheckpointError if a change was not merged, because the base model lacks the module."""
        unused = sorted(self.deltas.keys() - self._merged)
        if unused:
            more = f" and {len(unused) - 1} more modules" if len(unused) > 1 else ""
            raise CheckpointError(
                f"'{self.folder}' changes {unused[0]}{more}, which the base model does not have; give the base model "
                "that the adapter was trained from"
            )

    def _scale(self, module: str, rank: int) -> np.float32:
        alpha = _pattern(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha", rank))
        return np.float32(alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))


def _pattern(patterns: dict[str, float] | None, module: str, default: float) -> float:
    """Return PEFT's value for a module; the keys of `patterns` are regular expressions for the end of its name."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _read_tensors(path: Path) -> dict[str, Array]:
    if not path.is_file():
        raise CheckpointError(f"'{path}' does not exist; save the adapter as safetensors")
    try:
        with safe_open(path, framework="np") as shard:
            return {name: np.asarray(shard.get_tensor(name), np.float32) for name in shard.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as exc:
        raise CheckpointError(f"cannot read '{path}' as safetensors ({exc}); copy it again") from exc


def _parse_name(folder: Path, name: str) -> tuple[str, str]:
    """Return the module and the attribute of `_Delta` for a tensor's name in the adapter."""
    plain = name.removeprefix(_WRAPPER).replace(".modules_to_save", "").replace(".default", "")
    suffix = next((suffix for suffix in (*_PARTS, "weight") if plain.endswith(f".{suffix}")), None)
    if suffix is None:
        raise CheckpointError(f"'{folder}' contains the tensor '{name}', which does not belong to a LoRA adapter")
    module = plain.removesuffix(f".{suffix}")
    for released, own in _PREFIXES:
        if module.startswith(released):
            return own + module.removeprefix(released), _PARTS.get(suffix, "replacement")
    raise CheckpointError(f"'{folder}' changes '{module}', which is not a module of Qwen2.5-VL or Qwen3-VL")
