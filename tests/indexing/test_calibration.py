from contextlib import closing
from functools import cache
from itertools import combinations_with_replacement

import numpy as np
import pytest
from little_world import FLAGS, SNAPSHOT, bars, flag, png, write_little_pack

from atlas.flags import invented_flag
from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.errors import PackError
from gog_edge.indexing.calibration import (
    CAPTION_WEIGHTS,
    MIN_GAIN,
    MIN_QUERIES,
    HeldOutImageQueries,
    NameGenerator,
    calibrate_images,
    calibrate_pack,
    calibrate_texts,
    caption_weight,
    fit_calibration,
    held_out_image_queries,
    held_out_text_queries,
    top_article,
    write_calibration,
)
from gog_edge.indexing.commit import write_lock
from gog_edge.indexing.compact import compact
from gog_edge.indexing.generation import PackWriter
from gog_edge.indexing.sources.base import ArticleRecord, ImageRecord
from gog_edge.indexing.tombstones import remove
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.manifest import FOUND_THRESHOLD, IMAGE_FEATURES, Calibration, read_manifest
from gog_edge.retrieval.pack import Pack, verify_pack
from gog_edge.retrieval.retriever import Retriever, predict_probability
from gog_edge.types import ImageQuery, TextQuery

FEATURES = ("a", "b")


def cloud(rows, centre, seed):
    return np.random.default_rng(seed).normal(size=(rows, 2)) + centre


def fitted(present=400, absent=400, gap=2.0, **settings):
    x = np.concatenate([cloud(present, (gap, 0), 1), cloud(absent, (0, 0), 2)])
    return fit_calibration(x, [1] * present + [0] * absent, names=FEATURES, **settings)


def noisy(pixels, seed):
    rng = np.random.default_rng(seed)
    return np.clip(pixels + rng.normal(0, 12, pixels.shape), 0, 255).astype(np.uint8)


# --- the model ----------------------------------------------------------------------------------


def test_the_fit_recovers_known_weights():
    x = np.random.default_rng(0).normal(size=(8_000, 2))
    probability = 1 / (1 + np.exp(-(2 * x[:, 0] - x[:, 1])))
    y = np.random.default_rng(1).random(8_000) < probability
    assert fit_calibration(x, y, names=FEATURES).weights == pytest.approx((2, -1), abs=0.25)


def test_the_probability_is_monotonic_and_between_0_and_1():
    fit = fitted()
    probabilities = [predict_probability(fit, (value, 0)) for value in np.linspace(-1e6, 1e6, 101)]
    assert probabilities == sorted(probabilities) and 0 <= probabilities[0] < 0.01 < 0.99 < probabilities[-1] <= 1


@pytest.mark.parametrize("target", [0.02, 0.05, 0.3])
def test_the_target_holds_for_unseen_absent_queries(target):
    fits = [
        fit_calibration(np.concatenate([cloud(400, (2, 0), seed), cloud(400, (0, 0), 1_000 + seed)]),
                        [1] * 400 + [0] * 400, names=FEATURES, target_false_accept=target)
        for seed in range(20)
    ]
    fresh = cloud(20_000, (0, 0), 77)
    rates = [np.mean([fit.bias + fresh @ np.array(fit.weights) >= 0]) for fit in fits]
    assert np.mean(rates) == pytest.approx(target, abs=0.012)
    assert np.mean([fit.false_accept for fit in fits]) == pytest.approx(target, abs=0.02)
    assert predict_probability(fits[0], cloud(1, (9, 0), 1)[0]) > FOUND_THRESHOLD
    assert (fits[0].present, fits[0].absent) == (400, 400)


def test_a_higher_target_accepts_more_present_queries():
    strictest, usual, lax = (fitted(target_false_accept=target).true_accept for target in (0, 0.05, 0.3))
    assert strictest < usual < lax


def test_the_rates_are_measured_on_the_second_half():
    """The halves differ, so that the rates show which one was measured."""
    x = np.concatenate([cloud(200, (4, 0), 1), cloud(100, (0, 0), 2), cloud(100, (4, 0), 3)])
    fit = fit_calibration(x, [1] * 200 + [0] * 200, names=FEATURES)
    assert fit.false_accept > 0.9 and fit.true_accept > 0.9


def test_an_optional_feature_is_used_only_if_it_helps():
    rng = np.random.default_rng(4)
    x = np.concatenate([cloud(400, (3, 0), 1), cloud(400, (0, 0), 2)])
    y = [1] * 400 + [0] * 400
    informative = np.column_stack([x[:, 0], np.repeat([1.0, 0.0], 400) + rng.normal(0, 0.5, 800)])
    assert fit_calibration(x, y, names=FEATURES, optional=("b",)).weights[1] == 0
    improved = fit_calibration(informative, y, names=FEATURES, optional=("b",))
    assert improved.weights[1] > 0
    assert improved.true_accept > fit_calibration(informative * [1, 0], y, names=FEATURES).true_accept


