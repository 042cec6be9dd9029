"""Merging of a LoRA adapter into its base model with PEFT's own arithmetic, one module at a time.

PEFT applies the adapter to the whole model on the meta device, which finds and checks the modules that it changes. The
weights of each are computed when they are asked for: PEFT applies the adapter to a model that has only this module,
with its real weights, and merges it. So the memory holds one module, and what PEFT does when it loads an adapter (the
decomposition of PiSSA and OLoRA, the norms of DoRA) is done here too.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from gog_edge.engines.base import Array
from gog_edge.errors import CheckpointError
from gog_edge.exporting.policy.adapter import Adapter, some
from gog_edge.exporting.policy.config import ModelConfig

Tensor = TypeVar("Tensor")

EMBEDDINGS, HEAD = "model.language_model.embed_tokens", "lm_head"
_ADDED = re.compile(r"\.lora_|\.modules_to_save\.|\.trainable_tokens_delta")


class Merger:
    """The changes of an adapter to the weights of one base model."""

    def __init__(self, adapter: Adapter, model: ModelConfig, *, tied: bool) -> None:
        """Check that the adapter fits. `tied`: the base model's head shares the weights of the embeddings.

        Raises:
            CheckpointError: the adapter lacks a tensor, has one that the model does not have, or one of another shape.
        """
        from peft.tuners.lora import LoraLayer
        from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

        self.adapter = adapter
        self._base_is_tied = tied
        with peft_errors(adapter, "does not fit the base model"):
            applied = apply_adapter(model.meta_model(tied=tied), adapter, {
                name: torch.empty(tensor.shape, device="meta") for name, tensor in adapter.tensors.items()
            }, meta=True)  # fmt: skip
        modules = dict(applied.base_model.model.named_modules())
        self._layers = {name: module for name, module in modules.items() if isinstance(module, LoraLayer)}
        self._tokens = {name: module for name, module in modules.items() if isinstance(module, TrainableTokensWrapper)}
        self._saved = {name for name, module in modules.items() if isinstance(module, ModulesToSaveWrapper)}
        self._tensors = known_names(applied, adapter.tensors)
        self._check_token_ids(model.text.vocab_size)

    @property
    def is_standard(self) -> bool:
        """Return whether PEFT itself reads the folder completely: its names are those of the present classes."""
        return self.adapter.is_standard and self._tensors.keys() == self.adapter.tensors.keys()

    @property
    def is_tied(self) -> bool:
        """Return whether the head still shares the weights of the embeddings when the adapter is merged."""
        if not self._base_is_tied:
            return False
        changed = [self._changes(module) for module in (EMBEDDINGS, HEAD)]
        return not any(changed) or (all(changed) and self._ties_adapters)

    @property
    def _ties_adapters(self) -> bool:
        """Return whether PEFT gives head and embeddings the same change."""
        head = self._tokens.get(HEAD)
        return bool(self.adapter.config.ensure_weight_tying) or (
            head is not None and head.token_adapter.tied_adapter is not None
        )

    def _changes(self, module: str) -> bool:
        return module in {*self._layers, *self._tokens, *self._saved} or f"{module}.weight" in self._tensors

    @property
    def notes(self) -> tuple[str, ...]:
        """Return the patterns of the adapter that PEFT ignored when it was trained, because they match no module."""
        from peft.utils.other import get_pattern_key

        config, ignored = self.adapter.config, []
        for key in ("rank_pattern", "alpha_pattern"):
            patterns = getattr(config, key)
            used = {get_pattern_key(patterns, module) for module in self._layers}
            ignored += [f"{key} '{pattern}'" for pattern in patterns if pattern not in used]
        return (f"{some(ignored)} of the adapter matches no module, as in its training",) if ignored else ()

    def merge(self, name: str, read: Callable[[str], Array]) -> Array:
        """Return a weight with the adapter merged, as float32.

        Args:
            name: the weight's name within the model, for example `language_model.norm.weight`.
            read: returns a weight of the base model by such a name.

        Raises:
            CheckpointError: PEFT cannot merge the module.
        """
        path = name if name.startswith("lm_head") else f"model.{name}"
        module, _, leaf = path.rpartition(".")
        weight = self._base(path, name, read)
        if module in self._tokens and leaf == "weight":
            return self._with_tokens(module, weight)
        if module not in self._layers or (leaf == "bias" and not self.adapter.config.lora_bias):
            return weight
        own = {leaf: weight}
        if leaf == "bias":
            own["weight"] = self._base(f"{module}.weight", name.removesuffix("bias") + "weight", read)
        with peft_errors(self.adapter, f"cannot be merged into {module}"):
            return self._merge_module(module, own)[leaf]

    def _base(self, path: str, name: str, read: Callable[[str], Array]) -> Array:
        """Return the weight that LoRA's change is added to: that of the base model, or one saved with the adapter."""
        module, _, leaf = path.rpartition(".")
        stored = next((key for key in (path, f"{module}.base_layer.{leaf}") if key in self._tensors), None)
        if stored is None and self._base_is_tied and module == HEAD:
            stored = f"{EMBEDDINGS}.base_layer.weight"  # PEFT loads it into the weight that both share
        return self._tensors[stored].read() if stored in self._tensors else read(name)

    def _with_tokens(self, module: str, weight: Array) -> Array:
        wrapper = self._tokens[module].token_adapter
        source = EMBEDDINGS if wrapper.tied_adapter is not None else module
        rows = self._tensors[f"{source}.token_adapter.trainable_tokens_delta"].read()
        merged = weight.copy()
        merged[wrapper.token_indices["default"]] = rows
        return merged

    def _merge_module(self, module: str, weights: dict[str, Array]) -> dict[str, Array]:
        """Return the weights of one module with LoRA merged by PEFT."""
        from peft import inject_adapter_in_model, set_peft_model_state_dict

        layer = copy.deepcopy(self._layers[module].get_base_layer())
        for leaf, shape in [(leaf, parameter.shape) for leaf, parameter in layer.named_parameters()]:
            values = weights.get(leaf, np.zeros(shape, np.float32))
            setattr(layer, leaf, nn.Parameter(torch.from_numpy(np.ascontiguousarray(values)), requires_grad=False))
        config = self._config_for(module)
        with torch.no_grad():
            model = inject_adapter_in_model(config, _nested(module, layer))
            prefix = f"{module}."
            state = {name: torch.from_numpy(tensor.read()) for name, tensor in self._tensors.items()
                     if name.startswith(prefix) and ".base_layer." not in name}  # fmt: skip
            if self.adapter.config.ensure_weight_tying and module == HEAD and not state:
                state = self._tied_factors()
            result: Any = set_peft_model_state_dict(model, state)
            missing = [key for key in result.missing_keys if _ADDED.search(key)]
            if missing or result.unexpected_keys:
                raise ValueError(f"peft does not find {some([*missing, *result.unexpected_keys])}")
            wrapper: Any = model.get_submodule(module)
            wrapper.merge()
            merged = wrapper.get_base_layer()
            return {leaf: getattr(merged, leaf).detach().numpy() for leaf in weights}

    def _tied_factors(self) -> dict[str, torch.Tensor]:
        """Return the factors of a head whose adapter PEFT ties to that of the embeddings."""
        first, second = (
            torch.from_numpy(self._tensors[f"{EMBEDDINGS}.lora_embedding_{part}"].read()) for part in "AB"
        )
        return {f"{HEAD}.lora_A.weight": second.T, f"{HEAD}.lora_B.weight": first.T}

    def _config_for(self, module: str) -> Any:
        """Return the adapter's settings for a model that has only one module; its rank and alpha stay the same."""
        config = copy.deepcopy(self.adapter.config)
        config.target_modules = {module}
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        config.modules_to_save = config.trainable_token_indices = None
        config.bias = "none"  # trained biases replace those of the base model
        config.ensure_weight_tying = False
        config.inference_mode = True
        if not self.adapter.decomposes_base:
            config.init_lora_weights = True  # initial values, which the adapter's own replace
        return config

    def _check_token_ids(self, vocab: int) -> None:
        for module in self._tokens.values():
            largest = max(module.token_adapter.token_indices["default"], default=0)
            if largest >= vocab:
                raise CheckpointError(
                    f"'{self.adapter.folder}' has trainable_token_indices up to {largest}, the base model has {vocab} "
                    "tokens; give the base model that the adapter was trained from"
                )


