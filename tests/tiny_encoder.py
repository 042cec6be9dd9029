"""A small ONNX encoder: it projects the colours of a coarse grid, and words that name colours, into one space.

Pictures with the same colours in the same places are near each other; the word 'red' is near red pictures.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace

from gog_edge.files import describe_files, sha256_of, write_json

SIDE, GRID, DIM, CONTEXT = 16, 4, 24, 8
COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "white": (1, 1, 1), "black": (0, 0, 0)}


def write_tiny_encoder(folder: Path, *, seed: int = 0, name: str = "tiny") -> Path:
    """Write an encoder folder as export.export_clip does."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    projection = rng.normal(size=(3 * GRID * GRID, DIM)).astype(np.float32)
    words = np.zeros((len(COLOURS) + 2, DIM), dtype=np.float32)  # [PAD] and [UNK] are zero
    for row, colour in enumerate(COLOURS.values(), 2):
        flat = np.repeat(np.array(colour, dtype=np.float32) * 2 - 1, GRID * GRID)
        words[row] = flat @ projection
    _save(folder / "image.onnx", _image_graph(projection))
    _save(folder / "text.onnx", _text_graph(words))
    vocabulary = {"[PAD]": 0, "[UNK]": 1} | {word: row for row, word in enumerate(COLOURS, 2)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = Lowercase(), Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "manifest.json", _manifest(folder, name))
    return folder


def _manifest(folder: Path, name: str) -> dict:
    image = {
        "width": SIDE, "height": SIDE, "mean": [0.5] * 3, "std": [0.5] * 3,
        "interpolation": "bilinear", "resize": "squash",
    }  # fmt: skip
    return {
        "schema": 1, "kind": "encoder", "name": name, "dim": DIM, "image": image,
        "text": {"context_length": CONTEXT, "pad_id": 0},
        "weights_sha256": sha256_of(folder / "image.onnx"),
        "preprocessing_sha256": hashlib.sha256(repr(image).encode()).hexdigest(),
        "logit_scale": 1.0,
        "files": [e.to_json() for e in describe_files(folder, ["image.onnx", "text.onnx", "tokenizer.json"])],
    }  # fmt: skip


def _image_graph(projection: np.ndarray) -> onnx.GraphProto:
    step = SIDE // GRID
    return helper.make_graph(
        [
            helper.make_node("AveragePool", ["pixels"], ["grid"], kernel_shape=[step, step], strides=[step, step]),
            helper.make_node("Flatten", ["grid"], ["flat"]),
            helper.make_node("MatMul", ["flat", "projection"], ["embedding"]),
        ],
        "image",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", DIM])],
        [numpy_helper.from_array(projection, "projection")],
    )


def _text_graph(words: np.ndarray) -> onnx.GraphProto:
    axes = numpy_helper.from_array(np.array([1], dtype=np.int64), "axes")
    return helper.make_graph(
        [
            helper.make_node("Gather", ["words", "tokens"], ["each"]),
            helper.make_node("ReduceSum", ["each", "axes"], ["embedding"], keepdims=0),
        ],
        "text",
        [helper.make_tensor_value_info("tokens", TensorProto.INT64, ["n", CONTEXT])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", DIM])],
        [numpy_helper.from_array(words, "words"), axes],
    )


def _save(path: Path, graph: onnx.GraphProto) -> None:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, path)
