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
    LEAST,
    LEAST_GAIN,
    Coiner,
    HeldOut,
    calibrate_looks,
    calibrate_pack,
    calibrate_texts,
    caption_weight,
    first_of,
    fit_calibration,
    held_out_looks,
    held_out_texts,
    write_calibration,
)
from gog_edge.indexing.commit import writing
from gog_edge.indexing.generation import ArticleDraft, ImageDraft, PackWriter
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.manifest import FOUND, IMAGE_FEATURES, Calibration, read_manifest
from gog_edge.retrieval.pack import Pack, verify_pack
from gog_edge.retrieval.retriever import Retriever
from gog_edge.types import ImageQuery, TextQuery

NAMES = ("a", "b")


def cloud(rows, centre, seed):
    return np.random.default_rng(seed).normal(size=(rows, 2)) + centre


def fitted(present=400, absent=400, gap=2.0, **settings):
    x = np.concatenate([cloud(present, (gap, 0), 1), cloud(absent, (0, 0), 2)])
    return fit_calibration(x, [1] * present + [0] * absent, names=NAMES, **settings)


def noisy(pixels, seed):
    rng = np.random.default_rng(seed)
    return np.clip(pixels + rng.normal(0, 12, pixels.shape), 0, 255).astype(np.uint8)


# --- the model ----------------------------------------------------------------------------------


def test_it_recovers_the_line_that_made_the_labels():
    x = np.random.default_rng(0).normal(size=(8_000, 2))
    chance = 1 / (1 + np.exp(-(2 * x[:, 0] - x[:, 1])))
    y = np.random.default_rng(1).random(8_000) < chance
    assert fit_calibration(x, y, names=NAMES).weights == pytest.approx((2, -1), abs=0.25)


def test_the_chance_rises_with_the_evidence_and_stays_between_0_and_1():
    fit = fitted()
    chances = [fit.chance((value, 0)) for value in np.linspace(-1e6, 1e6, 101)]
    assert chances == sorted(chances) and 0 <= chances[0] < 0.01 < 0.99 < chances[-1] <= 1


@pytest.mark.parametrize("target", [0.02, 0.05, 0.3])
def test_the_target_is_held_by_things_that_were_never_seen(target):
    fits = [
        fit_calibration(np.concatenate([cloud(400, (2, 0), seed), cloud(400, (0, 0), 1_000 + seed)]),
                        [1] * 400 + [0] * 400, names=NAMES, target_false_accept=target)
        for seed in range(20)
    ]
    fresh = cloud(20_000, (0, 0), 77)
    rates = [np.mean([fit.bias + fresh @ np.array(fit.weights) >= 0]) for fit in fits]
    assert np.mean(rates) == pytest.approx(target, abs=0.012)
    assert np.mean([fit.false_accept for fit in fits]) == pytest.approx(target, abs=0.02)
    assert fits[0].chance(cloud(1, (9, 0), 1)[0]) > FOUND and (fits[0].present, fits[0].absent) == (400, 400)


def test_a_laxer_target_finds_more_and_a_target_of_nothing_stands_above_all():
    strictest, usual, lax = (fitted(target_false_accept=target).true_accept for target in (0, 0.05, 0.3))
    assert strictest < usual < lax


def test_the_rates_are_those_of_the_other_half():
    """Where the two halves differ, the rates are the second's."""
    x = np.concatenate([cloud(200, (4, 0), 1), cloud(100, (0, 0), 2), cloud(100, (4, 0), 3)])
    fit = fit_calibration(x, [1] * 200 + [0] * 200, names=NAMES)
    assert fit.false_accept > 0.9 and fit.true_accept > 0.9


def test_a_feature_that_must_earn_its_place_has_none_where_it_tells_nothing():
    rng = np.random.default_rng(4)
    x = np.concatenate([cloud(400, (3, 0), 1), cloud(400, (0, 0), 2)])
    y = [1] * 400 + [0] * 400
    telling = np.column_stack([x[:, 0], np.repeat([1.0, 0.0], 400) + rng.normal(0, 0.5, 800)])
    assert fit_calibration(x, y, names=NAMES, must_earn=("b",)).weights[1] == 0
    earned = fit_calibration(telling, y, names=NAMES, must_earn=("b",))
    assert earned.weights[1] > 0
    assert earned.true_accept > fit_calibration(telling * [1, 0], y, names=NAMES).true_accept