def apply_adapter(model: Any, adapter: Adapter, tensors: dict[str, torch.Tensor], *, meta: bool = False) -> Any:
    """Return a PeftModel around `model`, with the adapter's tensors.

    Args:
        model: of transformers.
        adapter: the adapter.
        tensors: its tensors, by the names of `Adapter.tensors`.
        meta: `model` and `tensors` are on the meta device, where nothing can be computed.

    Raises:
        CheckpointError: the model has no such modules, or tensors are missing.
        Exception: as raised by PEFT.
    """
    from peft import PeftModel, set_peft_model_state_dict

    config = copy.deepcopy(adapter.config)
    config.inference_mode = True
    config.task_type = None  # selects a wrapper for training and generation
    if meta:
        config.init_lora_weights = True
    applied = PeftModel(model, config, low_cpu_mem_usage=meta)
    state = {f"base_model.model.{name}": tensor for name, tensor in known_names(applied, tensors).items()}
    result: Any = set_peft_model_state_dict(applied, state, low_cpu_mem_usage=meta)
    if result.unexpected_keys:
        unexpected = some(_plain(key) for key in result.unexpected_keys)
        raise CheckpointError(
            f"'{adapter.folder}' changes {unexpected}, which the base model does not have, or target_modules does not "
            "name; give the base model that the adapter was trained from"
        )
    tied = f".{HEAD}.token_adapter." if _ties_tokens(applied) else None
    missing = [_plain(key) for key in result.missing_keys if _ADDED.search(key) and not (tied and tied in key)]
    if missing:
        module, _, part = missing[0].rpartition(".lora_")
        named = f"lora_{part.partition('.')[0]} for {module}" if module else missing[0]
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise CheckpointError(
            f"'{adapter.folder}' has no {named}{more}, which its {adapter.files[0].name} requires; save the adapter "
            "again"
        )
    return applied


