"""The vision towers of Qwen2.5-VL and Qwen3-VL as ONNX graphs, written straight from their weights.

One picture a run, patches in the order of `policy.vision.flatten`. What depends on the grid alone (angles, windows,
interpolation of positions) comes in from outside, so the graph holds no data-dependent shapes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from gog_edge.engines.base import Array
from gog_edge.exporting.graph import BOOL, FLOAT, INT64, MICROSOFT, Form, GraphBuilder, Progress, silent
from gog_edge.policy.manifest import VisionSpec

Weights = Callable[[str], Array]  # name within the tower, such as "blocks.0.norm1.weight" -> float32


class Windows(NamedTuple):
    """Inputs that say which patches see each other; see `policy.vision.window_feeds`."""

    slots: str
    places: str  # of each patch among all slots
    mask: str


class VisionWriter(ABC):
    """Writes patches [M, patch_dim] -> tokens [M / merge², out_hidden]."""

    builder: type[GraphBuilder] = GraphBuilder

    def __init__(
        self, path: Path, spec: VisionSpec, weights: Weights, form: Form = "fp32", progress: Progress = silent
    ) -> None:
        self.spec = spec
        self.weights = weights
        self._progress = progress
        self.graph = self.builder("vision", path, form)

    def write(self) -> None:
        """Write the whole tower."""
        graph, spec = self.graph, self.spec
        patches = graph.input("patches", FLOAT, ["patches", spec.patch_dim])
        for name in ("cos", "sin"):
            graph.input(name, FLOAT, [1, "patches", spec.head_dim // 2])
        stream = graph.op("Unsqueeze", self.begin(patches), graph.ints(0))
        deeper = []
        for block in self._progress(range(spec.depth), "vision tower"):
            stream = graph.op("Add", stream, self._attention(self.norm(stream, f"blocks.{block}.norm1"), block))
            stream = graph.op("Add", stream, self.feed_forward(self.norm(stream, f"blocks.{block}.norm2"), block))
            if block in spec.deepstack:
                place = spec.deepstack.index(block)
                deeper.append((place, graph.op("Unsqueeze", self.deepen(stream, place), graph.ints(0))))
        graph.output(self.merge(stream), "tokens", FLOAT, ["tokens", spec.out_hidden])
        if deeper:
            features = graph.op("Concat", *(feature for _, feature in sorted(deeper)), axis=0)
            graph.output(features, "deepstack", FLOAT, [len(deeper), "tokens", spec.out_hidden])
        graph.save()

    @abstractmethod
    def begin(self, patches: str) -> str:
        """Patches -> the first block's input [M, hidden]; declares further inputs."""

    @abstractmethod
    def norm(self, value: str, name: str) -> str:
        """The norm of that name."""

    @abstractmethod
    def feed_forward(self, normed: str, block: int) -> str:
        """A block's second half."""

    @abstractmethod
    def merge(self, stream: str) -> str:
        """[1, M, hidden] -> tokens [M / merge², out_hidden]."""

    def deepen(self, stream: str, place: int) -> str:
        """[1, M, hidden] -> features [M / merge², out_hidden] for the decoder's layer `place`."""
        raise NotImplementedError

    def windows(self, block: int) -> Windows | None:
        """What a block's patches see; None: each other."""
        return None

    def attend(self, qkv: str, windows: Windows | None) -> str:
        """Projections [1, M, 3 * hidden] -> what is attended [1, M, hidden]."""
        graph, heads, scale = self.graph, self.spec.heads, self.spec.head_dim**-0.5
        *turned, value = graph.ops("Split", qkv, count=3, axis=-1, num_outputs=3)
        query, key = (graph.op("RotaryEmbedding", part, "cos", "sin", num_heads=heads) for part in turned)
        if windows is None:
            # ONNX Runtime's own operator never holds all M² scores: less memory, and 1.4 times as fast as Attention.
            return graph.op(
                "MultiHeadAttention", query, key, value, domain=MICROSOFT, num_heads=heads, scale=scale
            )
        flat = [graph.op("Squeeze", part, graph.ints(0)) for part in (query, key, value)]
        cut = [graph.op("Gather", part, windows.slots, axis=0) for part in flat]
        attended = graph.op("Attention", *cut, windows.mask, q_num_heads=heads, kv_num_heads=heads, scale=scale)
        joined = graph.op("Reshape", attended, graph.ints(-1, self.spec.hidden))
        return graph.op("Unsqueeze", graph.op("Gather", joined, windows.places, axis=0), graph.ints(0))

    def linear(self, value: str, name: str) -> str:
        """The linear layer of that name, with its bias."""
        return self.graph.linear(value, self.weights(f"{name}.weight"), self.weights(f"{name}.bias"), name="linear")

    def joined(self, value: str) -> str:
        """[1, M, hidden] -> what is merged into one token side by side [M / merge², merge² * hidden]."""
        return self.graph.op("Reshape", value, self.graph.ints(-1, self.spec.hidden * self.spec.merge**2))

    def kernel(self) -> Array:
        """The patch embedding's weights [hidden, patch_dim]."""
        return self.weights("patch_embed.proj.weight").reshape(self.spec.hidden, -1)

    def _attention(self, normed: str, block: int) -> str:
        name = f"blocks.{block}.attn"
        return self.linear(self.attend(self.linear(normed, f"{name}.qkv"), self.windows(block)), f"{name}.proj")


