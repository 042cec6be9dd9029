"""Conversion of graphs that were exported for ONNX Runtime's CPU provider: same weights, same input names.

`standard` uses only operators of the ONNX standard (opset 24), as TensorRT takes them from 10.15 on: TensorScatter
becomes its in-place cache update, Attention its fused attention. `decomposed` (opset 21) is for older TensorRT, which
has neither. `fp16` keeps ONNX Runtime's own operators, for its CUDA provider.

Matmuls and attention compute in fp16; norms, residual sums, biases, activations and the softmax of decomposed attention
in fp32. Inputs and outputs are fp32, except a decoder's caches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import onnx

from gog_edge.errors import CheckpointError
from gog_edge.exporting.conversion.operators import DecomposedOperators, StandardOperators
from gog_edge.exporting.conversion.rules import CudaConverter, GraphConverter
from gog_edge.exporting.conversion.standard import StandardConverter
from gog_edge.exporting.conversion.values import ValueMap
from gog_edge.exporting.graph import OPSET, GraphBuilder

Kind = Literal["standard", "decomposed", "fp16"]
KINDS: tuple[Kind, ...] = ("standard", "decomposed", "fp16")
OPSETS: dict[Kind, int] = {"standard": OPSET, "decomposed": 21, "fp16": OPSET}


def convert_graph(source: Path, target: Path, kind: Kind, *, context: int = 0) -> None:
    """Convert a graph of a policy or an encoder.

    Args:
        source: decoder.onnx or vision.onnx of a policy folder, image.onnx or text.onnx of an encoder folder.
        target: the file to write; large weights go to an external data file next to it.
        kind: the runtime to convert for.
        context: tokens that each KV cache of a decoder has room for; 0 for all other graphs.

    Raises:
        CheckpointError: an operator cannot be converted, a weight exceeds the fp16 range, or `context` does not fit
            the graph.
    """
    model = onnx.load(str(source), load_external_data=False)
    is_decoder = any(node.op_type == "GroupQueryAttention" for node in model.graph.node)
    if is_decoder and context < 1:
        raise CheckpointError(f"'{source}' is a decoder: 'context' must be at least 1 token, got {context}")
    if not is_decoder and context != 0:
        raise CheckpointError(f"'{source}' is not a decoder and has no KV cache: 'context' must be 0, got {context}")
    graph = GraphBuilder(model.graph.name, target, opset=OPSETS[kind])
    values = ValueMap(graph, model.graph, source.parent)
    converter: GraphConverter
    if kind == "fp16":
        converter = CudaConverter(values, context)
    else:
        operators = StandardOperators if kind == "standard" else DecomposedOperators
        converter = StandardConverter(values, context, operators(values))
    converter.convert()
    graph.prune()
    graph.save()
