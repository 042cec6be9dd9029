"""A text-only checkpoint as GGUF in bfloat16, which llama.cpp's own quantiser takes from there.

Written directly: llama.cpp's converter knows tokenizers by the hash of what they encode, and a made-up one is not among
them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from tokenizers import Tokenizer

from benchmarks.peers.text_only import StoredTensor, tensor_bytes, text_config, text_tensors
from gog_edge.errors import CheckpointError

NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_gguf(checkpoint: Path, out: Path) -> None:
    """Write the decoder of a vision-language checkpoint as a text-only GGUF file."""
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
        kind = _kind(tensor)
        size = 4 * tensor.size // 2 if kind is GGMLQuantizationType.F32 else tensor.size
        dtype = np.dtype(np.float32) if kind is GGMLQuantizationType.F32 else np.dtype(np.uint16)
        writer.add_tensor_info(gguf_name(tensor.name), tensor.shape, dtype, size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(_data(tensor))
    writer.close()
    part.rename(out)


def gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight."""
    stem, _, ending = name.rpartition(".")
    if stem in NAMES:
        return f"{NAMES[stem]}.{ending}"
    _, _, number, part = stem.split(".", 3)
    return f"blk.{number}.{LAYER_NAMES[part]}.{ending}"


def _kind(tensor: StoredTensor) -> GGMLQuantizationType:
    if tensor.dtype != "BF16":
        raise CheckpointError(f"'{tensor.file}': '{tensor.name}' is {tensor.dtype}; peers are made from BF16")
    return GGMLQuantizationType.F32 if len(tensor.shape) == 1 else GGMLQuantizationType.BF16


def _data(tensor: StoredTensor) -> np.ndarray:
    bits = np.frombuffer(tensor_bytes(tensor), np.uint16)
    if len(tensor.shape) > 1:
        return bits.reshape(tensor.shape)
    return (bits.astype(np.uint32) << 16).view(np.float32)  # norms and biases: llama.cpp wants them in float32


def _add_tokenizer(writer: GGUFWriter, path: Path, vocab: int, eos: int) -> None:
    tokenizer = Tokenizer.from_file(str(path))
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokens = [tokenizer.id_to_token(token) or f"<pad {token}>" for token in range(vocab)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in special else TokenType.NORMAL for token in tokens])
    writer.add_token_merges([f"{tokens[0]} {tokens[0]}"])  # llama.cpp is told ids, no text, but refuses none at all
    writer.add_eos_token_id(eos)
