"""A pack's vectors as Parquet: what Milvus, Qdrant, OpenSearch or a notebook takes in, a row a vector.

    images.parquet    pictures, whole and in tiles
    captions.parquet  what is written under them
        row       int64: number of the vector in this file
        id        int64: id of the image
        vector    fixed-size list of float16 (or float32), of unit length: its inner product is the cosine
        articles  list of int64: ids of the articles that the image stands in, the main one first
        titles    list of strings: theirs
        caption, licence, attribution   strings
        snapshot  string: uuid of what the pack was made from
        generation  int64: of the pack

What is no longer in the pack is left out. The key `gog_edge` of each file's metadata says which vectors these are.
Format: https://parquet.apache.org/docs/file-format/; float16 is its FLOAT16 logical type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from gog_edge.errors import BackendError, PackError
from gog_edge.files import full_disk_said, sync_files
from gog_edge.retrieval.manifest import Manifest, read_manifest, verify_files_of
from gog_edge.retrieval.pack import open_shards, read_tombstones
from gog_edge.retrieval.text.store import Store
from gog_edge.retrieval.vectors.milvus import DTYPES, PROPERTY, SPACES, Holding, Origin
from gog_edge.retrieval.vectors.shards import Ids, VectorShards
from gog_edge.types import Vectors

GROUP_ROWS = 8_192  # of a row group: 8 MiB of vectors of 512 halves
OnProgress: TypeAlias = Callable[[str, int, int], None]  # space, rows done, rows in all


def export_parquet(folder: Path, out: Path, *, dtype: str = "float16",
                   on_progress: OnProgress | None = None) -> list[Path]:
    """Write a pack's vectors; memory is bounded by a row group. Returns the files, one for each space that has vectors.

    Args:
        folder: the pack.
        out: folder of the files, made where it is not there; a file appears whole or not at all.
        dtype: "float16", as the pack holds them, or "float32" for readers that know no halves.
        on_progress: is told (space, rows done, rows in all).

    Raises:
        PackError: it is no pack, has no vectors, its files are altered, or the disk is full.
        BackendError: pyarrow is not installed.
    """
    if dtype not in DTYPES:
        raise PackError(f"vectors cannot be written as {dtype!r}; known are {', '.join(DTYPES)}")
    manifest = read_manifest(folder)
    origins = [origin for origin in (Origin.of(manifest, space) for space in SPACES)
               if getattr(manifest, origin.space).rows]
    verify_files_of(folder, manifest, full=False)
    out.mkdir(parents=True, exist_ok=True)
    articles, dead = read_tombstones(folder, manifest)
    store = Store.open(folder, manifest.segments, articles.tolist())
    try:
        with full_disk_said(out, PackError):
            return [_write_space(out, manifest, origin, store, _live(folder, manifest, origin, dead), dtype,
                                 on_progress) for origin in origins]
    finally:
        store.close()


def read_holding(path: Path) -> Holding:
    """What a file of an export holds; PackError where it is no such file."""
    pyarrow = _pyarrow()
    try:
        metadata = pyarrow.parquet.read_schema(path).metadata or {}
    except (OSError, pyarrow.ArrowInvalid) as exc:
        raise PackError(f"'{path}' is no Parquet file ({exc}); export the pack again") from exc
    return Holding.from_json(metadata.get(PROPERTY.encode(), b"").decode(), f"'{path}'")


def read_vectors(path: Path, batch: int) -> Iterator[tuple[Ids, Ids, Vectors]]:
    """Rows [n], ids of images [n] and vectors [n, dim] of a file of an export, a batch at a time."""
    with _pyarrow().parquet.ParquetFile(path) as file:
        for part in file.iter_batches(batch, columns=["row", "id", "vector"]):
            flat = part["vector"].flatten().to_numpy()
            yield part["row"].to_numpy(), part["id"].to_numpy(), flat.reshape(len(part), -1)


def _live(folder: Path, manifest: Manifest, origin: Origin, dead: Ids) -> tuple[VectorShards, Ids]:
    """The vectors of a space, and the rows of what is still there."""
    shards = open_shards(folder, getattr(manifest, origin.space), origin.dim)
    ids = shards.ids_of(np.arange(len(shards), dtype=np.int64))
    return shards, np.flatnonzero(~np.isin(ids, dead)).astype(np.int64)


def _write_space(out: Path, manifest: Manifest, origin: Origin, store: Store, live: tuple[VectorShards, Ids],
                 dtype: str, on_progress: OnProgress | None) -> Path:
    pyarrow, (shards, rows), path = _pyarrow(), live, out / f"{origin.space}.parquet"
    holding = Holding(origin, len(rows), dtype)
    schema = _schema(origin.dim, dtype).with_metadata({PROPERTY: holding.to_json()})
    beside = path.with_name(path.name + ".part")
    # Vectors are noise to a compressor.
    compression = {name: "zstd" for name in schema.names} | {"vector.list.element": "none"}
    with pyarrow.parquet.ParquetWriter(beside, schema, compression=compression, use_dictionary=_TEXTS) as writer:
        for at in range(0, len(rows), GROUP_ROWS):
            some = rows[at : at + GROUP_ROWS]
            columns = _columns(manifest, store, shards.ids_of(some), shards.take(some).astype(dtype), at)
            writer.write_batch(pyarrow.record_batch(columns, schema=schema))
            if on_progress is not None:
                on_progress(origin.space, at + len(some), len(rows))
    sync_files([beside])
    beside.replace(path)
    return path


_TEXTS = ["caption", "licence", "attribution", "snapshot"]


def _schema(dim: int, dtype: str) -> Any:
    pa = _pyarrow()
    vector = pa.list_(pa.field("element", pa.float16() if dtype == "float16" else pa.float32(), nullable=False), dim)
    texts = [pa.field(name, pa.string()) for name in _TEXTS]
    lists = [pa.field("articles", pa.list_(pa.int64())), pa.field("titles", pa.list_(pa.string()))]
    numbers = [pa.field(name, pa.int64(), nullable=False) for name in ("row", "id", "generation")]
    return pa.schema([*numbers, pa.field("vector", vector, nullable=False), *lists, *texts])


def _columns(manifest: Manifest, store: Store, ids: Ids, vectors: Vectors, first: int) -> dict[str, Any]:
    """The columns of some rows, numbered from `first`."""
    pa = _pyarrow()
    known = store.images(np.unique(ids).tolist())
    if missing := set(ids.tolist()) - known.keys():
        raise PackError(f"pack '{manifest.name}': a vector is of image {min(missing)}, which its store does not hold; "
                        "build it again")
    images = [known[image] for image in ids.tolist()]
    return {
        "row": np.arange(first, first + len(ids), dtype=np.int64),
        "id": ids,
        "generation": np.full(len(ids), manifest.generation, dtype=np.int64),
        "vector": pa.FixedSizeListArray.from_arrays(
            pa.array(vectors.reshape(-1)), type=_schema(vectors.shape[1], str(vectors.dtype)).field("vector").type),
        "articles": [image.articles for image in images],
        "titles": [image.titles for image in images],
        "caption": [image.caption for image in images],
        "licence": [image.licence for image in images],
        "attribution": [image.attribution for image in images],
        "snapshot": [manifest.snapshot.uuid] * len(ids),
    }  # fmt: skip


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as exc:
        raise BackendError("Parquet needs pyarrow; pip install 'gog_edge[milvus]'") from exc
    return pyarrow
