"""Embed queries and passages with a sentence encoder on ONNX Runtime.

The graph returns the hidden state of every token. Pooling and normalisation follow it here, as the manifest says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Le
from numpy.typing import NDArray
from tokenizers import Tokenizer

from gog_edge.engines.base import Floats, GraphEngine
from gog_edge.engines.onnx.session import CPU_PROVIDERS, OrtGraph
from gog_edge.errors import ArtifactError
from gog_edge.files import MODEL_MANIFEST, FileEntry, open_tokenizer, read_json, verify_files
from gog_edge.retrieval.manifest import Fingerprint
from gog_edge.tables import build, shown
from gog_edge.types import Vectors

SCHEMA = 1
KIND = "text_encoder"
GRAPH, TOKENIZER = "model.onnx", "tokenizer.json"
POOLINGS = ("mean", "cls")  # over the tokens: their mean, or the first one
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
MIN_TOKENS = 4  # of one text: the special tokens and at least one other
MAX_TOKENS = 131_072  # of one text
MAX_BATCH = 64  # texts per run of the graph
MAX_BATCH_TOKENS = 1_024  # padded tokens per run; the activations of larger batches exceed the CPU caches


@dataclass(frozen=True, slots=True)
class TextEncoderSpec:
    """How texts are tokenized and pooled."""

    # of one text, with special tokens; longer texts are truncated
    max_tokens: Annotated[int, Ge(MIN_TOKENS), Le(MAX_TOKENS)]
    pad_id: Annotated[int, Ge(0), Le(2**31 - 1)]
    inputs: tuple[Literal["input_ids", "attention_mask", "token_type_ids"], ...]  # of the graph
    pooling: Literal["mean", "cls"]
    query_prefix: str  # of every query, for example "query: " of E5
    passage_prefix: str
    normalize: Literal[True] = True  # vectors have unit length


@dataclass(frozen=True, slots=True)
class _ManifestTable:
    """The fields of the manifest that are read besides those of `Fingerprint`."""

    text: TextEncoderSpec
    files: tuple[FileEntry, ...]


class TextEncoder:
    """A sentence encoder; may be used from several threads."""

    def __init__(
        self, fingerprint: Fingerprint, spec: TextEncoderSpec, graph: GraphEngine, tokenizer: Tokenizer
    ) -> None:
        """Configure the tokenizer, which must not be shared: truncation at `spec.max_tokens`, no padding."""
        tokenizer.enable_truncation(spec.max_tokens)
        tokenizer.no_padding()
        self.fingerprint = fingerprint
        self.spec = spec
        self._graph = graph
        self._tokenizer = tokenizer

    @classmethod
    def open(cls, folder: Path, *, threads: int | None = None, providers: Sequence[str] = CPU_PROVIDERS) -> TextEncoder:
        """Open a folder that `gog-edge export text` wrote.

        Args:
            folder: The text encoder.
            threads: Of ONNX Runtime; None: one per physical core.
            providers: ONNX Runtime execution providers; there is no fallback to others.

        Raises:
            ArtifactError: A file is missing or altered, or the manifest has another kind or schema.
            BackendError: A provider is not available, or the graph cannot be loaded.
        """
        manifest = read_json(folder / MODEL_MANIFEST, what="text encoder")
        if manifest.get("kind") != KIND or manifest.get("schema") != SCHEMA:
            raise ArtifactError(
                f"text encoder: the manifest of '{folder}' must have kind '{KIND}' and schema {SCHEMA}, got "
                f"{shown(manifest.get('kind'))} and {shown(manifest.get('schema'))}; export it again with this version"
            )
        where = f"text encoder: invalid manifest in '{folder}'; export it again"
        fingerprint = Fingerprint.from_json(manifest, where=where)
        table = build(_ManifestTable, manifest, "", error=ArtifactError, where=where, known_only=True)
        spec = table.text
        if not set(INPUTS[:2]) <= set(spec.inputs):
            raise ArtifactError(f"{where}: [text] 'inputs' must include {' and '.join(INPUTS[:2])}, got {spec.inputs}")
        verify_files(folder, table.files, what="text encoder")
        tokenizer = open_tokenizer(folder / TOKENIZER, what="text encoder")
        # Threads that spin while they wait would take cores from a policy that generates at the same time.
        graph = OrtGraph(folder / GRAPH, threads=threads, providers=providers, spinning=False)
        return cls(fingerprint, spec, graph, tokenizer)

    @property
    def dim(self) -> int:
        """Return the length of a vector."""
        return self.fingerprint.dim

    def embed_queries(self, texts: Sequence[str]) -> Vectors:
        """Return unit vectors [n, dim] of n queries with the query prefix, truncated at `max_tokens`."""
        return self._embed([self.spec.query_prefix + text for text in texts])

    def embed_passages(self, texts: Sequence[str]) -> Vectors:
        """Return unit vectors [n, dim] of n passages with the passage prefix, truncated at `max_tokens`."""
        return self._embed([self.spec.passage_prefix + text for text in texts])

    def _embed(self, texts: Sequence[str]) -> Vectors:
        vectors = np.empty((len(texts), self.dim), dtype=np.float32)
        tokens = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))] if texts else []
        for places in batches_by_length([len(ids) for ids in tokens]):
            vectors[places] = self._run([tokens[place] for place in places])
        return vectors

    def _run(self, tokens: Sequence[Sequence[int]]) -> Vectors:
        """Return unit vectors [n, dim] of token ids, padded to the longest."""
        longest = max(len(ids) for ids in tokens)
        ids = np.full((len(tokens), longest), self.spec.pad_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, own in enumerate(tokens):
            ids[row, : len(own)] = own
            mask[row, : len(own)] = 1
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        hidden = self._graph.run({name: feeds[name] for name in self.spec.inputs})["last_hidden_state"]
        if hidden.shape != (*ids.shape, self.dim):
            raise ArtifactError(
                f"text encoder '{self.fingerprint.name}': the graph must return {(*ids.shape, self.dim)}, got "
                f"{hidden.shape}; export it again"
            )
        vectors = unit(pool(hidden, mask, self.spec.pooling))
        if not np.isfinite(vectors).all():
            raise ArtifactError(f"text encoder '{self.fingerprint.name}': a vector is not finite; export or copy it "
                                "again")  # fmt: skip
        return vectors


def pool(hidden: NDArray[Any], mask: NDArray[np.int64], pooling: str) -> Floats:
    """Pool hidden states [n, tokens, dim] under an attention mask [n, tokens] into [n, dim] float32."""
    states = hidden.astype(np.float32, copy=False)
    if pooling == "cls":
        return np.ascontiguousarray(states[:, 0])
    weights = mask.astype(np.float32)
    weights /= np.maximum(weights.sum(axis=1, keepdims=True), 1.0)
    return np.asarray(np.matmul(weights[:, None, :], states)[:, 0], dtype=np.float32)


def unit(vectors: Floats) -> Vectors:
    """Scale each row of [n, dim] to unit length."""
    lengths: Floats = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, np.maximum(lengths, 1e-12), dtype=np.float32)


def batches_by_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield indexes of texts, sorted by length, in batches of up to MAX_BATCH texts and MAX_BATCH_TOKENS padded tokens.

    Texts of similar length share a batch, so that little of it is padding. A text longer than MAX_BATCH_TOKENS is a
    batch of its own.
    """
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) == MAX_BATCH or (len(batch) + 1) * lengths[place] > MAX_BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def passage_text(title: str, section: str, text: str) -> str:
    """Return the passage of a paragraph: title, section and text, the columns of the word index."""
    return "\n".join(part for part in (title, section, text) if part)
