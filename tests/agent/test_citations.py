"""An answer cites the passages that contain it, and no others."""

import pytest

from gog_edge.agent.citations import Sources, find_sources, normalize_answer
from gog_edge.types import Citation, Evidence, Passage, SearchResult

LIKELY, UNLIKELY = 0.9, 0.1


def passage(text, number=0):
    return Passage("test", "Latvia", "Facts", number, text, "CC0")


def result(*texts, found=LIKELY):
    return SearchResult((Evidence(("Latvia",), tuple(map(passage, texts)), None, 1.0),), found)


def cited(sources):
    return [citation.passage.text for citation in sources.citations]


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("Riga", "The capital of Latvia is Riga."),
        ("riga.", "Its capital is RIGA, on the Baltic Sea."),
        ("The Latvian euro", "It uses the Latvian Euro."),
        ("Sao Tome", "The capital is São Tomé."),
        ("1902000", "It has 1,902,000 inhabitants."),
        ("3.5", "The rate is 3.5."),
    ],
)
def test_a_passage_that_contains_the_answer_is_cited(answer, text):
    sources = find_sources(answer, [result("Latvia is a country.", text)])
    assert cited(sources) == [text] and sources.related == () and sources.found == LIKELY


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("Doha", "The capital of Latvia is Riga."),
        ("Rig", "The capital of Latvia is Riga."),  # only part of a word
        ("5", "The rate is 3.5."),
        ("euro lat", "The lat was replaced by the euro."),
    ],
)
def test_a_passage_without_the_answer_is_related_at_most(answer, text):
    sources = find_sources(answer, [result(text, "Latvia is a country.")])
    assert sources == Sources((), (Citation(passage(text), None),), LIKELY)


def test_all_passages_of_the_latest_result_that_contain_the_answer_are_cited():
    older, newer, last = result("Riga is old."), result("Riga is a city.", "It rains in Riga."), result("No city.")
    sources = find_sources("Riga", [older, newer, last])
    assert cited(sources) == ["Riga is a city.", "It rains in Riga."]


def test_the_probability_is_that_of_the_result_cited_from():
    assert find_sources("Riga", [result("Riga is old.", found=0.7), result("No city.", found=0.8)]).found == 0.7
    assert find_sources("Doha", [result("Riga is old.", found=0.7), result("No city.", found=0.8)]).found == 0.8


def test_an_unlikely_result_has_no_related_passage_but_may_be_cited():
    unlikely = result("The capital of Latvia is Riga.", found=UNLIKELY)
    assert find_sources("not in my snapshot", [unlikely]) == Sources((), (), UNLIKELY)
    assert cited(find_sources("Riga", [unlikely])) == ["The capital of Latvia is Riga."]


@pytest.mark.parametrize("answer", ["", " ", "...", "the"])
def test_an_empty_answer_has_no_sources(answer):
    assert find_sources(answer, [result("The capital of Latvia is Riga.")]) == Sources((), (), LIKELY)


def test_without_a_search_there_is_nothing_to_cite():
    assert find_sources("three", []) == Sources((), (), None)
    assert find_sources("three", [SearchResult((), LIKELY)]) == Sources((), (), LIKELY)


@pytest.mark.parametrize(
    ("text", "normalized"),
    [("The  Élysée!", "elysee"), ("1,234.50 km", "1234.50 km"), ("U.S.A.", "u s"), ("a_b", "b"), ("ﬁne", "fine")],
)
def test_normalisation(text, normalized):
    assert normalize_answer(text) == normalized


@pytest.mark.parametrize(("answer", "passage"), [
    ("柏林", "德國的首都是柏林。"), ("베를린", "베를린은 독일의 수도이다."), ("Ελλάδα", "Η ΕΛΛΆΔΑ, χώρα."),
    ("बर्लिन", "राजधानी बर्लिन है।"), ("กรุงเทพ", "เมืองหลวงคือกรุงเทพฯ"), ("1234.5", "المساحة ١٬٢٣٤٫٥ كم"),
    ("ألمانيا", "برلين في المانيا."), ("東京", "ﾄｳｷｮｳ（東京）は"), ("пʼять", "Їх п'ять."),
    ("Côte d’Ivoire", "Co\u0302te d'Ivoire is a country."), ("東京 2020", "これは東京2020です"),
])  # fmt: skip
def test_an_answer_is_found_in_every_script(answer, passage):
    assert cited(find_sources(answer, [result(passage)])) == [passage]


@pytest.mark.parametrize(("answer", "passage"), [
    ("लन", "राजधानी बर्लिन है।"), ("がら", "からの"), ("3", "It has 3.5 million people."), ("йод", "иод"),
    ("柏林", "柏、林"), ("20", "東京2020"),
])  # fmt: skip
def test_an_answer_is_not_found_in_other_words(answer, passage):
    assert cited(find_sources(answer, [result(passage)])) == []
