"""The checkpoint in transformers in fp32 on the CPU, its adapter applied by PEFT: the reference of the parity check.

Nothing that merges weights for the export takes part: an adapter is not merged here, but runs beside the base weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from gog_edge.engines.base import Floats
from gog_edge.errors import CheckpointError
from gog_edge.exporting.policy.checkpoint import Checkpoint
from gog_edge.exporting.policy.config import quiet_transformers
from gog_edge.exporting.policy.merging import Merger, apply_adapter, peft_errors
from gog_edge.exporting.policy.weights import StoredTensor
from gog_edge.exporting.quantization import dequantize, quantize
from gog_edge.exporting.torchvision_shim import import_torchvision
from gog_edge.policy.manifest import PolicyManifest, WeightFormats, WeightQuantization
from gog_edge.types import Pixels

_PLACEHOLDER = WeightQuantization(8, 32)
_ALL_QUANTIZED = WeightFormats(
    decoder=_PLACEHOLDER, head=_PLACEHOLDER, embeddings=_PLACEHOLDER, vision=_PLACEHOLDER
)


class Reference:
    """A checkpoint in transformers, its adapter unmerged; each call computes everything from scratch."""

    def __init__(self, checkpoint: Checkpoint, manifest: PolicyManifest) -> None:
        self._model: Any = _load(checkpoint)
        self._merger = checkpoint.merger
        self._adapted: Any = None if self._merger is None else _apply(self._merger, self._model)
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        spec = manifest.vision
        self.image_token = manifest.image_token
        self._processor: Any = Qwen2VLImageProcessorPil(
            size={"shortest_edge": spec.min_pixels, "longest_edge": spec.max_pixels},
            image_mean=list(spec.mean), image_std=list(spec.std), patch_size=spec.patch,
            temporal_patch_size=spec.temporal, merge_size=spec.merge,
        )

    def merge_adapter(self) -> None:
        """Let PEFT merge the adapter into the whole model, whose weights can then be rounded."""
        if self._merger is not None:
            _untie(self._model)
            with peft_errors(self._merger.adapter, "cannot be merged by peft"):
                self._model, self._merger = self._adapted.merge_and_unload(safe_merge=True), None

    def round_weights(self, precision: str, formats: WeightFormats) -> None:
        """Round the weights, after `merge_adapter`, to the values that an export with these formats stores."""
        for name, parameter in self._model.named_parameters():
            scheme = _scheme_of(name, parameter.dim(), formats)
            if scheme is None and precision == "fp16" and _scheme_of(name, parameter.dim(), _ALL_QUANTIZED) is not None:
                parameter.data = parameter.data.half().float()
            elif scheme is not None:
                weight = parameter.data.reshape(len(parameter), -1).numpy()
                rounded = dequantize(*quantize(weight, scheme), scheme, weight.shape[1])
                parameter.data = torch.from_numpy(rounded).reshape(parameter.shape)

    @torch.no_grad()
    def image_tokens(self, picture: Pixels) -> Floats:
        """Return one picture's n tokens, followed by its deepstack features, as rows [(1 + layers) * n, hidden]."""
        inputs = self._processor([picture], return_tensors="pt")
        output = self._model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
        features = getattr(output, "deepstack_features", None) or []
        return np.asarray(torch.cat([output.pooler_output, *features]).numpy(), np.float32)

    @torch.no_grad()
    def logits(self, tokens: Sequence[int], pictures: Sequence[Pixels]) -> Floats:
        """Return the logits [n, vocab] of a whole conversation."""
        output = self._model(use_cache=False, **self._inputs(tokens, pictures))
        return np.asarray(output.logits[0].numpy(), np.float32)

    @torch.no_grad()
    def kv_states(self, tokens: Sequence[int], pictures: Sequence[Pixels]) -> Floats:
        """Return keys and values of every layer [2 * layers, kv_heads, n, head_dim], keys with rotary embeddings."""
        output = self._model(use_cache=True, logits_to_keep=1, **self._inputs(tokens, pictures))
        layers = output.past_key_values.layers
        return np.concatenate([part.numpy() for layer in layers for part in (layer.keys, layer.values)])

    def _inputs(self, tokens: Sequence[int], pictures: Sequence[Pixels]) -> Mapping[str, Any]:
        ids = torch.tensor([list(tokens)])
        images = self._processor(list(pictures), return_tensors="pt") if pictures else {}
        is_image = (ids == self.image_token).int()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": is_image, **images}


def _scheme_of(name: str, dimensions: int, formats: WeightFormats) -> WeightQuantization | None:
    """Return how the export quantizes a parameter of transformers, or None for floating point."""
    if dimensions < 2 or "pos_embed" in name:
        return None
    if name.startswith("model.visual."):
        return formats.vision
    if "lm_head" in name:
        return formats.head
    return formats.embeddings if "embed_tokens" in name else formats.decoder


# --- loading -------------------------------------------------------------------------------------


def _load(checkpoint: Checkpoint) -> Any:
    """Return the base model in transformers. Raises CheckpointError if it does not find every weight."""
    import_torchvision()
    import transformers

    tied = checkpoint.base_is_tied
    names = checkpoint.model.tensor_shapes(tied=tied)
    stored = {name: checkpoint.weights.tensors[name] for name in names}
    state = {name if name.startswith("lm_head") else f"model.{name}": tensor for name, tensor in _read(stored).items()}
    try:
        with quiet_transformers():
            model, loading = getattr(transformers, checkpoint.architecture).from_pretrained(
                None, config=checkpoint.model.library_config(tied=tied), state_dict=state, dtype=torch.float32,
                output_loading_info=True,
            )  # fmt: skip
    except Exception as exc:  # transformers raises many kinds
        reason = " ".join((str(exc).strip() or type(exc).__name__).split())[:300]
        raise CheckpointError(f"transformers cannot load '{checkpoint.folder}' ({reason})") from exc
    wrong = [name for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in loading[key]]
    if wrong:
        raise CheckpointError(f"transformers loads '{checkpoint.folder}' without '{wrong[0]}'; is it complete?")
    return model.eval().requires_grad_(False)


def _read(stored: Mapping[str, StoredTensor]) -> dict[str, torch.Tensor]:
    """Return tensors that are mapped from their files, without a copy."""
    by_path: defaultdict[Path, list[str]] = defaultdict(list)
    for name, tensor in stored.items():
        by_path[tensor.path].append(name)
    tensors = {}
    for path, names in by_path.items():
        with safe_open(path, framework="pt") as file:
            tensors.update({name: file.get_tensor(stored[name].name) for name in names})
    return tensors


def _apply(merger: Merger, model: Any) -> Any:
    """Return a PeftModel around the model, unmerged; PEFT itself reads the folder if its names are the present ones."""
    from peft import PeftModel

    adapter = merger.adapter
    with peft_errors(adapter, "cannot be applied to the base model"):
        if merger.is_standard:
            applied = PeftModel.from_pretrained(model, str(adapter.folder), torch_device="cpu")
        else:
            applied = apply_adapter(model, adapter, _read(adapter.tensors))
        return applied.float().eval().requires_grad_(False)


def _untie(model: Any) -> None:
    """Give the head a copy of the weights that it shares with the embeddings, since PEFT would merge into both."""
    shared = [module for module in model.modules() if isinstance(module, (torch.nn.Linear, torch.nn.Embedding))
              and module.weight.shape[0] == model.config.get_text_config().vocab_size]  # fmt: skip
    heads = [module for module in shared if isinstance(module, torch.nn.Linear)]
    for head in heads:
        if any(head.weight is other.weight for other in shared if other is not head):
            head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
