"""The atlas policy's tokenizer: byte-level BPE of a few thousand entries with Qwen's special tokens."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from gog_edge.exporting.policy.chat_template import CHATML
from gog_edge.files import write_json
from gog_edge.policy.dialect.dialect import Dialect

VOCABULARY = 4096
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
# Up to three digits are one token, so that a pixel coordinate is one decision.
_SPLIT = r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s"


def dialect_marks(dialect: Dialect) -> list[str]:
    """The dialect's marks, each one token of this tokenizer."""
    tags = dialect.tags
    marks = [*tags.reason, *tags.answer, *tags.text_search, *tags.image_search, tags.whole_picture]
    return [*marks, dialect.observation.open.strip(), dialect.observation.close.strip()]


def train_tokenizer(texts: Iterable[str], dialect: Dialect, vocabulary: int = VOCABULARY) -> Tokenizer:
    """Learn merges from texts. Numbers 0..999 always become single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(dialect_marks(dialect)),
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    numbers = (" ".join(str(n) for n in range(1000)) for _ in range(400))
    tokenizer.train_from_iterator((text for source in (texts, numbers) for text in source), trainer)
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in dialect_marks(dialect)])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json and the chat template, as a Hugging Face checkpoint holds them."""
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": 2048,
            "clean_up_tokenization_spaces": False,
        },
    )
