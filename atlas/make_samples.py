"""Draw the sample pictures of the atlas bundle, with questions that suit them.

    python -m atlas.make_samples gog_edge/data/atlas

The asked countries are held out from all policy training.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from atlas.countries import COUNTRIES_FILE, load_countries
from atlas.pack import stored_flags
from atlas.scenes import draw_scene, make_spec, relations
from atlas.testset import invented_key, scene_flags
from gog_edge.files import write_atomic, write_json
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.pack import Pack
from gog_edge.types import Pixels

WIDTH = 800
FIRST_SEED = 5_000_000_000


@dataclass(frozen=True, slots=True)
class Wanted:
    """A sample: the flags it shows, where the first of them must stand, and what to ask."""

    name: str
    title: str
    flags: tuple[str, ...]
    place: str  # a relation of scenes.relations; empty for a single flag
    questions: tuple[str, ...]
    occluded: bool = False


SAMPLES = (
    Wanted(
        "row", "A row of flags", ("fi", "br", "cn", "za"), "left2",
        ("What is the capital of the country of the second flag from the left?",
         "Which country does the rightmost flag belong to?", "How many flags are there?"),
    ),
    Wanted(
        "wall", "Six flags on a wall", ("lk", "ca", "de", "jm", "mx", "pt"), "largest",
        ("Which languages are spoken in the country with the largest flag?",
         "How many people live in the country of the smallest flag?"),
    ),
    Wanted(
        "neighbours", "From flag to neighbour", ("hu", "sn", "kr"), "middle",
        ("What is the capital of a country that borders the country with the flag in the middle?",
         "Which other country uses the same currency as the country of the leftmost flag?"),
    ),
    Wanted(
        "one", "One flag", ("cr",), "",
        ("What is the currency of the country with this flag?", "Name the country of this flag."),
    ),
    Wanted(
        "pair", "Two that look alike", ("lv", "qa"), "right1",
        ("Beside the flag of Qatar hangs another flag. What is the capital of the country of the other flag?",
         "Which flag is larger, the left or the right one?"),
    ),
    Wanted(
        "stranger", "A flag of no country", (invented_key(10_007), "us", "fr"), "right1",
        ("Which country does the flag on the far right belong to?",
         "What is the capital of the country of the leftmost flag?"),
    ),
    Wanted(
        "hidden", "Behind the pole", ("tr", "no", "ke"), "bottom1",
        ("What is the dialling code of the country of the lowest flag?",), occluded=True,
    ),
)  # fmt: skip


def draw(wanted: Wanted, flags: dict[str, Pixels]) -> Pixels:
    """The first seed whose scene puts the asked flag where it is asked for."""
    seed = FIRST_SEED
    while True:
        spec = make_spec(seed, list(wanted.flags), occluded=0 if wanted.occluded else None, occlusion_rate=0.0)
        if not wanted.place or relations(spec).get(wanted.place) == 0:
            return draw_scene(spec, scene_flags(spec, flags), WIDTH)
        seed += 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    args = parser.parse_args(argv)
    folder = args.bundle / "packs" / "atlas"
    pack = Pack.open(folder, Encoder.open(args.bundle / "encoder"))
    flags = stored_flags(pack, load_countries(folder / COUNTRIES_FILE))
    out = args.bundle / "samples"
    out.mkdir(exist_ok=True)
    listing = []
    for wanted in SAMPLES:
        stream = io.BytesIO()
        Image.fromarray(np.asarray(draw(wanted, flags))).save(stream, "JPEG", quality=88)
        write_atomic(out / f"{wanted.name}.jpg", stream.getvalue())
        listing.append({"picture": f"{wanted.name}.jpg", "title": wanted.title, "questions": list(wanted.questions)})
    write_json(out / "samples.json", listing)
    print(json.dumps({"samples": len(listing), "folder": str(out)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
