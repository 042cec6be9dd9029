"""Export of a checkpoint to a policy folder: graphs, embedding table, tokenizer, chat format, dialect, manifest."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from gog_edge.engines.base import Array
from gog_edge.engines.manifest import ORT
from gog_edge.engines.onnx.native import HEAD_WIDTH_MULTIPLE, MAX_HEAD_WIDTH, library, unavailable_reason
from gog_edge.errors import ArtifactError, BackendError, CheckpointError
from gog_edge.exporting.graph import Progress, WeightFormat, silent
from gog_edge.exporting.output_folder import atomic_output_folder, check_disk_space
from gog_edge.exporting.policy.chat_template import extract_chat_format
from gog_edge.exporting.policy.checkpoint import Checkpoint
from gog_edge.exporting.policy.decoder_graph import Weights, write_decoder
from gog_edge.exporting.policy.native_graph import NativeVisionOperators, supports_native, write_native_decoder
from gog_edge.exporting.policy.parity import ParityEpisode, check_passed, measure_parity
from gog_edge.exporting.policy.vision_graph import write_vision
from gog_edge.exporting.quantization import INT7_BY_ROW, quantize
from gog_edge.files import describe_files, write_json
from gog_edge.policy.dialect.dialect import Dialect
from gog_edge.policy.dialect.loader import DIALECT_FILE, copy_dialect
from gog_edge.policy.manifest import (
    CHAT_TEMPLATE,
    DECODER_GRAPH,
    EMBEDDING_SCALES,
    EMBEDDINGS,
    MANIFEST,
    NATIVE_DECODER_GRAPH,
    NATIVE_VISION_GRAPH,
    PREFILL_GRAPH,
    TOKENIZER,
    VISION_GRAPH,
    ChatFormat,
    PolicyManifest,
    WeightFormats,
    WeightQuantization,
)

PRECISIONS = ("fp32", "fp16", "int4")

# CPU weight layouts: a second copy of an int4 policy's weights for ONNX Runtime on the CPU. NATIVE is for the package's
# own operators, which are about twice as fast on x86-64; PREFILL is a graph for long prompts, for which ONNX Runtime's
# operators are then twice as fast on any processor.
NATIVE, PREFILL, NO_LAYOUT = CPU_LAYOUTS = ("native", "prefill", "none")
BLOCK_SIZES = (32, 64, 128, 256)
DEFAULT_BLOCK = 128
DEFAULT_CONTEXT = 4096  # tokens
DEFAULT_DIALECT = "gog"
FP16_OVERFLOW = 65_520.0  # smaller values round to a finite one
BYTES_PER_WEIGHT = {"fp32": 4.0, "fp16": 2.0, "int4": 1.9}  # int4: with scales, 8-bit parts and a CPU layout


def export_policy(
    source: Path,
    out: Path,
    *,
    adapter: Path | None = None,
    precision: str = "fp32",
    block: int = DEFAULT_BLOCK,
    cpu_layout: str | None = None,
    name: str | None = None,
    context: int | None = None,
    dialect: str | Path | None = None,
    episodes: Sequence[ParityEpisode] | None = None,
    parity: bool = True,
    progress: Progress = silent,
    notice: Callable[[str], None] = lambda _: None,
) -> PolicyManifest:
    """Export a Qwen2.5-VL or Qwen3-VL checkpoint folder to a policy folder and return its manifest.

    The graphs are for ONNX Runtime; engines for GPUs are built from them (`exporting.engines.builder`).

    Args:
        source: folder with config.json, safetensors and tokenizer.json.
        out: folder to write; replaced only when everything succeeded.
        adapter: PEFT folder of LoRA weights to merge.
        precision: one of PRECISIONS.
        block: int4: number of weights that share a scale.
        cpu_layout: int4: one of CPU_LAYOUTS. None chooses NATIVE if its operators support the model and run on this
            machine, so that parity can be measured, and PREFILL otherwise.
        name: name in the manifest; None for the name of `source`.
        context: tokens of one conversation, at most what the checkpoint was trained for; None for DEFAULT_CONTEXT, or
            less if it was trained for less.
        dialect: a file, or the name of a dialect of the package; None for the checkpoint's dialect.toml, or 'gog'.
        episodes: conversations for the parity check; None for random ones.
        parity: whether to compare the graphs with transformers.
        progress: shows progress over layers.
        notice: shows what was ignored in the folders.

    Raises:
        BackendError: the precision or CPU layout does not exist.
        CheckpointError: the checkpoint cannot be exported, the graphs miss the parity limits, or disk or memory do not
            suffice.
        DialectError: the dialect cannot be used.
    """
    check_precision(precision)
    check_cpu_layout(cpu_layout, precision)
    if context is not None and context < 1:
        raise CheckpointError(f"'context' must be at least 1 token, got {context}; give a larger --context")
    checkpoint = Checkpoint.open(source, adapter)
    max_context = _max_context(context, checkpoint)
    for note in checkpoint.notes:
        notice(note)
    layout = _choose_cpu_layout(cpu_layout, checkpoint, parity) if precision == "int4" else NO_LAYOUT
    formats = weight_formats(precision, block, prefill=layout == PREFILL)
    with atomic_output_folder(out, "policy") as part:
        check_disk_space(part, int(checkpoint.parameters * BYTES_PER_WEIGHT[precision]), "the policy")
        chat, used_dialect = _write_text_files(checkpoint, part, dialect)  # first, since its errors come early
        manifest = PolicyManifest(
            name=name or source.resolve().name,
            architecture=checkpoint.architecture,
            engine=ORT,
            precision=precision,
            weights=formats,
            vision=checkpoint.vision,
            text=checkpoint.text,
            chat=chat,
            image_token=checkpoint.image_token,
            eos=checkpoint.eos,
            box_frame=used_dialect.box_frame,
            max_context=max_context,
            generation=checkpoint.generation,
            source_sha256=checkpoint.sha256,
        )
        _check_manifest(source, manifest)
        _write_weights(checkpoint, part, precision, formats, layout, progress)
        files = describe_files(part, [path.name for path in part.iterdir()])
        manifest = dataclasses.replace(manifest, files=tuple(files))
        write_json(part / MANIFEST, manifest.to_json())
        if parity:
            report = measure_parity(part, checkpoint, episodes)
            check_passed(report)
            manifest = dataclasses.replace(manifest, parity=report.to_json())
            write_json(part / MANIFEST, manifest.to_json())
    return manifest


# --- checks and choices --------------------------------------------------------------------------


def _check_manifest(source: Path, manifest: PolicyManifest) -> None:
    """Raise CheckpointError if the manifest could not be read again."""
    try:
        PolicyManifest.from_json(json.loads(json.dumps(manifest.to_json(), allow_nan=False)))
    except (ArtifactError, ValueError) as exc:
        raise CheckpointError(f"'{source}' cannot be exported: {exc}") from exc


def check_precision(precision: str) -> None:
    """Raise BackendError if `precision` is not one of PRECISIONS."""
    if precision not in PRECISIONS:
        raise BackendError(f"unknown precision '{precision}' of a policy; available: {', '.join(PRECISIONS)}")


def check_cpu_layout(cpu_layout: str | None, precision: str, engine: str = ORT) -> None:
    """Raise BackendError if a CPU weight layout does not exist, or is not available for a precision and engine."""
    if cpu_layout is not None and cpu_layout not in CPU_LAYOUTS:
        raise BackendError(f"unknown CPU layout '{cpu_layout}'; available: {', '.join(CPU_LAYOUTS)}")
    if cpu_layout not in (None, NO_LAYOUT) and (precision != "int4" or engine != ORT):
        raise BackendError(
            f"CPU layouts are for precision int4 and engine '{ORT}', not for {precision} and '{engine}'; omit "
            f"--cpu-layout {cpu_layout}"
        )


def _max_context(context: int | None, checkpoint: Checkpoint) -> int:
    trained = checkpoint.max_positions
    if context is not None and context > trained:
        raise CheckpointError(
            f"'context' must be at most {trained} tokens, for which '{checkpoint.folder}' was trained "
            f"(max_position_embeddings), got {context}; give a smaller --context"
        )
    return context or min(DEFAULT_CONTEXT, trained)


def _choose_cpu_layout(wanted: str | None, checkpoint: Checkpoint, parity: bool) -> str:
    text, vision = checkpoint.text, checkpoint.vision
    supported, can_measure = supports_native(text, vision), library() is not None or not parity
    if wanted == NATIVE and not can_measure:
        raise CheckpointError(
            f"the native graphs cannot be compared with transformers here: {unavailable_reason()}; or export with "
            "--no-parity, and run `gog-edge export check` on a machine that has the native operators"
        )
    if wanted == NATIVE and not supported:
        raise CheckpointError(
            f"the attention heads have a width of {text.head_dim} in the decoder and {vision.head_dim} in the vision "
            f"tower; the native operators need multiples of {HEAD_WIDTH_MULTIPLE} in the decoder, and at most "
            f"{MAX_HEAD_WIDTH} in both; export with --cpu-layout {PREFILL}"
        )
    return wanted or (NATIVE if supported and can_measure else PREFILL)


def weight_formats(precision: str, block: int = DEFAULT_BLOCK, *, prefill: bool = True) -> WeightFormats:
    """Return how the weights of each part are stored in a precision.

    In int4, the embedding table and the head have 8 bits: they are a small part of the bytes and a large part of the
    error. The vision tower and, with `prefill`, a second graph of the decoder process many rows at a time, where
    compute and not bytes is the limit; there ONNX Runtime is twice as fast with one scale per row.

    Raises CheckpointError if the operators do not support the block size.
    """
    if block not in BLOCK_SIZES:
        raise CheckpointError(f"'block' must be one of {', '.join(map(str, BLOCK_SIZES))}, got {block}")
    if precision != "int4":
        return WeightFormats()
    int8 = WeightQuantization(8, block)
    return WeightFormats(
        decoder=WeightQuantization(4, block), prefill=INT7_BY_ROW if prefill else None, head=int8, embeddings=int8,
        vision=INT7_BY_ROW,
    )


# --- the files -----------------------------------------------------------------------------------


def _write_text_files(checkpoint: Checkpoint, folder: Path, dialect: str | Path | None) -> tuple[ChatFormat, Dialect]:
    """Write tokenizer, chat template and dialect."""
    image_token, eos = (_token_text(checkpoint, token) for token in (checkpoint.image_token, checkpoint.eos[0]))
    shutil.copyfile(checkpoint.folder / TOKENIZER, folder / TOKENIZER)
    (folder / CHAT_TEMPLATE).write_text(checkpoint.chat_template, encoding="utf-8")
    used_dialect = _write_dialect(checkpoint, folder, dialect)
    return extract_chat_format(checkpoint.chat_template, image_token=image_token, eos=eos), used_dialect


def _token_text(checkpoint: Checkpoint, token: int) -> str:
    text = checkpoint.tokenizer.id_to_token(token)
    if text is None:
        raise CheckpointError(
            f"'{checkpoint.folder}': its config names token {token}, which its tokenizer does not have; copy both "
            "files from the same checkpoint"
        )
    return str(text)


def _write_dialect(checkpoint: Checkpoint, folder: Path, chosen: str | Path | None) -> Dialect:
    """Write the chosen dialect, else the checkpoint's own, else the package's default.

    The default gets the box frame that the architecture was trained with.
    """
    own = checkpoint.folder / DIALECT_FILE
    source: str | Path = chosen or (own if own.is_file() else DEFAULT_DIALECT)
    other_frame = source == DEFAULT_DIALECT and not chosen and checkpoint.is_qwen3
    dialect, _ = copy_dialect(source, folder, "rel1000" if other_frame else None)
    return dialect


def _write_weights(
    checkpoint: Checkpoint, folder: Path, precision: str, formats: WeightFormats, layout: str, progress: Progress
) -> None:
    """Write all graphs and the embedding table."""
    plain: WeightFormat = "fp16" if precision == "fp16" else "fp32"
    vision, decoder = checkpoint.vision_weights(), checkpoint.decoder_weights()
    if precision == "fp16":
        vision, decoder = _within_fp16(checkpoint, vision), _within_fp16(checkpoint, decoder)
    write_vision(folder / VISION_GRAPH, checkpoint.vision, vision, formats.vision or plain, progress)
    write_decoder(
        folder / DECODER_GRAPH, checkpoint.text, decoder, weight_format=formats.decoder or plain,
        head_format=formats.head or plain, progress=progress,
    )
    if formats.prefill is not None:
        write_decoder(
            folder / PREFILL_GRAPH, checkpoint.text, decoder, prefill=True, weight_format=formats.prefill,
            progress=progress,
        )
    if layout == NATIVE:
        own = formats.for_native_graphs()
        write_vision(
            folder / NATIVE_VISION_GRAPH, checkpoint.vision, vision, own.vision or plain, progress,
            NativeVisionOperators(),
        )
        write_native_decoder(
            folder / NATIVE_DECODER_GRAPH, checkpoint.text, decoder, own.decoder or plain, own.head or plain, progress
        )
    _write_embeddings(folder, decoder("embed_tokens.weight"), formats.embeddings or plain)


def _within_fp16(checkpoint: Checkpoint, weights: Weights) -> Weights:
    """Return `weights` that raises CheckpointError, naming the tensor, for a matrix with values beyond fp16."""

    def read(name: str) -> Array:
        array = weights(name)
        largest = max(float(array.max()), -float(array.min()))
        if array.ndim > 1 and largest >= FP16_OVERFLOW:
            raise CheckpointError(
                f"'{checkpoint.folder}': '{name}' has values up to {largest:.4g}, which fp16 stores as infinite; "
                "export with --precision fp32"
            )
        return array

    return read


def _write_embeddings(folder: Path, table: Array, weight_format: WeightFormat) -> None:
    if isinstance(weight_format, WeightQuantization):
        packed, scales = quantize(table, weight_format)
        np.save(folder / EMBEDDINGS, packed.reshape(len(packed), -1), allow_pickle=False)
        np.save(folder / EMBEDDING_SCALES, scales, allow_pickle=False)
    else:
        dtype = np.float16 if weight_format == "fp16" else np.float32
        np.save(folder / EMBEDDINGS, table.astype(dtype), allow_pickle=False)
