import numpy as np
import pytest
from little_world import FLAGS, bars, flag, write_little_pack

from gog_edge.errors import PackError
from gog_edge.indexing.calibrate import calibrate_images, calibrate_texts, fit_calibration, write_calibration
from gog_edge.retrieval.calibration import IMAGE_FEATURES, Calibration
from gog_edge.retrieval.manifest import read_manifest
from gog_edge.retrieval.pack import Pack
from gog_edge.retrieval.retriever import Retriever
from gog_edge.types import ImageQuery, TextQuery

NAMES = ("a", "b")


def cloud(rows, centre, seed):
    return np.random.default_rng(seed).normal(size=(rows, 2)) + centre


def fitted(present=200, absent=200, gap=2.0, **settings):
    x = np.concatenate([cloud(present, (gap, 0), 1), cloud(absent, (0, 0), 2)])
    return fit_calibration(x, [1] * present + [0] * absent, names=NAMES, **settings)


def noisy(pixels, seed):
    rng = np.random.default_rng(seed)
    return np.clip(pixels + rng.normal(0, 12, pixels.shape), 0, 255).astype(np.uint8)


def test_it_recovers_the_line_that_made_the_labels():
    x = np.random.default_rng(0).normal(size=(4_000, 2))
    chance = 1 / (1 + np.exp(-(2 * x[:, 0] - x[:, 1])))
    y = np.random.default_rng(1).random(4_000) < chance
    fit = fit_calibration(x, y, names=NAMES)
    assert fit.weights == pytest.approx((2, -1), abs=0.25) and fit.bias == pytest.approx(0, abs=0.15)
    calibrated = [fit.chance(row) for row in x]
    assert np.mean(np.abs(calibrated - chance)) < 0.03


def test_the_chance_rises_with_the_evidence_and_stays_between_0_and_1():
    fit = fitted()
    chances = [fit.chance((value, 0)) for value in np.linspace(-1e6, 1e6, 101)]
    assert chances == sorted(chances) and 0 <= chances[0] < 0.01 < 0.99 < chances[-1] <= 1


def test_the_threshold_keeps_the_target_and_rates_are_measured():
    for target in (0.0, 0.05, 0.3):
        fit = fitted(target_false_accept=target)
        assert fit.false_accept <= target <= fit.false_accept + 0.01
        assert 0 <= fit.true_accept <= 1
    assert fitted(target_false_accept=0.3).true_accept > fitted(target_false_accept=0.0).true_accept


def test_it_does_not_depend_on_how_many_of_each_there_were():
    assert fitted(200, 40).chance((1, 0)) == pytest.approx(fitted(40, 200).chance((1, 0)), abs=0.15)


def test_separable_and_constant_features_stay_finite():
    x = [[float(n >= 20), 3.0] for n in range(40)]
    fit = fit_calibration(x, [n >= 20 for n in range(40)], names=NAMES)
    assert np.isfinite(fit.weights).all() and fit.chance((1, 3)) > 0.9 > 0.1 > fit.chance((0, 3))


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (np.zeros((30, 3)), [0, 1] * 15),
        (np.zeros((30, 2)), [0, 1] * 10),
        (np.full((30, 2), np.nan), [0, 1] * 15),
        (np.zeros((30, 2)), [1] * 30),
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


def test_a_calibrated_pack_tells_known_things_from_unknown_ones(tmp_path, tiny_encoder):
    write_little_pack(tmp_path / "pack", tiny_encoder)
    pack = Pack.open(tmp_path / "pack", tiny_encoder)
    plain = Retriever(tiny_encoder, [pack])
    known = [noisy(flag(name), seed) for seed in range(3) for name in FLAGS]
    rng = np.random.default_rng(5)
    unknown = [bars(*rng.integers(0, 256, (3, 3)).tolist()) for _ in range(30)]
    texts = [f"capital of {name}" for name in FLAGS] + [f"{name} currency" for name in FLAGS]
    strange = [f"capital of {name}x" for name in FLAGS] + [f"q{name} currency" for name in FLAGS]
    image = calibrate_images(plain, *([ImageQuery(crop) for crop in crops] for crops in (known, unknown)))
    text = calibrate_texts(plain, texts, strange)
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
    assert found[0] > image.threshold > found[1] and found[2] > text.threshold > found[3]
    pack.close()
