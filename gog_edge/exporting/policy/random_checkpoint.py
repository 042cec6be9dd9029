"""Checkpoints of the released models' true shapes with random weights, to measure export, load time and speed.

Their tokenizer is a byte-level BPE of Qwen's size whose merges are synthetic: it has as many tokens and merges to load
as the real one, needs no corpus, and is the same everywhere.
"""

from __future__ import annotations

import heapq
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gog_edge.errors import CheckpointError
from gog_edge.exporting.output_folder import check_disk_space
from gog_edge.exporting.policy.chat_template import CHATML
from gog_edge.exporting.torchvision_shim import import_torchvision
from gog_edge.files import write_json
from gog_edge.policy.manifest import CHAT_TEMPLATE, TOKENIZER

import_torchvision()  # before transformers, which imports torchvision if it is installed
from transformers import (  # noqa: E402
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

SPECIAL = {  # Qwen's own ids
    "<|endoftext|>": 151_643, "<|im_start|>": 151_644, "<|im_end|>": 151_645, "<|object_ref_start|>": 151_646,
    "<|object_ref_end|>": 151_647, "<|box_start|>": 151_648, "<|box_end|>": 151_649, "<|quad_start|>": 151_650,
    "<|quad_end|>": 151_651, "<|vision_start|>": 151_652, "<|vision_end|>": 151_653, "<|vision_pad|>": 151_654,
    "<|image_pad|>": 151_655, "<|video_pad|>": 151_656,
}  # fmt: skip
WEIGHT_STD = 0.02  # standard deviation of the weights, as Qwen initializes them
SHARD_BYTES = 2 << 30
_IDS: dict[str, Any] = {
    "image_token_id": SPECIAL["<|image_pad|>"],
    "video_token_id": SPECIAL["<|video_pad|>"],
    "vision_start_token_id": SPECIAL["<|vision_start|>"],
    "vision_end_token_id": SPECIAL["<|vision_end|>"],
}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model's configuration, and the names of its tensors in the released checkpoint."""

    config: Any  # Qwen2_5_VLConfig or Qwen3VLConfig
    processor: dict[str, Any]  # preprocessor_config.json
    renamed: tuple[tuple[str, str], ...] = ()  # (prefix in transformers, prefix in the release)

    @property
    def architecture(self) -> Any:
        """Return the model class in transformers."""
        qwen3 = isinstance(self.config, Qwen3VLConfig)
        return Qwen3VLForConditionalGeneration if qwen3 else Qwen2_5_VLForConditionalGeneration

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return every tensor of the checkpoint by its released name, on the meta device."""
        with torch.device("meta"):
            model = self.architecture(self.config)
        named = dict(model.named_parameters())  # a tied head is listed once
        return {self._released(name): tensor for name, tensor in named.items()}

    def _released(self, name: str) -> str:
        for own, released in self.renamed:
            if name.startswith(own):
                return released + name.removeprefix(own)
        return name


def _qwen25(hidden: int, intermediate: int, layers: int, heads: int, kv: int, vocab: int, *, tied: bool) -> ModelShape:
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocab,
            "max_position_embeddings": 128_000, "rms_norm_eps": 1e-6, "tie_word_embeddings": tied,
            "bos_token_id": SPECIAL["<|endoftext|>"], "eos_token_id": SPECIAL["<|im_end|>"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]},
        },
        vision_config={
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112, "out_hidden_size": hidden,
            "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2,
        },
        tie_word_embeddings=tied,
        **_IDS,
    )  # fmt: skip
    processor = {"min_pixels": 3136, "max_pixels": 12_845_056, "patch_size": 14, "merge_size": 2,
                 "temporal_patch_size": 2, "image_mean": [0.48145466, 0.4578275, 0.40821073],
                 "image_std": [0.26862954, 0.26130258, 0.27577711]}  # fmt: skip
    return ModelShape(config, processor, (("model.visual.", "visual."), ("model.language_model.", "model.")))


def _qwen3(
    hidden: int, intermediate: int, layers: int, heads: int, *, tied: bool, tower: tuple[int, int, int, list[int]]
) -> ModelShape:
    depth, width, wide, deepstack = tower
    config = Qwen3VLConfig(
        text_config={
            "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936,
            "max_position_embeddings": 262_144, "rms_norm_eps": 1e-6, "tie_word_embeddings": tied,
            "bos_token_id": SPECIAL["<|endoftext|>"], "eos_token_id": SPECIAL["<|im_end|>"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 5_000_000.0, "mrope_section": [24, 20, 20],
                                "mrope_interleaved": True},
        },
        vision_config={
            "depth": depth, "hidden_size": width, "intermediate_size": wide, "num_heads": 16, "patch_size": 16,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": hidden,
            "num_position_embeddings": 2304, "deepstack_visual_indexes": deepstack,
        },
        tie_word_embeddings=tied,
        **_IDS,
    )  # fmt: skip
    processor = {"size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}, "patch_size": 16, "merge_size": 2,
                 "temporal_patch_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # fmt: skip
    return ModelShape(config, processor)


_SMALL_TOWER, _LARGE_TOWER = (24, 1024, 4096, [5, 11, 17]), (27, 1152, 4304, [8, 16, 24])
SHAPES: dict[str, Callable[[], ModelShape]] = {
    "qwen2.5-vl-3b": lambda: _qwen25(2048, 11_008, 36, 16, 2, 151_936, tied=True),
    "qwen2.5-vl-7b": lambda: _qwen25(3584, 18_944, 28, 28, 4, 152_064, tied=False),
    "qwen3-vl-2b": lambda: _qwen3(2048, 6144, 28, 16, tied=True, tower=_SMALL_TOWER),
    "qwen3-vl-4b": lambda: _qwen3(2560, 9728, 36, 32, tied=True, tower=_SMALL_TOWER),
    "qwen3-vl-8b": lambda: _qwen3(4096, 12_288, 36, 32, tied=False, tower=_LARGE_TOWER),
}


def shape_of(name: str) -> ModelShape:
    """Return a released shape by its name in SHAPES. Raises CheckpointError for an unknown name."""
    if name not in SHAPES:
        raise CheckpointError(f"unknown shape '{name}'; available: {', '.join(SHAPES)}")
    return SHAPES[name]()


# --- weights -------------------------------------------------------------------------------------


def write_random_checkpoint(
    shape: ModelShape,
    out: Path,
    *,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[Iterable[tuple[str, torch.Tensor]]], Iterable[tuple[str, torch.Tensor]]] = iter,
) -> int:
    """Write a checkpoint folder in bfloat16, one shard at a time, and return the bytes of its weights.

    The folder appears only when it is complete.

    Args:
        shape: from `shape_of`.
        out: a folder that does not exist yet.
        seed: of the random weights.
        shard_bytes: size at which a new file is begun.
        progress: shows progress over (name, tensor) pairs.

    Raises:
        CheckpointError: `out` exists or cannot be written, or the disk space does not suffice.
    """
    if out.exists():
        raise CheckpointError(f"'{out}' already exists; remove it or choose another folder")
    tensors = shape.tensors()
    size = sum(2 * tensor.numel() for tensor in tensors.values())
    out.parent.mkdir(parents=True, exist_ok=True)
    check_disk_space(out.parent, size, "the checkpoint")
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        _write_weights(part, progress(tensors.items()), size, shard_bytes, torch.Generator().manual_seed(seed))
        _write_text_files(part, shape)
        part.rename(out)
    except OSError as exc:
        raise CheckpointError(f"cannot write '{part}' ({exc.strerror or exc}); nothing was kept") from exc
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return size


def _write_weights(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], size: int, shard_bytes: int, generator: torch.Generator
) -> None:
    files = []
    for number, shard in enumerate(_shards(tensors, shard_bytes, generator), start=1):
        files.append(list(shard))
        save_file(shard, folder / f"model-{number:05d}.safetensors", metadata={"format": "pt"})
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        (folder / f"model-{number:05d}.safetensors").rename(folder / name)
        weight_map |= dict.fromkeys(names, name)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})


def _shards(
    tensors: Iterable[tuple[str, torch.Tensor]], max_bytes: int, generator: torch.Generator
) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + 2 * tensor.numel() > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = _random(name, tensor.shape, generator)
        size += 2 * tensor.numel()
    yield shard


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Return ones for norms; everything else is normally distributed, biases too, so that a lost one is noticed."""
    if len(shape) == 1 and name.endswith("weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, WEIGHT_STD, generator=generator)


def _write_text_files(folder: Path, shape: ModelShape) -> None:
    config = json.loads(shape.config.to_json_string(use_diff=False))
    write_json(folder / "config.json", config | {"architectures": [shape.architecture.__name__]})
    random_tokenizer(SPECIAL).save(str(folder / TOKENIZER))
    (folder / CHAT_TEMPLATE).write_text(CHATML, encoding="utf-8")
    write_json(folder / "preprocessor_config.json", shape.processor)
    write_json(folder / "generation_config.json", {"eos_token_id": [SPECIAL["<|im_end|>"], SPECIAL["<|endoftext|>"]]})


# --- the tokenizer -------------------------------------------------------------------------------

MERGES = 151_387  # of Qwen2.5 and Qwen3: with 256 bytes, they fill the ids below the special tokens
TRIPLES = 40_000  # merges that produce three letters, for words of odd length
LETTERS = " etaoinsrhldcumfpgwybvkxjqzETAOINSRHLDCUMFPGWYBVKXJQZ0123456789.,;:!?'\"()-\n/<>[]_="  # most frequent first


def random_tokenizer(special: Mapping[str, int]) -> Tokenizer:
    """Return a byte-level BPE tokenizer; the ids of the `special` tokens follow all others, in order."""
    merges = synthetic_merges()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, *(left + right for left, right in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(sorted(special, key=special.__getitem__))
    return tokenizer


def synthetic_merges() -> list[tuple[str, str]]:
    """Return merges of letters to pairs, of pairs to fours, and of a pair and a letter to triples.

    Frequent ones come first, and no result occurs twice.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = [byte_level.pre_tokenize_str(letter)[0][0] for letter in LETTERS]
    merges = {left + right: (left, right) for left, right in pairs_by_rank(letters, letters)}
    pairs = list(merges)
    for first, second, limit in ((pairs, pairs, MERGES - TRIPLES), (pairs, letters, MERGES)):
        new = ((left + right, (left, right)) for left, right in pairs_by_rank(first, second))
        merges |= islice(((token, parts) for token, parts in new if token not in merges), limit - len(merges))
    return list(merges.values())


def pairs_by_rank(first: Sequence[str], second: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield pairs of both, ordered by the product of their ranks; lazily, since there are millions."""

    def row(i: int) -> Iterator[tuple[int, int, int]]:
        return ((i * j, i, j) for j in range(1, len(second) + 1))

    for _, i, j in heapq.merge(*map(row, range(1, len(first) + 1))):
        yield first[i - 1], second[j - 1]