def test_the_weights_do_not_depend_on_the_class_sizes():
    many, few = fitted(400, 80), fitted(80, 400)
    assert many.weights == pytest.approx(few.weights, abs=0.6)


def test_equal_features_do_not_pass_by_rounding():
    x = [[0.1 + 0.2, 1.0]] * 40 + [[0.3, 0.7]] * 40
    fit = fit_calibration(x[::-1], [1] * 40 + [0] * 40, names=FEATURES)
    assert fit.false_accept == 0 and fit_calibration([[0.3, 0.7]] * 80, [1, 0] * 40, names=FEATURES).false_accept == 0


def test_separable_and_constant_features_give_finite_weights():
    x = [[float(n >= 40), 3.0] for n in range(80)]
    fit = fit_calibration(x, [n >= 40 for n in range(80)], names=FEATURES)
    assert np.isfinite(fit.weights).all() and predict_probability(fit, (1, 3)) > 0.9
    assert predict_probability(fit, (0, 3)) < 0.1


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (np.zeros((80, 3)), [0, 1] * 40),
        (np.zeros((38, 2)), [0, 1] * 19),
        (np.full((80, 2), np.nan), [0, 1] * 40),
        (np.zeros((80, 2)), [1] * 80),
        (np.zeros((0, 2)), []),
    ],
)
def test_invalid_training_data_is_refused(x, y):
    with pytest.raises(PackError, match="calibration"):
        fit_calibration(x, y, names=FEATURES)


def test_json_round_trip_and_other_features():
    fit = fitted()
    assert Calibration.from_json(fit.to_json(), FEATURES) == fit
    with pytest.raises(PackError, match="calibrate the pack again"):
        Calibration.from_json(fit.to_json(), IMAGE_FEATURES)
    with pytest.raises(PackError, match="requires the key 'weights'"):
        Calibration.from_json({"features": ["a"]}, FEATURES)


# --- queries from a pack -----------------------------------------------------------------------


TITLES = [f"{first}{last}" for last in ("land", "mark", "stan", "gora", "via", "nia", "dor", "esh", "pur", "tia")
         for first in ("Bal", "Cor", "Dre", "Fen", "Gol", "Har", "Jor", "Kel", "Lum", "Mor", "Nev", "Oth")]


