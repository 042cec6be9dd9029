"""`gog-edge pack`: look at a pack and change it. Each change is a new generation, which servers take up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from gog_edge.cli.common import errors_shown
from gog_edge.errors import InputError

if TYPE_CHECKING:
    from gog_edge.bundle import Bundle
    from gog_edge.indexing.generation import PackOptions
    from gog_edge.indexing.sources.open import Kind
    from gog_edge.retrieval.encoder import Encoder
    from gog_edge.retrieval.manifest import Manifest

app = typer.Typer(name="pack", no_args_is_help=True, help="Look at a pack, and change it while it is served.")

PackArgument = Annotated[Path, typer.Argument(metavar="PACK", help="Folder of a pack.")]
EncoderOption = Annotated[Path | None, typer.Option("--encoder", help="Folder of the pack's encoder; that of the "
                                                    "bundle that holds the pack when left out.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
MemoryOption = Annotated[str | None, typer.Option("--memory", help="What the search may take, as 2G; as before when "
                                                  "left out.")]
RecallOption = Annotated[float | None, typer.Option("--recall", min=0.5, max=1.0, help="Share of the ten nearest that "
                                                    "an index must find; as before when left out.")]


@app.command()
def info(pack: PackArgument, as_json: JsonOption = False) -> None:
    """Tell what is in a pack."""
    with errors_shown():
        from gog_edge.cli.render_pack import pack_json, show_pack
        from gog_edge.retrieval.manifest import read_manifest

        manifest = read_manifest(pack)
        if as_json:
            _print_json(pack_json(pack, manifest))
        else:
            show_pack(pack, manifest)


@app.command()
def verify(pack: PackArgument, as_json: JsonOption = False) -> None:
    """Read everything of a pack and compare it; exit code 1, and the first fault by name, when something is wrong.

    Vectors that a Milvus server searches, as the bundle around the pack says, need not be here.
    """
    with errors_shown(1):
        from gog_edge.cli.render_pack import Stages
        from gog_edge.retrieval.manifest import read_manifest
        from gog_edge.retrieval.pack import verify_pack

        with Stages() as stages:
            before = read_manifest(pack)
            server = _server_of(pack, before)
            total = sum(entry.size for entry in before.files)
            manifest = verify_pack(pack, stages.counting("comparing files", total), vectors=server is None)
    _done(manifest, "is whole" if server is None else f"is whole but for its vectors, which lie on {server}", as_json)


@app.command()
def add(
    pack: PackArgument,
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A snapshot that index.build_pack takes.")],
    encoder: EncoderOption = None,
    images: Annotated[Path | None, typer.Option(help="Folder of images, for snapshots that hold addresses.")] = None,
    kind: Annotated[str | None, typer.Option(help="What SOURCE is; told by its first bytes when left out.")] = None,
    language: Annotated[str, typer.Option(help="Of WIT's rows.")] = "en",
    licence: Annotated[str | None, typer.Option(help="Of what the source names none for.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read; 0 for one a core.")] = 0,
    memory: MemoryOption = None,
    recall: RecallOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add what a source holds; articles of the same key are replaced. An own collection is better a pack of its own."""
    with errors_shown(interrupted="the same command goes on"):
        from gog_edge.cli.render_pack import Stages
        from gog_edge.indexing.build import build_pack
        from gog_edge.indexing.sources.open import open_source
        from gog_edge.retrieval.manifest import read_manifest

        with Stages() as stages:
            before = read_manifest(pack)
            snapshot = open_source(source, kind=cast("Kind | None", kind), images=images, language=language,
                                   licence=licence)
            manifest = build_pack(
                snapshot, pack, name=before.name, encoder=_encoder(pack, before, encoder),
                options=_options(before, memory, recall), workers=workers or None, add=True, on_progress=stages,
            )  # fmt: skip
    _done(manifest, f"has {manifest.counts.articles - before.counts.articles:+,} articles", as_json)


