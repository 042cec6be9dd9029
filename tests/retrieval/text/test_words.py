import sqlite3

import pytest

from gog_edge.retrieval.text.words import MAX_TERMS, match_any, name_key, raw_words, search_terms, spans

HOSTILE = [
    '"', '""', "a AND", "NEAR(a b, 3)", "a*", "^a", "-a", "title:a", "{a b}:c", "a\x00b", "'; DROP TABLE words; --",
    "🇪🇸🏴‍☠️", "a" * 10_000, "x y " * 2_500, "(" * 10_000, "\ud800", "é́́́", "日本 の 旗", "AND OR NOT", "\\", "%", "",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_any_text_becomes_an_expression_that_fts5_accepts(text):
    terms = search_terms(raw_words(text))
    assert len(terms) <= MAX_TERMS
    if terms:
        db = sqlite3.connect(":memory:")
        db.execute("CREATE VIRTUAL TABLE t USING fts5(a)")
        db.execute("SELECT * FROM t WHERE t MATCH ?", [match_any(terms)]).fetchall()
        db.close()


def test_marks_case_and_punctuation_do_not_matter_for_names():
    assert name_key("Côte d'Ivoire") == name_key("COTE D IVOIRE") == "cote d ivoire"
    assert name_key("?!") == ""


def test_words_without_meaning_are_dropped_unless_there_are_no_others():
    assert search_terms(raw_words("What is the capital of Spain?")) == ("capital", "spain")
    assert search_terms(raw_words("The Who")) == ("the", "who")


def test_spans_know_every_place():
    assert spans(["A", "b", "a"])["a"] == [(0, 1), (2, 3)]
    assert spans(["A", "b", "a"])["a b a"] == [(0, 3)]
