"""Fix a test set: generate it from a seed and write its hash to benchmarks/testsets.json.

    python -m benchmarks.make_test_set held-out --seed 1 --per-kind 48
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from gog_edge.cli.common import command_imports, command_main

with command_imports(__name__):
    from atlas.countries import COUNTRIES_FILE, load_countries
    from atlas.pack import stored_flags
    from atlas.testset import QuestionGenerator, items_hash
    from benchmarks.bench_atlas import TEST_SETS
    from gog_edge.bundle import DEFAULT_BUNDLE, open_bundle
    from gog_edge.files import read_json, write_json
    from gog_edge.retrieval.encoder import Encoder
    from gog_edge.retrieval.pack import Pack


@command_main
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the test set")
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE, help="default: the atlas")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--per-kind", type=int, default=48, help="questions of each kind (default %(default)s)")
    args = parser.parse_args(argv)
    bundle = open_bundle(args.bundle)
    countries = load_countries(bundle.packs[0] / COUNTRIES_FILE)
    pack = Pack.open(bundle.packs[0], Encoder.open(bundle.encoder))
    flags = stored_flags(pack, countries)
    pack.close()
    items = QuestionGenerator(countries, flags, args.seed).generate(args.per_kind)
    fixed = {"seed": args.seed, "per_kind": args.per_kind, "questions": len(items), "sha256": items_hash(items)}
    sets = read_json(TEST_SETS, what="test sets") if TEST_SETS.exists() else {}
    write_json(TEST_SETS, sets | {args.name: fixed})
    print(json.dumps({args.name: fixed}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
