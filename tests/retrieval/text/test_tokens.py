import sqlite3

import pytest

from gog_edge.retrieval.text.tokens import MAX_TERMS, fts5_any, name_key, search_terms, tokenize, word_spans

HOSTILE = [
    '"', '""', "a AND", "NEAR(a b, 3)", "a*", "^a", "-a", "title:a", "{a b}:c", "a\x00b", "'; DROP TABLE words; --",
    "🇪🇸🏴‍☠️", "a" * 10_000, "x y " * 2_500, "(" * 10_000, "\ud800", "é́́́", "日本 の 旗", "AND OR NOT", "\\", "%", "",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_any_text_becomes_a_valid_fts5_expression(text):
    terms = search_terms(tokenize(text))
    assert len(terms) <= MAX_TERMS
    if terms:
        db = sqlite3.connect(":memory:")
        db.execute("CREATE VIRTUAL TABLE t USING fts5(a)")
        db.execute("SELECT * FROM t WHERE t MATCH ?", [fts5_any(terms)]).fetchall()
        db.close()


def test_name_keys_ignore_diacritics_case_and_punctuation():
    assert name_key("Côte d'Ivoire") == name_key("COTE D IVOIRE") == "cote d ivoire"
    assert name_key("?!") == ""


def test_stop_words_are_dropped_unless_there_are_no_others():
    assert search_terms(tokenize("What is the capital of Spain?")) == ("capital", "spain")
    assert search_terms(tokenize("The Who")) == ("the", "who")


def test_spans_list_every_position():
    assert word_spans(["A", "b", "a"])["a"] == [(0, 1), (2, 3)]
    assert word_spans(["A", "b", "a"])["a b a"] == [(0, 3)]
