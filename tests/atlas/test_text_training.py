"""Training of the atlas's sentence encoder: what it sees, what it never sees, and going on after a stop."""

import math
import warnings
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from atlas.countries import COUNTRIES_FILE, held_out, load_countries
from atlas.text.pairs import COUNTRIES, NameGenerator, make_batch, misspell, seen_countries
from atlas.text.wordings import NAMED, REVERSE
from atlas.text_encoder import Run, main
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


def test_a_stopped_run_comes_to_the_same_end(tmp_path, countries):
    from rich.progress import Progress

    for stop in (2, 1):
        run = Run(tmp_path / str(stop), countries, steps=2, seed=0)
        run._steps = stop
        with Progress(disable=True) as progress:
            run.train(progress)
    run = Run(tmp_path / "1", countries, steps=2, seed=0)
    assert run.step == 1
    with Progress(disable=True) as progress:
        run.train(progress)
    whole = Run(tmp_path / "2", countries, steps=2, seed=0)
    assert not math.isnan(run.loss) and run.step == whole.step == 2
    for one, other in zip(run.model.parameters(), whole.model.parameters(), strict=True):
        assert bool((one == other).all())


def test_the_command_writes_a_folder_that_can_be_exported(tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main([str(tmp_path / "out"), "--facts", str(FACTS), "--steps", "1"]) == 0
    found = TextCheckpoint.open(tmp_path / "out")
    assert (found.pooling, found.query_prefix, found.passage_prefix) == ("mean", "query: ", "passage: ")
    assert '"steps": 1' in capsys.readouterr().out


def test_facts_that_are_not_there_are_told(tmp_path, capsys):
    assert main([str(tmp_path / "out"), "--facts", str(Path("nowhere.json")), "--steps", "1"]) == 1
    assert "nowhere.json" in capsys.readouterr().err
