"""Build a pack from a snapshot, or bring one to a newer snapshot.

    python -m index.build_pack wikipedia_en_top_maxi_2026-01.zim packs/top --encoder encoder --memory 4G
    python -m index.build_pack collection/ packs/museum --encoder encoder --name museum
    python -m index.build_pack wikipedia_en_top_maxi_2026-07.zim packs/top --encoder encoder --update

SOURCE is a Kiwix .zim file, Google's WIT (.tsv.gz, with --images), Encyclopedic VQA's knowledge base or InfoSeek's
Wiki6M (with --images), a MediaWiki XML dump, or a folder of pictures with captions in a table or beside them.
Stopped or killed at any moment, the same command goes on. The last line is the result as JSON.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gog_edge.cli.common import FAILURES, explained
from gog_edge.cli.render_pack import Stages, pack_json, show_pack
from gog_edge.errors import InputError
from gog_edge.indexing.build import READING, build_pack, read_snapshot
from gog_edge.indexing.calibration import calibrate_pack
from gog_edge.indexing.generation import SHARD_ROWS, PackOptions
from gog_edge.indexing.sources.base import Source
from gog_edge.planner import parse_size
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.manifest import MANIFEST, Manifest, read_manifest

CALIBRATING = "calibrating"  # a stage
GOES_ON = "what is done is kept: the same command goes on"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m index.build_pack", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", type=Path, help="a snapshot")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of the pack: new, unfinished, or with --update")
    searched = parser.add_mutually_exclusive_group(required=True)
    searched.add_argument("--encoder", type=Path, help="encoder folder made by export.export_clip")
    searched.add_argument("--text-only", action="store_true", help="without vectors: searched by words alone")
    parser.add_argument("--name", help="in citations and addresses (default: the name of OUT, or the pack's own)")
    parser.add_argument("--update", action="store_true", help="the pack that is there becomes this snapshot: only what "
                        "changed is embedded, what it does not hold any more goes")
    parser.add_argument("--images", type=Path, help="folder of images, for snapshots that hold addresses alone")
    parser.add_argument("--kind", help="what SOURCE is (default: told by its first bytes)")
    parser.add_argument("--language", default="en", help="of WIT's rows; empty for all (%(default)s)")
    parser.add_argument("--licence", help="of texts, and of a folder's pictures, where SOURCE names none")
    parser.add_argument("--memory", help="what the search may take, as 2G (default: what is quickest)")
    parser.add_argument("--recall", type=float, help="share of the ten nearest that an index must find (default: 0.95)")
    parser.add_argument("--tiles", action="store_true", help="embed lead pictures in parts too: six vectors for one")
    parser.add_argument("--no-captions", action="store_true", help="do not embed captions")
    parser.add_argument("--no-calibration", action="store_true", help="do not measure how surely it is known what is "
                        "in it; `gog-edge pack calibrate` does later")
    parser.add_argument("--shard-rows", type=int, help="pictures that are embedded at a time: what a kill costs "
                        f"(default: {SHARD_ROWS:,})")
    parser.add_argument("--workers", type=int, default=0, help="processes that read (default: one a core)")
    parser.add_argument("--stop-after", choices=[READING], help="leave the embedding to index.embed_ray; the same "
                        "command without goes on from there")
    return parser.parse_args(argv)


def _options(args: argparse.Namespace, before: Manifest | None) -> PackOptions:
    """As the arguments say; what they leave open is as before, or as usual."""
    options = PackOptions() if before is None else PackOptions.of(before)
    values = asdict(options)
    if args.memory is not None:
        values["memory"] = parse_size(args.memory)
    if args.recall is not None:
        if not 0.5 <= args.recall <= 1:
            raise InputError(f"a recall of {args.recall}; give a share from 0.5 to 1")
        values["recall"] = args.recall
    if args.shard_rows is not None:
        if args.shard_rows < 1:
            raise InputError(f"shards of {args.shard_rows} rows; give at least 1")
        values["shard_rows"] = args.shard_rows
    if args.workers < 0:
        raise InputError(f"{args.workers} workers; give at least 1, or 0 for one a core")
    values["tiles"] |= args.tiles
    values["captions"] &= not args.no_captions
    return PackOptions(**values)


def _build(args: argparse.Namespace, command: str, stages: Stages) -> Manifest | None:
    before = read_manifest(args.out) if args.update and (args.out / MANIFEST).is_file() else None
    name = args.name or (args.out.resolve().name if before is None else before.name)
    settings: dict[str, Any] = {
        "name": name, "encoder": None if args.text_only else Encoder.open(args.encoder),
        "options": _options(args, before), "workers": args.workers or None, "update": args.update, "command": command,
        "on_progress": stages,
    }  # fmt: skip
    source = _source(args)
    if args.stop_after == READING:
        read_snapshot(source, args.out, **settings)
        return None
    manifest = build_pack(source, args.out, **settings)
    if args.text_only or args.no_calibration or (not args.update and _calibrated(manifest)):
        return manifest
    stages(CALIBRATING, 0, 1)
    manifest = calibrate_pack(args.out, settings["encoder"])
    stages(CALIBRATING, 1, 1)
    return manifest


def _source(args: argparse.Namespace) -> Source:
    from gog_edge.indexing.sources.open import open_source  # readers need the extra `index`: --help does not

    return open_source(args.source, kind=args.kind, images=args.images, language=args.language, licence=args.licence)


def _calibrated(manifest: Manifest) -> bool:
    """Whether it is: not so where the same command was stopped between the commit and the calibration."""
    return manifest.image_calibration is not None or manifest.text_calibration is not None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = _arguments(argv)
    command = shlex.join(["python", "-m", "index.build_pack", *(sys.argv[1:] if argv is None else argv)])
    try:
        with Stages() as stages:
            manifest = _build(args, command, stages)
    except KeyboardInterrupt:
        print(f"build_pack: stopped; {GOES_ON}", file=sys.stderr)
        return 130
    except FAILURES as exc:
        print(f"build_pack: {explained(exc)}", file=sys.stderr)
        return 1
    if manifest is None:
        print(json.dumps({"pack": str(args.out), "stopped_after": args.stop_after}))
        return 0
    show_pack(args.out, manifest, seconds=stages.seconds)
    seconds = {stage: round(took, 2) for stage, took in stages.seconds.items()}
    print(json.dumps({"pack": str(args.out), "seconds": seconds, **pack_json(args.out, manifest)}, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
