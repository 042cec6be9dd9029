"""Export of a sentence encoder through optimum: a graph, a tokenizer and a manifest with parity figures.

The graph returns the hidden state of every token; `retrieval.text.encoder.TextEncoder` pools and normalises. Parity is
measured on its output, so that it covers the tokenizer, the graph and the pooling.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from optimum.exporters.onnx import export
from optimum.exporters.tasks import TasksManager
from tokenizers import Tokenizer, normalizers
from torch import nn
from torch.nn import functional

from gog_edge.errors import CheckpointError
from gog_edge.exporting.output_folder import atomic_output_folder
from gog_edge.exporting.text.checkpoint import TextCheckpoint, TextOptions
from gog_edge.files import MODEL_MANIFEST, describe_files, open_tokenizer, write_json
from gog_edge.retrieval.text.encoder import (
    GRAPH,
    INPUTS,
    KIND,
    SCHEMA,
    TOKENIZER,
    TextEncoder,
)
from gog_edge.types import Vectors

TASK = "feature-extraction"
OUTPUT = "last_hidden_state"
MIN_COSINE = 0.9999  # between the vectors of one text from ONNX Runtime and from PyTorch
EXTERNAL = f"{GRAPH}_data"  # optimum writes it for weights above the 2 GiB limit of protocol buffers
UNUSED = ("pooler.",)  # weights that may be missing, since the graph does not read them
PARITY_SENTENCES = (
    "What is the capital of France?",
    "how many people live there",
    "The currency of Kiribati is the Dollar (AUD).",
    "France borders Switzerland, Germany, Belgium, Luxembourg, Italy, Andorra, Monaco and Spain.",
    "The population of Portugal is 10,281,762 people; its area is 92,391 square kilometres.",
    "Łódź, São Tomé e Príncipe, Côte d'Ivoire; 日本の首都, Ελλάδα, Россия, مصر",
    "a",
    "",
    "  tabs\tand\n\nnew   lines  ",
    "MONEY USED IN THAILAND?!",
    "e\u0301 and é, ﬁne ﬂag, İstanbul, 🇫🇷",
    "Each paragraph is a passage of its own. " * 8,
    "word " * 2_000,
)


@dataclass(frozen=True, slots=True)
class TextParity:
    """Differences between the unit vectors of ONNX Runtime and of PyTorch."""

    min_cosine: float
    max_abs: float  # of a component
    tried: int  # vectors


def export_text_encoder(
    model: Path, out: Path, options: TextOptions | None = None, *, sentences: Sequence[str] = PARITY_SENTENCES
) -> dict[str, Any]:
    """Write a text encoder folder and return its manifest; `out` is replaced only when everything succeeded.

    Args:
        model: A transformers folder, with or without the files of sentence-transformers; nothing is downloaded.
        out: A new or empty folder, or one of a text encoder.
        options: Settings that the folder does not define, or that replace its own.
        sentences: Texts of the parity check.

    Raises:
        CheckpointError: The folder is incomplete or not supported, the graph differs from PyTorch, `out` contains
            something else, or the disk is full.
    """
    checkpoint = TextCheckpoint.open(model, options)
    with _quiet():
        network = _load(checkpoint)
        with atomic_output_folder(out, KIND) as part:
            inputs = _write_graph(network, checkpoint, part)
            _write_tokenizer(checkpoint, part)
            manifest = _manifest(checkpoint, part, inputs)
            write_json(part / MODEL_MANIFEST, manifest)  # TextEncoder reads it
            parity = measure_parity(TextEncoder.open(part), checkpoint, network, sentences)
            manifest["parity"] = {**asdict(parity), "limits": {"min_cosine": MIN_COSINE}}
            write_json(part / MODEL_MANIFEST, manifest)
    return manifest


def _load(checkpoint: TextCheckpoint) -> nn.Module:
    """Load the network in float32; every weight must come from the folder."""
    try:
        network, loading = transformers.AutoModel.from_pretrained(
            str(checkpoint.folder), local_files_only=True, trust_remote_code=False, use_safetensors=True,
            dtype=torch.float32, output_loading_info=True,
        )  # fmt: skip
    except Exception as exc:  # transformers and safetensors raise many kinds
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot load '{checkpoint.folder}' ({_first_line(exc)}); check "
            "that the folder is complete"
        ) from exc
    missing = [name for name in loading["missing_keys"] if not name.startswith(UNUSED)]
    if missing or loading["mismatched_keys"]:
        named = missing[0] if missing else loading["mismatched_keys"][0][0]
        raise CheckpointError(
            f"'{checkpoint.folder}' has no weight '{named}' of the shape in config.json; copy the whole folder"
        )
    loaded: nn.Module = network.eval()
    for key, tensor in loaded.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"'{checkpoint.folder}': '{key}' has values that are NaN or infinite; copy it again")
    return loaded


def _write_graph(network: Any, checkpoint: TextCheckpoint, folder: Path) -> tuple[str, ...]:
    """Export through optimum and return the inputs of the graph."""
    try:
        make_config = TasksManager.get_exporter_config_constructor(
            "onnx", network, task=TASK, library_name="transformers"
        )
        inputs, outputs = export(network, make_config(network.config), folder / GRAPH)
    except Exception as exc:  # optimum and torch raise many kinds
        raise CheckpointError(
            f"optimum cannot export '{checkpoint.folder}' ({checkpoint.model_type}) to ONNX ({_first_line(exc)}); use "
            "the versions that the extra 'text' pins, or another model"
        ) from exc
    if OUTPUT not in outputs or not set(inputs) <= set(INPUTS):
        raise CheckpointError(
            f"'{checkpoint.folder}': the graph must have inputs among {', '.join(INPUTS)} and the output {OUTPUT}, got "
            f"{', '.join(inputs)} and {', '.join(outputs)}; choose another model"
        )
    return tuple(inputs)


def _write_tokenizer(checkpoint: TextCheckpoint, folder: Path) -> None:
    """Write the tokenizer, with the lower-casing of sentence-transformers as part of its normalizer."""
    tokenizer: Tokenizer = open_tokenizer(checkpoint.folder / TOKENIZER, what="text encoder", error=CheckpointError)
    if checkpoint.lower_case:
        own = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
    tokenizer.save(str(folder / TOKENIZER))


def _manifest(checkpoint: TextCheckpoint, folder: Path, inputs: Sequence[str]) -> dict[str, Any]:
    names = [GRAPH, TOKENIZER, *([EXTERNAL] if (folder / EXTERNAL).is_file() else [])]
    files = [entry.to_json() for entry in describe_files(folder, names)]
    text = {
        "max_tokens": checkpoint.max_tokens,
        "pad_id": checkpoint.pad_id,
        "inputs": list(inputs),
        "pooling": checkpoint.pooling,
        "normalize": True,
        "query_prefix": checkpoint.query_prefix,
        "passage_prefix": checkpoint.passage_prefix,
    }
    tokenizer = next(entry["sha256"] for entry in files if entry["path"] == TOKENIZER)
    recipe = json.dumps({"text": text, "tokenizer": tokenizer}, sort_keys=True)
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "name": checkpoint.name,
        "model_type": checkpoint.model_type,
        "dim": checkpoint.dim,
        "text": text,
        "weights_sha256": checkpoint.weights_sha256,
        "preprocessing_sha256": hashlib.sha256(recipe.encode()).hexdigest(),
        "precision": "fp32",
        "parity": None,
        "files": files,
    }


# --- parity --------------------------------------------------------------------------------------


def measure_parity(
    encoder: TextEncoder, checkpoint: TextCheckpoint, network: nn.Module, sentences: Sequence[str]
) -> TextParity:
    """Embed sentences as queries and as passages, in batches on ONNX Runtime and one by one on PyTorch.

    Raises:
        CheckpointError: The cosine between the two vectors of a text is below MIN_COSINE.
    """
    given = np.concatenate([encoder.embed_queries(sentences), encoder.embed_passages(sentences)])
    texts = [prefix + text for prefix in (checkpoint.query_prefix, checkpoint.passage_prefix) for text in sentences]
    wanted = _reference(checkpoint, network, texts, encoder.spec.inputs)
    cosines = (given.astype(np.float64) * wanted).sum(axis=1)
    worst = int(np.argmin(np.where(np.isnan(cosines), -1.0, cosines)))
    parity = TextParity(float(cosines[worst]), float(np.abs(given - wanted).max()), len(texts))
    if not parity.min_cosine >= MIN_COSINE:  # written so that NaN fails
        raise CheckpointError(
            f"'{checkpoint.folder}': the cosine between ONNX Runtime and PyTorch must be at least {MIN_COSINE}, got "
            f"{parity.min_cosine:.6f} for {texts[worst][:60]!r}; use the versions that the extra 'text' pins, or "
            "another model"
        )
    return parity


def _reference(
    checkpoint: TextCheckpoint, network: nn.Module, texts: Sequence[str], inputs: Sequence[str]
) -> Vectors:
    """Return unit vectors [n, dim] of n texts from the tokenizer of transformers and PyTorch."""
    load: Any = transformers.AutoTokenizer.from_pretrained  # untyped
    tokenizer = load(str(checkpoint.folder), local_files_only=True, trust_remote_code=False, use_fast=True)
    rows = []
    for text in texts:
        cased = text.lower() if checkpoint.lower_case else text
        tokens = tokenizer(cased, truncation=True, max_length=checkpoint.max_tokens, return_tensors="pt")
        with torch.inference_mode():
            states = network(**{name: tokens[name] for name in inputs if name in tokens}).last_hidden_state[0]
        pooled = states[0] if checkpoint.pooling == "cls" else states.mean(dim=0)
        rows.append(functional.normalize(pooled, dim=-1))
    return np.asarray(torch.stack(rows).numpy(), dtype=np.float32)


# --- messages ---------------------------------------------------------------------------------------


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings and log messages of the libraries about their own internals."""
    loggers = [logging.getLogger(name) for name in ("transformers", "optimum", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _first_line(exc: Exception) -> str:
    return (str(exc).strip() or type(exc).__name__).splitlines()[0]
