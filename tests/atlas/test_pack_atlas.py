import json

import numpy as np
import pytest
from little_world import png

from atlas.countries import COUNTRIES_FILE, Country, load_countries
from atlas.flags import invented_flag, png_pixels
from atlas.pack import atlas_images, build_atlas, calibration_crops, calibration_texts
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.pack import Pack
from gog_edge.retrieval.retriever import Retriever
from gog_edge.types import ImageQuery, TextQuery
from index.build_atlas import main

NAMES = ("Aland", "Borduria", "Cordon", "Delmark", "Elbonia", "Freeland", "Gondal", "Hav")


def country(n, name):
    return Country(
        iso=f"{name[0]}{name[1].upper()}", iso3=name[:3].upper(), name=name, capital=f"{name} City", continent="Europe",
        area=1000 + n, population=10_000 - n, currency="Crown", currency_code="CRN", languages=("Latin",),
        neighbours=(), domain=f".{name[:2].lower()}", phone=f"+9{n}", aliases=(name[:2].upper(), name[:3].upper()),
    )  # fmt: skip


COUNTRIES = [country(n, name) for n, name in enumerate(NAMES)]
FLAGS = {one.flag: png(invented_flag(n)) for n, one in enumerate(COUNTRIES)} | {"ha": png(invented_flag(0))}


@pytest.fixture(scope="module")
def atlas(tmp_path_factory, tiny_encoder):
    folder = tmp_path_factory.mktemp("atlas") / "pack"
    return folder, build_atlas(folder, encoder=tiny_encoder, countries=COUNTRIES, flags=FLAGS, scenes=20)


def test_the_pack_is_searchable_and_calibrated(atlas, tiny_encoder):
    folder, manifest = atlas
    assert manifest.counts.images == len(COUNTRIES) - 1 and manifest.image_calibration and manifest.text_calibration
    assert load_countries(folder / COUNTRIES_FILE) == COUNTRIES
    pack = Pack.open(folder, tiny_encoder)
    seen, read = Retriever(tiny_encoder, [pack]).search(
        [ImageQuery(png_pixels(FLAGS["bo"]), "What is its capital?"), TextQuery("capital of BO")]
    )
    assert seen.evidence[0].titles == ("Borduria",)
    assert {seen.evidence[0].passages[0].text, read.evidence[0].passages[0].text} == {
        "The capital of Borduria is Borduria City."
    }
    pack.close()


def test_countries_with_the_same_flag_share_an_image():
    records = atlas_images(COUNTRIES, FLAGS)
    (shared,) = [record for record in records if len(record.articles) > 1]
    assert shared.articles == ("Aland", "Hav") and shared.caption == "Flag of Aland and Hav"


def test_similar_flags_name_each_other_after_their_own_country():
    nearly = png_pixels(FLAGS["bo"]).copy()
    nearly[..., 2] = np.clip(nearly[..., 2].astype(int) + 9, 0, 255)
    records = {record.caption: record.articles for record in atlas_images(COUNTRIES, FLAGS | {"co": png(nearly)})}
    assert records["Flag of Borduria"] == ("Borduria", "Cordon")
    assert records["Flag of Cordon"] == ("Cordon", "Borduria")


def test_calibration_queries_are_deterministic():
    pixels = {key: png_pixels(data) for key, data in FLAGS.items()}
    (known, unknown), (known_again, unknown_again) = calibration_crops(pixels, 6), calibration_crops(pixels, 6)
    assert {key for key, _ in known} <= set(FLAGS) and [key for key, _ in known] == [key for key, _ in known_again]
    queries, again = ([query for _, query in own] for own in (known, known_again))
    queries, again = queries + unknown, again + unknown_again
    assert known and unknown and all(min(query.pixels.shape[:2]) > 4 for query in queries)
    assert all(
        (a.pixels == b.pixels).all() and len(a.views) == len(b.views) for a, b in zip(queries, again, strict=True)
    )
    assert calibration_texts(COUNTRIES) == calibration_texts(COUNTRIES)


def test_calibration_texts_are_about_countries_and_about_invented_names():
    known, unknown = calibration_texts(COUNTRIES)
    words = {word for one in COUNTRIES for word in (one.name, one.capital, one.currency)}
    assert len(known) == len(unknown) == 400
    assert all(any(word in text for word in words) for text in known)
    assert not any(word in text for text in unknown for word in words)


def test_the_command_reports_how_to_download_the_flags(tmp_path, tiny_encoder_folder, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([str(tmp_path / "out"), "--encoder", str(tiny_encoder_folder)]) == 1
    assert "npm pack flag-icons@7.5.0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("way", ["named", "installed"])
def test_the_command_builds_from_a_package_folder(tmp_path, tiny_encoder_folder, capsys, monkeypatch, way):
    pytest.importorskip("resvg_py")
    monkeypatch.chdir(tmp_path)
    package = tmp_path / ("node_modules/flag-icons" if way == "installed" else "elsewhere")
    (package / "flags/4x3").mkdir(parents=True)
    paths = '<path fill="{}" d="M0 0h4v3H0z"/><path fill="{}" d="M0 0h2v2H0z"/>'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 3">{paths}</svg>'
    codes = {"fr": ("#00f", "#f00"), "it": ("#0f0", "#fff"), "no": ("#f00", "#00f"), "es": ("#ff0", "#f00")}
    for code, colours in codes.items():
        (package / f"flags/4x3/{code}.svg").write_text(svg.format(*colours))
    (package / "country.json").write_text(json.dumps([{"code": code, "name": code.upper()} for code in codes]))
    flags = ["--flags", str(package)] if way == "named" else []
    assert main([str(tmp_path / "out"), "--encoder", str(tiny_encoder_folder), "--scenes", "30", *flags]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["manifest"]["counts"] == {"articles": 4, "paragraphs": 36, "images": 4}
    Pack.open(tmp_path / "out", Encoder.open(tiny_encoder_folder)).close()
