"""Graphs that were exported for ONNX Runtime's CPU, rewritten for other runtimes: same weights, same names.

`standard` holds operators of the ONNX standard alone (opset 24), as TensorRT takes them from 10.15 on: TensorScatter
becomes its in-place cache, Attention its fused attention. `decomposed` (opset 21) is for TensorRT before that, which
has neither. `half` keeps ONNX Runtime's own operators, for its CUDA provider.

Products and attention are half precision; all between them is single: norms, what products are added to, activations,
and the softmax where attention is taken apart. Inputs and outputs are single, too, but for a decoder's caches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import onnx

from gog_edge.errors import CheckpointError
from gog_edge.exporting.conversion.operators import DecomposedOperators, StandardOperators
from gog_edge.exporting.conversion.rules import HalfLifter, Lifter
from gog_edge.exporting.conversion.standard import StandardLifter
from gog_edge.exporting.conversion.values import Rewriter
from gog_edge.exporting.graph import OPSET, GraphBuilder

Kind = Literal["standard", "decomposed", "half"]
KINDS: tuple[Kind, ...] = ("standard", "decomposed", "half")
OPSETS: dict[Kind, int] = {"standard": OPSET, "decomposed": 21, "half": OPSET}


def lift_graph(source: Path, target: Path, kind: Kind, *, context: int = 0) -> None:
    """Rewrite a graph of a policy or an encoder.

    Args:
        source: decoder.onnx or vision.onnx of a policy folder, image.onnx or text.onnx of an encoder folder.
        target: the file to write; larger weights go to a file beside it.
        kind: what for.
        context: tokens that each cache of a decoder holds; 0 for all other graphs.

    Raises:
        CheckpointError: an operator cannot be rewritten, half precision does not hold a weight, a decoder's caches hold
            nothing, or what is no decoder is given some.
    """
    model = onnx.load(str(source), load_external_data=False)
    decoder = any(node.op_type == "GroupQueryAttention" for node in model.graph.node)
    if decoder != (context > 0):
        said = "a decoder: its caches must hold a token at least" if decoder else "no decoder: it has no caches"
        raise CheckpointError(f"'{source}' is {said}; a context of {context} cannot be had")
    graph = GraphBuilder(model.graph.name, target, opset=OPSETS[kind])
    rewriter = Rewriter(graph, model.graph, source.parent)
    lifter: Lifter = HalfLifter(rewriter, context)
    if kind != "half":
        operators = StandardOperators if kind == "standard" else DecomposedOperators
        lifter = StandardLifter(rewriter, context, operators(rewriter))
    lifter.lift()
    graph.prune()
    graph.save()