class Qwen25Vision(VisionWriter):
    """Most blocks see only their window of the picture; RMS norms, gated feed-forward."""

    def begin(self, patches: str) -> str:
        """Windows are cut out by slots: W windows of S places each, empty ones masked away."""
        graph = self.graph
        self._windows = Windows(
            graph.input("window_slots", INT64, ["windows", "slots"]),
            graph.input("patch_places", INT64, ["patches"]),
            # Attention wants one row of the mask for each query.
            graph.input("window_mask", BOOL, ["windows", 1, "slots", "slots"]),
        )
        return graph.linear(patches, self.kernel(), name="patch_embed")

    def norm(self, value: str, name: str) -> str:
        """RMS norm."""
        scale = self.graph.weight(self.weights(f"{name}.weight"), "norm")
        return self.graph.op("RMSNormalization", value, scale, axis=-1, epsilon=self.spec.norm_eps)

    def feed_forward(self, normed: str, block: int) -> str:
        """SwiGLU."""
        name = f"blocks.{block}.mlp"
        gate, up = (
            (self.weights(f"{name}.{part}_proj.weight"), self.weights(f"{name}.{part}_proj.bias"))
            for part in ("gate", "up")
        )
        return self.linear(self.graph.swiglu(normed, gate, up), f"{name}.down_proj")

    def windows(self, block: int) -> Windows | None:
        """See `VisionWriter`."""
        return None if block in self.spec.full_attention else self._windows

    def merge(self, stream: str) -> str:
        """Norm, join, two layers."""
        inner = self.linear(self.joined(self.norm(stream, "merger.ln_q")), "merger.mlp.0")
        return self.linear(self.graph.op("Gelu", inner), "merger.mlp.2")


class Qwen3Vision(VisionWriter):
    """Every block sees the whole picture; learned positions, layer norms, features for the decoder's first layers."""

    def begin(self, patches: str) -> str:
        """Positions are mixed from the four nearest places of the learned table."""
        graph = self.graph
        nearest = graph.input("position_places", INT64, ["patches", 4])
        shares = graph.input("position_shares", FLOAT, ["patches", 4])
        table = graph.weight(self.weights("pos_embed.weight"), "positions")
        weighted = graph.op(
            "Mul", graph.op("Gather", table, nearest, axis=0), graph.op("Unsqueeze", shares, graph.ints(-1))
        )
        positions = graph.op("ReduceSum", weighted, graph.ints(1), keepdims=0)
        embedded = graph.linear(patches, self.kernel(), self.weights("patch_embed.proj.bias"), name="patch_embed")
        return graph.op("Add", embedded, positions)

    def norm(self, value: str, name: str) -> str:
        """Layer norm."""
        scale, bias = (self.graph.weight(self.weights(f"{name}.{part}"), "norm") for part in ("weight", "bias"))
        return self.graph.op("LayerNormalization", value, scale, bias, axis=-1, epsilon=self.spec.norm_eps)

    def feed_forward(self, normed: str, block: int) -> str:
        """Two layers."""
        inner = self.linear(normed, f"blocks.{block}.mlp.linear_fc1")
        return self.linear(self.graph.op("Gelu", inner, approximate="tanh"), f"blocks.{block}.mlp.linear_fc2")

    def merge(self, stream: str) -> str:
        """Norm, join, two layers."""
        return self._merged(self.joined(self.norm(stream, "merger.norm")), "merger")

    def deepen(self, stream: str, place: int) -> str:
        """Join, norm, two layers."""
        name = f"deepstack_merger_list.{place}"
        return self._merged(self.norm(self.joined(stream), f"{name}.norm"), name)

    def _merged(self, joined: str, name: str) -> str:
        return self.linear(self.graph.op("Gelu", self.linear(joined, f"{name}.linear_fc1")), f"{name}.linear_fc2")


def write_vision(
    path: Path, spec: VisionSpec, weights: Weights, form: Form = "fp32", progress: Progress = silent
) -> None:
    """Write the vision graph, its weights stored as `form`."""
    writer = Qwen25Vision if spec.window else Qwen3Vision
    writer(path, spec, weights, form, progress).write()
