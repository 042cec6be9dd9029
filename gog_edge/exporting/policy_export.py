"""Checkpoint -> policy folder: graphs, tables, chat strings, and the proof that they say the same."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np

from gog_edge.errors import BackendError, CheckpointError
from gog_edge.exporting.chat_format import extract_chat_format
from gog_edge.exporting.checkpoint import Checkpoint
from gog_edge.exporting.decoder_graph import write_decoder
from gog_edge.exporting.parity import ParityEpisode, check_passed, measure_parity
from gog_edge.exporting.vision_graph import write_vision
from gog_edge.files import describe_files, read_json, write_json
from gog_edge.policy.dialect import Dialect, load_dialect
from gog_edge.policy.manifest import (
    CHAT_TEMPLATE,
    DECODER_GRAPH,
    DIALECT,
    EMBEDDINGS,
    MANIFEST,
    TOKENIZER,
    VISION_GRAPH,
    PolicyManifest,
)

AVAILABLE = {"ort": ("fp32",)}  # engine -> precisions
DEFAULT_CONTEXT = 4096
DEFAULT_DIALECT = "gog"
LOWERING = (
    "com.microsoft GroupQueryAttention with past and present in one buffer and SkipSimplifiedLayerNormalization; "
    "on ONNX Runtime 1.31.1 CPU 1.7 to 1.9 times as fast as TensorScatter and Attention (opset 24) in both "
    "prefill and decode of the small shape"
)


def export_policy(
    source: Path,
    out: Path,
    *,
    engine: str = "ort",
    precision: str = "fp32",
    name: str | None = None,
    context: int = DEFAULT_CONTEXT,
    dialect: str | Path | None = None,
    episodes: Sequence[ParityEpisode] | None = None,
    parity: bool = True,
) -> PolicyManifest:
    """Export a Qwen2.5-VL checkpoint folder to a policy folder and return its manifest.

    `context`: tokens of one conversation, at most what the checkpoint was made for. `dialect`: a file, or the
    name of one of the package's; by default the checkpoint's own dialect.toml, else 'gog'. `episodes`: conversations
    for the parity check; random ones by default.
    Raises BackendError for an engine or precision that is not to be had, CheckpointError for a checkpoint that
    cannot be exported or graphs that miss the parity limit. `out` is replaced only when all went well.
    """
    check_available(engine, precision)
    checkpoint = Checkpoint.open(source)
    if out.exists() and not _is_policy(out):
        raise CheckpointError(f"'{out}' exists and is no policy folder; name another one or remove it")
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        manifest = _write(checkpoint, part, engine, precision, name or source.resolve().name, context, dialect)
        if parity:
            report = measure_parity(part, source, episodes)
            check_passed(report)
            manifest = dataclasses.replace(manifest, parity=report.to_json())
            write_json(part / MANIFEST, manifest.to_json())
        shutil.rmtree(out, ignore_errors=True)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return manifest


def check_available(engine: str, precision: str) -> None:
    """BackendError, naming what there is, when this version cannot export for an engine or a precision."""
    if precision not in AVAILABLE.get(engine, ()):
        have = "; ".join(f"--engine {key} with --precision {', '.join(kinds)}" for key, kinds in AVAILABLE.items())
        raise BackendError(f"cannot export for engine '{engine}' in precision '{precision}' yet; available: {have}")


def _write(
    checkpoint: Checkpoint,
    folder: Path,
    engine: str,
    precision: str,
    name: str,
    context: int,
    dialect: str | Path | None,
) -> PolicyManifest:
    weights = checkpoint.decoder_weights()
    write_vision(folder / VISION_GRAPH, checkpoint.vision, checkpoint.vision_weights())
    write_decoder(folder / DECODER_GRAPH, checkpoint.text, weights, "gqa")
    np.save(folder / EMBEDDINGS, weights("embed_tokens.weight"), allow_pickle=False)
    shutil.copyfile(checkpoint.folder / "tokenizer.json", folder / TOKENIZER)
    (folder / CHAT_TEMPLATE).write_text(checkpoint.chat_template, encoding="utf-8")
    spoken = _copy_dialect(checkpoint.folder, folder / DIALECT, dialect)
    manifest = PolicyManifest(
        name=name,
        architecture=checkpoint.config["architectures"][0],
        engine=engine,
        precision=precision,
        lowering=LOWERING,
        vision=checkpoint.vision,
        text=checkpoint.text,
        chat=extract_chat_format(
            checkpoint.chat_template,
            image_token=_token(checkpoint, checkpoint.image_token),
            eos=_token(checkpoint, checkpoint.eos[0]),
        ),
        image_token=checkpoint.image_token,
        eos=checkpoint.eos,
        box_frame=spoken.box_frame,
        max_context=min(context, checkpoint.max_positions),
        generation=checkpoint.generation,
        source_sha256=checkpoint.sha256,
        files=tuple(describe_files(folder, [path.name for path in folder.iterdir()])),
    )
    write_json(folder / MANIFEST, manifest.to_json())
    return manifest


def _token(checkpoint: Checkpoint, token: int) -> str:
    text = checkpoint.tokenizer.id_to_token(token)
    if text is None:
        raise CheckpointError(f"'{checkpoint.folder}': its tokenizer has no token {token}, which its config names")
    return str(text)


def _copy_dialect(source: Path, target: Path, chosen: str | Path | None) -> Dialect:
    """Put the dialect into the policy folder: the one chosen, else the checkpoint's own, else the package's."""
    own = source / DIALECT
    wanted: str | Path = chosen or (own if own.is_file() else DEFAULT_DIALECT)
    dialect = load_dialect(wanted)
    text = (
        wanted.read_bytes()
        if isinstance(wanted, Path)
        else (resources.files("gog_edge.policy") / "dialects" / f"{wanted}.toml").read_bytes()
    )
    target.write_bytes(text)
    return dialect


def _is_policy(folder: Path) -> bool:
    """A policy folder, or an empty one, may be replaced."""
    if not folder.is_dir():
        return False
    manifest = folder / MANIFEST
    kind = read_json(manifest, what="policy").get("kind") if manifest.is_file() else None
    return kind == "policy" or not any(folder.iterdir())