def test_it_does_not_depend_on_how_many_of_each_there_were():
    many, few = fitted(400, 80), fitted(80, 400)
    assert many.weights == pytest.approx(few.weights, abs=0.6)


def test_equal_things_never_pass_by_rounding():
    x = [[0.1 + 0.2, 1.0]] * 40 + [[0.3, 0.7]] * 40
    fit = fit_calibration(x[::-1], [1] * 40 + [0] * 40, names=NAMES)
    assert fit.false_accept == 0 and fit_calibration([[0.3, 0.7]] * 80, [1, 0] * 40, names=NAMES).false_accept == 0


def test_separable_and_constant_features_stay_finite():
    x = [[float(n >= 40), 3.0] for n in range(80)]
    fit = fit_calibration(x, [n >= 40 for n in range(80)], names=NAMES)
    assert np.isfinite(fit.weights).all() and fit.chance((1, 3)) > 0.9 > 0.1 > fit.chance((0, 3))


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
def test_what_cannot_be_fitted_is_refused(x, y):
    with pytest.raises(PackError, match="calibration"):
        fit_calibration(x, y, names=NAMES)


def test_it_survives_json_and_refuses_other_features():
    fit = fitted()
    assert Calibration.from_json(fit.to_json(), NAMES) == fit
    with pytest.raises(PackError, match="calibrate it again"):
        Calibration.from_json(fit.to_json(), IMAGE_FEATURES)
    with pytest.raises(PackError, match="not usable"):
        Calibration.from_json({"features": ["a"]}, NAMES)


# --- a pack's own queries -----------------------------------------------------------------------


LANDS = [f"{first}{last}" for last in ("land", "mark", "stan", "gora", "via", "nia", "dor", "esh", "pur", "tia")
         for first in ("Bal", "Cor", "Dre", "Fen", "Gol", "Har", "Jor", "Kel", "Lum", "Mor", "Nev", "Oth")]


