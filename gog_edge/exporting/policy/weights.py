"""The tensors of a checkpoint folder: which file stores each one under which name, and their values.

Names are those within the model, as current releases of transformers use them: `visual.*` for the vision tower,
`language_model.*` for the decoder, `lm_head.weight` for the head.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from gog_edge.engines.base import Array
from gog_edge.errors import CheckpointError
from gog_edge.files import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
CHECKED_VALUES = 2**22  # values that are checked at a time, which bounds the temporary memory

# What trainers put before or into names: DDP, torch.compile, FSDP, a PeftModel whose adapter was merged.
_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "base_model.model.")
# The prefixes that releases of transformers and other libraries use, in the order of matching.
_PREFIXES = (
    ("model.visual.", "visual."), ("visual.", "visual."), ("model.language_model.model.", "language_model."),
    ("language_model.model.", "language_model."), ("model.language_model.lm_head.", "lm_head."),
    ("language_model.lm_head.", "lm_head."), ("model.lm_head.", "lm_head."), ("lm_head.", "lm_head."),
    ("model.language_model.", "language_model."), ("language_model.", "language_model."),
)  # fmt: skip
_DECODER_PARTS = ("layers.", "embed_tokens.", "norm.")  # after "model." or without any prefix
_QUANTIZED = (
    ("bitsandbytes", re.compile(r"\.weight\.(absmax|quant_map|nested_absmax|quant_state)|\.SCB$")),
    ("GPTQ or AWQ", re.compile(r"\.(qweight|qzeros|g_idx)$")),
    ("FP8", re.compile(r"\.(weight_scale_inv|weight_scale|input_scale)$")),
    ("compressed-tensors", re.compile(r"\.(weight_packed|weight_shape)$")),
)
_UNMERGED = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|modules_to_save|original_module)\b")
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.safetensors$")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a safetensors file."""

    path: Path
    name: str  # in the file
    dtype: str  # as safetensors spells it, for example "BF16"
    shape: tuple[int, ...]

    def read(self) -> Array:
        """Return the values as float32.

        Raises:
            CheckpointError: they are not floating point, not finite, or cannot be read.
        """
        if self.dtype not in FLOATS:
            raise CheckpointError(
                f"'{self.path}': '{self.name}' must be one of {', '.join(FLOATS)}, got {self.dtype}; export a "
                "floating-point checkpoint"
            )
        try:
            with safe_open(self.path, framework="pt") as file:  # NumPy itself has no bfloat16
                mapped = file.get_tensor(self.name)
        except (SafetensorError, OSError) as exc:
            raise CheckpointError(f"cannot read '{self.name}' from '{self.path}' ({exc}); copy it again") from exc
        values: Array = mapped.to(torch.float32, copy=True).numpy()
        check_finite(values, f"'{self.path}': '{self.name}'")
        return values


def check_finite(values: Array, what: str) -> None:
    """Raise CheckpointError with the number of values that are NaN or infinite in float32, if there are any."""
    flat = values.reshape(-1)
    parts = (flat[start : start + CHECKED_VALUES] for start in range(0, flat.size, CHECKED_VALUES))
    wrong = sum(part.size - int(np.isfinite(part).sum()) for part in parts)
    if wrong:
        raise CheckpointError(
            f"{what} has {wrong} of {values.size} values that are NaN or infinite; the training may have diverged: "
            "export an earlier checkpoint, or copy it again"
        )


