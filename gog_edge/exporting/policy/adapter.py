"""A LoRA adapter in PEFT's folder format: its settings, and its tensors under the names of the present model classes.

The format: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from gog_edge.errors import CheckpointError
from gog_edge.exporting.policy.config import ADAPTER_CONFIG
from gog_edge.exporting.policy.weights import ADAPTER_WEIGHTS, StoredTensor, model_name, read_header
from gog_edge.exporting.torchvision_shim import import_torchvision
from gog_edge.files import read_json

# How `init_lora_weights` treats the base weights, on which the meaning of the saved factors depends. PEFT repeats the
# decomposition of the first group when it loads an adapter, and leaves the base weights alone in the second.
DECOMPOSED = ("pissa", "olora")
UNTOUCHED = ("gaussian", "eva", "orthogonal", "mica")
_CONVERT = (
    "write the adapter with save_pretrained(FOLDER, path_initial_model_for_weight_conversion=INITIAL_ADAPTER), which "
    "converts it to plain LoRA"
)
# Settings that change what a layer computes in a way that cannot be merged into its weight, or that no test covers.
_UNSUPPORTED = ("layer_replication", "target_parameters", "megatron_config", "use_qalora")
_HARMLESS = ("lora_dtype", "lorap_lr_ratio", "enable_lora", "merge_weights")  # of other trainers: of no effect here

_LORA_PART = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|base_layer|token_adapter)(\..+)?$")
_ADAPTER_NAME = re.compile(r"(\.(?:lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|modules_to_save))\.default\b")


@dataclass(frozen=True)
class Adapter:
    """An adapter folder that was read and checked on its own, without the base model."""

    folder: Path
    config: Any  # peft.LoraConfig, with names of the present layout
    tensors: dict[str, StoredTensor]  # by PEFT's name without the prefix "base_model.model."
    is_standard: bool  # PEFT itself finds every tensor and module under these names

    @classmethod
    def open(cls, folder: Path) -> Adapter:
        """Read a PEFT folder.

        Raises:
            CheckpointError: a file is missing or damaged, or the kind of adapter or one of its settings is not
                supported.
        """
        raw = read_json(folder / ADAPTER_CONFIG, what="adapter", error=CheckpointError)
        config = _read_config(folder / ADAPTER_CONFIG, raw)
        tensors, modules = _read_tensors(folder)
        renamed = any(own != stored for own, stored in modules.items())
        is_standard = not renamed and config.target_modules is not None and all(
            tensor.name == f"base_model.model.{name}" for name, tensor in tensors.items()
        )
        if not is_standard:
            config = _resolve(config, modules)
        return cls(folder, config, tensors, is_standard)

    @property
    def files(self) -> tuple[Path, ...]:
        """Return the adapter's files."""
        return self.folder / ADAPTER_CONFIG, self.folder / ADAPTER_WEIGHTS

    @cached_property
    def decomposes_base(self) -> bool:
        """Return whether the factors belong to the base weights without their own initial values (PiSSA, OLoRA)."""
        return str(self.config.init_lora_weights).lower() in DECOMPOSED


# --- settings ------------------------------------------------------------------------------------


def _read_config(path: Path, raw: Mapping[str, Any]) -> Any:
    """Return PEFT's config object."""
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(f"'{path}' has peft_type = {raw.get('peft_type')!r}; only 'LORA' can be merged")
    import_torchvision()
    from peft import LoraConfig

    known = {field.name: field for field in fields(LoraConfig)}
    unknown = [key for key, value in raw.items() if key not in known and value and key not in _HARMLESS]
    if unknown:
        raise CheckpointError(
            f"'{path}' has {unknown[0]} = {raw[unknown[0]]!r}, which this version of peft does not know; it may change "
            "what the adapter computes: install the release of peft that wrote it, and save the adapter without it"
        )
    _check_types(path, raw)
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in (*DECOMPOSED, *UNTOUCHED):
        raise CheckpointError(
            f"'{path}' has init_lora_weights = {init!r}: the adapter was trained on other base weights, which cannot "
            f"be computed again from the base model; {_CONVERT}"
        )
    given = {key: value for key, value in raw.items() if key in known and value is not None}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = LoraConfig(**given)
    except Exception as exc:  # peft raises many kinds
        raise CheckpointError(f"'{path}' is not a config that peft accepts ({_first_line(exc)})") from exc
    _check_supported(path, config, known)
    return config


def _check_types(path: Path, raw: Mapping[str, Any]) -> None:
    """Check the settings that PEFT uses without checking them."""
    for key, kind in (("rank_pattern", int), ("alpha_pattern", float)):
        given = raw.get(key)
        if given is None:
            continue
        if not isinstance(given, Mapping) or not all(_is_positive(value, kind) for value in given.values()):
            _refuse(path, key, given, f"an object of positive {'integers' if kind is int else 'numbers'}")
        for pattern in given:
            _check_pattern(path, key, pattern)
    for key, kind in (("r", int), ("lora_alpha", float)):
        if raw.get(key) is not None and not _is_positive(raw[key], kind):
            _refuse(path, key, raw[key], "a positive number")
    for key in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "target_parameters"):
        given = raw.get(key)
        if given is not None and not isinstance(given, str) and not _are(given, str):
            _refuse(path, key, given, "a list of names or a regular expression")
        if isinstance(given, str):
            _check_pattern(path, key, given)
    layers = raw.get("layers_to_transform")
    if layers is not None and type(layers) is not int and not _are(layers, int):
        _refuse(path, "layers_to_transform", layers, "a list of integers")
    tokens = raw.get("trainable_token_indices")
    rows = tokens.values() if isinstance(tokens, Mapping) else [] if tokens is None else [tokens]
    if not all(_are(row, int) and all(token >= 0 for token in row) for row in rows):
        _refuse(path, "trainable_token_indices", tokens, "a list of token ids")
    for key in ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias", "ensure_weight_tying", "use_qalora"):
        if not isinstance(raw.get(key) or False, bool):
            _refuse(path, key, raw[key], "true or false")
    if raw.get("bias") not in (None, "none", "all", "lora_only"):
        _refuse(path, "bias", raw["bias"], "none, all or lora_only")
    if not isinstance(raw.get("init_lora_weights", True), (bool, str, type(None))):
        _refuse(path, "init_lora_weights", raw["init_lora_weights"], "true, false or a name")
    dropout = raw.get("lora_dropout")
    if dropout is not None and (type(dropout) not in (int, float) or not 0 <= dropout <= 1):
        _refuse(path, "lora_dropout", dropout, "a number from 0 to 1")


