"""The checkpoint in transformers, in fp32 on the CPU: the reference of the parity check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from gog_edge.engines.base import Floats
from gog_edge.exporting.policy.adapter import Adapter
from gog_edge.exporting.policy.checkpoint import Checkpoint
from gog_edge.exporting.quantization import dequantize, quantize
from gog_edge.exporting.torchvision_shim import import_torchvision
from gog_edge.policy.manifest import PolicyManifest, WeightFormats, WeightQuantization
from gog_edge.types import Pixels

_PLACEHOLDER = WeightQuantization(8, 32)
_ALL_QUANTIZED = WeightFormats(
    decoder=_PLACEHOLDER, head=_PLACEHOLDER, embeddings=_PLACEHOLDER, vision=_PLACEHOLDER
)


class Reference:
    """A checkpoint in transformers; each call computes everything from scratch, without a KV cache."""

    def __init__(self, checkpoint: Checkpoint, manifest: PolicyManifest) -> None:
        import_torchvision()
        from transformers import Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
        from transformers.utils import logging

        disable_progress_bar: Any = logging.disable_progress_bar
        disable_progress_bar()
        model: Any = Qwen3VLForConditionalGeneration if checkpoint.is_qwen3 else Qwen2_5_VLForConditionalGeneration
        self._model: Any = model.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
        if checkpoint.adapter is not None:
            self._merge(checkpoint.adapter)
        spec = manifest.vision
        self.image_token = manifest.image_token
        self._processor: Any = Qwen2VLImageProcessorPil(
            size={"shortest_edge": spec.min_pixels, "longest_edge": spec.max_pixels},
            image_mean=list(spec.mean), image_std=list(spec.std), patch_size=spec.patch,
            temporal_patch_size=spec.temporal, merge_size=spec.merge,
        )

    def _merge(self, adapter: Adapter) -> None:
        for name, parameter in self._model.named_parameters():
            parameter.data = torch.from_numpy(adapter.merge(name.removeprefix("model."), parameter.data.numpy()))

    def round_weights(self, precision: str, formats: WeightFormats) -> None:
        """Round the weights to the values that an export with these formats stores."""
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
