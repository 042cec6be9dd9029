"""Conversion of open_clip's tokenizers to the `tokenizers` format, which the runtime reads without open_clip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from gog_edge.errors import CheckpointError
from gog_edge.files import open_tokenizer

SAMPLES = (
    "", " ", "the flag of France", "What's THE Currency of São Tomé?", "it's we're I'll you'd they've i'm don't",
    "1234567890 12,5 % of 3.14", "tabs\tand\n\nnew   lines ", "日本の国旗 и флаг 🇫🇷👩‍👩‍👧", "e\u0301 and é",
    "‘curly’ “quotes”", "a &amp; b &lt;c&gt;", "<start_of_text>", "!?!?... ---", "x" * 300, "word " * 120,
    "zero\u200bwidth \u202eright to left", "nul\x00 bell\x07", "ﬁne ﬂag", "İstanbul ŁÓDŹ ẞ", "Ⅷ ² ½ ٣",
)  # fmt: skip

# The effect of open_clip's cleaning (ftfy, then html.unescape) on ordinary text. Its repairs of mojibake, full-width
# letters and rarer entities are not reproduced: they change a few tokens of damaged texts only.
_REPLACEMENTS = (
    *(("[\u2018\u2019\u201a\u201b\u02bc]", "'"), ("[\u201c\u201d\u201e\u201f]", '"')),
    ("[\\x00-\\x08\\x0b\\x0e-\\x1f\\x7f\u206a-\u206f\ufeff\ufff9-\ufffb]", ""),
    *(("ﬀ", "ff"), ("ﬁ", "fi"), ("ﬂ", "fl"), ("ﬃ", "ffi"), ("ﬄ", "ffl"), ("ﬅ", "ſt"), ("ﬆ", "st")),
    *(("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&#39;", "'"), ("&nbsp;", " ")),
)
_PUNCTUATION = r"[!-/:-@\[-`{-~]"
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def _cleaning(clean: str) -> list[normalizers.Normalizer]:
    """Return the normalizers for one of open_clip's `clean` modes: whitespace, lower or canonicalize.

    Raises:
        CheckpointError: any other mode.
    """
    steps: list[normalizers.Normalizer] = [normalizers.Replace(Regex(old), new) for old, new in _REPLACEMENTS]
    steps.append(normalizers.NFC())
    if clean == "canonicalize":
        steps += [normalizers.Replace("_", " "), normalizers.Replace(Regex(_PUNCTUATION), "")]
    elif clean not in ("lower", "whitespace"):
        raise CheckpointError(f"tokenizer: 'clean' must be one of whitespace, lower, canonicalize, got '{clean}'")
    if clean != "whitespace":
        steps.append(normalizers.Lowercase())
    return [*steps, normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]


def convert_simple_tokenizer(original: Any, *, clean: str = "lower") -> Tokenizer:
    """Convert open_clip's `SimpleTokenizer` (byte-level BPE with an end-of-word suffix) to a `tokenizers` object.

    The names of the two special tokens are always parsed as such; the original does so only if no punctuation precedes
    them.
    """
    merges = sorted(original.bpe_ranks, key=original.bpe_ranks.__getitem__)
    tokenizer = Tokenizer(models.BPE(dict(original.encoder), merges, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(_cleaning(clean))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(f"(?i:{_WORDS})"), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    start, end = (original.decoder[index] for index in original.all_special_ids[:2])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=True) for token in (start, end)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(token, original.encoder[token]) for token in (start, end)]
    )
    return tokenizer


def convert_hf_tokenizer(file: Path, *, clean: str = "whitespace") -> Tokenizer:
    """Read a tokenizer.json and put open_clip's cleaning before its own normalization."""
    tokenizer = open_tokenizer(file, what="open_clip model", error=CheckpointError)
    own = [tokenizer.normalizer] if tokenizer.normalizer is not None else []
    tokenizer.normalizer = normalizers.Sequence(_cleaning(clean) + own)
    return tokenizer


def check_tokenizer(
    tokenizer: Tokenizer, original: Callable[[list[str], int], Any], length: int, samples: Sequence[str] = SAMPLES
) -> None:
    """Compare the ids of every sample, truncated and padded to `length`, with the original tokenizer's.

    Raises:
        CheckpointError: the ids of a text differ.
    """
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=0)
    expected = original(list(samples), length).tolist()
    for text, encoding, ids in zip(samples, tokenizer.encode_batch(list(samples)), expected, strict=True):
        if encoding.ids != ids:
            raise CheckpointError(
                f"tokenizer: {text[:60]!r} gives {encoding.ids[:12]}, open_clip gives {ids[:12]}; this tokenizer "
                "cannot be exported"
            )
