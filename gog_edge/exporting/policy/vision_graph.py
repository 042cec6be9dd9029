"""The vision towers of Qwen2.5-VL and Qwen3-VL as ONNX graphs, written directly from their weights.

A run encodes one picture, with patches in the order of `policy.vision.flatten`. Whatever depends only on the grid
(rotary angles, windows, interpolation of positions) is an input, so that no shape in the graph depends on a value.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from gog_edge.engines.base import Array
from gog_edge.exporting.graph import BOOL, FLOAT, INT64, MICROSOFT, GraphBuilder, Progress, WeightFormat, silent
from gog_edge.policy.vision import VisionSpec

Weights = Callable[[str], Array]  # name within the tower, such as "blocks.0.norm1.weight" -> float32


class Windows(NamedTuple):
    """Names of the inputs that assign patches to attention windows; see `policy.vision.window_feeds`."""

    slots: str  # patch in each slot of each window
    places: str  # slot of each patch
    mask: str


class VisionOperators:
    """The attention of a tower, with ONNX Runtime's own operators."""

    builder: type[GraphBuilder] = GraphBuilder

    def attend(self, graph: GraphBuilder, spec: VisionSpec, qkv: str, windows: Windows | None) -> str:
        """Compute attention of projections [1, M, 3 * hidden] -> [1, M, hidden], within windows if there are any."""
        heads, scale = spec.heads, spec.head_dim**-0.5
        *unrotated, value = graph.ops("Split", qkv, count=3, axis=-1, num_outputs=3)
        query, key = (graph.op("RotaryEmbedding", part, "cos", "sin", num_heads=heads) for part in unrotated)
        if windows is None:
            # This operator never stores all M² scores: less memory, and 1.4 times as fast as Attention.
            return graph.op(
                "MultiHeadAttention", query, key, value, domain=MICROSOFT, num_heads=heads, scale=scale
            )
        flat = [graph.op("Squeeze", part, graph.ints(0)) for part in (query, key, value)]
        windowed = [graph.op("Gather", part, windows.slots, axis=0) for part in flat]
        attended = graph.op("Attention", *windowed, windows.mask, q_num_heads=heads, kv_num_heads=heads, scale=scale)
        rows = graph.op("Reshape", attended, graph.ints(-1, spec.hidden))
        return graph.op("Unsqueeze", graph.op("Gather", rows, windows.places, axis=0), graph.ints(0))


