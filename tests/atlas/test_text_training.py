"""Training of the atlas's sentence encoder: its pairs, the held-out countries, and resuming an interrupted run."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from atlas.countries import COUNTRIES_FILE, held_out, load_countries
from atlas.text.pairs import COUNTRIES, NameGenerator, make_batch, misspell, seen_countries
from atlas.text.wordings import NAMED, REVERSE
from atlas.train_text_encoder import TextEncoderTraining, main
from atlas.training import cosine_decay
from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.exporting.text.checkpoint import TextCheckpoint

FACTS = DEFAULT_BUNDLE / "packs" / "atlas" / COUNTRIES_FILE


@pytest.fixture(scope="module")
def countries():
    return load_countries(FACTS)


def batches(countries, count):
    real = seen_countries(countries)
    names = {country.iso: country.name for country in real}
    generator = NameGenerator([country.name for country in real])
    return [make_batch(np.random.default_rng([3, n]), real, names, generator) for n in range(count)]


def test_held_out_countries_are_never_seen(countries):
    hidden = {country.name for country in countries if country.iso in held_out(countries)}
    seen = {pair.passage.split("\n")[0] for batch in batches(countries, 40) for pair in batch}
    assert not seen & hidden
    assert len(seen & {country.name for country in countries}) > 150
    text = " ".join(pair.passage for batch in batches(countries, 40) for pair in batch if pair.fact == "neighbours")
    assert "Kenya" in hidden and "Kenya" not in text


def test_a_batch_has_every_fact_of_its_countries_and_comes_again(countries):
    (batch,) = batches(countries, 1)
    assert 5 * COUNTRIES < len(batch) <= 9 * COUNTRIES
    assert len({pair.passage for pair in batch}) == len(batch)
    assert batch == batches(countries, 1)[0]


def test_new_wordings_are_in_no_batch_and_every_seen_one_is(countries):
    for wordings in (NAMED, REVERSE):
        for fact, one in wordings.items():
            assert len(set(one.seen)) == len(one.seen) and not set(one.seen) & set(one.new), fact
            assert all(("{s}" if wordings is NAMED else "{v}") in text for text in (*one.seen, *one.new)), fact


def test_a_misspelt_name_differs_by_one_slip():
    rng = np.random.default_rng(0)
    assert misspell(rng, "Chad") == "Chad"
    for _ in range(50):
        wrong = misspell(rng, "Papua New Guinea")
        assert wrong[:10] == "Papua New " and abs(len(wrong) - len("Papua New Guinea")) <= 1


def test_a_resumed_run_ends_with_the_same_weights(tmp_path, countries):
    whole, interrupted = (TextEncoderTraining(tmp_path / name, countries, steps=2, seed=0) for name in "ab")
    whole.train()
    interrupted.train(stop=1)
    resumed = TextEncoderTraining(tmp_path / "b", countries, steps=2, seed=0)
    assert resumed.step == 1
    resumed.train()
    assert resumed.step == whole.step == 2 and set(resumed.progress.averages) == {"loss"}
    for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert bool((one == other).all())


def test_the_cosine_falls_from_one_to_the_floor():
    assert [cosine_decay(progress, 0.2) for progress in (0.0, 0.5, 1.0, 2.0)] == pytest.approx([1.0, 0.6, 0.2, 0.2])


def test_the_command_writes_a_folder_that_can_be_exported(tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main([str(tmp_path / "out"), "--facts", str(FACTS), "--steps", "1"]) == 0
    found = TextCheckpoint.open(tmp_path / "out")
    assert (found.pooling, found.query_prefix, found.passage_prefix) == ("mean", "query: ", "passage: ")
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["steps"] == 1 and line["loss"] > 0 and line["parameters"] > 1_000_000


def test_a_missing_file_of_facts_is_reported(tmp_path, capsys):
    assert main([str(tmp_path / "out"), "--facts", str(Path("nowhere.json")), "--steps", "1"]) == 1
    assert "nowhere.json" in capsys.readouterr().err
