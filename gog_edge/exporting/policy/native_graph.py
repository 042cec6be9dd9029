"""A policy's graphs once more, for this package's own operators (`engines.native`): weights in panels, a tiled cache.

One graph of the decoder does for one token and for many: its products read four bits of a weight whatever they are
multiplied with, where ONNX Runtime's want another form of the weights, of twice the size, to multiply many rows as
quickly.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gog_edge.engines.base import Array
from gog_edge.engines.onnx.native import DOMAIN, PANEL, WIDEST, WIDTHS
from gog_edge.exporting.graph import UINT16, Form, GraphBuilder, Progress, silent
from gog_edge.exporting.policy.decoder_graph import DecoderWriter, Weights
from gog_edge.exporting.policy.vision_graph import Qwen3Vision, Qwen25Vision, VisionWriter, Windows
from gog_edge.exporting.quantization import Packed, quantise
from gog_edge.policy.manifest import Blocks, TextSpec, VisionSpec


def fits_native(text: TextSpec, vision: VisionSpec) -> bool:
    """Whether there are kernels for such heads."""
    return text.head_dim % WIDTHS == 0 and max(text.head_dim, vision.head_dim) <= WIDEST


class NativeBuilder(GraphBuilder):
    """Writes weights in blocks as `BlockProduct` takes them."""

    def swiglu(self, value: str, gate: tuple[Array, Array | None], up: tuple[Array, Array | None]) -> str:
        """See `GraphBuilder`; in one operator."""
        if not isinstance(self.form, Blocks):
            return super().swiglu(value, gate, up)
        bias = None if gate[1] is None or up[1] is None else in_turns(gate[1], up[1])
        return self._product(value, in_turns(gate[0], up[0]), bias, "gate_up", self.form, len(gate[0]), gated=1)

    def _blocked(self, value: str, weight: Array, bias: Array | None, name: str, blocks: Blocks) -> str:
        return self._product(value, weight, bias, name, blocks, len(weight), gated=0)

    def _product(
        self, value: str, weight: Array, bias: Array | None, name: str, blocks: Blocks, columns: int, *, gated: int
    ) -> str:
        packed, scales = quantise(weight, blocks)
        inputs = [value, self.weight(panels(packed, blocks.bits).reshape(-1), name)]
        inputs.append(self.weight(panels_of_scales(scales).reshape(-1), f"{name}_scales"))
        if bias is not None:
            inputs.append(self.weight(filled(bias), f"{name}_bias"))
        return self.op(
            "BlockProduct", *inputs, domain=DOMAIN, K=weight.shape[1], N=columns, bits=blocks.bits,
            block_size=blocks.size, gated=gated,
        )  # fmt: skip


class NativeWriter(DecoderWriter):
    """By `CachedAttention`, which normalises heads, and by `BlockProduct`."""

    name = "native"
    builder = NativeBuilder
    cache_type = UINT16  # bfloat16, in tiles
    takes_last = False

    def attention(self, qkv: str, layer: int) -> str:
        """See `DecoderWriter`."""
        past_key, key = self.state(f"key_{layer}")
        past_value, value = self.state(f"value_{layer}")
        inputs = [qkv, past_key, past_value, "total", "cos", "sin"]
        if self.spec.qk_norm:
            inputs += [self.graph.weight(self.weights(f"layers.{layer}.self_attn.{part}_norm.weight"), "norm")
                       for part in "qk"]  # fmt: skip
        return self.graph.ops(
            "CachedAttention", *inputs, names=(key, value), domain=DOMAIN, num_heads=self.spec.heads,
            kv_num_heads=self.spec.kv_heads, scale=self.spec.head_dim**-0.5, epsilon=self.spec.norm_eps,
        )[0]

    def _rest(self, stream: str, attended: str, layer: int, following: str) -> tuple[str, str]:
        """The last layer's products are for the newest tokens alone, too."""
        if layer + 1 == self.spec.layers and layer >= self.spec.deepstack:
            stream, attended = self._newest(stream), self._newest(attended)
        return super()._rest(stream, attended, layer, following)


class NativeTower(VisionWriter):
    """By `PatchAttention`, which turns queries and keys and needs no windows cut out, and by `BlockProduct`."""

    builder = NativeBuilder

    def attend(self, qkv: str, windows: Windows | None) -> str:
        """See `VisionWriter`."""
        seen = [] if windows is None else [windows.slots, windows.mask]
        return self.graph.op(
            "PatchAttention", qkv, "cos", "sin", *seen, domain=DOMAIN, num_heads=self.spec.heads,
            scale=self.spec.head_dim**-0.5,
        )


class NativeQwen25Vision(NativeTower, Qwen25Vision):
    """See `Qwen25Vision`."""


class NativeQwen3Vision(NativeTower, Qwen3Vision):
    """See `Qwen3Vision`."""


def panels(packed: Packed, bits: int) -> Packed:
    """[columns, blocks, size * bits / 8] as `quantise` gives them -> [columns / PANEL, blocks, groups, PANEL, 4].

    See engines/native/product.h: a vector has four rows of the weights for many columns; of four bits, the next four
    rows stand in the upper halves.
    """
    whole = filled(packed)
    columns, blocks, _ = whole.shape
    if bits == 4:
        numbers = np.stack([whole & 15, whole >> 4], axis=-1).reshape(columns, blocks, -1, 2, 4)
        whole = numbers[..., 0, :] | numbers[..., 1, :] << 4  # rows 8 i to 8 i + 3 below 8 i + 4 to 8 i + 7
    fours = whole.reshape(columns // PANEL, PANEL, blocks, -1, 4)
    return np.ascontiguousarray(fours.transpose(0, 2, 3, 1, 4))


def panels_of_scales(scales: Array) -> Array:
    """[columns, blocks] -> [columns / PANEL, blocks, PANEL], filled up."""
    whole = filled(scales)
    return np.ascontiguousarray(whole.reshape(-1, PANEL, whole.shape[1]).transpose(0, 2, 1))


def in_turns(first: Array, second: Array) -> Array:
    """Columns of both [columns, ...], a panel of one and a panel of the other."""
    pair = [whole.reshape(-1, PANEL, *whole.shape[1:]) for whole in (filled(first), filled(second))]
    return np.stack(pair, axis=1).reshape(-1, *first.shape[1:])


def filled(columns: Array) -> Array:
    """With zeros, to whole panels."""
    return np.pad(columns, [(0, -len(columns) % PANEL), *[(0, 0)] * (columns.ndim - 1)])


def write_native(
    path: Path, spec: TextSpec, weights: Weights, form: Form, head: Form, progress: Progress = silent
) -> None:
    """Write the decoder's graph, its weights stored as `form`, the head's as `head`."""
    NativeWriter(path, spec, weights, form=form, head=head, progress=progress).write()


def write_native_vision(
    path: Path, spec: VisionSpec, weights: Weights, form: Form, progress: Progress = silent
) -> None:
    """Write the vision graph, its weights stored as `form`."""
    writer = NativeQwen25Vision if spec.window else NativeQwen3Vision
    writer(path, spec, weights, form, progress).write()