def _check_supported(path: Path, config: Any, known: Mapping[str, Any]) -> None:
    """Raise CheckpointError for settings whose effect cannot be merged."""
    variants = [name for name, field in known.items() if field.metadata.get("is_lora_variant") and name != "use_dora"]
    for name in (*_UNSUPPORTED, *variants):
        if getattr(config, name):
            raise CheckpointError(
                f"'{path}' has {name} = {getattr(config, name)!r}, which cannot be merged; train without it, or merge "
                "the adapter where it was trained"
            )


def _check_pattern(path: Path, key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as exc:
        raise CheckpointError(f"'{path}': {key} has {pattern!r}, which is no regular expression ({exc})") from exc


def _refuse(path: Path, key: str, value: object, expected: str) -> None:
    raise CheckpointError(f"'{path}': {key} must be {expected}, got {value!r}; save the adapter again")


def _is_positive(value: Any, kind: type) -> bool:
    allowed = (int,) if kind is int else (int, float)
    return type(value) in allowed and 0 < value <= 2**24 and math.isfinite(value)


def _are(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


# --- tensors -------------------------------------------------------------------------------------


def _read_tensors(folder: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return the tensors by PEFT's present name, and the modules with LoRA factors: present name -> stored name."""
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise CheckpointError(
            f"'{path}' does not exist; save the adapter as safetensors, with save_pretrained(FOLDER, "
            "safe_serialization=True): pickled weights may contain code and are not read"
        )
    tensors: dict[str, StoredTensor] = {}
    modules: dict[str, str] = {}
    for tensor in read_header(path):
        name, module, stored = _present_name(folder, tensor.name)
        if name in tensors:
            raise CheckpointError(f"'{path}' has both '{tensors[name].name}' and '{tensor.name}'; save it again")
        tensors[name] = tensor
        if ".lora_" in tensor.name:
            modules[module] = stored
    return tensors, modules


def _present_name(folder: Path, stored: str) -> tuple[str, str, str]:
    """Return a tensor's name in PEFT's present format, its module in the present layout, and its module as stored."""
    plain = re.sub(r"\.modules_to_save\b", "", _ADAPTER_NAME.sub(r"\1", stored))
    plain = plain.removesuffix(".default")
    plain = plain.rpartition("base_model.model.")[2]
    match = _LORA_PART.search(plain)
    module, part = (plain[: match.start()], plain[match.start() :]) if match else (plain.rpartition(".")[0], "")
    present = present_module(module)
    if present is None:
        raise CheckpointError(f"'{folder}' changes '{module}', which is not a module of Qwen2.5-VL or Qwen3-VL")
    return present + (part or plain.removeprefix(module)), present, module


def present_module(module: str) -> str | None:
    """Return a module's path in transformers' present classes, or None for one that they do not have."""
    name = model_name(f"{module}.")
    if name is None:
        return None
    own = name.removesuffix(".")
    return own if own == "lm_head" else f"model.{own}"


# --- names of other layouts ----------------------------------------------------------------------


def _resolve(config: Any, modules: Mapping[str, str]) -> Any:
    """Return the settings in terms of the present module paths.

    PEFT matched its patterns against the paths that the model had when the adapter was trained, which are those of the
    file. The result lists every module with its own rank and alpha, and has no patterns.
    """
    from peft.utils.other import get_pattern_key

    resolved = copy.deepcopy(config)
    if modules:
        resolved.target_modules = set(modules)
    resolved.exclude_modules = resolved.layers_to_transform = resolved.layers_pattern = None
    resolved.rank_pattern, resolved.alpha_pattern = {}, {}
    for module, stored in modules.items():
        rank_key, alpha_key = (
            get_pattern_key(patterns.keys(), stored) for patterns in (config.rank_pattern, config.alpha_pattern)
        )
        own = f"^{re.escape(module)}"
        resolved.rank_pattern[own] = config.rank_pattern.get(rank_key, config.r)
        resolved.alpha_pattern[own] = config.alpha_pattern.get(alpha_key, config.lora_alpha)
    saved = config.modules_to_save
    resolved.modules_to_save = None if saved is None else [_translated(name) for name in saved]
    tokens = config.trainable_token_indices
    if isinstance(tokens, dict):
        resolved.trainable_token_indices = {_translated(name): rows for name, rows in tokens.items()}
    return resolved


def _translated(name: str) -> str:
    """Return the present path of a module; a name without a known prefix is the end of a path, and stays."""
    return (present_module(name) or name) if "." in name else name


def _first_line(exc: Exception) -> str:
    return (str(exc).strip() or type(exc).__name__).splitlines()[0]


def some(names: Iterable[str]) -> str:
    """Return the first of some names, and how many more there are."""
    listed = sorted(names)
    return listed[0] + (f" and {len(listed) - 1} more" if len(listed) > 1 else "")
