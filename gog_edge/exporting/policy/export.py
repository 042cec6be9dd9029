"""Checkpoint -> policy folder: graphs, tables, chat strings, and the proof that they say the same."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gog_edge.engines.base import Array
from gog_edge.engines.manifest import ENGINES, ORT
from gog_edge.engines.onnx.native import WIDEST, WIDTHS, library, why_none
from gog_edge.errors import BackendError, CheckpointError
from gog_edge.exporting.graph import Form, Progress, silent
from gog_edge.exporting.output_folder import replacing
from gog_edge.exporting.policy.chat_template import extract_chat_format
from gog_edge.exporting.policy.checkpoint import Checkpoint
from gog_edge.exporting.policy.decoder_graph import write_decoder
from gog_edge.exporting.policy.native_graph import fits_native, write_native, write_native_vision
from gog_edge.exporting.policy.parity import ParityEpisode, check_passed, measure_parity
from gog_edge.exporting.policy.vision_graph import write_vision
from gog_edge.exporting.quantization import ROWS, quantise
from gog_edge.files import describe_files, write_json
from gog_edge.policy.dialect.dialect import Dialect
from gog_edge.policy.dialect.loader import copy_dialect
from gog_edge.policy.manifest import (
    CHAT_TEMPLATE,
    DECODER_GRAPH,
    DIALECT,
    EMBEDDING_SCALES,
    EMBEDDINGS,
    MANIFEST,
    NATIVE_DECODER_GRAPH,
    NATIVE_VISION_GRAPH,
    PREFILL_GRAPH,
    TOKENIZER,
    VISION_GRAPH,
    Blocks,
    ChatFormat,
    PolicyManifest,
    WeightForms,
)

PRECISIONS = ("fp32", "fp16", "int4")

# Of the decoder in int4. NATIVE is for operators of our own, which x86-64 processors run about twice as fast; PREFILL
# is a graph for many tokens at a time, which ONNX Runtime's own run twice as fast on any processor.
NATIVE, PREFILL, NO_SECOND = SECOND_FORMS = ("native", "prefill", "none")
BLOCK_SIZES = (32, 64, 128, 256)
DEFAULT_BLOCK = 128
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
    adapter: Path | None = None,
    engine: str = "ort",
    precision: str = "fp32",
    block: int = DEFAULT_BLOCK,
    second: str | None = None,
    name: str | None = None,
    context: int = DEFAULT_CONTEXT,
    dialect: str | Path | None = None,
    episodes: Sequence[ParityEpisode] | None = None,
    parity: bool = True,
    progress: Progress = silent,
) -> PolicyManifest:
    """Export a Qwen2.5-VL or Qwen3-VL checkpoint folder to a policy folder and return its manifest.

    `adapter`: a PEFT folder of LoRA weights to merge. `engine`: what the policy will run on; the graphs are ONNX
    Runtime's whatever it is, engines for others are built from them (`export.build_engines`). `block`: weights that
    share a scale in int4; `second`: one of `SECOND_FORMS`, which int4 gets besides for ONNX Runtime on the processor;
    None: NATIVE where there are kernels for the decoder's heads, and to prove it on this processor, else PREFILL.
    `context`: tokens of one conversation, at most what the checkpoint was made for. `dialect`: a file, or the name of
    one of the package's; by default the checkpoint's own dialect.toml, else 'gog'. `episodes`: conversations for the
    parity check; random ones by default.
    Raises BackendError for an engine or precision that is not to be had, CheckpointError for a checkpoint that
    cannot be exported, graphs that miss the parity limit, or a machine without the room. `out` is replaced only
    when all went well.
    """
    check_available(engine, precision)
    check_second(second, precision, engine)
    if context < 1:
        raise CheckpointError(f"a conversation of {context} tokens holds nothing; give --context at least 1")
    checkpoint = Checkpoint.open(source, adapter)
    form = _second_form(second, checkpoint, parity) if _has_second(precision, engine) else NO_SECOND
    forms = weight_forms(precision, block, prefill=form == PREFILL)
    with replacing(out, "policy") as part:
        _check_room(checkpoint, part, precision)
        chat, spoken = _write_texts(checkpoint, part, dialect)  # what may be missing is found before the long work
        _write_weights(checkpoint, part, precision, forms, form, progress)
        manifest = PolicyManifest(
            name=name or source.resolve().name,
            architecture=checkpoint.config["architectures"][0],
            engine=ORT,
            precision=precision,
            weights=forms,
            lowering=LOWERING,
            vision=checkpoint.vision,
            text=checkpoint.text,
            chat=chat,
            image_token=checkpoint.image_token,
            eos=checkpoint.eos,
            box_frame=spoken.box_frame,
            max_context=min(context, checkpoint.max_positions),
            generation=checkpoint.generation,
            source_sha256=checkpoint.sha256,
            files=tuple(describe_files(part, [path.name for path in part.iterdir()])),
        )
        write_json(part / MANIFEST, manifest.to_json())
        if parity:
            report = measure_parity(part, checkpoint, episodes)
            check_passed(report)
            manifest = dataclasses.replace(manifest, parity=report.to_json())
            write_json(part / MANIFEST, manifest.to_json())
    return manifest


def weight_forms(precision: str, block: int = DEFAULT_BLOCK, *, prefill: bool = True) -> WeightForms:
    """How each part's weights are stored in a precision.

    In int4 the tables at both ends take 8 bits: they are few bytes and much of the error. Where many rows are
    multiplied at a time, in the vision tower and (with `prefill`) in a second graph of the decoder, the work counts and
    not the bytes: for ONNX Runtime whole numbers by rows are twice as fast there.
    CheckpointError for a block size that the operators do not take.
    """
    if block not in BLOCK_SIZES:
        raise CheckpointError(f"blocks of {block} weights are not to be had; take one of {BLOCK_SIZES}")
    if precision != "int4":
        return WeightForms()
    wide = Blocks(8, block)
    return WeightForms(
        decoder=Blocks(4, block), prefill=ROWS if prefill else None, head=wide, embeddings=wide, vision=ROWS
    )


BYTES_A_WEIGHT = {"fp32": 4.0, "fp16": 2.0, "int4": 1.9}  # int4: with scales, what takes 8 bits, and two decoders


def _check_room(checkpoint: Checkpoint, folder: Path, precision: str) -> None:
    needed = int(checkpoint.parameters * BYTES_A_WEIGHT[precision])
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"'{folder.parent}' has {free / 1e9:.1f} GB free, the policy takes about {needed / 1e9:.1f} GB; make room"
        )


def check_available(engine: str, precision: str) -> None:
    """BackendError, naming what there is, when this version cannot export for an engine or in a precision."""
    for what, given, known in (("engine", engine, ENGINES), ("precision", precision, PRECISIONS)):
        if given not in known:
            raise BackendError(f"policies cannot be exported for {what} '{given}'; available: {', '.join(known)}")


def check_second(second: str | None, precision: str, engine: str) -> None:
    """BackendError, naming what there is, for a second form of the weights that there is not."""
    if second is not None and second not in SECOND_FORMS:
        raise BackendError(f"there is no second form '{second}'; available: {', '.join(SECOND_FORMS)}")
    if second not in (None, NO_SECOND) and not _has_second(precision, engine):
        raise BackendError(
            f"a second form of the weights is for int4 and engine '{ORT}', not for {precision} and '{engine}'; leave "
            f"out --second {second}"
        )


def _has_second(precision: str, engine: str) -> bool:
    return precision == "int4" and engine == ORT


def _second_form(wanted: str | None, checkpoint: Checkpoint, parity: bool) -> str:
    text, vision = checkpoint.text, checkpoint.vision
    fits, proved = fits_native(text, vision), library() is not None or not parity
    if wanted == NATIVE and not proved:
        raise CheckpointError(
            f"graphs for our own operators cannot be compared with transformers here: {why_none()}; or export with "
            "--no-parity and run export.check_parity where they run"
        )
    if wanted == NATIVE and not fits:
        raise CheckpointError(
            f"the decoder's heads are {text.head_dim} wide, the tower's {vision.head_dim}; the native operators take "
            f"multiples of {WIDTHS} in the decoder, and up to {WIDEST} in both; export with --second {PREFILL}"
        )
    return wanted or (NATIVE if fits and proved else PREFILL)


def _write_texts(checkpoint: Checkpoint, folder: Path, dialect: str | Path | None) -> tuple[ChatFormat, Dialect]:
    """Tokenizer, chat template and dialect; CheckpointError or DialectError where they cannot be used."""
    image_token, eos = (_token(checkpoint, token) for token in (checkpoint.image_token, checkpoint.eos[0]))
    shutil.copyfile(checkpoint.folder / TOKENIZER, folder / TOKENIZER)
    (folder / CHAT_TEMPLATE).write_text(checkpoint.chat_template, encoding="utf-8")
    spoken = _copy_dialect(checkpoint, folder, dialect)
    return extract_chat_format(checkpoint.chat_template, image_token=image_token, eos=eos), spoken


def _write_weights(
    checkpoint: Checkpoint, folder: Path, precision: str, forms: WeightForms, second: str, progress: Progress
) -> None:
    """All graphs and the embedding table."""
    plain: Form = "fp16" if precision == "fp16" else "fp32"
    tower, decoder = checkpoint.vision_weights(), checkpoint.decoder_weights()
    write_vision(folder / VISION_GRAPH, checkpoint.vision, tower, forms.vision or plain, progress)
    write_decoder(
        folder / DECODER_GRAPH, checkpoint.text, decoder, form=forms.decoder or plain,
        head=forms.head or plain, progress=progress,
    )
    if forms.prefill is not None:
        write_decoder(
            folder / PREFILL_GRAPH, checkpoint.text, decoder, prefill=True, form=forms.prefill, progress=progress
        )
    if second == NATIVE:
        own = forms.native()
        write_native_vision(folder / NATIVE_VISION_GRAPH, checkpoint.vision, tower, own.vision or plain, progress)
        write_native(
            folder / NATIVE_DECODER_GRAPH, checkpoint.text, decoder, own.decoder or plain, own.head or plain, progress
        )
    _write_embeddings(folder, decoder("embed_tokens.weight"), forms.embeddings or plain)
    if checkpoint.adapter is not None:
        checkpoint.adapter.check_used()


def _write_embeddings(folder: Path, table: Array, form: Form) -> None:
    if isinstance(form, Blocks):
        packed, scales = quantise(table, form)
        np.save(folder / EMBEDDINGS, packed.reshape(len(packed), -1), allow_pickle=False)
        np.save(folder / EMBEDDING_SCALES, scales, allow_pickle=False)
    else:
        np.save(folder / EMBEDDINGS, table.astype(np.float16 if form == "fp16" else np.float32), allow_pickle=False)


def _token(checkpoint: Checkpoint, token: int) -> str:
    text = checkpoint.tokenizer.id_to_token(token)
    if text is None:
        raise CheckpointError(f"'{checkpoint.folder}': its tokenizer has no token {token}, which its config names")
    return str(text)


def _copy_dialect(checkpoint: Checkpoint, folder: Path, chosen: str | Path | None) -> Dialect:
    """Put the dialect into the policy folder: the one chosen, else the checkpoint's own, else the package's.

    The package's default says boxes as the architecture was taught to: its frame is replaced by the backbone's.
    """
    own = checkpoint.folder / DIALECT
    wanted: str | Path = chosen or (own if own.is_file() else DEFAULT_DIALECT)
    replaced = wanted == DEFAULT_DIALECT and not chosen and checkpoint.is_qwen3
    dialect, _ = copy_dialect(wanted, folder, "rel1000" if replaced else None)
    return dialect
