"""From a pack's Parquet export into Milvus: a new collection for each space, then the aliases switch to them.

Killed at any point and called again, it begins the unfinished collection anew; what is served stays served.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from numpy.typing import NDArray

from gog_edge.errors import BackendError, PackError
from gog_edge.indexing.parquet_export import read_holding, read_vectors
from gog_edge.retrieval.vectors.milvus import DTYPES, LONG_S, PROPERTY, SPACES, Holding, MilvusServer, alias_of
from gog_edge.retrieval.vectors.shards import Ids

BATCH = 2_048  # rows of one call: 4 MiB of vectors of 512 floats
OnProgress: TypeAlias = Callable[[str, int, int], None]  # space, rows done, rows in all


@dataclass(frozen=True, slots=True)
class IndexKind:
    """An index of Milvus: how it is built and searched."""

    build: Mapping[str, int | bool | str]
    search: Mapping[str, int]


# https://milvus.io/docs/index-explained.md gives the parameters. nlist 0: four lists for each square root of the rows.
KINDS = {
    "FLAT": IndexKind({}, {}),
    "IVF_FLAT": IndexKind({"nlist": 0}, {"nprobe": 64}),
    "IVF_SQ8": IndexKind({"nlist": 0}, {"nprobe": 64}),
    # One bit a dimension, then twice as many as are wanted compared at 8 bits.
    "IVF_RABITQ": IndexKind({"nlist": 0, "refine": True, "refine_type": "SQ8"}, {"nprobe": 64, "refine_k": 4}),
    "HNSW": IndexKind({"M": 32, "efConstruction": 200}, {"ef": 128}),
}


@dataclass(frozen=True, slots=True)
class Loaded:
    """A space that is served."""

    alias: str
    collection: str
    holding: Holding
    dropped: tuple[str, ...] = ()  # older collections that were removed


def load_export(folder: Path, server: MilvusServer, *, index: str = "IVF_FLAT", search: Mapping[str, int] | None = None,
                dtype: str = "float32", drop_old: bool = False, on_progress: OnProgress | None = None) -> list[Loaded]:
    """Load every space of an export, then switch the aliases, each in one call.

    Args:
        folder: where `export_parquet` wrote.
        server: where to.
        index: a key of KINDS.
        search: parameters of a search instead of the kind's, as {"nprobe": 128}.
        dtype: of the vectors there; "float16" takes half the memory (milvus-lite knows "float32" only).
        drop_old: collections of earlier generations that no alias names any more are dropped.
        on_progress: is told (space, rows done, rows in all).

    Raises:
        PackError: there is no export, or the alias's name is taken by something else.
        BackendError: the server is away or refuses, or rows were lost on the way.
    """
    if index not in KINDS or dtype not in DTYPES:
        raise BackendError(f"an index '{index}' over {dtype} is not known; known are {', '.join(KINDS)} over "
                           f"{' and '.join(DTYPES)}")
    files = [path for path in (folder / f"{space}.parquet" for space in SPACES) if path.is_file()]
    if not files:
        raise PackError(f"'{folder}' holds no images.parquet; run `python -m index.export_parquet PACK {folder}`")
    params = {**KINDS[index].search, **(search or {})}
    loaded = []
    for path in files:
        holding = replace(read_holding(path), dtype=dtype, index=index, search=params)
        loaded.append(_load_space(path, holding, server, on_progress))
    for one in loaded:
        _switch(server, one)
    return [replace(one, dropped=_drop_old(server, one) if drop_old else ()) for one in loaded]


def collection_of(holding: Holding) -> str:
    """The collection that just these vectors with just this index are in."""
    origin = holding.origin
    return f"{alias_of(origin.pack, origin.space)}_{origin.generation:06d}_{holding.index.lower()}"


def _load_space(path: Path, holding: Holding, server: MilvusServer, on_progress: OnProgress | None) -> Loaded:
    alias, collection = alias_of(holding.origin.pack, holding.origin.space), collection_of(holding)
    if server.target(alias) == collection:
        if server.holding(collection) == holding:
            return Loaded(alias, collection, holding)
        raise PackError(f"collection '{collection}' on {server.config.uri} is being served and holds something else of "
                        "the same generation; take another --index, or drop it")
    if server.holding(collection) is not None:
        server.call("drop_collection", collection)  # an unfinished one
    _create(server, collection, holding)
    done = 0
    for rows, ids, vectors in read_vectors(path, BATCH):
        _insert(server, collection, rows, ids, vectors.astype(holding.dtype))
        done += len(rows)
        if on_progress is not None:
            on_progress(holding.origin.space, done, holding.rows)
    _build_index(server, collection, holding)
    kept = server.count(collection)
    if kept != holding.rows:
        raise BackendError(f"collection '{collection}' on {server.config.uri} holds {kept} vectors of {holding.rows} "
                           "that were sent; run the same command again")
    return Loaded(alias, collection, holding)


def _create(server: MilvusServer, collection: str, holding: Holding) -> None:
    from pymilvus import DataType, MilvusClient

    kind = DataType.FLOAT16_VECTOR if holding.dtype == "float16" else DataType.FLOAT_VECTOR
    said = holding.to_json()
    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False, description=said)
    schema.add_field("row", DataType.INT64, is_primary=True)
    schema.add_field("image", DataType.INT64)
    schema.add_field("vector", kind, dim=holding.origin.dim)
    server.call("create_collection", collection, schema=schema, properties={PROPERTY: said})


def _insert(server: MilvusServer, collection: str, rows: Ids, ids: Ids, vectors: NDArray[Any]) -> None:
    data = [{"row": row, "image": image, "vector": vector}
            for row, image, vector in zip(rows.tolist(), ids.tolist(), vectors, strict=True)]
    server.call("upsert", collection, data=data, timeout_s=LONG_S)  # a second try writes nothing twice


def _build_index(server: MilvusServer, collection: str, holding: Holding) -> None:
    from pymilvus import MilvusClient

    build = dict(KINDS[holding.index].build)
    if "nlist" in build:  # as FAISS advises
        build["nlist"] = min(65_536, max(1, round(4 * holding.rows**0.5)))
    params = MilvusClient.prepare_index_params()
    params.add_index("vector", index_type=holding.index, metric_type="IP", params=build)
    server.call("flush", collection, timeout_s=LONG_S)
    server.call("create_index", collection, index_params=params, timeout_s=LONG_S)
    server.call("load_collection", collection, timeout_s=LONG_S)


def _switch(server: MilvusServer, loaded: Loaded) -> None:
    """From here on searches go to the new collection."""
    target = server.target(loaded.alias)
    if target != loaded.collection:
        server.call("create_alias" if target is None else "alter_alias", loaded.collection, loaded.alias)


def _drop_old(server: MilvusServer, loaded: Loaded) -> tuple[str, ...]:
    """Drop this space's other collections: those that are named as ours and say that they are ours."""
    ours = re.compile(rf"{re.escape(loaded.alias)}_\d{{6}}_[a-z0-9_]+")
    old = [name for name in server.call("list_collections") if name != loaded.collection and ours.fullmatch(name)]
    origin = loaded.holding.origin
    dropped = []
    for name in sorted(old):
        holding = server.holding(name)
        if holding is not None and (holding.origin.pack, holding.origin.space) == (origin.pack, origin.space):
            server.call("drop_collection", name)
            dropped.append(name)
    return tuple(dropped)
