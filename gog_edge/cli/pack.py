"""`gog-edge pack`: build packs, inspect them, and change them. Each change is a generation that servers switch to."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from gog_edge.cli.common import App, print_errors
from gog_edge.cli.pack_distribution import embed_ray, export_parquet, load_milvus
from gog_edge.errors import InputError

if TYPE_CHECKING:
    from gog_edge.bundle import Bundle
    from gog_edge.indexing.generation import PackOptions
    from gog_edge.indexing.sources.base import Source
    from gog_edge.indexing.sources.open import Kind
    from gog_edge.retrieval.encoder import Encoder
    from gog_edge.retrieval.manifest import Manifest
    from gog_edge.retrieval.text.encoder import TextEncoder

app = App(name="pack", no_args_is_help=True, help="Build packs, inspect them, and change them while they are "
                                                    "served.")
CALIBRATING = "calibrating"  # a stage
RESUME = "completed steps are kept; run the same command again to resume"

PackArgument = Annotated[Path, typer.Argument(metavar="PACK", help="Folder of a pack.")]
EncoderOption = Annotated[Path | None, typer.Option("--encoder", help="Folder of the pack's encoder; default: the "
                                                    "encoder of the bundle that contains the pack.")]
TextEncoderOption = Annotated[Path | None, typer.Option("--text-encoder", help="Folder of the text encoder of a pack "
                                                        "with vectors of paragraphs; default: that of the bundle that "
                                                        "contains the pack.")]
ImagesOption = Annotated[Path | None, typer.Option(help="Folder of images, for snapshots that contain addresses "
                                                   "only.")]
KindOption = Annotated[str | None, typer.Option(help="Format of SOURCE; default: detected from its first bytes.")]
LanguageOption = Annotated[str, typer.Option(help="Language of the WIT rows to read, empty for all; or the variant of "
                                             "a dump's language to choose, such as zh-hant.")]
LicenceOption = Annotated[str | None, typer.Option(help="Licence of texts, and of a folder's pictures, where SOURCE "
                                                   "does not state one.")]
ColumnOption = Annotated[list[str] | None, typer.Option("--column", metavar="FIELD=NAME", help="Column of a folder's "
                                                        "tables with the file, title, caption, text, licence or "
                                                        "attribution, where its name is not recognised; repeatable.")]
EncodingOption = Annotated[str, typer.Option(metavar="NAME", help="Encoding of a folder's tables and texts that are "
                                             "not in UTF-8, such as cp1251 or shift_jis; default: Windows-1252.")]
NoChecksumOption = Annotated[bool, typer.Option("--no-checksum", help="Do not compare the checksum of a ZIM file "
                                                "before it is read; its damaged entries are then skipped.")]
WorkersOption = Annotated[int, typer.Option(help="Number of processes that parse; 0 for one per core.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
MemoryOption = Annotated[str | None, typer.Option("--memory", help="Maximum memory of a search, for example 2G; "
                                                  "default: as the pack was built, no limit for a new one.")]
RecallOption = Annotated[float | None, typer.Option("--recall", help="Share of the ten nearest neighbours that an "
                                                    "index must return, 0.5 to 1; default: as the pack was built, "
                                                    "0.95 for a new one.")]

app.command("embed-ray")(embed_ray)
app.command("export-parquet")(export_parquet)
app.command("load-milvus")(load_milvus)


@app.command()
def build(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A snapshot.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the pack. It must be new or of an unfinished "
                                        "build, except with --update.")],
    encoder: Annotated[Path | None, typer.Option(help="Folder of the encoder, made by `gog-edge export clip`.")] = None,
    text_only: Annotated[bool, typer.Option("--text-only", help="Build without vectors of images and "
                                            "captions.")] = False,
    text_encoder: Annotated[Path | None, typer.Option(help="Folder of a text encoder, made by `gog-edge export text`: "
                                                      "paragraphs are searched by vectors too.")] = None,
    name: Annotated[str | None, typer.Option(help="Name in citations and addresses; default: the name of OUT, or of "
                                             "the pack to update.")] = None,
    update: Annotated[bool, typer.Option("--update", help="Replace the content of the pack with this snapshot: only "
                                         "changes are embedded, and missing articles are deleted.")] = False,
    images: ImagesOption = None,
    kind: KindOption = None,
    language: LanguageOption = "en",
    licence: LicenceOption = None,
    column: ColumnOption = None,
    encoding: EncodingOption = "",
    memory: MemoryOption = None,
    recall: RecallOption = None,
    tiles: Annotated[bool, typer.Option("--tiles", help="Embed parts of lead images too: six vectors instead of "
                                        "one.")] = False,
    no_captions: Annotated[bool, typer.Option("--no-captions", help="Do not embed captions.")] = False,
    no_calibration: Annotated[bool, typer.Option("--no-calibration", help="Do not calibrate the probability that a "
                                                 "subject is in the pack; `gog-edge pack calibrate` does it "
                                                 "later.")] = False,
    shard_rows: Annotated[int | None, typer.Option(help="Maximum images of a shard. A build that is killed "
                                                   "loses one shard at most. Default: 16,384.")] = None,
    workers: WorkersOption = 0,
    no_checksum: NoChecksumOption = False,
    stop_after: Annotated[str | None, typer.Option(metavar="reading", help="Leave the embedding to `gog-edge pack "
                                                   "embed-ray`; the same command without this option completes the "
                                                   "build.")] = None,
) -> None:
    """Build a pack from a snapshot, or update one to a newer snapshot.

    SOURCE is a Kiwix .zim file, Google's WIT (.tsv.gz, with --images), Encyclopedic VQA's knowledge base or InfoSeek's
    Wiki6M (with --images), a MediaWiki XML dump, or a folder of pictures with captions in a table or in text files.
    A build that was stopped or killed is resumed by the same command. The last line of the output is a JSON object.
    """
    with print_errors(interrupted=RESUME):
        from gog_edge.cli.render_pack import StageProgress, pack_json, print_pack
        from gog_edge.indexing.build import READING, build_pack, read_snapshot
        from gog_edge.indexing.calibration import calibrate_pack
        from gog_edge.indexing.generation import PackOptions
        from gog_edge.retrieval.encoder import Encoder
        from gog_edge.retrieval.manifest import MANIFEST, read_manifest
        from gog_edge.retrieval.text.encoder import TextEncoder

        if (encoder is None) != text_only:
            raise typer.BadParameter("give either --encoder DIR or --text-only")
        if stop_after not in (None, READING):
            raise typer.BadParameter(f"must be '{READING}', got '{stop_after}'", param_hint="'--stop-after'")
        with StageProgress() as progress:
            before = read_manifest(out) if update and (out / MANIFEST).is_file() else None
            options = PackOptions() if before is None else PackOptions.from_manifest(before)
            options = _change_options(options, memory, recall, shard_rows)
            options = replace(options, tiles=options.tiles or tiles, captions=options.captions and not no_captions)
            opened = None if encoder is None else Encoder.open(encoder)
            opened_text = None if text_encoder is None else TextEncoder.open(text_encoder)
            settings: dict[str, Any] = {
                "name": name or (out.resolve().name if before is None else before.name), "encoder": opened,
                "options": options, "workers": _workers(workers), "update": update,
                "command": _command_line(context), "on_progress": progress, "text_encoder": opened_text,
                "verify": not no_checksum,
            }  # fmt: skip
            snapshot = _open_source(source, kind, images, language, licence, column, encoding)
            if stop_after is not None:
                read_snapshot(snapshot, out, **settings)
                manifest = None
            else:
                manifest = build_pack(snapshot, out, **settings)
                has_vectors = opened is not None or opened_text is not None
                if has_vectors and not no_calibration and (update or not _is_calibrated(manifest)):
                    progress(CALIBRATING, 0, 1)
                    manifest = calibrate_pack(out, opened, text_encoder=opened_text)
                    progress(CALIBRATING, 1, 1)
        if manifest is None:
            _print_json({"pack": str(out), "stopped_after": stop_after})
            return
        print_pack(out, manifest, seconds=progress.seconds)
        seconds = {stage: round(took, 2) for stage, took in progress.seconds.items()}
        _print_json({"pack": str(out), "seconds": seconds, **pack_json(out, manifest)})


@app.command()
def info(pack: PackArgument, as_json: JsonOption = False) -> None:
    """Print the contents of a pack."""
    with print_errors():
        from gog_edge.cli.render_pack import pack_json, print_pack
        from gog_edge.retrieval.manifest import read_manifest

        manifest = read_manifest(pack)
        if as_json:
            _print_json(pack_json(pack, manifest))
        else:
            print_pack(pack, manifest)


@app.command()
def verify(pack: PackArgument, as_json: JsonOption = False) -> None:
    """Read all files of a pack and check them. If something is wrong, the first fault is printed; exit code 1.

    Vectors that a Milvus server searches, according to the bundle that contains the pack, may be missing.
    """
    with print_errors():
        from gog_edge.cli.render_pack import StageProgress
        from gog_edge.retrieval.manifest import read_manifest
        from gog_edge.retrieval.pack import verify_pack

        with StageProgress() as progress:
            before = read_manifest(pack)
            server = _server_of(pack, before)
            total = sum(entry.size for entry in before.files)
            manifest = verify_pack(pack, progress.counter("comparing files", total), vectors=server is None)
    _print_result(manifest, "is valid" if server is None else f"is valid; its vectors are on {server}", as_json)


@app.command()
def add(
    pack: PackArgument,
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A snapshot, as for `gog-edge pack build`.")],
    encoder: EncoderOption = None,
    text_encoder: TextEncoderOption = None,
    images: ImagesOption = None,
    kind: KindOption = None,
    language: LanguageOption = "en",
    licence: LicenceOption = None,
    column: ColumnOption = None,
    encoding: EncodingOption = "",
    workers: WorkersOption = 0,
    no_checksum: NoChecksumOption = False,
    memory: MemoryOption = None,
    recall: RecallOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add a snapshot; articles of the same key are replaced. Build a separate pack for a collection of your own."""
    with print_errors(interrupted=RESUME):
        from gog_edge.cli.render_pack import StageProgress, print_report
        from gog_edge.indexing.build import build_pack
        from gog_edge.indexing.generation import PackOptions
        from gog_edge.retrieval.manifest import read_manifest

        with StageProgress() as progress:
            before = read_manifest(pack)
            snapshot = _open_source(source, kind, images, language, licence, column, encoding)
            options = _change_options(PackOptions.from_manifest(before), memory, recall)
            manifest = build_pack(
                snapshot, pack, name=before.name, encoder=_open_encoder(pack, before, encoder), options=options,
                workers=_workers(workers), add=True, on_progress=progress, verify=not no_checksum,
                text_encoder=_open_text_encoder(pack, before, text_encoder),
            )  # fmt: skip
    if not as_json:
        print_report(pack, manifest)
    _print_result(manifest, f"has {manifest.counts.articles - before.counts.articles:+,} articles", as_json)


