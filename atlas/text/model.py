"""A small BERT with mean pooling and its WordPiece tokenizer, saved in the layout of sentence-transformers."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional

from atlas.text.pairs import PASSAGE_PREFIX, QUERY_PREFIX
from gog_edge.exporting.torchvision_shim import import_torchvision
from gog_edge.files import write_json

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # ids 0 to 4
VOCABULARY = 2_000  # small, so that names split into pieces that many names share
LAYERS, HIDDEN, HEADS, INTERMEDIATE = 4, 192, 6, 512
MAX_TOKENS = 96
_TYPES = "sentence_transformers.models."


def train_tokenizer(texts: Iterable[str], vocabulary: int = VOCABULARY) -> Tokenizer:
    """Train a lower-case WordPiece tokenizer with BERT's special tokens; the same texts give the same tokenizer.

    The library numbers the initial pieces in the order of a hash table, which differs between runs and decides ties
    between merges. Here they get fixed numbers as special tokens first.
    """
    trained = Tokenizer(models.WordPiece(unk_token=SPECIAL[1]))
    trained.normalizer = normalizers.BertNormalizer(lowercase=True)
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    lines = [trained.normalizer.normalize_str(text) for text in texts]
    letters = sorted({letter for line in lines for letter in line if not letter.isspace()})
    numbered = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters)]
    trainer = trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=numbered, show_progress=False)
    trained.train_from_iterator(lines, trainer)
    tokenizer = Tokenizer(models.WordPiece(vocab=trained.get_vocab(), unk_token=SPECIAL[1]))
    tokenizer.normalizer, tokenizer.pre_tokenizer = trained.normalizer, trained.pre_tokenizer
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return with_batches(tokenizer)


def with_batches(tokenizer: Tokenizer) -> Tokenizer:
    """Enable truncation at MAX_TOKENS and padding to the longest text of a batch."""
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding(pad_id=0, pad_token=SPECIAL[0])
    return tokenizer


def new_model(vocabulary: int) -> nn.Module:
    """Return the network with random weights."""
    import_torchvision()  # before transformers does
    bert: Any = importlib.import_module("transformers.models.bert")
    config = bert.BertConfig(
        vocab_size=vocabulary, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=INTERMEDIATE, max_position_embeddings=MAX_TOKENS, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model: nn.Module = bert.BertModel(config, add_pooling_layer=False)
    return model


def embed(model: nn.Module, tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """Return unit vectors [n, dim] of n texts by mean pooling, with gradients."""
    encodings = tokenizer.encode_batch(list(texts))
    ids = torch.tensor([encoding.ids for encoding in encodings])
    mask = torch.tensor([encoding.attention_mask for encoding in encodings])
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    weights = mask[:, :, None].to(states.dtype)
    return functional.normalize((states * weights).sum(dim=1) / weights.sum(dim=1), dim=-1)


def save(model: Any, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the folder in the layout of sentence-transformers: network, tokenizer, pooling, prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.save(str(folder / "tokenizer.json"))
    with_batches(tokenizer)
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": MAX_TOKENS,
        **dict(zip(names, SPECIAL, strict=True)),
    })  # fmt: skip
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": MAX_TOKENS, "do_lower_case": False})
    write_json(folder / "config_sentence_transformers.json", {
        "prompts": {"query": QUERY_PREFIX, "document": PASSAGE_PREFIX}, "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    })  # fmt: skip
    parts = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    modules = [{"idx": n, "name": str(n), "path": path, "type": _TYPES + kind} for n, (path, kind) in enumerate(parts)]
    (folder / "modules.json").write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")
    for path, _ in parts[1:]:
        (folder / path).mkdir(exist_ok=True)
    write_json(folder / "1_Pooling" / "config.json", {
        "word_embedding_dimension": HIDDEN, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True,
        "pooling_mode_max_tokens": False, "pooling_mode_mean_sqrt_len_tokens": False,
    })  # fmt: skip
