"""Convert a vision-language checkpoint to what the peers load: its decoder as a text-only checkpoint, or as GGUF.

Tensors are copied byte for byte in bfloat16, so that all engines have the same weights and torch is not needed. GGUF is
written directly, because llama.cpp's converter identifies tokenizers by a hash and does not know a synthetic one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from numpy.typing import NDArray
from tokenizers import Tokenizer

from gog_edge.errors import CheckpointError
from gog_edge.files import read_json, write_json

PREFIXES = ("model.language_model.", "model.")  # of the decoder in Qwen3-VL and in Qwen2.5-VL
TEXT_ARCHITECTURES = {"qwen3_vl": ("Qwen3ForCausalLM", "qwen3"), "qwen2_5_vl": ("Qwen2ForCausalLM", "qwen2")}
CONFIG_KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "rms_norm_eps", "bos_token_id", "eos_token_id", "hidden_act",
)  # fmt: skip
TENSORS = "model.safetensors"
GGUF_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
GGUF_LAYER_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """The location of a tensor in a safetensors file."""

    name: str  # in a text-only checkpoint
    dtype: str  # as in safetensors, for example "BF16"
    shape: tuple[int, ...]
    file: Path
    offset: int  # of the first byte in `file`
    size: int  # bytes

    def read(self) -> bytes:
        """Return the tensor's bytes, little-endian."""
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            return stream.read(self.size)


def text_tensors(checkpoint: Path) -> Iterator[StoredTensor]:
    """Yield the decoder's tensors in the order of the shards."""
    for shard in sorted(checkpoint.glob("*.safetensors")):
        with shard.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        for name, entry in header.items():
            text_name = _text_name(name)
            if text_name is not None:
                begin, end = entry["data_offsets"]
                shape = tuple(entry["shape"])
                yield StoredTensor(text_name, entry["dtype"], shape, shard, 8 + length + begin, end - begin)


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
    """Return config.json of the text-only checkpoint.

    Raises:
        CheckpointError: the architecture is not supported.
    """
    config = read_json(checkpoint / "config.json", what="checkpoint", error=CheckpointError)
    kind = config.get("model_type")
    if kind not in TEXT_ARCHITECTURES:
        supported = ", ".join(TEXT_ARCHITECTURES)
        raise CheckpointError(f"'{checkpoint}': model_type must be one of {supported} for the peers, got {kind!r}")
    architecture, model_type = TEXT_ARCHITECTURES[kind]
    text = config["text_config"]
    theta = text["rope_parameters"]["rope_theta"]
    return {
        **{key: text[key] for key in CONFIG_KEYS if text.get(key) is not None},
        "architectures": [architecture],
        "model_type": model_type,
        "dtype": "bfloat16",
        "use_sliding_window": False,
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
    }


def write_text_checkpoint(checkpoint: Path, out: Path) -> None:
    """Write the text-only checkpoint, atomically.

    Raises:
        CheckpointError: the checkpoint contains no decoder or is of another architecture.
    """
    tensors = list(text_tensors(checkpoint))
    if not tensors:
        raise CheckpointError(f"'{checkpoint}' contains no decoder tensors; check that the checkpoint is complete")
    config = text_config(checkpoint)
    build_folder(out, lambda part: _write(part, checkpoint, config, tensors))


def _write(part: Path, checkpoint: Path, config: dict[str, Any], tensors: list[StoredTensor]) -> None:
    with (part / TENSORS).open("wb") as stream:
        header = _header(tensors)
        stream.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors:
            stream.write(tensor.read())
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


def build_folder(out: Path, fill: Callable[[Path], None]) -> None:
    """Fill a temporary folder and rename it to `out`, so that a folder of that name is always complete."""
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        fill(part)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_gguf(checkpoint: Path, out: Path) -> None:
    """Write the decoder as a GGUF file in bfloat16, the input of llama.cpp's quantizer.

    Raises:
        CheckpointError: the checkpoint is not in bfloat16 or of another architecture.
    """
    config = text_config(checkpoint)
    part = out.with_name(out.name + ".part")
    writer = GGUFWriter(part, config["model_type"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    _add_tokenizer(writer, checkpoint / "tokenizer.json", config["vocab_size"], config["eos_token_id"])
    tensors = list(text_tensors(checkpoint))
    for tensor in tensors:
        kind = _gguf_type(tensor)
        wide = kind is GGMLQuantizationType.F32
        dtype = np.dtype(np.float32) if wide else np.dtype(np.uint16)
        size = 2 * tensor.size if wide else tensor.size
        writer.add_tensor_info(gguf_name(tensor.name), tensor.shape, dtype, size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(_gguf_data(tensor))
    writer.close()
    part.rename(out)


def gguf_name(name: str) -> str:
    """Return the name of a tensor in GGUF: model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight."""
    stem, _, ending = name.rpartition(".")
    if stem in GGUF_NAMES:
        return f"{GGUF_NAMES[stem]}.{ending}"
    _, _, number, part = stem.split(".", 3)
    return f"blk.{number}.{GGUF_LAYER_NAMES[part]}.{ending}"


def _gguf_type(tensor: StoredTensor) -> GGMLQuantizationType:
    if tensor.dtype != "BF16":
        raise CheckpointError(f"'{tensor.file}': '{tensor.name}' must be BF16 for the peers, got {tensor.dtype}")
    return GGMLQuantizationType.F32 if len(tensor.shape) == 1 else GGMLQuantizationType.BF16


def _gguf_data(tensor: StoredTensor) -> NDArray[Any]:
    bits = np.frombuffer(tensor.read(), np.uint16)
    if len(tensor.shape) > 1:
        return bits.reshape(tensor.shape)
    return (bits.astype(np.uint32) << 16).view(np.float32)  # llama.cpp requires norms and biases in float32


def _add_tokenizer(writer: GGUFWriter, path: Path, vocab: int, eos: int) -> None:
    tokenizer = Tokenizer.from_file(str(path))
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokens = [tokenizer.id_to_token(token) or f"<pad {token}>" for token in range(vocab)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in special else TokenType.NORMAL for token in tokens])
    writer.add_token_merges([f"{tokens[0]} {tokens[0]}"])  # llama.cpp receives ids only, but requires a merge
    writer.add_eos_token_id(eos)