@dataclass(frozen=True)
class WeightFiles:
    """The tensors of a checkpoint folder by their name within the model; values are read on request."""

    folder: Path
    tensors: dict[str, StoredTensor]
    paths: tuple[Path, ...]  # of the files that are used
    notes: tuple[str, ...]  # what was ignored, for the person who exports

    @classmethod
    def open(cls, folder: Path) -> WeightFiles:
        """Read the names and shapes of the tensors: those of the index if there is one, else of model.safetensors.

        Raises:
            CheckpointError: a file or tensor is missing or damaged, files disagree, or the weights are quantized,
                pickled, or an adapter that was not merged.
        """
        stored, notes = _stored_tensors(folder)
        tensors: dict[str, StoredTensor] = {}
        others = []
        for tensor in stored:
            name = model_name(tensor.name)
            if name is None:
                others.append(tensor.name)
            elif name in tensors:
                raise CheckpointError(
                    f"'{folder}' stores the same weight twice, as '{tensors[name].name}' in {tensors[name].path.name} "
                    f"and as '{tensor.name}' in {tensor.path.name}; remove one of them"
                )
            else:
                tensors[name] = tensor
        _check_kind(folder, stored)
        if (folder / ADAPTER_WEIGHTS).exists():
            notes.append(f"{ADAPTER_WEIGHTS} in this folder is not merged; give the folder with --adapter to merge it")
        if others:
            notes.append(f"ignored {_counted(others, 'tensor')} of no known part of the model: {_some(others)}")
        paths = tuple(sorted({tensor.path for tensor in stored}))
        return cls(folder, tensors, paths, tuple(notes))

    def __contains__(self, name: str) -> bool:
        """Return whether a tensor exists."""
        return name in self.tensors

    def read(self, name: str) -> Array:
        """Return one tensor as float32. Raises CheckpointError if it does not exist, or see `StoredTensor.read`."""
        if name not in self.tensors:
            raise CheckpointError(f"'{self.folder}' has no tensor '{name}'; is the checkpoint complete?")
        return self.tensors[name].read()

    def equal(self, first: str, second: str) -> bool:
        """Return whether two tensors have equal values, compared a few rows at a time."""
        one, other = self.tensors[first], self.tensors[second]
        if one.shape != other.shape or not one.shape:
            return False
        rows = one.shape[0]
        step = max(1, CHECKED_VALUES // max(1, prod(one.shape[1:])))
        with safe_open(one.path, framework="pt") as left, safe_open(other.path, framework="pt") as right:
            first_rows, second_rows = left.get_slice(one.name), right.get_slice(other.name)
            chunks = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
            return all(torch.equal(first_rows[chunk].float(), second_rows[chunk].float()) for chunk in chunks)

    def check_shapes(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Compare names and shapes with those of the architecture, by name.

        Raises:
            CheckpointError: a tensor is missing or has another shape, or the decoder or tower has more layers.
        """
        missing = [name for name in expected if name not in self.tensors]
        if missing:
            raise CheckpointError(
                f"'{self.folder}' has no tensor '{missing[0]}'{_more(missing)}; is the checkpoint complete?"
            )
        for name, shape in expected.items():
            tensor = self.tensors[name]
            if tensor.shape != shape:
                raise CheckpointError(
                    f"'{tensor.path}': '{tensor.name}' has shape {list(tensor.shape)}, config.json implies "
                    f"{list(shape)}; copy both from the same checkpoint"
                )
        layers = re.compile(r"(language_model\.layers|visual\.blocks)\.\d+\..*(weight|bias)$")
        extra = [name for name in self.tensors if name not in expected and layers.match(name)]
        if extra:
            raise CheckpointError(
                f"'{self.folder}' has the tensor '{extra[0]}'{_more(extra)}, which config.json does not describe; copy "
                "both from the same checkpoint"
            )


def model_name(stored: str) -> str | None:
    """Return the name within the model of a tensor or module of any known layout, or None for an unknown one."""
    name = stored.replace("_fsdp_wrapped_module.", "").replace("_orig_mod.", "")
    while wrapper := next((wrapper for wrapper in _WRAPPERS if name.startswith(wrapper)), None):
        name = name.removeprefix(wrapper)
    for released, own in _PREFIXES:
        if name.startswith(released):
            return own + name.removeprefix(released)
    part = name.removeprefix("model.")
    return f"language_model.{part}" if part.startswith(_DECODER_PARTS) else None


def read_header(path: Path) -> list[StoredTensor]:
    """Return the tensors of a safetensors file. Raises CheckpointError if it cannot be read."""
    try:
        if not path.is_file():
            raise OSError("it is not a regular file")
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return [StoredTensor(path, name, part.get_dtype(), tuple(part.get_shape()))
                    for name, part in slices.items()]  # fmt: skip
    except (SafetensorError, OSError, ValueError) as exc:
        raise CheckpointError(f"cannot read '{path}' as safetensors ({exc}); copy it again") from exc


# --- which files ---------------------------------------------------------------------------------


def _stored_tensors(folder: Path) -> tuple[list[StoredTensor], list[str]]:
    """Return the tensors of the folder, and what was ignored."""
    present = sorted(path for path in folder.glob("*.safetensors") if path.name != ADAPTER_WEIGHTS)
    if (folder / INDEX).exists():
        return _indexed_tensors(folder, present)
    if (folder / SINGLE).exists():
        return read_header(folder / SINGLE), _leftovers(path for path in present if path.name != SINGLE)
    if not present:
        raise CheckpointError(f"'{folder}' has no .safetensors file; {_advice(folder)}")
    _check_numbers(folder, present)
    tensors: dict[str, StoredTensor] = {}
    for tensor in (tensor for path in present for tensor in read_header(path)):
        if tensor.name in tensors:
            raise CheckpointError(
                f"'{folder}' has '{tensor.name}' in both {tensors[tensor.name].path.name} and {tensor.path.name}, and "
                f"no {INDEX} that says which one counts; remove the files that do not belong to it"
            )
        tensors[tensor.name] = tensor
    return list(tensors.values()), []


def _indexed_tensors(folder: Path, present: list[Path]) -> tuple[list[StoredTensor], list[str]]:
    weight_map = read_json(folder / INDEX, what="checkpoint", error=CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"'{folder / INDEX}': weight_map must map names of tensors to files, got {weight_map!r}")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain_name(file):
            raise CheckpointError(
                f"'{folder / INDEX}' places '{name}' in {file!r}; it must be the name of a .safetensors file in the "
                "same folder: save the checkpoint again"
            )
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(
            f"'{folder}' is incomplete: {INDEX} lists tensors of {_some(missing)}; copy these files too"
        )
    found = {file: {tensor.name: tensor for tensor in read_header(folder / file)} for file in files}
    for name, file in weight_map.items():
        if name not in found[file]:
            other = next((other for other in files if name in found[other]), None)
            where = f"it is in {other}" if other else "that file does not contain it"
            raise CheckpointError(
                f"'{folder / INDEX}' places '{name}' in {file}, but {where}; copy the index and all files of the same "
                "checkpoint"
            )
    notes = _leftovers(path for path in present if path.name not in found)
    unlisted = [name for file in files for name in found[file] if weight_map.get(name) != file]
    if unlisted:
        notes.append(f"ignored {_counted(unlisted, 'tensor')} missing from {INDEX}: {_some(unlisted)}")
    return [found[file][name] for name, file in weight_map.items()], notes


def _is_plain_name(file: str) -> bool:
    return file.endswith(".safetensors") and not re.search(r"[/\\:\0]", file)


def _leftovers(paths: Iterable[Path]) -> list[str]:
    names = [path.name for path in paths]
    return [f"ignored {_counted(names, 'file')} beside those of the checkpoint: {_some(names)}"] if names else []


def _check_numbers(folder: Path, present: list[Path]) -> None:
    """Raise CheckpointError if a shard of a numbered series without an index is missing."""
    numbered = {path.name: match for path in present if (match := _SHARD.search(path.name))}
    for name, match in numbered.items():
        stem = name[: match.start()]
        series = (f"{stem}-{n:0{len(match[1])}d}-of-{match[2]}.safetensors" for n in range(1, int(match[2]) + 1))
        missing = next((other for other in series if other not in numbered), None)
        if missing:
            raise CheckpointError(f"'{folder}' is incomplete: it has {name}, but not {missing}; copy all files")



# --- what kind -----------------------------------------------------------------------------------


def _advice(folder: Path) -> str:
    if (folder / ADAPTER_WEIGHTS).exists() or (folder / "adapter_config.json").exists():
        return "it is a PEFT adapter: give the base model as CHECKPOINT, and this folder with --adapter"
    pickled = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickled:
        return (
            f"{_some(pickled)} may contain code, which is never run: load the checkpoint where you trust it, and write "
            "it with save_pretrained(FOLDER, safe_serialization=True)"
        )
    return "save the checkpoint in that format"


def _check_kind(folder: Path, stored: list[StoredTensor]) -> None:
    """Raise CheckpointError for quantized weights, and for an adapter's weights that were not merged."""
    for tensor in stored:
        method = next((method for method, pattern in _QUANTIZED if pattern.search(tensor.name)), None)
        method = "FP8" if method is None and tensor.dtype.startswith("F8") else method
        if method is not None:
            raise CheckpointError(
                f"'{folder}' is already quantized ({method}: '{tensor.name}'); export the floating-point checkpoint "
                "that it was created from, with --precision int4"
            )
        if _UNMERGED.search(tensor.name):
            raise CheckpointError(
                f"'{folder}' contains an adapter that was not merged ('{tensor.name}'); give the base model as "
                "CHECKPOINT and the adapter with --adapter, or save the result of merge_and_unload()"
            )


# --- messages ------------------------------------------------------------------------------------


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _counted(names: list[str], noun: str) -> str:
    return f"{len(names)} {noun}{'s' if len(names) > 1 else ''}"