def _ties_tokens(applied: Any) -> bool:
    """Return whether PEFT lets the head use the trained tokens of the embeddings."""
    adapter = getattr(applied.base_model.model.get_submodule(HEAD), "token_adapter", None)
    return adapter is not None and adapter.tied_adapter is not None


def known_names(applied: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by their names in a model with the adapter: old releases of PEFT omit `base_layer` of biases."""
    known = {name.removeprefix("base_model.model.") for name in applied.state_dict()}

    def renamed(name: str) -> str:
        module, _, leaf = name.rpartition(".")
        wrapped = f"{module}.base_layer.{leaf}"
        return wrapped if name not in known and wrapped in known else name

    return {renamed(name): tensor for name, tensor in tensors.items()}


def _plain(key: str) -> str:
    return key.removeprefix("base_model.model.").replace(".default", "")


def _nested(path: str, layer: nn.Module) -> nn.Module:
    """Return a module that has `layer` at a dotted path and nothing else."""
    root = parent = nn.Module()
    *outer, name = path.split(".")
    for part in outer:
        child = nn.Module()
        parent.add_module(part, child)
        parent = child
    parent.add_module(name, layer)
    return root


@contextmanager
def peft_errors(adapter: Adapter, what: str) -> Iterator[None]:
    """Raise CheckpointError for any error of PEFT, and silence its warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as exc:  # peft raises many kinds
        reason = " ".join((str(exc).strip() or type(exc).__name__).split())[:300]
        raise CheckpointError(
            f"'{adapter.folder}' {what} ({reason}); give the base model that the adapter was trained from"
        ) from exc
