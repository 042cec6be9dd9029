"""Splitting of texts into paragraphs that can be cited."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gog_edge.indexing.sources.text import MAX_CHARACTERS, clean_line, clean_lines, split_paragraphs, split_text


def test_a_short_text_is_not_split():
    assert list(split_text("One. Two. Three.")) == ["One. Two. Three."]
    assert list(split_text("")) == list(split_text(" \n ")) == []


def test_long_texts_are_split_after_sentences():
    text = " ".join(f"The sentence of number {k} ends here." for k in range(200))
    pieces = list(split_text(text))
    assert " ".join(pieces) == text
    assert all(piece.endswith("here.") and piece.startswith("The") for piece in pieces)
    assert all(MAX_CHARACTERS * 0.9 < len(piece) <= MAX_CHARACTERS for piece in pieces[:-1])


@pytest.mark.parametrize("short", ["J. Smith", "Dr. Smith", "U.S. Army", "c. 1900", "approx. five"])
def test_abbreviations_do_not_end_a_sentence(short):
    text = f"The painter left the town early. Later {short} came and stayed for long"
    assert list(split_text(text, len(text) - 3)) == ["The painter left the town early.",
                                                     f"Later {short} came and stayed for long"]


def test_texts_are_split_between_lines_first():
    text = "One item here. And\nanother item. And\nmore"
    assert list(split_text(text, 40)) == ["One item here. And\nanother item. And", "more"]


def test_scripts_without_spaces_are_split_at_their_own_punctuation():
    pieces = list(split_text("東京は日本の首都である。" * 300))
    assert "".join(pieces) == "東京は日本の首都である。" * 300
    assert all(piece.endswith("。") and len(piece) <= MAX_CHARACTERS for piece in pieces)
    assert all(len(piece) <= MAX_CHARACTERS for piece in split_text("漢" * 5000))


def test_words_are_never_split():
    long = "A" * 3000
    assert list(split_text(f"before {long} after")) == ["before", long, "after"]


def test_unstorable_characters_are_removed():
    assert clean_line(" a\t\n b\u00a0c\u00add\0 \ud800e ") == "a b cd e"
    assert clean_lines("a  b\r\n\r\n c ") == "a b\nc"
    assert list(split_paragraphs("S", "one\n\n two \n")) == [("S", "one"), ("S", "two")]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.sampled_from("abcD .。\n,漢!?)\"'é\u200c0"), max_size=400), st.integers(5, 60))
def test_no_text_is_lost_and_no_word_is_split(text, limit):
    pieces = list(split_text(text, limit))
    assert "".join("".join(pieces).split()) == "".join(text.split())
    for piece in pieces:
        assert piece == piece.strip() and (len(piece) <= limit or len(piece.split()) == 1)
    latin = [word for word in text.split() if word.isalpha() and word.isascii()]
    kept = [word for piece in pieces for word in piece.split()]
    assert all(word in kept for word in latin)
