"""A byte-level BPE tokenizer of Qwen's true size with made-up merges.

It has as many tokens and merges to load as the real one; a text becomes tokens of two or three letters. No corpus is
needed, and it is the same everywhere.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

MERGES = 151_387  # of Qwen2.5 and Qwen3: with 256 bytes they fill the ids below the special tokens
TRIPLES = 40_000  # of them: what ends an odd stretch of letters
# What English and the dialects' marks are written in, most frequent first.
COMMON = " etaoinsrhldcumfpgwybvkxjqzETAOINSRHLDCUMFPGWYBVKXJQZ0123456789.,;:!?'\"()-\n/<>[]_="


def random_tokenizer(special: Mapping[str, int]) -> Tokenizer:
    """`special` tokens have the ids behind all others, in order."""
    merges = made_up_merges()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, *(left + right for left, right in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(sorted(special, key=special.__getitem__))
    return tokenizer


def made_up_merges() -> list[tuple[str, str]]:
    """Letters to pairs, pairs to fours, and pairs and a letter to threes; frequent ones first, no result twice."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = [byte_level.pre_tokenize_str(letter)[0][0] for letter in COMMON]
    merges = {left + right: (left, right) for left, right in products(letters, letters)}
    pairs = list(merges)
    for first, second, most in ((pairs, pairs, MERGES - TRIPLES), (pairs, letters, MERGES)):
        new = ((left + right, (left, right)) for left, right in products(first, second))
        merges |= islice(((token, parts) for token, parts in new if token not in merges), most - len(merges))
    return list(merges.values())


def products(first: Sequence[str], second: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Pairs of both, by the product of their ranks; as they are asked for, since there are millions."""

    def row(i: int) -> Iterator[tuple[int, int, int]]:
        return ((i * j, i, j) for j in range(1, len(second) + 1))

    for _, i, j in heapq.merge(*map(row, range(1, len(first) + 1))):
        yield first[i - 1], second[j - 1]
