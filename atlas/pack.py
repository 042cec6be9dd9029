"""The atlas as a pack: articles of countries, their flags, and a calibration from scenes of real and invented flags."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from atlas.articles import article, listed
from atlas.countries import ATTRIBUTION, COUNTRIES_FILE, Country, save_countries
from atlas.flags import FLAG_ATTRIBUTION, FLAG_LICENCE, invented_flag, png_pixels
from atlas.scenes import draw_scene, make_spec
from atlas.testset import look_alikes
from gog_edge.agent.actions import gaze_query, mend_box
from gog_edge.config import GazeConfig
from gog_edge.indexing.calibration import HeldOut, calibrate_looks, calibrate_texts, write_calibration
from gog_edge.indexing.generation import ArticleDraft, ImageDraft, PackWriter, Snapshot
from gog_edge.picture import Picture
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.fusion import Key, Look
from gog_edge.retrieval.manifest import Manifest, read_manifest
from gog_edge.retrieval.pack import Pack
from gog_edge.retrieval.retriever import Retriever
from gog_edge.retrieval.text.words import name_key
from gog_edge.types import Box, ImageQuery, Pixels

NAME = "atlas"
TEXT_LICENCE = "CC BY 4.0"
SCENES = 240  # for the calibration of pictures
BATCH = 64  # of them, embedded at a time
FALSE_ACCEPT = 0.01  # drawn flags are told apart well: less may be taken for what it is not than elsewhere
SCENE_WIDTH = 512
SHAKE = 0.08  # standard deviation of a side's error, in sides: about what the policy does
FIRST_SCENE_SEED = 9_000_000  # far from the seeds of training and test scenes
FIRST_INVENTED_SEED = 9_000_000
TEXTS = 400  # of each kind, for the calibration of words
_ASKED = (
    "capital of {name}",
    "What is the currency of {name}?",
    "population of {name}",
    "Which languages are spoken in {name}?",
    "{name} neighbours",
    "How large is the area of {name}?",
    "dialling code of {name}",
    "{name}",
)
_ASKED_BACK = ("Which country has the capital {name}?", "country whose capital is {name}")
_SYLLABLES = (
    "bal cor dre fen gol har jor kel lum mor nev oth pra quel ros sil tar ul vel wak xan yor zem",
    "a e i o u an el ir or un ath esh ond",
    "dia lia mark nor ria stan tia via zan land mbia que",
)


def atlas_articles(countries: Sequence[Country]) -> list[ArticleDraft]:
    """One article a country, one fact a paragraph."""
    names = {country.iso: country.name for country in countries}
    return [
        ArticleDraft(
            country.name,
            tuple((paragraph.section, paragraph.text) for paragraph in article(country, names)),
            f"{TEXT_LICENCE}, facts: {ATTRIBUTION}",
            country.aliases,
        )
        for country in countries
    ]


def atlas_images(countries: Sequence[Country], flags: Mapping[str, bytes]) -> list[ImageDraft]:
    """One image a flag, naming all that fly it, the one with most people first, then those whose flags look the same.

    Look-alikes (Chad and Romania) keep images of their own: where a picture is good the encoder tells them apart, and
    where it does not, the evidence names both.
    """
    by_people = sorted(countries, key=lambda country: (-country.population, country.iso))
    owners: dict[bytes, list[Country]] = {}
    for country in by_people:
        owners.setdefault(flags[country.flag], []).append(country)
    different = look_alikes({country.flag: png_pixels(flags[country.flag]) for country in countries})
    drafts = []
    for png, bearers in owners.items():
        others = set(different[bearers[0].flag])
        twins = [country for country in by_people if country.flag not in others and country not in bearers]
        titles = tuple(country.name for country in (*bearers, *twins))
        caption = f"Flag of {listed([country.name for country in bearers])}"
        drafts.append(ImageDraft(png, caption, FLAG_LICENCE, FLAG_ATTRIBUTION, titles))
    return drafts


def build_atlas(
    folder: Path,
    *,
    encoder: Encoder,
    countries: Sequence[Country],
    flags: Mapping[str, bytes],
    scenes: int = SCENES,
) -> Manifest:
    """Write the atlas pack with its calibration, and the facts as `countries.json` in the same folder.

    Args:
        folder: new or empty.
        encoder: the encoder that the box will run.
        countries: every country that has a flag.
        flags: PNG bytes by flag key.
        scenes: pictures drawn to calibrate the search with pictures.

    Raises:
        PackError: the folder is not empty, or there are too few scenes to calibrate.
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
        bearers = _bearers(pack, countries)
        looks = HeldOut(
            _looks(retriever, [query for _, query in known]), [bearers[key] for key, _ in known],
            _looks(retriever, unknown),
        )  # fmt: skip
        image = calibrate_looks(looks, FALSE_ACCEPT)
        text = calibrate_texts(pack, *calibration_texts(countries), target_false_accept=FALSE_ACCEPT)
    finally:
        pack.close()
    write_calibration(folder, image=image, text=text)


