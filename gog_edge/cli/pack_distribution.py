"""`gog-edge pack embed-ray | export-parquet | load-milvus`: packs that are larger than one machine."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

from gog_edge.cli.common import print_errors
from gog_edge.errors import InputError

DtypeOption = Annotated[str, typer.Option(help="Data type of the vectors: float32 or float16. milvus-lite supports "
                                          "float32 only.")]


def embed_ray(
    out: Annotated[Path, typer.Argument(metavar="PACK", help="Folder of the pack, after `gog-edge pack build "
                                        "--stop-after reading`.")],
    encoder: Annotated[Path, typer.Option(help="Folder of the encoder that the build was started with.")],
    address: Annotated[str, typer.Option(help="Address of a Ray cluster, 'auto' to find it, or 'local' for this "
                                           "machine only.")] = "local",
    workers: Annotated[int, typer.Option(help="Number of workers.")] = 2,
    cores: Annotated[int, typer.Option(help="Cores per worker.")] = 1,
    text_encoder: Annotated[Path | None, typer.Option(help="Folder of the text encoder that the build was started "
                                                      "with.")] = None,
) -> None:
    """Embed an unfinished build on many machines or processes with Ray Data. Needs the extra `ray`.

    Every machine of the cluster has gog_edge installed and sees the folders of the pack and of the encoder under the
    same paths (NFS, Lustre). A command that was stopped or killed is resumed by the same command; afterwards the build
    command completes the pack. The last line of the output is a JSON object.
    """
    started = time.perf_counter()
    with print_errors(interrupted="completed shards are kept; run the same command again to resume"):
        from gog_edge.cli.render_pack import StageProgress
        from gog_edge.indexing.distribution.ray_embedding import RayWorkers, embed_with_ray

        if min(workers, cores) < 1:
            raise InputError(f"--workers and --cores must be at least 1, got {workers} and {cores}")
        with StageProgress() as progress:
            shards = embed_with_ray(out, encoder, RayWorkers(workers, cores, address), progress,
                                    text_encoder=text_encoder)
        typer.echo(json.dumps({"pack": str(out), "shards": shards, "seconds": _seconds_since(started)}))


def export_parquet(
    pack: Annotated[Path, typer.Argument(metavar="PACK", help="Folder of a pack.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the files.")],
    dtype: DtypeOption = "float16",
) -> None:
    """Export vectors, ids, titles, captions and licences as Parquet. Needs the extra `milvus`.

    Milvus (`gog-edge pack load-milvus`), Qdrant, OpenSearch and notebooks can read it. The last line of the output is a
    JSON object.
    """
    started = time.perf_counter()
    with print_errors(interrupted="run the same command again"):
        from gog_edge.indexing.distribution.parquet_export import export_parquet as write_parquet
        from gog_edge.indexing.distribution.parquet_export import read_export_info
        from gog_edge.retrieval.vectors.milvus import DTYPES

        _check_choice("--dtype", dtype, DTYPES)
        files = write_parquet(pack, out, dtype=dtype)
        rows = {path.name: read_export_info(path).rows for path in files}
        typer.echo(json.dumps({"out": str(out), "rows": rows, "seconds": _seconds_since(started)}))


def load_milvus(
    pack: Annotated[Path, typer.Argument(metavar="PACK", help="Folder of a pack, or of its Parquet export.")],
    uri: Annotated[str, typer.Argument(metavar="URI", help="Address of the server, for example "
                                       "http://10.0.0.5:19530, or a file of milvus-lite (.db).")],
    key_env: Annotated[str, typer.Option(help="Environment variable with the server's token.")] = "",
    timeout_s: Annotated[float, typer.Option(help="Seconds that a call may take.")] = 30.0,
    index: Annotated[str, typer.Option(help="FLAT, IVF_FLAT, IVF_SQ8, IVF_RABITQ or HNSW.")] = "IVF_FLAT",
    search: Annotated[list[str] | None, typer.Option(metavar="NAME=NUMBER", help="Search parameter, for example "
                                                     "nprobe=128; may be repeated.")] = None,
    dtype: DtypeOption = "float32",
    drop_old: Annotated[bool, typer.Option("--drop-old", help="Drop collections of earlier generations "
                                           "afterwards.")] = False,
) -> None:
    """Load a pack's vectors into a Milvus server and direct searches to them. Needs the extra `milvus`.

    A new collection is filled and indexed, then the alias PACK_SPACE switches to it in one call. A bundle uses
    it with `milvus = "URI"` next to the `path` of the pack in bundle.toml; its copy of the pack then needs neither
    vectors/ nor index/, except for the files of paragraphs, which Milvus does not search. The last line of the output
    is a JSON object.
    """
    started = time.perf_counter()
    with print_errors(interrupted="searches use the old collections; run the same command again"):
        from gog_edge.cli.render_pack import StageProgress
        from gog_edge.config import MilvusConfig
        from gog_edge.indexing.distribution.milvus_loading import INDEX_TYPES, load_export
        from gog_edge.indexing.distribution.parquet_export import export_parquet as write_parquet
        from gog_edge.retrieval.manifest import MANIFEST
        from gog_edge.retrieval.vectors.milvus import DTYPES, MilvusConnection

        _check_choice("--index", index, INDEX_TYPES)
        _check_choice("--dtype", dtype, DTYPES)
        params = dict(_search_parameter(text) for text in search or ())
        server = MilvusConnection.open(MilvusConfig(uri, key_env, timeout_s))
        try:
            with StageProgress() as progress, tempfile.TemporaryDirectory() as temporary:
                export = pack
                if (pack / MANIFEST).is_file():
                    export = Path(temporary)
                    write_parquet(pack, export,
                                  on_progress=lambda space, *rows: progress(f"{space} to Parquet", *rows))
                spaces = load_export(export, server, index=index, dtype=dtype, drop_old=drop_old, search=params,
                                     on_progress=progress)
        finally:
            server.close()
        aliases = {space.alias: space.to_json() for space in spaces}
        typer.echo(json.dumps({"uri": uri, "seconds": _seconds_since(started), "aliases": aliases}))


def _check_choice(option: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise typer.BadParameter(f"must be one of {', '.join(choices)}, got '{value}'", param_hint=f"'{option}'")


def _search_parameter(text: str) -> tuple[str, int]:
    name, _, value = text.partition("=")
    if not name or not value.lstrip("-").isdigit():
        raise typer.BadParameter(f"must be NAME=NUMBER, got '{text}'", param_hint="'--search'")
    return name, int(value)


def _seconds_since(started: float) -> float:
    return round(time.perf_counter() - started, 2)
