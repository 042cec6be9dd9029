"""The decoder once more, for steps of few tokens: heads that share keys and values are rows of one product.

ONNX Runtime lays keys and values out anew for each product of several rows, which takes longer than multiplying when
the rows are few. GroupQueryAttention takes a product for each head of the query. Here the heads of a group stand below
each other, as if they were more tokens, so that there is one for each head of the cache. All tokens after the first
head's are copies, which a mask hides; they stand behind the true ones, where the next step writes its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from gog_edge.exporting.graph import FLOAT, MICROSOFT
from gog_edge.exporting.lift_values import attributes
from gog_edge.policy.manifest import TextSpec

ATTENTION = "GroupQueryAttention"
# Heads of a group from which it is worth it: four save time in every step, two cost as much in steps of one token as
# they save in those of several.
LEAST_GROUP = 3


def write_grouped(decoder: Path, target: Path, spec: TextSpec) -> None:
    """Rewrite the graph `decoder` as `target`, in the same folder: both have the same weights file.

    It takes `mask` [1, 1, rows, seen] besides what the decoder takes; `rows` are the new tokens once for each head of a
    group, head after head, and so are the rows of cos, sin and of the cache from the first new token on.
    """
    model = onnx.load(str(decoder), load_external_data=False)
    graph = model.graph
    nodes = [new for node in graph.node for new in (_grouped(node, spec) if node.op_type == ATTENTION else [node])]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.input.append(helper.make_tensor_value_info("mask", FLOAT, [1, 1, "rows", "seen"]))
    for name, shape in _shapes(spec).items():
        graph.initializer.append(numpy_helper.from_array(np.asarray(shape, np.int64), name))
    onnx.save_model(model, str(target))


def _shapes(spec: TextSpec) -> dict[str, list[int]]:
    heads, kv_heads, width, group = spec.heads, spec.kv_heads, spec.head_dim, spec.group
    return {
        "grouped.widths": [heads * width, kv_heads * width, kv_heads * width],
        "grouped.heads": [-1, kv_heads, group, width],
        "grouped.rows": [1, -1, kv_heads * width],
        "grouped.groups": [group, -1, kv_heads, width],
        "grouped.joined": [1, -1, heads * width],
    }


def _grouped(node: NodeProto, spec: TextSpec) -> Iterator[NodeProto]:
    """The nodes that stand for an attention."""
    name = node.output[0]
    query, key, value = node.input[:3]
    if not key:  # all three in one
        query, key, value = (f"{name}.{part}" for part in ("query", "key", "value"))
        yield helper.make_node("Split", [node.input[0], "grouped.widths"], [query, key, value], axis=-1)
    yield helper.make_node("Reshape", [query, "grouped.heads"], [f"{name}.heads"])
    yield helper.make_node("Transpose", [f"{name}.heads"], [f"{name}.groups"], perm=[2, 0, 1, 3])
    yield helper.make_node("Reshape", [f"{name}.groups", "grouped.rows"], [f"{name}.rows"])
    for part, values in (("keys", key), ("values", value)):
        yield helper.make_node("Concat", [values] * spec.group, [f"{name}.{part}"], axis=1)
    inputs = [f"{name}.rows", f"{name}.keys", f"{name}.values", *node.input[3:], "", "mask"]  # "": position_ids
    outputs = [f"{name}.attended", *node.output[1:]]
    yield helper.make_node(ATTENTION, inputs, outputs, domain=MICROSOFT,
                           **(attributes(node) | {"num_heads": spec.kv_heads}))  # fmt: skip
    yield helper.make_node("Reshape", [f"{name}.attended", "grouped.groups"], [f"{name}.apart"])
    yield helper.make_node("Transpose", [f"{name}.apart"], [f"{name}.together"], perm=[1, 2, 0, 3])
    yield helper.make_node("Reshape", [f"{name}.together", "grouped.joined"], [name])
