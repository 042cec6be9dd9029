"""The benchmark of dense paragraph vectors: its questions, its figures, and a whole run with a tiny encoder."""

import json

from tiny_text_encoder import write_tiny_text_encoder

from atlas.countries import COUNTRIES_FILE, held_out, load_countries
from benchmarks.bench_text_channel import DEPTHS, GROUPS, METHODS, Places, figures, main, make_questions, split
from gog_edge.bundle import DEFAULT_BUNDLE

COUNTRIES = load_countries(DEFAULT_BUNDLE / "packs" / "atlas" / COUNTRIES_FILE)


def test_questions_are_about_held_out_countries_and_stay_the_same():
    questions = make_questions(COUNTRIES)
    hidden = {country.name for country in COUNTRIES if country.iso in held_out(COUNTRIES)}
    assert {question.title for question in questions} == hidden
    assert {question.group for question in questions} == set(GROUPS)
    assert questions == make_questions(COUNTRIES) and questions != make_questions(COUNTRIES, seed=1)


def test_a_reverse_question_has_one_answer():
    capital = {country.name: country.capital for country in COUNTRIES}
    asked = [question for question in make_questions(COUNTRIES) if question.group == "reverse"]
    asked = [question for question in asked if question.fact == "capital"]
    assert len(asked) > 40
    for question in asked:
        assert capital[question.title] in question.text and list(capital.values()).count(capital[question.title]) == 1


def test_figures_of_places():
    places = [Places(1, 2, True, True), Places(3, 0, False, True), Places(0, 0, False, False), Places(1, 1, True, True)]
    assert figures(places) == {"article recall@1": 0.5, "article recall@10": 0.75, "paragraph recall@1": 0.25,
                               "paragraph recall@10": 0.5, "cited": 0.5, "found": 0.75}  # fmt: skip


def test_halves_share_no_country():
    first, second = split(make_questions(COUNTRIES))
    names = [{question.title for question in half} for half in (first, second)]
    assert not names[0] & names[1] and abs(len(names[0]) - len(names[1])) <= 1
    assert len(first) + len(second) == len(make_questions(COUNTRIES))


def test_a_run_builds_both_packs_and_writes_every_figure(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.bench_text_channel.SPEED_ROUNDS", 1)
    few = [question for question in make_questions(COUNTRIES) if question.title in ("Argentina", "Belgium")]
    monkeypatch.setattr("benchmarks.bench_text_channel.make_questions", lambda _: few)
    encoder = write_tiny_text_encoder(tmp_path / "encoder")
    assert main(["--encoder", str(encoder), "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "text_channel.json").read_text())
    assert set(found["results"]) == set(METHODS) and set(found["cited_by_depth"]) == set(map(str, DEPTHS))
    assert set(found["results"][METHODS[0]]) == {*GROUPS, "all"}
    assert found["results"][METHODS[0]]["plain"]["article recall@10"] == 1.0
    assert found["pack_bytes"][METHODS[1]] > found["pack_bytes"][METHODS[0]] + found["paragraphs"] * 2 * found["dim"]
    assert len(found["calibration"][METHODS[1]]["features"]) == 6
    assert found["speed"]["passages_per_s"] > 0 and found["machine"]["processor"]
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found


def test_a_missing_encoder_is_reported(tmp_path, capsys):
    assert main(["--encoder", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "manifest.json" in error and error.count("\n") == 1
