"""The graph of an exact search: products of queries with a block of vectors, and the best of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gog_edge.exporting.graph import FLOAT, FLOAT16, INT64, GraphBuilder
from gog_edge.retrieval.gpu_search import BLOCK_ROWS, NEAREST, QUERIES

OPSET = 21  # of every TensorRT that runs engines of ours
Shape = tuple[int, ...]


def write_search_graph(path: Path, dim: int) -> None:
    """Write it for vectors of `dim` dimensions.

    Inputs: queries float32 [n, dim]; vectors float16 [rows, dim], at least `NEAREST` rows. Outputs: scores float32 and
    rows int64 [n, NEAREST], inner products and row numbers, best first. Products are computed in half precision.
    """
    graph = GraphBuilder("search", path, opset=OPSET)
    queries = graph.op("Cast", graph.input("queries", FLOAT, ["n", dim]), to=FLOAT16)
    vectors = graph.op("Transpose", graph.input("vectors", FLOAT16, ["rows", dim]), perm=[1, 0])
    products = graph.op("MatMul", queries, vectors)
    best, rows = graph.ops("TopK", products, graph.weight(np.array([NEAREST], np.int64)), count=2, axis=-1)
    graph.output(graph.op("Cast", best, to=FLOAT), "scores", FLOAT, ["n", NEAREST])
    graph.output(rows, "rows", INT64, ["n", NEAREST])
    graph.save()


def search_profiles(dim: int) -> tuple[dict[str, tuple[Shape, Shape, Shape]], ...]:
    """Shapes that its engine must take."""
    queries, rows = (1, 8, QUERIES), (NEAREST, BLOCK_ROWS, BLOCK_ROWS)
    sizes = {"queries": queries, "vectors": rows}
    return ({name: ((least, dim), (usual, dim), (most, dim)) for name, (least, usual, most) in sizes.items()},)
