"""The benchmark of the word search: its corpus, and a whole run of this checkout against itself."""

import json
from pathlib import Path

import pytest

from benchmarks.bench_words import CORPORA, main
from benchmarks.retrieval.text_corpus import LANGUAGES, PARAGRAPHS, SECTIONS, Language, articles

ROOT = Path(__file__).parents[2]


def test_the_corpus_is_reproducible_and_follows_the_law_of_zipf():
    first, again = (list(articles(LANGUAGES, 400, 1_000)) for _ in range(2))
    assert first == again and len(first) == 400 // PARAGRAPHS and len({one.title for one in first}) == len(first)
    assert {one.language for one in first} == set(LANGUAGES)
    assert all(len(one.paragraphs) == len(SECTIONS) for one in first)
    english = Language.make("English", 1_000)
    assert english.words[0] == "the" and 0.06 < english.shares[0] < 0.08 and english.shares[-1] == pytest.approx(1)


def test_a_checkout_equals_itself(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ["--other", str(ROOT), "--paragraphs", "400", "--vocabulary", "2000", "--queries", "24", "--rounds", "1",
             "--work", str(tmp_path / "work"), "--out", str(tmp_path)]  # fmt: skip
    assert main(words) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((tmp_path / "words.json").read_text()) == line
    assert [one["corpus"] for one in line["corpora"]] == list(CORPORA)
    for one in line["corpora"]:
        assert one["same"] == one["cost_ratio"]["index_bytes"] == one["cost_ratio"]["file_bytes"] == 1
        assert one["queries"] == 24 and one["this"]["found"] == one["other"]["found"] > 0.5
        assert one["p50_ratio"] > 0 and one["indexed_paragraphs_per_s"]["this"] > 0


def test_an_unknown_corpus_is_refused(tmp_path, capsys):
    assert main(["--other", str(ROOT), "--corpora", "Latin", "--work", str(tmp_path)]) == 2
    assert "--corpora must be of English, mixed, got 'Latin'" in capsys.readouterr().err
