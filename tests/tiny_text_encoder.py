"""A real ONNX sentence encoder of a few kilobytes: a word's hidden state is a fixed random vector."""

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
from tokenizers.processors import TemplateProcessing

from gog_edge.files import describe_files, sha256_of, write_json

DIM, MAX_TOKENS = 16, 12
WORDS = ("query", "passage", ":", "capital", "money", "people", "france", "spain", "of", "in", "the",
         "currency", "inhabitants")  # fmt: skip
SYNONYMS = {"currency": "money", "inhabitants": "people"}  # have the same hidden state
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def table(seed: int = 0) -> np.ndarray:
    """The hidden state of each token [vocabulary, DIM]."""
    states = np.random.default_rng(seed).normal(size=(len(SPECIAL) + len(WORDS), DIM)).astype(np.float32)
    rows = {word: row for row, word in enumerate(SPECIAL + WORDS)}
    for word, same in SYNONYMS.items():
        states[rows[word]] = states[rows[same]]
    return states


def write_tiny_text_encoder(folder: Path, *, seed: int = 0, pooling: str = "mean", prefixes: tuple[str, str] = ("", ""),
                            inputs: tuple[str, ...] = ("input_ids", "attention_mask")) -> Path:
    """Write a folder as `export_text_encoder` does."""
    folder.mkdir(parents=True, exist_ok=True)
    values = [helper.make_tensor_value_info(name, TensorProto.INT64, ["n", "tokens"]) for name in inputs]
    output = helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["n", "tokens", DIM])
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["last_hidden_state"])]
    graph = helper.make_graph(nodes, "text", values, [output], [numpy_helper.from_array(table(seed), "table")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, folder / "model.onnx")
    tokenizer = Tokenizer(WordLevel({word: row for row, word in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = Lowercase(), Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.save(str(folder / "tokenizer.json"))
    text = {"max_tokens": MAX_TOKENS, "pad_id": 0, "inputs": list(inputs), "pooling": pooling, "normalize": True,
            "query_prefix": prefixes[0], "passage_prefix": prefixes[1]}
    write_json(folder / "manifest.json", {
        "schema": 1, "kind": "text_encoder", "name": "tiny", "dim": DIM, "text": text,
        "weights_sha256": sha256_of(folder / "model.onnx"),
        "preprocessing_sha256": hashlib.sha256(repr(text).encode()).hexdigest(), "precision": "fp32", "parity": None,
        "files": [entry.to_json() for entry in describe_files(folder, ["model.onnx", "tokenizer.json"])],
    })  # fmt: skip
    return folder
