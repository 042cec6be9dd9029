"""Exports a pack's vectors as Parquet, one row per vector, for Milvus, Qdrant, OpenSearch or a notebook.

    images.parquet    embeddings of whole images and of tiles
    captions.parquet  embeddings of captions
        row       int64: number of the row in this file
        id        int64: id of the image
        vector    fixed-size list of float16 (or float32), of unit length: the inner product is the cosine
        articles  list of int64: ids of the image's articles, the main one first
        titles    list of strings: titles of these articles
        caption, licence, attribution   strings
        snapshot  string: UUID of the snapshot that the pack was built from
        generation  int64: of the pack

Deleted images are left out. The key `gog_edge` of each file's metadata identifies the vectors. Format:
https://parquet.apache.org/docs/file-format/; float16 is its FLOAT16 logical type.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gog_edge.errors import BackendError, PackError
from gog_edge.files import full_disk_as, sync_files
from gog_edge.indexing import OnProgress
from gog_edge.retrieval.manifest import Manifest, read_manifest, verify_pack_files
from gog_edge.retrieval.pack import open_shards, read_tombstones
from gog_edge.retrieval.text.store import Store
from gog_edge.retrieval.vectors.milvus import DTYPES, PROPERTY, SPACES, CollectionInfo, Origin
from gog_edge.retrieval.vectors.shards import Ids, VectorShards
from gog_edge.types import Vectors

GROUP_ROWS = 8_192  # of a row group: 8 MiB of vectors of 512 float16
_STRINGS = ["caption", "licence", "attribution", "snapshot"]


def export_parquet(folder: Path, out: Path, *, dtype: str = "float16",
                   on_progress: OnProgress | None = None) -> list[Path]:
    """Write one file for each space that has vectors, and return their paths. Memory is bounded by a row group.

    Args:
        folder: the pack.
        out: folder of the files, created if necessary; each file is written atomically.
        dtype: "float16", as the pack stores them, or "float32" for readers without float16.
        on_progress: called with (space, rows done, rows in total).

    Raises:
        PackError: there is no pack, it has no vectors, its files are altered, or the disk is full.
        BackendError: pyarrow is not installed.
    """
    if dtype not in DTYPES:
        raise PackError(f"the dtype of vectors must be one of {', '.join(DTYPES)}, got {dtype!r}")
    manifest = read_manifest(folder)
    origins = [origin for origin in (Origin.of(manifest, space) for space in SPACES)
               if getattr(manifest, origin.space).rows]
    verify_pack_files(folder, manifest, full=False)
    out.mkdir(parents=True, exist_ok=True)
    articles, images = read_tombstones(folder, manifest)
    store = Store.open(folder, manifest.segments, articles.tolist())
    try:
        with full_disk_as(out, PackError):
            return [_write_space(out, manifest, origin, store, _live_rows(folder, manifest, origin, images), dtype,
                                 on_progress) for origin in origins]
    finally:
        store.close()


def read_export_info(path: Path) -> CollectionInfo:
    """Return the description of an exported file.

    Raises:
        PackError: the file is not an export.
    """
    pyarrow = _pyarrow()
    try:
        metadata = pyarrow.parquet.read_schema(path).metadata or {}
    except (OSError, pyarrow.ArrowInvalid) as exc:
        raise PackError(f"'{path}' is not a Parquet file ({exc}); export the pack again") from exc
    return CollectionInfo.from_json(metadata.get(PROPERTY.encode(), b"").decode(), f"'{path}'")


def read_vectors(path: Path, batch: int) -> Iterator[tuple[Ids, Ids, Vectors]]:
    """Yield row numbers [n], image ids [n] and vectors [n, dim] of an exported file, `batch` rows at a time."""
    with _pyarrow().parquet.ParquetFile(path) as file:
        for part in file.iter_batches(batch, columns=["row", "id", "vector"]):
            flat = part["vector"].flatten().to_numpy()
            yield part["row"].to_numpy(), part["id"].to_numpy(), flat.reshape(len(part), -1)


def _live_rows(folder: Path, manifest: Manifest, origin: Origin, deleted: Ids) -> tuple[VectorShards, Ids]:
    """Return the vectors of a space, and the rows of images that are not deleted."""
    shards = open_shards(folder, getattr(manifest, origin.space), origin.dim)
    ids = shards.ids_of(np.arange(len(shards), dtype=np.int64))
    return shards, np.flatnonzero(~np.isin(ids, deleted)).astype(np.int64)


def _write_space(out: Path, manifest: Manifest, origin: Origin, store: Store, live: tuple[VectorShards, Ids],
                 dtype: str, on_progress: OnProgress | None) -> Path:
    pyarrow, (shards, rows), path = _pyarrow(), live, out / f"{origin.space}.parquet"
    info = CollectionInfo(origin, len(rows), dtype)
    schema = _schema(origin.dim, dtype).with_metadata({PROPERTY: info.to_json()})
    part = path.with_name(path.name + ".part")
    # Vectors do not compress.
    compression = {name: "zstd" for name in schema.names} | {"vector.list.element": "none"}
    with pyarrow.parquet.ParquetWriter(part, schema, compression=compression, use_dictionary=_STRINGS) as writer:
        for at in range(0, len(rows), GROUP_ROWS):
            group = rows[at : at + GROUP_ROWS]
            columns = _columns(manifest, store, shards.ids_of(group), shards.take(group).astype(dtype), at)
            writer.write_batch(pyarrow.record_batch(columns, schema=schema))
            if on_progress is not None:
                on_progress(origin.space, at + len(group), len(rows))
    sync_files([part])
    part.replace(path)
    return path


def _schema(dim: int, dtype: str) -> Any:
    pa = _pyarrow()
    vector = pa.list_(pa.field("element", pa.float16() if dtype == "float16" else pa.float32(), nullable=False), dim)
    strings = [pa.field(name, pa.string()) for name in _STRINGS]
    lists = [pa.field("articles", pa.list_(pa.int64())), pa.field("titles", pa.list_(pa.string()))]
    numbers = [pa.field(name, pa.int64(), nullable=False) for name in ("row", "id", "generation")]
    return pa.schema([*numbers, pa.field("vector", vector, nullable=False), *lists, *strings])


def _columns(manifest: Manifest, store: Store, ids: Ids, vectors: Vectors, first: int) -> dict[str, Any]:
    """Return the columns of a row group; `first` is the number of its first row."""
    pa = _pyarrow()
    stored = store.images(np.unique(ids).tolist())
    if missing := set(ids.tolist()) - stored.keys():
        raise PackError(f"pack '{manifest.name}': image {min(missing)} has a vector but is missing in the store; build "
                        "the pack again")
    images = [stored[image] for image in ids.tolist()]
    return {
        "row": np.arange(first, first + len(ids), dtype=np.int64),
        "id": ids,
        "generation": np.full(len(ids), manifest.generation, dtype=np.int64),
        "vector": pa.FixedSizeListArray.from_arrays(
            pa.array(vectors.reshape(-1)), type=_schema(vectors.shape[1], str(vectors.dtype)).field("vector").type),
        "articles": [image.articles for image in images],
        "titles": [image.titles for image in images],
        "caption": [image.caption for image in images],
        "licence": [image.links[0].licence if image.links else "" for image in images],  # of the main article
        "attribution": [image.links[0].attribution if image.links else "" for image in images],
        "snapshot": [manifest.snapshot.uuid] * len(ids),
    }  # fmt: skip


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as exc:
        raise BackendError("reading and writing Parquet needs pyarrow; pip install 'gog_edge[milvus]'") from exc
    return pyarrow