@app.command()
def remove(
    pack: PackArgument,
    article: Annotated[list[str] | None, typer.Option("--article", help="Title or key; may be repeated.")] = None,
    image: Annotated[list[int] | None, typer.Option("--image", help="Id, as in citations; may be repeated.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Delete articles and images by writing tombstones; `gog-edge pack compact` frees their space."""
    with print_errors():
        from gog_edge.indexing.tombstones import remove as remove_records

        if not article and not image:
            raise InputError("there is nothing to delete; give --article TITLE or --image ID")
        manifest = remove_records(pack, articles=article or (), images=image or ())
    counts = manifest.counts
    _print_result(manifest, f"has {counts.articles:,} articles and {counts.images:,} images left", as_json)


@app.command()
def calibrate(
    pack: PackArgument,
    encoder: EncoderOption = None,
    text_encoder: TextEncoderOption = None,
    false_accept: Annotated[float, typer.Option(min=0, max=0.99, help="Share of absent subjects that may count as "
                                                "found.")] = 0.05,
    as_json: JsonOption = False,
) -> None:
    """Calibrate the probability that a subject is in the pack, with views of its own images and its own titles.

    This replaces an existing calibration, even one from more realistic queries, such as the scenes of the atlas.
    """
    with print_errors():
        from gog_edge.cli.render_pack import calibration_changes, spinner
        from gog_edge.indexing.calibration import calibrate_pack
        from gog_edge.retrieval.manifest import read_manifest

        with spinner("searching views of stored images"):
            before = read_manifest(pack)
            manifest = calibrate_pack(
                pack, _open_encoder(pack, before, encoder), target_false_accept=false_accept,
                text_encoder=_open_text_encoder(pack, before, text_encoder),
            )  # fmt: skip
    if not as_json:
        typer.echo("\n".join(calibration_changes(before, manifest)))
    calibrated = manifest.image_calibration or manifest.text_calibration
    outcome = "is calibrated" if calibrated else "has too few images and titles to be calibrated"
    _print_result(manifest, outcome, as_json)


@app.command()
def compact(
    pack: PackArgument,
    encoder: EncoderOption = None,
    text_encoder: TextEncoderOption = None,
    memory: MemoryOption = None,
    recall: RecallOption = None,
    as_json: JsonOption = False,
) -> None:
    """Rewrite a pack of many generations without deleted rows. No image is embedded again."""
    with print_errors(interrupted="the pack is unchanged"):
        from gog_edge.cli.render_pack import StageProgress, describe_superseded
        from gog_edge.indexing.compact import compact as compact_pack
        from gog_edge.indexing.generation import PackOptions
        from gog_edge.retrieval.manifest import read_manifest

        with StageProgress() as progress:
            before = read_manifest(pack)
            opened = _open_encoder(pack, before, encoder)
            opened_text = _open_text_encoder(pack, before, text_encoder)
            options = _change_options(PackOptions.from_manifest(before), memory, recall)
            manifest = compact_pack(pack, opened, options, progress, text_encoder=opened_text)
        freed = describe_superseded(pack, manifest)
    sizes = " to ".join(f"{sum(entry.size for entry in one.files) / 2**20:,.1f}" for one in (before, manifest))
    _print_result(manifest, f"went from {sizes} MiB{freed}", as_json)


@app.command("reindex")
def reindex_command(pack: PackArgument, as_json: JsonOption = False) -> None:
    """Convert a pack that an earlier version built: its words are indexed again, in a new generation.

    Nothing is embedded and no encoder is needed. The pack can be served meanwhile. An interrupted conversion is resumed
    by the same command.
    """
    with print_errors(interrupted=RESUME):
        from gog_edge.cli.render_pack import StageProgress, calibration_changes, describe_superseded
        from gog_edge.indexing.reindex import reindex
        from gog_edge.retrieval.manifest import read_manifest

        with StageProgress() as progress:
            before = read_manifest(pack)
            manifest = reindex(pack, progress)
        freed = describe_superseded(pack, manifest)
    if manifest.generation == before.generation:
        _print_result(manifest, "has the words of this version already", as_json)
        return
    if not as_json:
        typer.echo("\n".join(calibration_changes(before, manifest)))
    _print_result(manifest, f"is indexed again{freed}", as_json)


# --- shared parts -------------------------------------------------------------------------------


def _open_source(source: Path, kind: str | None, images: Path | None, language: str, licence: str | None,
                 columns: list[str] | None, encoding: str) -> Source:
    from gog_edge.indexing.sources.open import open_source  # needs the extra `index`, which --help does not

    return open_source(source, kind=cast("Kind | None", kind), images=images, language=language, licence=licence,
                       columns=columns or (), encoding=encoding)


def _change_options(options: PackOptions, memory: str | None, recall: float | None,
                    shard_rows: int | None = None) -> PackOptions:
    """Return the options with the given values."""
    from gog_edge.planner import parse_size

    if memory is not None:
        options = replace(options, memory=parse_size(memory))
    if recall is not None:
        if not 0.5 <= recall <= 1:
            raise InputError(f"--recall must be from 0.5 to 1, got {recall}")
        options = replace(options, recall=recall)
    if shard_rows is not None:
        if shard_rows < 1:
            raise InputError(f"--shard-rows must be at least 1, got {shard_rows}")
        options = replace(options, shard_rows=shard_rows)
    return options


def _workers(workers: int) -> int | None:
    if workers < 0:
        raise InputError(f"--workers must be at least 1, or 0 for one per core, got {workers}")
    return workers or None


def _is_calibrated(manifest: Manifest) -> bool:
    """Return whether a pack has a calibration, which it has not if its build was stopped right after the commit."""
    return manifest.image_calibration is not None or manifest.text_calibration is not None


def _command_line(context: typer.Context) -> str:
    """Return the command line of the running command."""
    words = context.command_path.split()
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if parameter.param_type_name == "argument":
            words.append(str(value))
        elif value is True:
            words.append(parameter.opts[0])
        elif isinstance(value, list | tuple):  # of an option that may be repeated
            words += [word for one in value for word in (parameter.opts[0], str(one))]
        elif value != parameter.default:
            words += [parameter.opts[0], str(value)]
    return shlex.join(words)


def _open_encoder(pack: Path, manifest: Manifest, folder: Path | None) -> Encoder | None:
    """Open the given encoder, or that of the bundle that contains the pack; None for a pack without images."""
    from gog_edge.retrieval.encoder import Encoder

    if manifest.encoder is None:
        return None
    if folder is not None:
        return Encoder.open(folder)
    bundle = _bundle_of(pack)
    if bundle is None:
        raise InputError(f"'{pack}' is not in a bundle with its encoder '{manifest.encoder.name}'; give --encoder DIR")
    return Encoder.open(bundle.encoder)


def _open_text_encoder(pack: Path, manifest: Manifest, folder: Path | None) -> TextEncoder | None:
    """Open the given text encoder, or that of the bundle that contains the pack; None for a pack without one."""
    from gog_edge.retrieval.text.encoder import TextEncoder

    if manifest.text_encoder is None:
        if folder is not None:
            raise InputError(f"pack '{manifest.name}' was built without a text encoder; omit --text-encoder, or build "
                             "a new pack with it")
        return None
    bundle = None if folder is not None else _bundle_of(pack)
    folder = folder if bundle is None else bundle.text_encoder
    if folder is None:
        raise InputError(f"'{pack}' is not in a bundle with its text encoder '{manifest.text_encoder.name}'; give "
                         "--text-encoder DIR")
    return TextEncoder.open(folder)


def _server_of(pack: Path, manifest: Manifest) -> str | None:
    """Return the address of the server with the pack's vectors, according to the bundle; None if they are here."""
    if all((pack / path).is_file() for path in (*manifest.images.paths, *manifest.captions.paths)):
        return None
    bundle = _bundle_of(pack)
    servers = {} if bundle is None else bundle.servers
    return next((server.uri for path, server in servers.items() if path.resolve() == pack.resolve()), None)


def _bundle_of(pack: Path) -> Bundle | None:
    from gog_edge.bundle import FILE, open_bundle

    root = next((folder for folder in pack.resolve().parents if (folder / FILE).is_file()), None)
    return None if root is None else open_bundle(root)


def _print_result(manifest: Manifest, result: str, as_json: bool) -> None:
    if as_json:
        from dataclasses import asdict

        _print_json({"pack": manifest.name, "generation": manifest.generation, "counts": asdict(manifest.counts)})
    else:
        typer.echo(f"pack '{manifest.name}', generation {manifest.generation}, {result}")


def _print_json(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False))
