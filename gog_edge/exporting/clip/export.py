"""Export of an open_clip checkpoint to an encoder folder: two graphs, a tokenizer and a manifest with parity figures.

A manifest's fingerprint covers the weights and the preprocessing, not the precision: the vectors of an int8 export must
be comparable with those of the fp32 export, so that a pack built with either can be searched with the other.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from gog_edge.errors import CheckpointError
from gog_edge.exporting.clip.blocks import read_image_tower, read_text_tower
from gog_edge.exporting.clip.checkpoint import ClipCheckpoint
from gog_edge.exporting.clip.graph import write_image_tower, write_text_tower
from gog_edge.exporting.clip.parity import SAMPLES, measure_parity, noise_batches, parity_json, picture_batches
from gog_edge.exporting.graph import WeightFormat
from gog_edge.exporting.output_folder import atomic_output_folder
from gog_edge.exporting.quantization import INT7_BY_ROW
from gog_edge.files import MODEL_MANIFEST, describe_files, sha256_of, write_json
from gog_edge.retrieval.encoder import SCHEMA, parse_image_spec
from gog_edge.tables import shown

OPSET = 20  # of graphs written by torch.onnx
EMBEDDED_BYTES = 2**30  # weights above this size go to an external data file; protocol buffers are limited to 2 GiB
PRECISIONS: dict[str, WeightFormat] = {"fp32": "fp32", "int8": INT7_BY_ROW}
PARITY_TEXTS = ("the flag of France", "A red circle on white!", "", "Łódź, São Tomé e Príncipe; 日本", "word " * 200)


@dataclass(frozen=True, slots=True)
class _Tower:
    """One tower of a model, as PyTorch runs it, and how it is written."""

    file: str
    input: str
    module: nn.Module
    batches: Sequence[Tensor]  # inputs of the parity check; torch.onnx traces the first one
    write: Callable[[Path, WeightFormat], None]  # raises CheckpointError for a tower with unknown parts


def export_clip(
    checkpoint: ClipCheckpoint, out: Path, *, precision: str = "fp32", pictures: Path = SAMPLES
) -> dict[str, Any]:
    """Write an encoder folder and return its manifest; `out` is replaced only when everything succeeded.

    Args:
        checkpoint: from `load_clip`.
        out: a new or empty folder, or one of an encoder.
        precision: "fp32", or "int8" for integer matmuls, which are about three times as fast.
        pictures: folder of pictures for the parity check, whole and cropped; by default the atlas's samples.

    Raises:
        CheckpointError: the graphs differ from the model, the precision does not exist or does not support this model,
            `out` contains something else, or the disk is full.
    """
    if precision not in PRECISIONS:
        raise CheckpointError(f"unknown precision '{precision}' of an encoder; available: {', '.join(PRECISIONS)}")
    towers = _towers(checkpoint, pictures)
    with atomic_output_folder(out, "encoder") as part:
        lowering = {tower.file: _write(tower, part, checkpoint.name, precision) for tower in towers}
        image, text = (
            measure_parity(part / f"{tower.file}.onnx", tower.module, tower.input, tower.batches, precision)
            for tower in towers
        )
        checkpoint.tokenizer.save(str(part / "tokenizer.json"))
        described = {"precision": precision, "lowering": lowering, "parity": parity_json(image, text, precision)}
        manifest = _manifest(checkpoint, part, described)
        write_json(part / MODEL_MANIFEST, manifest)
    return manifest


def _towers(checkpoint: ClipCheckpoint, pictures: Path) -> tuple[_Tower, _Tower]:
    model, spec = checkpoint.model, parse_image_spec(asdict(checkpoint.image))
    tokens = tokenize(checkpoint.tokenizer, PARITY_TEXTS, checkpoint.context_length, checkpoint.pad_id)
    texts = [torch.from_numpy(tokens), torch.from_numpy(tokens[:1])]
    images = [*noise_batches(spec), *picture_batches(pictures, spec)]
    return (
        _Tower("image", "pixels", _ImageTower(model).eval(), images,
               lambda path, weight_format: write_image_tower(path, read_image_tower(model), weight_format)),
        _Tower("text", "tokens", _TextTower(model).eval(), texts,
               lambda path, weight_format: write_text_tower(path, read_text_tower(model), weight_format)),
    )  # fmt: skip


def _write(tower: _Tower, folder: Path, name: str, precision: str) -> str:
    """Write a tower's graph; return "blocks" if our writer supports it, or else "torch.onnx"."""
    path = folder / f"{tower.file}.onnx"
    try:
        tower.write(path, PRECISIONS[precision])
    except CheckpointError as exc:
        if precision != "fp32":
            raise CheckpointError(
                f"open_clip model '{name}': {exc}; only open_clip's own transformers can be exported in {precision}, "
                "export it in fp32"
            ) from exc
        _export_tower(tower.module, tower.batches[0], tower.input, path)
        return "torch.onnx"
    return "blocks"


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], length: int, pad_id: int) -> NDArray[np.int64]:
    """Return token ids [n, length] int64, truncated and padded as the runtime does."""
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=pad_id)
    return np.array([encoding.ids for encoding in tokenizer.encode_batch(list(texts))], dtype=np.int64)