class VisionWriter(ABC):
    """A writer of a tower: patches [M, patch_dim] -> tokens [M / merge², out_hidden]."""

    def __init__(
        self, path: Path, spec: VisionSpec, weights: Weights, weight_format: WeightFormat, progress: Progress,
        operators: VisionOperators,
    ) -> None:
        self.spec = spec
        self.weights = weights
        self._progress = progress
        self._operators = operators
        self.graph = operators.builder("vision", path, weight_format)

    def write(self) -> None:
        """Write the whole tower."""
        graph, spec = self.graph, self.spec
        patches = graph.input("patches", FLOAT, ["patches", spec.patch_dim])
        for name in ("cos", "sin"):
            graph.input(name, FLOAT, [1, "patches", spec.head_dim // 2])
        stream = graph.op("Unsqueeze", self.embed(patches), graph.ints(0))
        features = []
        for block in self._progress(range(spec.depth), "vision tower"):
            stream = graph.op("Add", stream, self._attention(self.norm(stream, f"blocks.{block}.norm1"), block))
            stream = graph.op("Add", stream, self.feed_forward(self.norm(stream, f"blocks.{block}.norm2"), block))
            if block in spec.deepstack:
                index = spec.deepstack.index(block)
                features.append((index, graph.op("Unsqueeze", self.deepstack(stream, index), graph.ints(0))))
        graph.output(self.merge(stream), "tokens", FLOAT, ["tokens", spec.out_hidden])
        if features:
            stacked = graph.op("Concat", *(feature for _, feature in sorted(features)), axis=0)
            graph.output(stacked, "deepstack", FLOAT, [len(features), "tokens", spec.out_hidden])
        graph.save()

    @abstractmethod
    def embed(self, patches: str) -> str:
        """Return the first block's input [M, hidden]; declare further graph inputs."""

    @abstractmethod
    def norm(self, value: str, name: str) -> str:
        """Apply the norm with this name."""

    @abstractmethod
    def feed_forward(self, normed: str, block: int) -> str:
        """Apply a block's MLP."""

    @abstractmethod
    def merge(self, stream: str) -> str:
        """Merge [1, M, hidden] to tokens [M / merge², out_hidden]."""

    def deepstack(self, stream: str, index: int) -> str:
        """Merge [1, M, hidden] to features [M / merge², out_hidden] for the decoder's layer `index`."""
        raise NotImplementedError

    def windows(self, block: int) -> Windows | None:
        """Return the attention windows of a block, or None if it attends to the whole picture."""
        return None

    def linear(self, value: str, name: str) -> str:
        """Apply the linear layer with this name, and its bias."""
        return self.graph.linear(value, self.weights(f"{name}.weight"), self.weights(f"{name}.bias"), name="linear")

    def group(self, value: str) -> str:
        """Reshape [1, M, hidden] to [M / merge², merge² * hidden]: the patches of a token side by side."""
        return self.graph.op("Reshape", value, self.graph.ints(-1, self.spec.hidden * self.spec.merge**2))

    def patch_kernel(self) -> Array:
        """Return the patch embedding's weights [hidden, patch_dim]."""
        return self.weights("patch_embed.proj.weight").reshape(self.spec.hidden, -1)

    def _attention(self, normed: str, block: int) -> str:
        name = f"blocks.{block}.attn"
        qkv = self.linear(normed, f"{name}.qkv")
        attended = self._operators.attend(self.graph, self.spec, qkv, self.windows(block))
        return self.linear(attended, f"{name}.proj")


class Qwen25Vision(VisionWriter):
    """The tower of Qwen2.5-VL: windowed attention in most blocks, RMS norms, gated MLPs."""

    def embed(self, patches: str) -> str:
        """Embed patches; declare W windows of S slots, of which the empty ones are masked."""
        graph = self.graph
        self._windows = Windows(
            graph.input("window_slots", INT64, ["windows", "slots"]),
            graph.input("patch_places", INT64, ["patches"]),
            # Attention needs one row of the mask per query.
            graph.input("window_mask", BOOL, ["windows", 1, "slots", "slots"]),
        )
        return graph.linear(patches, self.patch_kernel(), name="patch_embed")

    def norm(self, value: str, name: str) -> str:
        """Apply an RMS norm."""
        scale = self.graph.weight(self.weights(f"{name}.weight"), "norm")
        return self.graph.op("RMSNormalization", value, scale, axis=-1, epsilon=self.spec.norm_eps)

    def feed_forward(self, normed: str, block: int) -> str:
        """Apply a SwiGLU MLP."""
        name = f"blocks.{block}.mlp"
        gate, up = (
            (self.weights(f"{name}.{part}_proj.weight"), self.weights(f"{name}.{part}_proj.bias"))
            for part in ("gate", "up")
        )
        return self.linear(self.graph.swiglu(normed, gate, up), f"{name}.down_proj")

    def windows(self, block: int) -> Windows | None:
        """Return the windows, except for blocks with full attention."""
        return None if block in self.spec.full_attention else self._windows

    def merge(self, stream: str) -> str:
        """Apply a norm, then an MLP on the grouped patches."""
        inner = self.linear(self.group(self.norm(stream, "merger.ln_q")), "merger.mlp.0")
        return self.linear(self.graph.op("Gelu", inner), "merger.mlp.2")


class Qwen3Vision(VisionWriter):
    """The tower of Qwen3-VL: full attention, learned positions, layer norms, deepstack features."""

    def embed(self, patches: str) -> str:
        """Embed patches and add positions, interpolated from four entries of the learned table."""
        graph = self.graph
        nearest = graph.input("position_places", INT64, ["patches", 4])
        shares = graph.input("position_shares", FLOAT, ["patches", 4])
        table = graph.weight(self.weights("pos_embed.weight"), "positions")
        weighted = graph.op(
            "Mul", graph.op("Gather", table, nearest, axis=0), graph.op("Unsqueeze", shares, graph.ints(-1))
        )
        positions = graph.op("ReduceSum", weighted, graph.ints(1), keepdims=0)
        bias = self.weights("patch_embed.proj.bias")
        return graph.op("Add", graph.linear(patches, self.patch_kernel(), bias, name="patch_embed"), positions)

    def norm(self, value: str, name: str) -> str:
        """Apply a layer norm."""
        scale, bias = (self.graph.weight(self.weights(f"{name}.{part}"), "norm") for part in ("weight", "bias"))
        return self.graph.op("LayerNormalization", value, scale, bias, axis=-1, epsilon=self.spec.norm_eps)

    def feed_forward(self, normed: str, block: int) -> str:
        """Apply an MLP with the tanh approximation of GELU."""
        inner = self.linear(normed, f"blocks.{block}.mlp.linear_fc1")
        return self.linear(self.graph.op("Gelu", inner, approximate="tanh"), f"blocks.{block}.mlp.linear_fc2")

    def merge(self, stream: str) -> str:
        """Apply a norm, then an MLP on the grouped patches."""
        return self._merger(self.group(self.norm(stream, "merger.norm")), "merger")

    def deepstack(self, stream: str, index: int) -> str:
        """Apply a norm and an MLP on the grouped patches."""
        name = f"deepstack_merger_list.{index}"
        return self._merger(self.norm(self.group(stream), f"{name}.norm"), name)

    def _merger(self, grouped: str, name: str) -> str:
        return self.linear(self.graph.op("Gelu", self.linear(grouped, f"{name}.linear_fc1")), f"{name}.linear_fc2")


def write_vision(
    path: Path, spec: VisionSpec, weights: Weights, weight_format: WeightFormat = "fp32", progress: Progress = silent,
    operators: VisionOperators | None = None,
) -> None:
    """Write the vision graph of either architecture.

    Args:
        path: the .onnx file to write.
        spec: shapes of the tower.
        weights: its tensors by name.
        weight_format: how the weights of linear layers are stored.
        progress: shows progress over the blocks.
        operators: None for ONNX Runtime's own.
    """
    architecture = Qwen25Vision if spec.window else Qwen3Vision
    architecture(path, spec, weights, weight_format, progress, operators or VisionOperators()).write()
