"""Draw the sample pictures of the atlas bundle and write samples.json with their questions and expected answers.

    python -m atlas.make_samples gog_edge/data/atlas

The country that the first question of a sample is about is held out from all policy training.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gog_edge.cli.common import command_imports, command_main

with command_imports(__name__):
    import numpy as np
    from PIL import Image

    from atlas.countries import COUNTRIES_FILE, load_countries
    from atlas.flags import invented_key
    from atlas.pack import stored_flags
    from atlas.scenes import SceneSpec, draw_scene, flags_of_scene, make_spec, relations
    from atlas.testset import AnswerKey, larger_flag
    from gog_edge.bundle import SAMPLES_FILE
    from gog_edge.files import write_atomic, write_json
    from gog_edge.policy.dialect.loader import load_dialect
    from gog_edge.retrieval.encoder import Encoder
    from gog_edge.retrieval.pack import Pack
    from gog_edge.types import Pixels

WIDTH = 800  # pixels
FIRST_SEED = 5_000_000_000  # disjoint from the seeds of training and test scenes
WHOLE_PICTURE = ""  # place of the flag in a picture of one flag


@dataclass(frozen=True, slots=True)
class SampleQuestion:
    """A question about a sample, and what its answer follows from."""

    text: str
    fact: str  # one of questions.SINGLE_FACTS, or "count", "larger", "bordering", "same currency"
    place: str = WHOLE_PICTURE  # relation of the flag asked about


@dataclass(frozen=True, slots=True)
class SampleRecipe:
    """A sample picture: the flags it shows, and the place where the first of them must be."""

    name: str
    title: str
    flags: tuple[str, ...]
    place: str  # one of scenes.RELATIONS, or WHOLE_PICTURE
    questions: tuple[SampleQuestion, ...]
    occluded: bool = False  # whether the first flag is partly covered


Q = SampleQuestion
SAMPLES = (
    SampleRecipe(
        "row", "A row of flags", ("fi", "br", "cn", "za"), "left2",
        (Q("What is the capital of the country of the second flag from the left?", "capital", "left2"),
         Q("Which country does the rightmost flag belong to?", "name", "right1"),
         Q("How many flags are there?", "count")),
    ),
    SampleRecipe(
        "wall", "Six flags on a wall", ("lk", "ca", "de", "jm", "mx", "pt"), "largest",
        (Q("Which languages are spoken in the country with the largest flag?", "languages", "largest"),
         Q("How many people live in the country of the smallest flag?", "population", "smallest")),
    ),
    SampleRecipe(
        "neighbours", "From flag to neighbour", ("hu", "sn", "kr"), "middle",
        (Q("What is the capital of a country that borders the country with the flag in the middle?", "bordering",
           "middle"),
         Q("Which other country uses the same currency as the country of the leftmost flag?", "same currency",
           "left1")),
    ),
    SampleRecipe(
        "one", "One flag", ("cr",), WHOLE_PICTURE,
        (Q("What is the currency of the country with this flag?", "currency"),
         Q("Name the country of this flag.", "name")),
    ),
    SampleRecipe(
        "pair", "Two that look alike", ("lv", "qa"), "right1",
        (Q("Beside the flag of Qatar hangs another flag. What is the capital of the country of the other flag?",
           "capital", "right1"),
         Q("Which flag is larger, the left or the right one?", "larger")),
    ),
    SampleRecipe(
        "stranger", "A flag of no country", (invented_key(10_007), "us", "fr"), "right1",
        (Q("Which country does the flag on the far right belong to?", "name", "right1"),
         Q("What is the capital of the country of the leftmost flag?", "capital", "left1")),
    ),
    SampleRecipe(
        "hidden", "Behind the pole", ("tr", "no", "ke"), "bottom1",
        (Q("What is the dialling code of the country of the lowest flag?", "phone", "bottom1"),), occluded=True,
    ),
)  # fmt: skip


def find_spec(recipe: SampleRecipe) -> SceneSpec:
    """Return the layout of the first seed that places the first flag where the recipe wants it."""
    seed = FIRST_SEED
    while True:
        spec = make_spec(seed, list(recipe.flags), occluded=0 if recipe.occluded else None, occlusion_rate=0.0)
        if recipe.place == WHOLE_PICTURE or relations(spec).get(recipe.place) == 0:
            return spec
        seed += 1


def draw(recipe: SampleRecipe, flags: Mapping[str, Pixels]) -> Pixels:
    """Draw a sample: [600, 800, 3] uint8 RGB."""
    spec = find_spec(recipe)
    return draw_scene(spec, flags_of_scene(spec, flags), WIDTH)


def expected_answers(question: SampleQuestion, spec: SceneSpec, key: AnswerKey, not_found: str) -> tuple[str, ...]:
    """Return the accepted answers to a question about a sample; `not_found` if the flag belongs to no country."""
    meant = relations(spec)
    if question.fact == "count":
        return (str(len(spec.placed)),)
    if question.fact == "larger":
        answer = larger_flag(meant, "across")
        if answer is None:
            raise ValueError(f"'{question.text}' is ambiguous in the scene with seed {spec.seed}")
        return (answer,)
    index = 0 if question.place == WHOLE_PICTURE else meant[question.place]
    country = key.by_flag.get(spec.placed[index].flag)
    if country is None:
        return (not_found,)
    if question.fact == "bordering":
        return key.bordering_capitals(country)
    return key.same_currency(country) if question.fact == "same currency" else key.fact(country, question.fact)


def listing(key: AnswerKey) -> list[dict[str, object]]:
    """Return the content of samples.json: for each picture its questions, and for each question the right answers."""
    not_found = load_dialect("atlas").not_found
    entries: list[dict[str, object]] = []
    for recipe in SAMPLES:
        spec = find_spec(recipe)
        expected = [list(expected_answers(question, spec, key, not_found)) for question in recipe.questions]
        questions = [question.text for question in recipe.questions]
        entries.append(
            {"picture": f"{recipe.name}.jpg", "title": recipe.title, "questions": questions, "expected": expected}
        )
    return entries


@command_main
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="folder of the atlas bundle; the samples are written to its samples/")
    args = parser.parse_args(argv)
    folder = args.bundle / "packs" / "atlas"
    pack = Pack.open(folder, Encoder.open(args.bundle / "encoder"))
    countries = load_countries(folder / COUNTRIES_FILE)
    flags = stored_flags(pack, countries)
    pack.close()
    out = args.bundle / "samples"
    out.mkdir(exist_ok=True)
    for recipe in SAMPLES:
        stream = io.BytesIO()
        Image.fromarray(np.asarray(draw(recipe, flags))).save(stream, "JPEG", quality=88)
        write_atomic(out / f"{recipe.name}.jpg", stream.getvalue())
    write_json(out / SAMPLES_FILE, listing(AnswerKey(countries, flags)))
    print(json.dumps({"samples": len(SAMPLES), "folder": str(out)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
