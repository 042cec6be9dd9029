"""Build the atlas pack: articles about countries, their flags, and calibrations fitted on generated queries."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from atlas.countries import ATTRIBUTION, COUNTRIES_FILE, Country, article, join_names, save_countries
from atlas.flags import FLAG_ATTRIBUTION, FLAG_LICENCE, distinguishable_flags, invented_flag, png_pixels
from atlas.scenes import draw_scene, make_spec
from gog_edge.agent.actions import clamp_box, gaze_query
from gog_edge.config import GazeConfig
from gog_edge.indexing.calibration import HeldOutImageQueries, calibrate_images, calibrate_texts, write_calibration
from gog_edge.indexing.generation import PackWriter
from gog_edge.indexing.sources.base import ArticleRecord, ImageRecord
from gog_edge.picture import Picture
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.fusion import ArticleKey, ImageMatches
from gog_edge.retrieval.manifest import Manifest, Snapshot, read_manifest
from gog_edge.retrieval.pack import Pack
from gog_edge.retrieval.retriever import Retriever
from gog_edge.retrieval.text.tokens import name_key
from gog_edge.types import Box, ImageQuery, Pixels

NAME = "atlas"
TEXT_LICENCE = "CC BY 4.0"
SCENES = 240  # pictures drawn to calibrate the image search
BATCH = 64  # queries embedded at a time
FALSE_ACCEPT = 0.01  # target rate, lower than the default because drawn flags are easy to tell apart
SCENE_WIDTH = 512  # pixels
BOX_ERROR = 0.08  # standard deviation of each side of a box, relative to its length: about that of the policy
FIRST_SCENE_SEED = 9_000_000  # disjoint from the seeds of training and test scenes
FIRST_INVENTED_SEED = 9_000_000
TEXTS = 400  # queries about known names, and as many about unknown ones, to calibrate the text search
_TEXT_QUERIES = (
    "capital of {name}",
    "What is the currency of {name}?",
    "population of {name}",
    "Which languages are spoken in {name}?",
    "{name} neighbours",
    "How large is the area of {name}?",
    "dialling code of {name}",
    "{name}",
)
_CAPITAL_QUERIES = ("Which country has the capital {name}?", "country whose capital is {name}")
_SYLLABLES = (
    "bal cor dre fen gol har jor kel lum mor nev oth pra quel ros sil tar ul vel wak xan yor zem",
    "a e i o u an el ir or un ath esh ond",
    "dia lia mark nor ria stan tia via zan land mbia que",
)


def atlas_articles(countries: Sequence[Country]) -> list[ArticleRecord]:
    """Return one article per country with one fact per paragraph."""
    names = {country.iso: country.name for country in countries}
    return [
        ArticleRecord(
            country.name,
            tuple((paragraph.section, paragraph.text) for paragraph in article(country, names)),
            f"{TEXT_LICENCE}, facts: {ATTRIBUTION}",
            country.aliases,
        )
        for country in countries
    ]


def atlas_images(countries: Sequence[Country], flags: Mapping[str, bytes]) -> list[ImageRecord]:
    """Return one image per flag. It names the countries that use the flag by population, then those of similar flags.

    Flags that look the same (Chad and Romania) keep separate images: in a good picture the encoder tells them apart,
    and otherwise the evidence names both countries.
    """
    by_people = sorted(countries, key=lambda country: (-country.population, country.iso))
    owners: dict[bytes, list[Country]] = {}
    for country in by_people:
        owners.setdefault(flags[country.flag], []).append(country)
    different = distinguishable_flags({country.flag: png_pixels(flags[country.flag]) for country in countries})
    records = []
    for png, users in owners.items():
        others = set(different[users[0].flag])
        twins = [country for country in by_people if country.flag not in others and country not in users]
        titles = tuple(country.name for country in (*users, *twins))
        caption = f"Flag of {join_names([country.name for country in users])}"
        records.append(ImageRecord(png, caption, FLAG_LICENCE, FLAG_ATTRIBUTION, titles))
    return records


def build_atlas(
    folder: Path,
    *,
    encoder: Encoder,
    countries: Sequence[Country],
    flags: Mapping[str, bytes],
    scenes: int = SCENES,
) -> Manifest:
    """Write the atlas pack with its calibrations, and the facts as `countries.json` in the same folder.

    Args:
        folder: does not exist or is empty.
        encoder: the encoder that will search the pack.
        countries: every country that has a flag.
        flags: PNG bytes by flag key.
        scenes: number of pictures drawn to calibrate the image search.

    Raises:
        PackError: the folder is not empty, or `scenes` is too small for a calibration.
    """
    snapshot = _snapshot(countries, flags)
    with PackWriter(folder, name=NAME, snapshot=snapshot, encoder=encoder) as writer:
        writer.add(atlas_articles(countries), atlas_images(countries, flags))
        writer.commit()
    save_countries(folder / COUNTRIES_FILE, countries)
    _calibrate(folder, encoder, countries, flags, scenes)
    return read_manifest(folder)


def _snapshot(countries: Sequence[Country], flags: Mapping[str, bytes]) -> Snapshot:
    digest = hashlib.sha256(json.dumps([asdict(country) for country in countries], sort_keys=True).encode())
    for country in countries:
        digest.update(flags[country.flag])
    content = digest.hexdigest()
    licence = f"{TEXT_LICENCE} (facts: {ATTRIBUTION}); {FLAG_LICENCE} (flags: {FLAG_ATTRIBUTION})"
    return Snapshot("flags and countries", "", str(uuid.uuid5(uuid.NAMESPACE_OID, content)), content, licence)


def _calibrate(
    folder: Path, encoder: Encoder, countries: Sequence[Country], flags: Mapping[str, bytes], scenes: int
) -> None:
    pack = Pack.open(folder, encoder)
    try:
        pixels = {country.flag: png_pixels(flags[country.flag]) for country in countries}
        known, unknown = calibration_crops(pixels, scenes)
        retriever = Retriever(encoder, [pack])
        articles = _articles_by_flag(pack, countries)
        queries = HeldOutImageQueries(
            _match(retriever, [query for _, query in known]), [articles[key] for key, _ in known],
            _match(retriever, unknown),
        )  # fmt: skip
        image = calibrate_images(queries, FALSE_ACCEPT)
        text = calibrate_texts(pack, *calibration_texts(countries), target_false_accept=FALSE_ACCEPT)
    finally:
        pack.close()
    write_calibration(folder, image=image, text=text)


def _match(retriever: Retriever, queries: Sequence[ImageQuery]) -> list[ImageMatches]:
    return [one for at in range(0, len(queries), BATCH) for one in retriever.match_images(queries[at : at + BATCH])]


def _articles_by_flag(pack: Pack, countries: Sequence[Country]) -> dict[str, frozenset[ArticleKey]]:
    """Return the articles of the countries that use each flag."""
    hits = pack.store.find_names([name_key(country.name) for country in countries])
    articles = {hit.key: hit.article for hit in hits if not hit.redirect}
    found: dict[str, frozenset[ArticleKey]] = {}
    for country in countries:
        key = pack.name, articles[name_key(country.name)]
        found[country.flag] = found.get(country.flag, frozenset()) | {key}
    return found


def calibration_crops(
    flags: Mapping[str, Pixels], scenes: int
) -> tuple[list[tuple[str, ImageQuery]], list[ImageQuery]]:
    """Return image queries like those of a policy, with inexact boxes.

    Args:
        flags: pixels of the stored flags by key.
        scenes: number of pictures to draw.

    Returns:
        Queries of stored flags with their keys, and queries of what is not stored: invented flags, and whole pictures
        of three or more flags.
    """
    known: list[tuple[str, ImageQuery]] = []
    unknown: list[ImageQuery] = []
    gaze = GazeConfig()
    keys = sorted(flags)
    for seed in range(FIRST_SCENE_SEED, FIRST_SCENE_SEED + scenes):
        rng = np.random.default_rng([seed, 11])
        shown = dict(_sample_flags(rng, keys, flags))
        spec = make_spec(seed, list(shown))
        pixels = draw_scene(spec, shown, SCENE_WIDTH)
        picture = Picture(pixels)
        size = picture.size
        for index, key in enumerate(shown):
            box = spec.box(index, size)
            error = rng.normal(0, BOX_ERROR, 4) * [box.width, box.height, box.width, box.height]
            inexact, _ = clamp_box(
                Box(*(np.array([box.x0, box.y0, box.x1, box.y1]) + error).tolist()), size, gaze.min_side
            )
            query = gaze_query(picture, inexact, "", gaze)
            if key in flags:
                known.append((key, query))
            else:
                unknown.append(query)
        if len(shown) > 2:
            unknown.append(ImageQuery(pixels))
    return known, unknown


def _sample_flags(
    rng: np.random.Generator, keys: Sequence[str], flags: Mapping[str, Pixels]
) -> Iterator[tuple[str, Pixels]]:
    """Yield one to four flags with their keys, about half of them invented."""
    for _ in range(int(rng.integers(1, 5))):
        if rng.random() < 0.5:
            key = keys[int(rng.integers(len(keys)))]
            yield key, flags[key]
        else:
            seed = FIRST_INVENTED_SEED + int(rng.integers(1_000_000))
            yield f"invented-{seed}", invented_flag(seed)


def calibration_texts(countries: Sequence[Country]) -> tuple[list[str], list[str]]:
    """Return text queries about the countries, and as many about invented names."""
    rng = np.random.default_rng(13)
    names = {country.name.lower() for country in countries} | {country.capital.lower() for country in countries}
    known = []
    for _ in range(TEXTS):
        country = countries[int(rng.integers(len(countries)))]
        if country.capital and rng.random() < 0.2:
            known.append(_pick(rng, _CAPITAL_QUERIES).format(name=country.capital))
        elif country.currency and rng.random() < 0.1:
            known.append(f"countries that use the {country.currency}")
        else:
            known.append(_pick(rng, _TEXT_QUERIES).format(name=_pick(rng, (country.name, *country.aliases[2:]))))
    unknown: list[str] = []
    while len(unknown) < TEXTS:
        name = "".join(_pick(rng, part.split()) for part in _SYLLABLES).capitalize()
        if name.lower() not in names:
            forms = (*_TEXT_QUERIES, *_CAPITAL_QUERIES, "countries that use the {name}")
            unknown.append(_pick(rng, forms).format(name=name))
    return known, unknown


def _pick(rng: np.random.Generator, values: Sequence[str]) -> str:
    return values[int(rng.integers(len(values)))]


def stored_flags(pack: Pack, countries: Sequence[Country]) -> dict[str, Pixels]:
    """Return the pixels of the flags as stored in the pack, by flag key."""
    keys = {country.name: country.flag for country in countries}
    flags = {}
    rows = pack.store.images(pack.store.image_ids().tolist())
    for row in rows.values():
        picture = pack.image_file(row.id)
        if picture is None:
            continue
        pixels = png_pixels(picture.data)
        # The first title is the country whose flag this is; the flags of the others may only look the same.
        flags.update({keys[title]: pixels for title in row.titles[::-1] if title in keys and keys[title] not in flags})
        flags[keys[row.titles[0]]] = pixels
    return flags
