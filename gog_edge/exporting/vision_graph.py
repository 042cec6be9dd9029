"""The vision tower of Qwen2.5-VL as an ONNX graph, written straight from its weights.

Patches come in window order; who may see whom is told by two id vectors, so the graph holds no data-dependent shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gog_edge.engines.base import Array
from gog_edge.exporting.graph import FLOAT, INT32, GraphBuilder
from gog_edge.policy.manifest import VisionSpec

Weights = Callable[[str], Array]  # name within the tower, such as "blocks.0.norm1.weight" -> float32


class VisionWriter:
    """Writes patches [M, patch_dim] -> tokens [M / merge², out_hidden], both in window order."""

    def __init__(self, path: Path, spec: VisionSpec, weights: Weights) -> None:
        self.spec = spec
        self.weights = weights
        self.graph = GraphBuilder("vision", path)

    def write(self) -> None:
        """Write the whole tower."""
        graph, spec = self.graph, self.spec
        patches = graph.input("patches", FLOAT, ["patches", spec.patch_dim])
        for name in ("cos", "sin"):
            graph.input(name, FLOAT, [1, "patches", spec.head_dim // 2])
        segment = self._same(graph.input("segment_ids", INT32, ["patches"]))
        window = self._same(graph.input("window_ids", INT32, ["patches"]))
        kernel = self.weights("patch_embed.proj.weight").reshape(spec.hidden, -1)
        stream = graph.op("Unsqueeze", graph.linear(patches, kernel, name="patch_embed"), graph.ints(0))
        for block in range(spec.depth):
            stream = self._block(stream, block, segment if block in spec.full_attention else window)
        graph.output(self._merge(stream), "tokens", FLOAT, ["tokens", spec.out_hidden])
        graph.save()

    def _same(self, ids: str) -> str:
        """Ids [M] -> mask [M, M], true where equal."""
        rows, columns = (self.graph.op("Unsqueeze", ids, self.graph.ints(axis)) for axis in (1, 0))
        return self.graph.op("Equal", rows, columns)

    def _norm(self, value: str, weight: str) -> str:
        scale = self.graph.weight(self.weights(weight), "norm")
        return self.graph.op("RMSNormalization", value, scale, axis=-1, epsilon=self.spec.norm_eps)

    def _linear(self, value: str, name: str) -> str:
        return self.graph.linear(value, self.weights(f"{name}.weight"), self.weights(f"{name}.bias"), name="linear")

    def _block(self, stream: str, block: int, mask: str) -> str:
        graph, name = self.graph, f"blocks.{block}"
        stream = graph.op("Add", stream, self._attention(self._norm(stream, f"{name}.norm1.weight"), name, mask))
        normed = self._norm(stream, f"{name}.norm2.weight")
        gate, up = (
            (self.weights(f"{name}.mlp.{part}_proj.weight"), self.weights(f"{name}.mlp.{part}_proj.bias"))
            for part in ("gate", "up")
        )
        return graph.op("Add", stream, self._linear(graph.swiglu(normed, gate, up), f"{name}.mlp.down_proj"))

    def _attention(self, normed: str, name: str, mask: str) -> str:
        graph, heads = self.graph, self.spec.heads
        parts = graph.ops("Split", self._linear(normed, f"{name}.attn.qkv"), count=3, axis=-1, num_outputs=3)
        query, key = (graph.op("RotaryEmbedding", part, "cos", "sin", num_heads=heads) for part in parts[:2])
        scale = self.spec.head_dim**-0.5
        attended = graph.op(
            "Attention", query, key, parts[2], mask, q_num_heads=heads, kv_num_heads=heads, scale=float(scale)
        )
        return self._linear(attended, f"{name}.attn.proj")

    def _merge(self, stream: str) -> str:
        graph, spec = self.graph, self.spec
        normed = self._norm(stream, "merger.ln_q.weight")
        merged = graph.op("Reshape", normed, graph.ints(-1, spec.hidden * spec.merge**2))
        return self._linear(graph.op("Gelu", self._linear(merged, "merger.mlp.0")), "merger.mlp.2")


def write_vision(path: Path, spec: VisionSpec, weights: Weights) -> None:
    """Write the vision graph."""
    VisionWriter(path, spec, weights).write()


