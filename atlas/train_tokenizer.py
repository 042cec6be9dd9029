"""Learn the atlas policy's tokenizer from trajectories about made-up countries.

python -m atlas.train_tokenizer runs/tokenizer --flags flag-icons-7.5.0.tgz
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from atlas.countries import from_geonames
from atlas.flags import load_flag_icons
from atlas.policy.teacher import Scene, Teacher
from atlas.policy.tokens import save_tokenizer, train_tokenizer
from atlas.policy.worlds import Names, gather_names, make_world
from atlas.scenes import RELATIONS
from gog_edge.policy.dialect.loader import load_dialect
from gog_edge.types import Box


def trajectory_texts(names: Names, count: int, seed: int = 0) -> Iterator[str]:
    """Texts of `count` trajectories; the pictures do not matter here."""
    rng = np.random.default_rng([seed, 21])
    teacher = Teacher(load_dialect("atlas"), rng)
    picture = np.zeros((196, 252, 3), np.uint8)
    boxes = (Box(7, 7, 91, 70), Box(133, 28, 210, 84))
    for _ in range(count):
        relations = dict.fromkeys(RELATIONS, 0) | {"right1": 1, "bottom1": 1}
        turns = teacher.trajectory(Scene(picture, boxes, relations), make_world(rng, names))
        yield "system user assistant assistant user"  # the roles of the chat format
        yield from (segment for turn in turns for segment in turn.segments if isinstance(segment, str))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--flags", type=Path, required=True, help="npm package flag-icons 7.5.0, tarball or folder")
    parser.add_argument("--trajectories", type=int, default=15_000)
    args = parser.parse_args(argv)
    names = gather_names(from_geonames(load_flag_icons(args.flags)[1]))
    tokenizer = train_tokenizer(trajectory_texts(names, args.trajectories), load_dialect("atlas"))
    args.out.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, args.out)
    print(json.dumps({"entries": tokenizer.get_vocab_size()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
