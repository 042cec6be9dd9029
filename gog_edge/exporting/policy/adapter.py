"""A LoRA adapter in PEFT's folder format, merged into the weights of its base while they are read.

adapter_config.json and adapter_model.safetensors: https://huggingface.co/docs/peft/developer_guides/checkpoint
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

# PEFT's wrapper, then the prefixes of releases of different ages, in the order they are tried.
_WRAPPER = "base_model.model."
_PREFIXES = (
    ("model.visual.", "visual."), ("visual.", "visual."), ("model.language_model.", "language_model."),
    ("language_model.model.", "language_model."), ("model.lm_head", "lm_head"), ("lm_head", "lm_head"),
    ("model.", "language_model."),
)  # fmt: skip
_PARTS = {"lora_A.weight": "down", "lora_B.weight": "up", "lora_embedding_A": "down", "lora_embedding_B": "up"}


@dataclass(slots=True)
class _Change:
    """What an adapter does to one weight."""

    down: Array | None = None
    up: Array | None = None
    whole: Array | None = None  # modules_to_save: takes the weight's place


@dataclass(slots=True)
class Adapter:
    """Changes by module, such as `language_model.layers.0.self_attn.q_proj`."""

    folder: Path
    config: dict[str, Any]
    changes: dict[str, _Change]
    _merged: set[str] = field(default_factory=set)

    @classmethod
    def open(cls, folder: Path) -> Adapter:
        """Read a PEFT folder. CheckpointError names what it holds that cannot be merged."""
        config = read_json(folder / CONFIG, what="adapter", error=CheckpointError)
        for key, plain in (("peft_type", "LORA"), ("use_dora", False), ("bias", "none"), ("fan_in_fan_out", False)):
            if (config.get(key) or plain) != plain:
                raise CheckpointError(f"'{folder}/{CONFIG}' has {key} = {config[key]!r}; only {plain!r} can be merged")
        changes: dict[str, _Change] = {}
        for name, array in _arrays(folder / WEIGHTS).items():
            module, part = _read_name(folder, name)
            setattr(changes.setdefault(module, _Change()), part, array)
        return cls(folder, config, changes)

    @property
    def files(self) -> tuple[Path, ...]:
        """What the adapter is made of."""
        return self.folder / CONFIG, self.folder / WEIGHTS

    def merge(self, name: str, weight: Array) -> Array:
        """A base weight with the adapter's change; `name` such as `language_model.norm.weight`."""
        module, _, kind = name.rpartition(".")
        change = self.changes.get(module)
        if change is None or kind != "weight":
            return weight
        self._merged.add(module)
        added = change.whole if change.whole is not None else self._product(module, change)
        if added.shape != weight.shape:
            raise CheckpointError(
                f"'{self.folder}' changes {module} in shape {added.shape}, the base has {weight.shape}: "
                "is it an adapter of this base?"
            )
        return added if change.whole is not None else np.asarray(weight + added, np.float32)

    def _product(self, module: str, change: _Change) -> Array:
        if change.up is None or change.down is None:
            raise CheckpointError(f"'{self.folder}' has only one half of the change of {module}; save it again")
        product = self._scale(module, len(change.down)) * (change.up @ change.down)
        return product.T if module.endswith("embed_tokens") else product

    def check_used(self) -> None:
        """CheckpointError when a change found no weight: the adapter belongs to another model."""
        unused = sorted(self.changes.keys() - self._merged)
        if unused:
            raise CheckpointError(
                f"'{self.folder}' changes {unused[0]} and {len(unused) - 1} more that this base does not have: "
                "is it an adapter of this base?"
            )

    def _scale(self, module: str, rank: int) -> np.float32:
        alpha = _pattern(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha", rank))
        return np.float32(alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))


def _pattern(patterns: dict[str, float] | None, module: str, default: float) -> float:
    """PEFT's per-module values: a key is a regular expression for the end of a module's name."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _arrays(path: Path) -> dict[str, Array]:
    if not path.is_file():
        raise CheckpointError(f"'{path}' is not there; save the adapter as safetensors")
    try:
        with safe_open(path, framework="np") as shard:
            return {name: np.asarray(shard.get_tensor(name), np.float32) for name in shard.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as exc:
        raise CheckpointError(f"'{path}' is no readable safetensors file ({exc}); copy it again") from exc


def _read_name(folder: Path, name: str) -> tuple[str, str]:
    """(module, part) of a tensor's name in the adapter."""
    plain = name.removeprefix(_WRAPPER).replace(".modules_to_save", "").replace(".default", "")
    ending = next((ending for ending in (*_PARTS, "weight") if plain.endswith(f".{ending}")), None)
    if ending is None:
        raise CheckpointError(f"'{folder}' holds '{name}', which is no part of a LoRA adapter")
    module = plain.removesuffix(f".{ending}")
    for released, own in _PREFIXES:
        if module.startswith(released):
            return own + module.removeprefix(released), _PARTS.get(ending, "whole")
    raise CheckpointError(f"'{folder}' changes '{module}', which is no module of Qwen2.5-VL or Qwen3-VL")
