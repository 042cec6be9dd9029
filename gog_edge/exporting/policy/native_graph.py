"""A policy's graphs for this package's native operators: weights packed in panels, a tiled KV cache in bfloat16.

One decoder graph serves single tokens and long prompts: BlockProduct reads 4-bit weights for any number of rows, where
ONNX Runtime needs a second layout of the weights, twice the size, to multiply many rows as fast.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gog_edge.engines.base import Array
from gog_edge.engines.onnx.native import DOMAIN, HEAD_WIDTH_MULTIPLE, MAX_HEAD_WIDTH, PANEL
from gog_edge.exporting.graph import UINT16, GraphBuilder, Progress, WeightFormat, silent
from gog_edge.exporting.policy.decoder_graph import DecoderWriter, Weights
from gog_edge.exporting.policy.vision_graph import VisionOperators, Windows
from gog_edge.exporting.quantization import Packed, quantize
from gog_edge.policy.manifest import TextSpec, WeightQuantization
from gog_edge.policy.vision import VisionSpec


def supports_native(text: TextSpec, vision: VisionSpec) -> bool:
    """Return whether the native operators have kernels for the widths of a model's attention heads."""
    fits_vector = text.head_dim % HEAD_WIDTH_MULTIPLE == 0
    return fits_vector and max(text.head_dim, vision.head_dim) <= MAX_HEAD_WIDTH


class NativeBuilder(GraphBuilder):
    """A graph builder that writes quantized linear layers with the operator BlockProduct."""

    def swiglu(self, value: str, gate: tuple[Array, Array | None], up: tuple[Array, Array | None]) -> str:
        """Compute silu(gate(value)) * up(value) in one operator; see `GraphBuilder.swiglu`."""
        if not isinstance(self.weight_format, WeightQuantization):
            return super().swiglu(value, gate, up)
        bias = None if gate[1] is None or up[1] is None else interleave_panels(gate[1], up[1])
        weight, columns = interleave_panels(gate[0], up[0]), len(gate[0])
        return self._block_product(value, weight, bias, "gate_up", self.weight_format, columns, gated=1)

    def _linear_by_block(
        self, value: str, weight: Array, bias: Array | None, name: str, scheme: WeightQuantization
    ) -> str:
        return self._block_product(value, weight, bias, name, scheme, len(weight), gated=0)

    def _block_product(
        self, value: str, weight: Array, bias: Array | None, name: str, scheme: WeightQuantization, columns: int, *,
        gated: int,
    ) -> str:
        packed, scales = quantize(weight, scheme)
        inputs = [value, self.weight(pack_panels(packed, scheme.bits).reshape(-1), name)]
        inputs.append(self.weight(pack_scales(scales).reshape(-1), f"{name}_scales"))
        if bias is not None:
            inputs.append(self.weight(pad_to_panels(bias), f"{name}_bias"))
        return self.op(
            "BlockProduct", *inputs, domain=DOMAIN, K=weight.shape[1], N=columns, bits=scheme.bits,
            block_size=scheme.size, gated=gated,
        )  # fmt: skip


class NativeDecoderWriter(DecoderWriter):
    """A writer of the decoder with the operators CachedAttention, which also normalizes heads, and BlockProduct."""

    name = "native"
    builder = NativeBuilder
    cache_dtype = UINT16  # the bits of bfloat16
    takes_last = False

    def attention(self, qkv: str, layer: int) -> str:
        """Compute attention and update the cache; see `DecoderWriter.attention`."""
        past_key, key = self.declare_cache(f"key_{layer}")
        past_value, value = self.declare_cache(f"value_{layer}")
        inputs = [qkv, past_key, past_value, "total", "cos", "sin"]
        if self.spec.qk_norm:
            inputs += [self.graph.weight(self.weights(f"layers.{layer}.self_attn.{part}_norm.weight"), "norm")
                       for part in "qk"]  # fmt: skip
        return self.graph.ops(
            "CachedAttention", *inputs, names=(key, value), domain=DOMAIN, num_heads=self.spec.heads,
            kv_num_heads=self.spec.kv_heads, scale=self.spec.head_dim**-0.5, epsilon=self.spec.norm_eps,
        )[0]

    def _after_attention(self, stream: str, attended: str, layer: int, next_norm: str) -> tuple[str, str]:
        """Compute the last layer for the newest tokens only; see `DecoderWriter`."""
        if layer + 1 == self.spec.layers and layer >= self.spec.deepstack:
            stream, attended = self._newest(stream), self._newest(attended)
        return super()._after_attention(stream, attended, layer, next_norm)


class NativeVisionOperators(VisionOperators):
    """The attention of a tower with the operator PatchAttention, which rotates and needs no gathered windows."""

    builder = NativeBuilder

    def attend(self, graph: GraphBuilder, spec: VisionSpec, qkv: str, windows: Windows | None) -> str:
        """Compute attention; see `VisionOperators.attend`."""
        masked = [] if windows is None else [windows.slots, windows.mask]
        return graph.op(
            "PatchAttention", qkv, "cos", "sin", *masked, domain=DOMAIN, num_heads=spec.heads,
            scale=spec.head_dim**-0.5,
        )


def write_native_decoder(
    path: Path, spec: TextSpec, weights: Weights, weight_format: WeightFormat, head_format: WeightFormat,
    progress: Progress = silent,
) -> None:
    """Write the decoder graph; see `decoder_graph.write_decoder`."""
    NativeDecoderWriter(
        path, spec, weights, weight_format=weight_format, head_format=head_format, progress=progress
    ).write()


# --- the layout of packed weights (engines/onnx/native/matmul.h) ---------------------------------


def pack_panels(packed: Packed, bits: int) -> Packed:
    """Reorder [columns, blocks, size * bits / 8] from `quantize` to [columns / PANEL, blocks, groups, PANEL, 4].

    A vector register then loads four rows of the weights for many columns. Of 4-bit weights, a byte contains rows i and
    i + 4 of a group of eight, the first in the low four bits.
    """
    padded = pad_to_panels(packed)
    columns, blocks, _ = padded.shape
    if bits == 4:
        values = np.stack([padded & 15, padded >> 4], axis=-1).reshape(columns, blocks, -1, 2, 4)
        padded = values[..., 0, :] | values[..., 1, :] << 4
    groups = padded.reshape(columns // PANEL, PANEL, blocks, -1, 4)
    return np.ascontiguousarray(groups.transpose(0, 2, 3, 1, 4))


def pack_scales(scales: Array) -> Array:
    """Reorder [columns, blocks] to [columns / PANEL, blocks, PANEL], padded with zeros."""
    padded = pad_to_panels(scales)
    return np.ascontiguousarray(padded.reshape(-1, PANEL, padded.shape[1]).transpose(0, 2, 1))


def interleave_panels(first: Array, second: Array) -> Array:
    """Join the columns of two arrays [columns, ...]: a panel of the first, a panel of the second, and so on."""
    pair = [padded.reshape(-1, PANEL, *padded.shape[1:]) for padded in (pad_to_panels(first), pad_to_panels(second))]
    return np.stack(pair, axis=1).reshape(-1, *first.shape[1:])


def pad_to_panels(columns: Array) -> Array:
    """Pad [columns, ...] with zeros to a multiple of PANEL columns."""
    return np.pad(columns, [(0, -len(columns) % PANEL), *[(0, 0)] * (columns.ndim - 1)])
