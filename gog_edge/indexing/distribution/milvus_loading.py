"""Loads a pack's Parquet export into Milvus: a new collection for each space, after which the aliases switch to them.

If it is killed, the next call replaces the unfinished collection. Searches use the old collections until the switch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from gog_edge.errors import BackendError, PackError
from gog_edge.indexing import OnProgress
from gog_edge.indexing.distribution.parquet_export import read_export_info, read_vectors
from gog_edge.retrieval.vectors.milvus import (
    DTYPES,
    LOAD_TIMEOUT_S,
    PROPERTY,
    SPACES,
    CollectionInfo,
    MilvusConnection,
    alias_name,
)
from gog_edge.retrieval.vectors.shards import Ids

BATCH = 2_048  # rows of one call: 4 MiB of vectors of 512 float32


@dataclass(frozen=True, slots=True)
class IndexType:
    """A Milvus index type: the parameters for building and for searching it."""

    build: Mapping[str, int | bool | str]
    search: Mapping[str, int]


# Parameters: https://milvus.io/docs/index-explained.md. nlist 0 stands for 4 sqrt(rows).
INDEX_TYPES = {
    "FLAT": IndexType({}, {}),
    "IVF_FLAT": IndexType({"nlist": 0}, {"nprobe": 64}),
    "IVF_SQ8": IndexType({"nlist": 0}, {"nprobe": 64}),
    # One bit per dimension; four times as many candidates as results are compared again with 8 bits.
    "IVF_RABITQ": IndexType({"nlist": 0, "refine": True, "refine_type": "SQ8"}, {"nprobe": 64, "refine_k": 4}),
    "HNSW": IndexType({"M": 32, "efConstruction": 200}, {"ef": 128}),
}


@dataclass(frozen=True, slots=True)
class LoadedSpace:
    """A space that is served by a collection."""

    alias: str
    collection: str
    info: CollectionInfo
    dropped: tuple[str, ...] = ()  # older collections that were dropped

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that commands print."""
        return {"alias": self.alias, "collection": self.collection, "holding": asdict(self.info),
                "dropped": self.dropped}  # fmt: skip


def load_export(folder: Path, server: MilvusConnection, *, index: str = "IVF_FLAT",
                search: Mapping[str, int] | None = None, dtype: str = "float32", drop_old: bool = False,
                on_progress: OnProgress | None = None) -> list[LoadedSpace]:
    """Load every space of an export, then switch the aliases, each in one call.

    Args:
        folder: output of `export_parquet`.
        server: the connection to the server.
        index: a key of INDEX_TYPES.
        search: search parameters that override those of the index type, as {"nprobe": 128}.
        dtype: of the vectors on the server; "float16" takes half the memory (milvus-lite supports "float32" only).
        drop_old: drop collections of earlier generations that are not served any more.
        on_progress: called with (space, rows done, rows in total).

    Raises:
        PackError: there is no export, or another collection has the name of the alias.
        BackendError: the server is not reachable, refuses a call, or has lost rows.
    """
    if index not in INDEX_TYPES or dtype not in DTYPES:
        raise BackendError(f"the index must be one of {', '.join(INDEX_TYPES)} and the dtype one of "
                           f"{', '.join(DTYPES)}, got '{index}' and '{dtype}'")
    files = [path for path in (folder / f"{space}.parquet" for space in SPACES) if path.is_file()]
    if not files:
        raise PackError(f"'{folder}' does not contain images.parquet; run `gog-edge pack export-parquet PACK {folder}`")
    params = {**INDEX_TYPES[index].search, **(search or {})}
    loaded = []
    for path in files:
        info = replace(read_export_info(path), dtype=dtype, index=index, search=params)
        loaded.append(_load_space(path, info, server, on_progress))
    for space in loaded:
        _switch_alias(server, space)
    return [replace(space, dropped=_drop_old(server, space) if drop_old else ()) for space in loaded]


def collection_name(info: CollectionInfo) -> str:
    """Return the name of the collection for these vectors and this index type."""
    origin = info.origin
    return f"{alias_name(origin.pack, origin.space)}_{origin.generation:06d}_{info.index.lower()}"