def _looks(retriever: Retriever, queries: Sequence[ImageQuery]) -> list[Look]:
    return [look for at in range(0, len(queries), BATCH) for look in retriever.look(queries[at : at + BATCH])]


def _bearers(pack: Pack, countries: Sequence[Country]) -> dict[str, frozenset[Key]]:
    """The articles of the countries that fly each flag."""
    hits = pack.store.named([name_key(country.name) for country in countries])
    articles = {hit.key: hit.article for hit in hits if not hit.redirect}
    found: dict[str, frozenset[Key]] = {}
    for country in countries:
        key = pack.name, articles[name_key(country.name)]
        found[country.flag] = found.get(country.flag, frozenset()) | {key}
    return found


def calibration_crops(
    flags: Mapping[str, Pixels], scenes: int
) -> tuple[list[tuple[str, ImageQuery]], list[ImageQuery]]:
    """Looks as a policy takes them, none of them exact: at real flags, by key; at invented ones, and at several."""
    known: list[tuple[str, ImageQuery]] = []
    unknown: list[ImageQuery] = []
    gaze = GazeConfig()
    keys = sorted(flags)
    for seed in range(FIRST_SCENE_SEED, FIRST_SCENE_SEED + scenes):
        rng = np.random.default_rng([seed, 11])
        shown = dict(_shown(rng, keys, flags))
        spec = make_spec(seed, list(shown))
        pixels = draw_scene(spec, shown, SCENE_WIDTH)
        picture = Picture(pixels)
        size = picture.size
        for index, key in enumerate(shown):
            box = spec.box(index, size)
            shake = rng.normal(0, SHAKE, 4) * [box.width, box.height, box.width, box.height]
            shaken, _ = mend_box(
                Box(*(np.array([box.x0, box.y0, box.x1, box.y1]) + shake).tolist()), size, gaze.min_side
            )
            query = gaze_query(picture, shaken, "", gaze)
            if key in flags:
                known.append((key, query))
            else:
                unknown.append(query)
        if len(shown) > 2:
            unknown.append(ImageQuery(pixels))
    return known, unknown


def _shown(rng: np.random.Generator, keys: Sequence[str], flags: Mapping[str, Pixels]) -> Iterator[tuple[str, Pixels]]:
    """One to four flags, about half of them invented."""
    for _ in range(int(rng.integers(1, 5))):
        if rng.random() < 0.5:
            key = keys[int(rng.integers(len(keys)))]
            yield key, flags[key]
        else:
            seed = FIRST_INVENTED_SEED + int(rng.integers(1_000_000))
            yield f"invented-{seed}", invented_flag(seed)


def calibration_texts(countries: Sequence[Country]) -> tuple[list[str], list[str]]:
    """Queries about countries, and the same about names that nobody bears."""
    rng = np.random.default_rng(13)
    borne = {country.name.lower() for country in countries} | {country.capital.lower() for country in countries}
    known = []
    for _ in range(TEXTS):
        country = countries[int(rng.integers(len(countries)))]
        if country.capital and rng.random() < 0.2:
            known.append(_pick(rng, _ASKED_BACK).format(name=country.capital))
        elif country.currency and rng.random() < 0.1:
            known.append(f"countries that use the {country.currency}")
        else:
            known.append(_pick(rng, _ASKED).format(name=_pick(rng, (country.name, *country.aliases[2:]))))
    unknown: list[str] = []
    while len(unknown) < TEXTS:
        name = "".join(_pick(rng, part.split()) for part in _SYLLABLES).capitalize()
        if name.lower() not in borne:
            unknown.append(_pick(rng, (*_ASKED, *_ASKED_BACK, "countries that use the {name}")).format(name=name))
    return known, unknown


def _pick(rng: np.random.Generator, values: Sequence[str]) -> str:
    return values[int(rng.integers(len(values)))]


def stored_flags(pack: Pack, countries: Sequence[Country]) -> dict[str, Pixels]:
    """The flags as the pack holds them, by flag key."""
    keys = {country.name: country.flag for country in countries}
    flags = {}
    rows = pack.store.images(pack.store.image_ids().tolist())
    for row in rows.values():
        picture = pack.picture(row.id)
        if picture is None:
            continue
        pixels = png_pixels(picture.data)
        # The first title is the image's own; the others may fly one that only looks the same.
        flags.update({keys[title]: pixels for title in row.titles[::-1] if title in keys and keys[title] not in flags})
        flags[keys[row.titles[0]]] = pixels
    return flags