def write_pack(folder, encoder, pictures, captions=(), per_article=1):
    """Articles of successive pictures."""
    with PackWriter(folder, name=folder.name, snapshot=SNAPSHOT, encoder=encoder) as writer:
        for n in range(len(pictures) // per_article):
            writer.add_article(ArticleDraft(LANDS[n], (("Place", f"{LANDS[n]} lies by the sea."),), "CC0"))
        for n, picture in enumerate(pictures):
            title = LANDS[n // per_article]
            caption = captions[n] if captions else f"Flag of {title}"
            writer.add_image(ImageDraft(png(picture), caption, "CC0", "us", (title,)))
        writer.commit()
    return folder


def test_what_is_absent_is_searched_as_if_its_articles_had_no_picture(tmp_path, tiny_encoder):
    rng = np.random.default_rng(1)
    pictures = [bars(*rng.integers(0, 256, (4, 3)).tolist()) for _ in range(30)]
    pictures[2] = noisy(pictures[0], 1) // 2 * 2  # a near-duplicate of the first land's, in the second
    pack = Pack.open(write_pack(tmp_path / "pack", tiny_encoder, pictures, per_article=2), tiny_encoder)
    looks = held_out_looks(pack, tiny_encoder, 12, seed=3)
    assert len(looks.absent) == 12 and len(looks.present) == len(looks.shows) == 24  # each with and without itself
    firsts = [look.things[0].keys[0] for look in looks.present[::2]]
    assert np.mean([first in shows for first, shows in zip(firsts, looks.shows[::2], strict=True)]) > 0.7
    for look, shows in zip(looks.absent, looks.shows[::2], strict=True):
        assert all(shows.isdisjoint(thing.keys) for thing in look.things) and look.things
    again = held_out_looks(pack, tiny_encoder, 12, seed=3)
    assert [look.features for look in again.absent] == [look.features for look in looks.absent]
    pack.close()


def test_names_are_coined_that_sound_like_the_packs_and_are_nobodys(little_pack):
    rng = np.random.default_rng(0)
    coin = Coiner(list(FLAGS))
    names = [coin.name(little_pack.store, rng) for _ in range(50)]
    letters = set("".join(FLAGS))
    assert all(set(name) <= letters | {" "} for name in names) and len(set(names)) > 10
    assert not set(names) & set(FLAGS) and Coiner([]).name(little_pack.store, rng) is None
    present, absent = held_out_texts(little_pack.store, little_pack.manifest, 100)
    assert len(present) == len(absent) == 11
    assert all(little_pack.store.named([word.lower() for word in text.split()]) or text.count(" ") for text in present)
    assert held_out_texts(little_pack.store, little_pack.manifest, 100) == (present, absent)


# --- packs --------------------------------------------------------------------------------------


def near_miss(n, rng):
    """Eight versions of one flag, each in other light: near to each other, and yet different entities."""
    pixels = invented_flag(1_000 + n // 8)[::6, ::6].astype(float)
    return np.clip(pixels + rng.normal(0, 28, 3), 0, 255).astype(np.uint8)


@cache
def atlas_encoder():
    return Encoder.open(DEFAULT_BUNDLE / "encoder", threads=1)


def test_one_fixed_cosine_fails_where_the_calibrated_chance_holds_its_rate(tmp_path):
    """Vectors of the shipped encoder: flags that differ, and flags of which eight are near misses of each other."""
    encoder, rng = atlas_encoder(), np.random.default_rng(3)
    folders = [write_pack(tmp_path / "wide", encoder, [invented_flag(n)[::6, ::6] for n in range(96)]),
               write_pack(tmp_path / "crowded", encoder, [near_miss(n, rng) for n in range(96)])]
    absent, fits = [], []
    for folder in folders:
        fits.append(calibrate_pack(folder, encoder, seed=1).image_calibration)
        pack = Pack.open(folder, encoder)
        absent.append([look.features for look in held_out_looks(pack, encoder, 96, seed=2).absent])
        pack.close()
    cosine = np.quantile([features[0] for features in absent[0]], 0.95)  # fixed where it is right for the first pack
    fixed = [np.mean([features[0] >= cosine for features in own]) for own in absent]
    chosen = [np.mean([fit.chance(features) >= FOUND for features in own])
              for fit, own in zip(fits, absent, strict=True)]
    assert fixed[0] <= 0.06 and fixed[1] > 0.3
    assert max(chosen) <= 0.1 and all(fit.false_accept <= 0.1 and fit.true_accept > 0.1 for fit in fits)


def test_the_atlas_keeps_its_rates_on_the_half_that_was_not_fitted():
    manifest = read_manifest(DEFAULT_BUNDLE / "packs" / "atlas")
    for fit in (manifest.image_calibration, manifest.text_calibration):
        assert fit.false_accept <= 2 * fit.target_false_accept and fit.true_accept >= 0.97


@pytest.mark.parametrize("captioned", [True, False])
def test_captions_get_the_say_that_they_earn(tmp_path, tiny_encoder, captioned):
    """Two pictures of each thing, in very different light. Their colours are told under both, or under one alone."""
    rng = np.random.default_rng(2)
    colours = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255,) * 3, "black": (0,) * 3}
    pictures, captions = [], []
    for mix in combinations_with_replacement(colours, 2):
        colour = np.mean([colours[word] for word in mix], axis=0)
        pictures += [bars(np.clip(colour + rng.normal(0, light, 3), 0, 255)) for light in (8, 60)]
        captions += [" ".join(mix) if captioned else "", " ".join(mix)]
    pack = Pack.open(write_pack(tmp_path / "pack", tiny_encoder, pictures, captions, 2), tiny_encoder)
    looks = held_out_looks(pack, tiny_encoder, 140, seed=1)
    pack.close()
    weight = caption_weight(looks.present, looks.shows)
    right = {one: np.mean([first_of(look, one) in own for look, own in zip(looks.present, looks.shows, strict=True)])
             for one in CAPTION_WEIGHTS}
    if captioned:
        assert weight > 0 and right[weight] == max(right.values()) >= right[0.0] + LEAST_GAIN
    else:
        assert weight == 0 and right[0.0] == max(right.values())


def test_a_calibrated_pack_tells_known_things_from_unknown_ones(tmp_path, tiny_encoder):
    write_little_pack(tmp_path / "pack", tiny_encoder)
    pack = Pack.open(tmp_path / "pack", tiny_encoder)
    plain = Retriever(tiny_encoder, [pack])
    known = [noisy(flag(name), seed) for seed in range(6) for name in FLAGS]
    rng = np.random.default_rng(5)
    unknown = [bars(*rng.integers(0, 256, (3, 3)).tolist()) for _ in range(60)]
    texts = [f"capital of {name}" for name in FLAGS] + [f"{name} currency" for name in FLAGS]
    strange = [f"capital of {name}x" for name in FLAGS] + [f"q{name} currency" for name in FLAGS]
    known_looks, unknown_looks = (plain.look([ImageQuery(crop) for crop in crops]) for crops in (known, unknown))
    image = calibrate_looks(HeldOut(known_looks, [frozenset()] * len(known_looks), unknown_looks))
    text = calibrate_texts(pack, texts, strange)
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
    assert found[0] > FOUND > found[1] and found[2] > FOUND > found[3]
    pack.close()


def test_a_pack_is_calibrated_in_place_and_stays_whole(tmp_path, tiny_encoder):
    rng = np.random.default_rng(6)
    pictures = [bars(*rng.integers(0, 256, (5, 3)).tolist()) for _ in range(80)]
    folder = write_pack(tmp_path / "pack", tiny_encoder, pictures)
    before = read_manifest(folder)
    manifest = calibrate_pack(folder, tiny_encoder, target_false_accept=0.1)
    assert read_manifest(folder) == manifest == verify_pack(folder)
    assert before.calibrated(manifest.image_calibration, manifest.text_calibration) == manifest
    image, text = manifest.image_calibration, manifest.text_calibration
    assert (image.present, image.absent, text.present) == (80, 80, 80)
    assert image.false_accept <= 0.2 and text.false_accept <= 0.2 and text.true_accept > 0.9
    assert calibrate_pack(folder, tiny_encoder, target_false_accept=0.1) == manifest
    pack = Pack.open(folder, tiny_encoder)
    sure, unsure = Retriever(tiny_encoder, [pack]).search([TextQuery("Kelland"), TextQuery("Kelmany")])
    assert sure.found > FOUND > unsure.found
    pack.close()


def test_too_little_for_a_calibration_is_said(tmp_path, tiny_encoder):
    write_little_pack(tmp_path / "little", tiny_encoder)
    manifest = calibrate_pack(tmp_path / "little", tiny_encoder)
    assert manifest.counts.images < LEAST and (manifest.image_calibration, manifest.text_calibration) == (None, None)
    pack = Pack.open(tmp_path / "little", tiny_encoder)
    assert Retriever(tiny_encoder, [pack]).search([ImageQuery(flag("Italy"))])[0].found == pytest.approx(1, abs=1e-3)
    pack.close()


def test_a_pack_of_texts_alone_is_calibrated_for_words(tmp_path, tiny_encoder):
    with PackWriter(tmp_path / "texts", name="texts", snapshot=SNAPSHOT, encoder=None) as writer:
        for n in range(60):
            writer.add_article(ArticleDraft(f"{chr(97 + n % 26) * 3}ton {n}", (("", "It lies by the sea."),), "CC0"))
        writer.commit()
    manifest = calibrate_pack(tmp_path / "texts", tiny_encoder)
    assert manifest.image_calibration is None and manifest.text_calibration.true_accept > 0.9


def test_what_cannot_be_calibrated_is_refused(tmp_path, tiny_encoder):
    with pytest.raises(PackError, match="is this the right folder"):
        calibrate_pack(tmp_path / "none", tiny_encoder)
    write_little_pack(tmp_path / "little", tiny_encoder)
    with pytest.raises(PackError, match="share from 0"):
        calibrate_pack(tmp_path / "little", tiny_encoder, target_false_accept=1.0)
    with writing(tmp_path / "little"), pytest.raises(PackError, match="another process"):
        calibrate_pack(tmp_path / "little", tiny_encoder)