def _load_space(path: Path, info: CollectionInfo, server: MilvusConnection,
                on_progress: OnProgress | None) -> LoadedSpace:
    alias, collection = alias_name(info.origin.pack, info.origin.space), collection_name(info)
    if server.alias_target(alias) == collection:
        if server.collection_info(collection) == info:
            return LoadedSpace(alias, collection, info)
        raise PackError(f"collection '{collection}' on {server.config.uri} is being served and contains other vectors "
                        "of the same generation; choose another --index, or drop it")
    if server.collection_info(collection) is not None:
        server.call("drop_collection", collection)  # an unfinished one
    _create_collection(server, collection, info)
    done = 0
    for rows, ids, vectors in read_vectors(path, BATCH):
        _insert(server, collection, rows, ids, vectors.astype(info.dtype))
        done += len(rows)
        if on_progress is not None:
            on_progress(info.origin.space, done, info.rows)
    _build_index(server, collection, info)
    stored = server.row_count(collection)
    if stored != info.rows:
        raise BackendError(f"collection '{collection}' on {server.config.uri} has {stored} of the {info.rows} vectors "
                           "that were sent; run the same command again")
    return LoadedSpace(alias, collection, info)


def _create_collection(server: MilvusConnection, collection: str, info: CollectionInfo) -> None:
    from pymilvus import DataType, MilvusClient

    kind = DataType.FLOAT16_VECTOR if info.dtype == "float16" else DataType.FLOAT_VECTOR
    description = info.to_json()
    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False, description=description)
    schema.add_field("row", DataType.INT64, is_primary=True)
    schema.add_field("image", DataType.INT64)
    schema.add_field("vector", kind, dim=info.origin.dim)
    server.call("create_collection", collection, schema=schema, properties={PROPERTY: description})


def _insert(server: MilvusConnection, collection: str, rows: Ids, ids: Ids, vectors: NDArray[Any]) -> None:
    data = [{"row": row, "image": image, "vector": vector}
            for row, image, vector in zip(rows.tolist(), ids.tolist(), vectors, strict=True)]
    # upsert, because a call that is tried again must not write rows twice
    server.call("upsert", collection, data=data, timeout_s=LOAD_TIMEOUT_S)


def _build_index(server: MilvusConnection, collection: str, info: CollectionInfo) -> None:
    from pymilvus import MilvusClient

    build = dict(INDEX_TYPES[info.index].build)
    if "nlist" in build:  # https://github.com/facebookresearch/faiss/wiki/Guidelines-to-choose-an-index
        build["nlist"] = min(65_536, max(1, round(4 * info.rows**0.5)))
    params = MilvusClient.prepare_index_params()
    params.add_index("vector", index_type=info.index, metric_type="IP", params=build)
    server.call("flush", collection, timeout_s=LOAD_TIMEOUT_S)
    server.call("create_index", collection, index_params=params, timeout_s=LOAD_TIMEOUT_S)
    server.call("load_collection", collection, timeout_s=LOAD_TIMEOUT_S)


def _switch_alias(server: MilvusConnection, space: LoadedSpace) -> None:
    """Direct searches to the new collection."""
    target = server.alias_target(space.alias)
    if target != space.collection:
        server.call("create_alias" if target is None else "alter_alias", space.collection, space.alias)


def _drop_old(server: MilvusConnection, space: LoadedSpace) -> tuple[str, ...]:
    """Drop the other collections of this space, recognised by their name and by their description."""
    name = re.compile(rf"{re.escape(space.alias)}_\d{{6}}_[a-z0-9_]+")
    others = [other for other in server.call("list_collections") if other != space.collection and name.fullmatch(other)]
    origin = space.info.origin
    dropped = []
    for other in sorted(others):
        info = server.collection_info(other)
        if info is not None and (info.origin.pack, info.origin.space) == (origin.pack, origin.space):
            server.call("drop_collection", other)
            dropped.append(other)
    return tuple(dropped)
