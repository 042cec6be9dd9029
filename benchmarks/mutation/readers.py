"""What the product does with each kind of file in real life, as functions of a seed folder."""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from gog_edge.bundle import DEFAULT_BUNDLE, open_bundle
from gog_edge.errors import SourceError
from gog_edge.planner import plan_memory
from gog_edge.retrieval.encoder import Encoder
from gog_edge.types import ImageQuery, TextQuery

PICTURE = np.full((64, 64, 3), 200, np.uint8)


class SilentDamage(Exception):
    """A file was accepted with a number that is not finite, or with half of a character."""


def check_values(value: Any, depth: int = 0) -> None:
    """Raise SilentDamage for the first number that is not finite and the first string that is not text."""
    if depth > 100:
        raise SilentDamage("values are nested deeper than 100")
    if isinstance(value, float) and not math.isfinite(value):
        raise SilentDamage(f"accepted the number {value}")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise SilentDamage(f"accepted the text {value[:40]!r}") from None
    for one in _parts(value):
        check_values(one, depth + 1)


def _parts(value: Any) -> Iterator[Any]:
    if is_dataclass(value) and not isinstance(value, type):
        yield from (getattr(value, field.name) for field in fields(value))
    elif isinstance(value, dict):
        yield from (*value, *value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        yield from value


# --- what a server opens ------------------------------------------------------------------------


def read_bundle(root: Path) -> object:
    """Open and verify a bundle, and plan its memory."""
    bundle = open_bundle(root)
    bundle.verify(full=False)
    plan_memory(bundle)
    return bundle


def read_runtime(root: Path) -> object:
    """Open a bundle as a server does, and run every part once."""
    from gog_edge.runtime import open_runtime

    with closing(open_runtime(root, threads=1)) as runtime:
        runtime.warm_up()
    return None


def read_policy(root: Path) -> object:
    """Open the policy of a bundle, and let it write a few tokens about a picture."""
    from gog_edge.picture import Picture
    from gog_edge.policy.local import LocalPolicy

    policy = LocalPolicy.open(root / "policy", threads=1)
    with closing(policy.begin(Picture(PICTURE), "What is it?")) as conversation:
        conversation.generate(max_tokens=4, force_answer=False, deadline=None)
    return policy.model.manifest


def read_dialect(root: Path) -> object:
    """Read a dialect, and compile its grammar."""
    from tokenizers import Tokenizer

    from gog_edge.policy.dialect.grammar import Grammar
    from gog_edge.policy.dialect.loader import load_dialect

    dialect = load_dialect(root / "dialect.toml")
    tokenizer = Tokenizer.from_file(str(DEFAULT_BUNDLE / "policy" / "tokenizer.json"))
    grammar = Grammar(dialect, tokenizer, tokenizer.get_vocab_size(), {2})
    grammar.turn()
    grammar.answer()
    return dialect


def read_encoder(root: Path) -> object:
    """Open an encoder, and embed a picture and a text."""
    encoder = Encoder.open(root / "encoder", threads=1)
    for vectors in (encoder.embed_images([PICTURE]), encoder.embed_texts(["a red flag"])):
        if not np.isfinite(vectors).all():
            raise SilentDamage("vectors are not finite")
    return encoder.fingerprint, encoder.spec


def read_text_encoder(root: Path) -> object:
    """Open a text encoder, and embed a query."""
    from gog_edge.retrieval.text.encoder import TextEncoder

    encoder = TextEncoder.open(root, threads=1)
    if not np.isfinite(encoder.embed_queries(["the red flag"])).all():
        raise SilentDamage("vectors are not finite")
    return encoder.fingerprint, encoder.spec


def read_pack(root: Path) -> object:
    """Open, search, verify and print a pack."""
    from rich.console import Console

    from gog_edge.cli.render_pack import pack_json, print_pack
    from gog_edge.retrieval.pack import Pack, verify_pack
    from gog_edge.retrieval.retriever import Retriever

    folder = root / "packs" / "atlas"
    with closing(Pack.open(folder, _atlas_encoder())) as pack:
        results = Retriever(_atlas_encoder(), [pack]).search([ImageQuery(PICTURE), TextQuery("capital of France")])
    verify_pack(folder)
    print_pack(folder, pack.manifest, console=Console(file=io.StringIO()))
    return pack.manifest, pack_json(folder, pack.manifest), [result.found for result in results]


@cache
def _atlas_encoder() -> Encoder:
    return Encoder.open(DEFAULT_BUNDLE / "encoder", threads=1)


def read_index(name: str, root: Path) -> object:
    """Open a FAISS index over stored vectors, and search all of it, with and without rescoring."""
    from gog_edge.retrieval.manifest import IndexEntry
    from gog_edge.retrieval.vectors.faiss_index import VectorIndex
    from gog_edge.retrieval.vectors.shards import VectorShards

    shards = VectorShards.open([(root / "vectors.npy", root / "ids.npy")], 16)
    queries = shards.take(np.arange(8))
    params = {"nprobe": 8} if name.startswith("ivf") else {"efSearch": 64} if name.startswith("hnsw") else {}
    for candidates in (0, 100):
        entry = IndexEntry(name, "", params, candidates, len(shards), 10, 1.0, 0.0, 0.0, 8, False)
        with closing(VectorIndex.open(root, entry, shards, tombstones=np.empty(0, np.int64))) as index:
            hits = index.search(queries, 20, without=shards.ids[:5])
            if np.isnan(hits.scores).any():
                raise SilentDamage("scores are not numbers")
    return None


def read_engines(root: Path) -> object:
    """Read and verify the engines of a bundle."""
    from gog_edge.engines.manifest import read_engine_manifest

    built = read_engine_manifest(root / "engines" / "ort-cuda", root, "ort-cuda")
    for graph in built.graphs:
        built.graph(graph.name)
    built.rebuild_command()
    return built


def read_trace_file(root: Path) -> object:
    """Read a trace."""
    from gog_edge.agent.trace import read_trace

    return read_trace(root / "episode.trace.json")


# --- what is exported ---------------------------------------------------------------------------


def read_checkpoint(root: Path) -> object:
    """Export a checkpoint, with its adapter if there is one, without the parity check."""
    from gog_edge.exporting.policy.export import export_policy

    adapter, out = root / "adapter", root / "out"
    try:
        return export_policy(root / "checkpoint", out, adapter=adapter if adapter.is_dir() else None, parity=False)
    finally:
        for path in root.glob("*out*"):
            shutil.rmtree(path, ignore_errors=True)


def read_clip(root: Path) -> object:
    """Load an open_clip checkpoint."""
    from gog_edge.exporting.clip.checkpoint import load_clip

    return load_clip(str(root)).image


def read_sentences(root: Path) -> object:
    """Read the folder of a sentence encoder."""
    from gog_edge.exporting.text.checkpoint import TextCheckpoint

    return TextCheckpoint.open(root)


# --- what packs are built from ------------------------------------------------------------------


def read_source(kind: str, root: Path) -> object:
    """Read a whole snapshot; the texts of its records must be storable."""
    from gog_edge.indexing.sources.open import detect_kind, open_source

    path = root if kind in ("folder", "wit") else next(path for path in root.iterdir() if path.is_file())
    with suppress(SourceError):
        detect_kind(path)
    source = open_source(path, kind=kind)  # type: ignore[arg-type]  # one of KINDS
    work = root.with_name(f"{root.name}-work")
    try:
        snapshot = source.snapshot()
        source.prepare(work)
        _ = source.size
        for chunk in source.chunks():
            for record in source.parse(chunk):
                check_values(record)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return snapshot