@app.command()
def remove(
    pack: PackArgument,
    article: Annotated[list[str] | None, typer.Option("--article", help="Title or key; may be repeated.")] = None,
    image: Annotated[list[int] | None, typer.Option("--image", help="Id, as in citations; may be repeated.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Take articles and images out; at once, since nothing else is written anew."""
    with errors_shown():
        from gog_edge.indexing.tombstones import remove as take_out

        if not article and not image:
            raise InputError("nothing is named that is to go; give --article TITLE or --image ID")
        manifest = take_out(pack, articles=article or (), images=image or ())
    _done(manifest, f"has {manifest.counts.articles:,} articles and {manifest.counts.images:,} images left", as_json)


@app.command()
def calibrate(
    pack: PackArgument,
    encoder: EncoderOption = None,
    false_accept: Annotated[float, typer.Option(min=0, max=0.99, help="Share of things that are not there that may "
                                                "count as found.")] = 0.05,
    as_json: JsonOption = False,
) -> None:
    """Measure how surely it is known that a thing is in the pack, with looks at its own pictures and its own words.

    What was measured before is replaced, also where it was measured with better pictures, as the atlas's scenes are.
    """
    with errors_shown():
        from gog_edge.cli.render_pack import recalibrated, waiting
        from gog_edge.indexing.calibration import calibrate_pack
        from gog_edge.retrieval.manifest import read_manifest

        with waiting("looking at its pictures"):
            before = read_manifest(pack)
            manifest = calibrate_pack(pack, _encoder(pack, before, encoder), target_false_accept=false_accept)
    if not as_json:
        typer.echo("\n".join(recalibrated(before, manifest)))
    _done(manifest, "is calibrated", as_json)


@app.command()
def compact(
    pack: PackArgument,
    encoder: EncoderOption = None,
    memory: MemoryOption = None,
    recall: RecallOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a pack of many generations as one, without what is no longer there; no picture is embedded again."""
    with errors_shown(interrupted="the pack is as it was"):
        from gog_edge.cli.render_pack import Stages, about_superseded
        from gog_edge.indexing.compact import compact as make_one
        from gog_edge.retrieval.manifest import read_manifest

        with Stages() as stages:
            before = read_manifest(pack)
            opened = _encoder(pack, before, encoder)
            manifest = make_one(pack, opened, _options(before, memory, recall), stages)
        freed = about_superseded(pack, manifest)
    sizes = " to ".join(f"{sum(entry.size for entry in one.files) / 2**20:,.1f}" for one in (before, manifest))
    _done(manifest, f"went from {sizes} MiB{freed}", as_json)


def _encoder(pack: Path, manifest: Manifest, named: Path | None) -> Encoder | None:
    """The encoder that was named, or that of the bundle around the pack; None for a pack of texts alone."""
    from gog_edge.retrieval.encoder import Encoder

    if manifest.encoder is None:
        return None
    if named is not None:
        return Encoder.open(named)
    bundle = _bundle_of(pack)
    if bundle is None:
        raise InputError(f"'{pack}' lies in no bundle that would tell its encoder '{manifest.encoder.name}'; give "
                         "--encoder DIR")
    return Encoder.open(bundle.encoder)


def _server_of(pack: Path, manifest: Manifest) -> str | None:
    """Where the vectors lie that are not here, if the bundle around the pack says so."""
    if all((pack / path).is_file() for path in (*manifest.images.paths, *manifest.captions.paths)):
        return None
    bundle = _bundle_of(pack)
    servers = {} if bundle is None else bundle.servers
    return next((server.uri for path, server in servers.items() if path.resolve() == pack.resolve()), None)


def _bundle_of(pack: Path) -> Bundle | None:
    from gog_edge.bundle import FILE, open_bundle

    root = next((folder for folder in pack.resolve().parents if (folder / FILE).is_file()), None)
    return None if root is None else open_bundle(root)


def _options(manifest: Manifest, memory: str | None, recall: float | None) -> PackOptions:
    """As the pack was made, but for what is asked for."""
    from dataclasses import replace

    from gog_edge.indexing.generation import PackOptions
    from gog_edge.planner import parse_size

    options = PackOptions.of(manifest)
    options = options if memory is None else replace(options, memory=parse_size(memory))
    return options if recall is None else replace(options, recall=recall)


def _done(manifest: Manifest, what: str, as_json: bool) -> None:
    if as_json:
        _print_json({"pack": manifest.name, "generation": manifest.generation, "counts": _counts(manifest)})
    else:
        typer.echo(f"pack '{manifest.name}', generation {manifest.generation}, {what}")


def _counts(manifest: Manifest) -> dict[str, int]:
    from dataclasses import asdict

    return asdict(manifest.counts)


def _print_json(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False))