def write_pack(folder, encoder, pictures, captions=(), per_article=1):
    """Write a pack whose articles have `per_article` successive pictures each."""
    with PackWriter(folder, name=folder.name, snapshot=SNAPSHOT, encoder=encoder) as writer:
        for n in range(len(pictures) // per_article):
            writer.add_article(ArticleRecord(TITLES[n], (("Place", f"{TITLES[n]} lies by the sea."),), "CC0"))
        for n, picture in enumerate(pictures):
            title = TITLES[n // per_article]
            caption = captions[n] if captions else f"Flag of {title}"
            writer.add_image(ImageRecord(png(picture), caption, "CC0", "us", (title,)))
        writer.commit()
    return folder


def test_absent_queries_exclude_all_images_of_their_articles(tmp_path, tiny_encoder):
    rng = np.random.default_rng(1)
    pictures = [bars(*rng.integers(0, 256, (4, 3)).tolist()) for _ in range(30)]
    pictures[2] = noisy(pictures[0], 1) // 2 * 2  # a near-duplicate of an image of the first article, in the second
    pack = Pack.open(write_pack(tmp_path / "pack", tiny_encoder, pictures, per_article=2), tiny_encoder)
    queries = held_out_image_queries(pack, tiny_encoder, 12, seed=3)
    # Each view is searched with and without its image.
    assert len(queries.absent) == 12 and len(queries.present) == len(queries.articles) == 24
    firsts = [matches.groups[0].keys[0] for matches in queries.present[::2]]
    assert np.mean([first in correct for first, correct in zip(firsts, queries.articles[::2], strict=True)]) > 0.7
    for matches, correct in zip(queries.absent, queries.articles[::2], strict=True):
        assert all(correct.isdisjoint(group.keys) for group in matches.groups) and matches.groups
    again = held_out_image_queries(pack, tiny_encoder, 12, seed=3)
    assert [matches.features for matches in again.absent] == [matches.features for matches in queries.absent]
    pack.close()


def test_generated_names_resemble_titles_and_do_not_exist(little_pack):
    rng = np.random.default_rng(0)
    generator = NameGenerator(list(FLAGS))
    names = [generator.generate(little_pack.store, rng) for _ in range(50)]
    letters = set("".join(FLAGS))
    assert all(set(name) <= letters | {" "} for name in names) and len(set(names)) > 10
    assert not set(names) & set(FLAGS) and NameGenerator([]).generate(little_pack.store, rng) is None
    present, absent = held_out_text_queries(little_pack.store, little_pack.manifest, 100)
    assert len(present) == len(absent) == 11
    store = little_pack.store
    assert all(store.find_names([word.lower() for word in text.split()]) or text.count(" ") for text in present)
    assert held_out_text_queries(little_pack.store, little_pack.manifest, 100) == (present, absent)


# --- packs --------------------------------------------------------------------------------------


def near_miss(n, rng):
    """Return one of eight versions of a flag in different light, which are similar and yet different entities."""
    pixels = invented_flag(1_000 + n // 8)[::6, ::6].astype(float)
    return np.clip(pixels + rng.normal(0, 28, 3), 0, 255).astype(np.uint8)


@cache
def atlas_encoder():
    return Encoder.open(DEFAULT_BUNDLE / "encoder", threads=1)


def test_the_calibrated_rate_holds_where_a_fixed_cosine_fails(tmp_path):
    """With the shipped encoder, for a pack of different flags and for a pack of flags in similar groups of eight."""
    encoder, rng = atlas_encoder(), np.random.default_rng(3)
    folders = [write_pack(tmp_path / "wide", encoder, [invented_flag(n)[::6, ::6] for n in range(96)]),
               write_pack(tmp_path / "crowded", encoder, [near_miss(n, rng) for n in range(96)])]
    absent, fits = [], []
    for folder in folders:
        fits.append(calibrate_pack(folder, encoder, seed=1).image_calibration)
        pack = Pack.open(folder, encoder)
        absent.append([matches.features for matches in held_out_image_queries(pack, encoder, 96, seed=2).absent])
        pack.close()
    cosine = np.quantile([features[0] for features in absent[0]], 0.95)  # the right threshold for the first pack
    by_cosine = [np.mean([features[0] >= cosine for features in own]) for own in absent]
    by_probability = [np.mean([predict_probability(fit, features) >= FOUND_THRESHOLD for features in own])
              for fit, own in zip(fits, absent, strict=True)]
    assert by_cosine[0] <= 0.06 and by_cosine[1] > 0.3
    assert max(by_probability) <= 0.1 and all(fit.false_accept <= 0.1 and fit.true_accept > 0.1 for fit in fits)


def test_the_atlas_keeps_its_rates_on_the_test_half():
    manifest = read_manifest(DEFAULT_BUNDLE / "packs" / "atlas")
    for fit in (manifest.image_calibration, manifest.text_calibration):
        assert fit.false_accept <= 2 * fit.target_false_accept and fit.true_accept >= 0.97


@pytest.mark.parametrize("captioned", [True, False])
def test_captions_are_weighted_by_their_benefit(tmp_path, tiny_encoder, captioned):
    """Each subject has two pictures in very different light; both captions name the colours, or only one does."""
    rng = np.random.default_rng(2)
    colours = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255,) * 3, "black": (0,) * 3}
    pictures, captions = [], []
    for mix in combinations_with_replacement(colours, 2):
        colour = np.mean([colours[word] for word in mix], axis=0)
        pictures += [bars(np.clip(colour + rng.normal(0, light, 3), 0, 255)) for light in (8, 60)]
        captions += [" ".join(mix) if captioned else "", " ".join(mix)]
    pack = Pack.open(write_pack(tmp_path / "pack", tiny_encoder, pictures, captions, 2), tiny_encoder)
    queries = held_out_image_queries(pack, tiny_encoder, 140, seed=1)
    pack.close()
    weight = caption_weight(queries.present, queries.articles)
    pairs = list(zip(queries.present, queries.articles, strict=True))
    right = {one: np.mean([top_article(matches, one) in correct for matches, correct in pairs])
             for one in CAPTION_WEIGHTS}
    if captioned:
        assert weight > 0 and right[weight] == max(right.values()) >= right[0.0] + MIN_GAIN
    else:
        assert weight == 0 and right[0.0] == max(right.values())


def test_a_calibrated_pack_separates_present_from_absent_subjects(tmp_path, tiny_encoder):
    write_little_pack(tmp_path / "pack", tiny_encoder)
    pack = Pack.open(tmp_path / "pack", tiny_encoder)
    plain = Retriever(tiny_encoder, [pack])
    present = [noisy(flag(name), seed) for seed in range(6) for name in FLAGS]
    rng = np.random.default_rng(5)
    absent = [bars(*rng.integers(0, 256, (3, 3)).tolist()) for _ in range(60)]
    texts = [f"capital of {name}" for name in FLAGS] + [f"{name} currency" for name in FLAGS]
    absent_texts = [f"capital of {name}x" for name in FLAGS] + [f"q{name} currency" for name in FLAGS]
    present_matches, absent_matches = (plain.match_images([ImageQuery(crop) for crop in crops])
                                      for crops in (present, absent))
    image = calibrate_images(HeldOutImageQueries(present_matches, [frozenset()] * len(present_matches), absent_matches))
    text = calibrate_texts(pack, texts, absent_texts)
    pack.close()
    write_calibration(tmp_path / "pack", image=image, text=text)
    assert read_manifest(tmp_path / "pack").image_calibration == image
    assert image.true_accept > 0.8 and image.false_accept <= 0.05 and text.true_accept > 0.9

    pack = Pack.open(tmp_path / "pack", tiny_encoder)
    results = Retriever(tiny_encoder, [pack]).search(
        [
            ImageQuery(noisy(flag("Italy"), 99)),
            ImageQuery(bars((90, 0, 190), (0, 200, 200), (255, 0, 255))),
            TextQuery("currency of Italy"),
            TextQuery("currency of Wakanda"),
        ]
    )
    found = [result.found for result in results]
    assert found[0] > FOUND_THRESHOLD > found[1] and found[2] > FOUND_THRESHOLD > found[3]
    pack.close()


def test_a_pack_is_calibrated_in_place_and_remains_valid(tmp_path, tiny_encoder):
    rng = np.random.default_rng(6)
    pictures = [bars(*rng.integers(0, 256, (5, 3)).tolist()) for _ in range(80)]
    folder = write_pack(tmp_path / "pack", tiny_encoder, pictures)
    before = read_manifest(folder)
    manifest = calibrate_pack(folder, tiny_encoder, target_false_accept=0.1)
    assert read_manifest(folder) == manifest == verify_pack(folder)
    assert before.with_calibration(manifest.image_calibration, manifest.text_calibration) == manifest
    image, text = manifest.image_calibration, manifest.text_calibration
    assert (image.present, image.absent, text.present) == (80, 80, 80)
    assert image.false_accept <= 0.2 and text.false_accept <= 0.2 and text.true_accept > 0.9
    assert calibrate_pack(folder, tiny_encoder, target_false_accept=0.1) == manifest
    pack = Pack.open(folder, tiny_encoder)
    sure, unsure = Retriever(tiny_encoder, [pack]).search([TextQuery("Kelland"), TextQuery("Kelmany")])
    assert sure.found > FOUND_THRESHOLD > unsure.found
    pack.close()


def test_small_packs_have_no_calibration(tmp_path, tiny_encoder):
    write_little_pack(tmp_path / "little", tiny_encoder)
    manifest = calibrate_pack(tmp_path / "little", tiny_encoder)
    assert manifest.counts.images < MIN_QUERIES
    assert (manifest.image_calibration, manifest.text_calibration) == (None, None)
    pack = Pack.open(tmp_path / "little", tiny_encoder)
    assert Retriever(tiny_encoder, [pack]).search([ImageQuery(flag("Italy"))])[0].found == pytest.approx(1, abs=1e-3)
    pack.close()


def test_a_pack_without_images_has_a_text_calibration(tmp_path, tiny_encoder):
    with PackWriter(tmp_path / "texts", name="texts", snapshot=SNAPSHOT, encoder=None) as writer:
        for n in range(60):
            writer.add_article(ArticleRecord(f"{chr(97 + n % 26) * 3}ton {n}", (("", "It lies by the sea."),), "CC0"))
        writer.commit()
    manifest = calibrate_pack(tmp_path / "texts", tiny_encoder)
    assert manifest.image_calibration is None and manifest.text_calibration.true_accept > 0.9


def test_invalid_calibrations_are_refused(tmp_path, tiny_encoder):
    with pytest.raises(PackError, match="folder"):
        calibrate_pack(tmp_path / "none", tiny_encoder)
    write_little_pack(tmp_path / "little", tiny_encoder)
    with pytest.raises(PackError, match="from 0 to below 1"):
        calibrate_pack(tmp_path / "little", tiny_encoder, target_false_accept=1.0)
    with write_lock(tmp_path / "little"), pytest.raises(PackError, match="another process"):
        calibrate_pack(tmp_path / "little", tiny_encoder)


def test_a_compacted_pack_without_some_articles_can_be_calibrated(tmp_path, tiny_encoder):
    write_little_pack(tmp_path / "little", tiny_encoder)
    remove(tmp_path / "little", articles=["Chad"])
    compact(tmp_path / "little", tiny_encoder)
    with closing(Pack.open(tmp_path / "little", tiny_encoder)) as pack:
        present, absent = held_out_text_queries(pack.store, pack.manifest, 50)
    assert len(present) == len(absent) > 0 and not any("Chad" in query for query in present)
    calibrate_pack(tmp_path / "little", tiny_encoder)
