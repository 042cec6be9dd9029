"""The decoder of a vision-language checkpoint as a text-only one, which is what every peer can load: same weights.

Tensors are copied byte for byte, so the dtype stays and torch is not needed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gog_edge.errors import CheckpointError
from gog_edge.files import read_json, write_json

PREFIXES = ("model.language_model.", "model.")  # Qwen3-VL's, Qwen2.5-VL's; what else there is belongs to the tower
TEXT_ARCHITECTURES = {"qwen3_vl": ("Qwen3ForCausalLM", "qwen3"), "qwen2_5_vl": ("Qwen2ForCausalLM", "qwen2")}
KEPT = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "rms_norm_eps", "bos_token_id", "eos_token_id", "hidden_act",
)  # fmt: skip
TENSORS = "model.safetensors"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor's bytes lie."""

    name: str  # as a text-only checkpoint names it
    dtype: str  # as safetensors names it: "BF16"
    shape: tuple[int, ...]
    file: Path
    offset: int  # of the first byte in `file`
    size: int  # bytes


def text_tensors(checkpoint: Path) -> Iterator[StoredTensor]:
    """The decoder's tensors, in the order of the shards."""
    for shard in sorted(checkpoint.glob("*.safetensors")):
        with shard.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        for name, entry in header.items():
            own = _text_name(name)
            if own is not None:
                begin, end = entry["data_offsets"]
                yield StoredTensor(own, entry["dtype"], tuple(entry["shape"]), shard, 8 + length + begin, end - begin)


def _text_name(name: str) -> str | None:
    if name == "lm_head.weight":
        return name
    if name == "__metadata__" or "visual." in name:
        return None
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return "model." + name.removeprefix(prefix)
    return None


def text_config(checkpoint: Path) -> dict[str, Any]:
    """config.json of the text-only checkpoint. CheckpointError for another architecture."""
    config = read_json(checkpoint / "config.json", what="checkpoint", error=CheckpointError)
    kind = config.get("model_type")
    if kind not in TEXT_ARCHITECTURES:
        raise CheckpointError(f"'{checkpoint}' is a {kind!r}; peers load {', '.join(TEXT_ARCHITECTURES)}")
    architecture, model_type = TEXT_ARCHITECTURES[kind]
    text = config["text_config"]
    theta = text["rope_parameters"]["rope_theta"]
    return {
        **{key: text[key] for key in KEPT if text.get(key) is not None},
        "architectures": [architecture],
        "model_type": model_type,
        "dtype": "bfloat16",
        "use_sliding_window": False,
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
    }


def write_text_checkpoint(checkpoint: Path, out: Path) -> None:
    """Write the text-only folder; it appears when it is whole. CheckpointError when a decoder cannot be found."""
    tensors = list(text_tensors(checkpoint))
    if not tensors:
        raise CheckpointError(f"'{checkpoint}' holds no decoder tensors; is the checkpoint complete?")
    config = text_config(checkpoint)
    build_folder(out, lambda part: _write(part, checkpoint, config, tensors))


def _write(part: Path, checkpoint: Path, config: dict[str, Any], tensors: list[StoredTensor]) -> None:
    with (part / TENSORS).open("wb") as stream:
        header = _header(tensors)
        stream.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors:
            stream.write(tensor_bytes(tensor))
    write_json(part / "config.json", config)
    shutil.copy(checkpoint / "tokenizer.json", part)
    write_json(part / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def _header(tensors: list[StoredTensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, begin + tensor.size]
        }  # fmt: skip
        begin += tensor.size
    text = json.dumps(entries).encode()
    return text + b" " * (-len(text) % 8)


def tensor_bytes(tensor: StoredTensor) -> bytes:
    """A tensor's bytes, little-endian."""
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.offset)
        return stream.read(tensor.size)


def build_folder(out: Path, fill: Callable[[Path], None]) -> None:
    """Fill a folder beside `out` and rename it: a folder of the final name is whole."""
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        fill(part)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