def _manifest(checkpoint: ClipCheckpoint, out: Path, described: Mapping[str, Any]) -> dict[str, Any]:
    """Return the encoder's manifest; `described` has the keys precision, lowering and parity."""
    names = ["image.onnx", "text.onnx", "tokenizer.json"]
    names += [f"{name}.data" for name in names[:2] if (out / f"{name}.data").is_file()]
    files = [entry.to_json() for entry in describe_files(out, names)]
    image = asdict(checkpoint.image)
    text = {"context_length": checkpoint.context_length, "pad_id": checkpoint.pad_id}
    tokenizer = next(entry["sha256"] for entry in files if entry["path"] == "tokenizer.json")
    recipe = json.dumps({"image": image, "text": text, "tokenizer": tokenizer}, sort_keys=True)
    scale = checkpoint.model.logit_scale
    return {
        "schema": SCHEMA,
        "kind": "encoder",
        "name": checkpoint.name,
        "dim": checkpoint.dim,
        "image": image,
        "text": text,
        "weights_sha256": sha256_of(checkpoint.weights),
        "preprocessing_sha256": hashlib.sha256(recipe.encode()).hexdigest(),
        "logit_scale": _logit_scale(scale),
        **described,
        "files": files,
    }


def _logit_scale(scale: Any) -> float:
    value = float(scale.exp().mean()) if isinstance(scale, Tensor) else 1.0
    if not math.isfinite(value):
        raise CheckpointError(f"the model's logit_scale is e to the power of {shown(scale)}; give other weights")
    return value


# --- graphs written by torch.onnx ----------------------------------------------------------------


class _ImageTower(nn.Module):
    """The image tower as a module: [n, 3, height, width] float32 -> [n, dim] of unit length."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return functional.normalize(self.model.encode_image(pixels), dim=-1)  # type: ignore[operator]


class _TextTower(nn.Module):
    """The text tower as a module: [n, context_length] int64 -> [n, dim] of unit length."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return functional.normalize(self.model.encode_text(tokens), dim=-1)  # type: ignore[operator]


def _export_tower(tower: nn.Module, example: Tensor, name: str, path: Path) -> None:
    """Write one tower as a graph with a dynamic batch size."""
    size = sum(value.numel() * value.element_size() for value in tower.state_dict().values())
    program = _trace(tower, example, name, path)
    for node in program.model.graph:
        node.metadata_props.clear()  # contains source paths of this machine
        for value in node.outputs:
            # The exporter names the output of a token table "embedding" too, which conflicts with the graph's output.
            if value.name == "embedding" and not value.is_graph_output():
                value.name = "token_embedding"
    program.save(path, external_data=size > EMBEDDED_BYTES)


def _trace(tower: nn.Module, example: Tensor, name: str, path: Path) -> torch.onnx.ONNXProgram:
    for logger in ("torch.onnx", "onnxscript"):  # they log their own internals
        logging.getLogger(logger).setLevel(logging.ERROR)
    program, reason = None, "returned no graph"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the exporter's own internals
        try:
            program = torch.onnx.export(
                tower.eval(),
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[name],
                output_names=["embedding"],
                dynamic_shapes=({0: torch.export.Dim("n", min=1, max=4096)},),
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as exc:
            reason = f"failed ({str(exc.__cause__ or exc).splitlines()[0]})"
    if program is None:
        raise CheckpointError(
            f"{path.name}: torch.onnx {reason} for {type(tower).__name__}; install the torch release of "
            "gog_edge[export], or use another model"
        )
    return program
