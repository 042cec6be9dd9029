"""Search a pack's vectors on a Milvus server, for indexes that are larger than one machine.

    <pack>_<space>                      an alias; searches use it only
    <pack>_<space>_<generation>_<index> a collection, which does not change after the alias is switched to it
        row     int64, primary key: number of the vector in the pack's Parquet export
        image   int64: image id, as in the pack's store
        vector  of unit length; its inner product is the cosine

`indexing.milvus_loading` fills collections and switches aliases. A collection describes its content in a property and
in its description: some servers keep only one of them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from gog_edge.config import MilvusConfig
from gog_edge.errors import BackendError, PackError
from gog_edge.retrieval.manifest import Manifest
from gog_edge.retrieval.vectors.faiss_index import MAX_K, Hits
from gog_edge.retrieval.vectors.shards import Ids
from gog_edge.types import Vectors

if TYPE_CHECKING:
    from pymilvus import MilvusClient

SPACES = ("images", "captions")
PROPERTY = "gog_edge"  # property of a collection with its CollectionInfo as JSON
QUERY_BATCH = 64  # queries per call
MAX_ROWS = 16_384  # per result of a Milvus search or query
TRANSIENT_CODES = (2, 101, 103)  # the server was not reached; a collection is not loaded, or not fully
LOAD_TIMEOUT_S = 3_600.0  # for loading a collection or building an index
RETRY_INTERVAL_S = 0.25
DTYPES = ("float32", "float16")


@dataclass(frozen=True, slots=True)
class Origin:
    """The identity of the vectors in a collection: equal origins mean equal vectors."""

    pack: str
    space: str
    generation: int
    encoder: str
    weights_sha256: str
    preprocessing_sha256: str
    dim: int
    shards_sha256: str  # of the hashes of all shard files, in order

    @classmethod
    def of(cls, manifest: Manifest, space: str) -> Origin:
        """Return the origin of a pack's space. Raises PackError if the pack has no vectors."""
        encoder = manifest.encoder
        if encoder is None:
            raise PackError(f"pack '{manifest.name}' has no vectors: it was built without an encoder, and needs no "
                            "Milvus server")
        hashes = {entry.path: entry.sha256 for entry in manifest.files}
        shards = getattr(manifest, space).shards
        digest = hashlib.sha256("\n".join(hashes[shard.vectors] + hashes[shard.ids] for shard in shards).encode())
        return cls(manifest.name, space, manifest.generation, encoder.name, encoder.weights_sha256,
                   encoder.preprocessing_sha256, encoder.dim, digest.hexdigest())


@dataclass(frozen=True, slots=True)
class CollectionInfo:
    """What a collection contains and how it is searched."""

    origin: Origin
    rows: int
    dtype: str = "float32"
    index: str = "FLAT"
    search: Mapping[str, int] | None = None  # search parameters

    def to_json(self) -> str:
        """Return the JSON form, in one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str, where: str) -> CollectionInfo:
        """Read the JSON form. Raises PackError, which names `where` the text was found."""
        try:
            raw = json.loads(text)
            return cls(**{**raw, "origin": Origin(**raw["origin"])})
        except (KeyError, TypeError, ValueError) as exc:
            raise PackError(f"{where} has an invalid description ({exc!r}); write it again with this version") from exc


def alias_name(pack: str, space: str) -> str:
    """Return the alias of a space; Milvus allows letters, digits and underscores, and no digit at the start."""
    name = re.sub(r"\W", "_", f"{pack}_{space}", flags=re.ASCII)
    return f"_{name}" if name[0].isdigit() else name


class MilvusConnection:
    """A connection to a Milvus server, or to a file of milvus-lite; may be used from several threads."""

    def __init__(self, config: MilvusConfig, client: MilvusClient) -> None:
        self.config, self._client = config, client

    @classmethod
    def open(cls, config: MilvusConfig) -> MilvusConnection:
        """Connect to the server.

        Raises:
            BackendError: The extra `milvus` is not installed, the token is not set, or the server does not respond.
        """
        try:
            from pymilvus import MilvusClient  # an optional extra
        except ModuleNotFoundError as exc:
            raise BackendError(f"searching on {config.uri} needs pymilvus; run pip install 'gog_edge[milvus]'") from exc
        token = os.environ.get(config.key_env, "") if config.key_env else ""
        if config.key_env and not token:
            raise BackendError(f"the environment variable '{config.key_env}' is empty or not set; set it to the token "
                               f"of {config.uri}")
        for logger in ("pymilvus", "pymilvus.milvus_client"):  # they log errors that are raised as well
            logging.getLogger(logger).setLevel(logging.CRITICAL)
        with _translated_errors(config):
            return cls(config, MilvusClient(uri=config.uri, token=token, timeout=config.timeout_s, dedicated=True))

    def call(self, method: str, *args: Any, timeout_s: float | None = None, **options: Any) -> Any:
        """Call a method of the client, and retry until the timeout while the server is unavailable.

        A restart of the server within the timeout therefore fails no search.

        Raises:
            BackendError: The call failed.
        """
        wait_s = timeout_s or self.config.timeout_s
        deadline = time.monotonic() + wait_s
        while True:
            try:
                with _translated_errors(self.config):
                    return getattr(self._client, method)(*args, timeout=wait_s, **options)
            except _Unavailable:
                if time.monotonic() + RETRY_INTERVAL_S > deadline:
                    raise
                time.sleep(RETRY_INTERVAL_S)

    def collection_info(self, collection: str) -> CollectionInfo | None:
        """Return the content of a collection or alias; None if it does not exist.

        Raises:
            PackError: The collection was not written by gog_edge.
        """
        if not self.call("has_collection", collection):
            return None
        described = self.call("describe_collection", collection)
        text = described.get("properties", {}).get(PROPERTY) or described.get("description", "")
        where = f"collection '{collection}' on {self.config.uri}"
        if not text.startswith("{"):
            raise PackError(f"{where} was not written by gog_edge; give the pack another name, or drop the collection")
        return CollectionInfo.from_json(text, where)

    def alias_target(self, alias: str) -> str | None:
        """Return the collection that an alias refers to; None if the alias does not exist."""
        if alias not in self.call("list_aliases")["aliases"]:
            return None
        return str(self.call("describe_alias", alias)["collection_name"])

    def row_count(self, collection: str) -> int:
        """Return the current number of rows of a loaded collection."""
        found = self.call("query", collection, filter="", output_fields=["count(*)"], consistency_level="Strong")
        return int(found[0]["count(*)"])

    def open_index(self, manifest: Manifest, space: str, _deleted: Ids) -> MilvusIndex:
        """Open the index of a pack's space, as `Pack.open` does; deleted images are not loaded on the server.

        Raises as `MilvusIndex.open` does.
        """
        return MilvusIndex.open(self, manifest, space)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


class MilvusIndex:
    """The nearest images of a space by cosine; may be searched from several threads.

    After the alias is switched to a later generation, searches use that one; images that this pack does not know are
    dropped from the results.
    """

    def __init__(self, server: MilvusConnection, alias: str, info: CollectionInfo, last: int) -> None:
        """Search an alias; `last` is the highest image id in the pack's store."""
        self._server, self._alias, self._info, self._last = server, alias, info, last
        self.shards = MilvusRows(server, alias, info)

    @classmethod
    def open(cls, server: MilvusConnection, manifest: Manifest, space: str) -> MilvusIndex:
        """Find a pack's space on a server, check that it has the pack's generation, and load it.

        Raises:
            PackError: The alias does not exist, has another origin, or rows are missing.
            BackendError: The server is not available.
        """
        origin, alias = Origin.of(manifest, space), alias_name(manifest.name, space)
        where = f"pack '{manifest.name}': '{alias}' on {server.config.uri}"
        advice = f"load this pack with `gog-edge pack load-milvus PACK {server.config.uri}`, or open the loaded one"
        info = server.collection_info(alias)
        if info is None:
            raise PackError(f"{where} does not exist; {advice}")
        served, wanted = asdict(info.origin), asdict(origin)
        for key, value in wanted.items():
            if served[key] != value:
                raise PackError(f"{where} must have the pack's {key} {value}, got {served[key]}; {advice}")
        server.call("load_collection", alias, timeout_s=LOAD_TIMEOUT_S)  # returns at once if it is loaded
        rows = server.row_count(alias)
        if rows != info.rows:
            raise PackError(f"{where} must have {info.rows} vectors, got {rows}; {advice}")
        return cls(server, alias, info, max(segment.images.last for segment in manifest.segments))

    def __len__(self) -> int:
        return self._info.rows

    def close(self) -> None:
        """Do nothing: the connection is shared with other packs."""

    def search(self, queries: Vectors, k: int, *, without: Ids | None = None) -> Hits:
        """Return the k nearest images of each query, as `VectorIndex.search` does.

        Args:
            queries: [n, dim] float32, of unit length.
            k: Clipped to MAX_K and to the number of images that can be found.
            without: Ids to ignore, [m] int64.

        Raises:
            BackendError: The server is not available, or reports an error.
        """
        k = max(0, min(k, MAX_K, len(self)))
        hits = Hits(np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1, np.int64))
        if k:
            for start in range(0, len(queries), QUERY_BATCH):
                part = slice(start, start + QUERY_BATCH)
                self._search(queries[part], Hits(hits.scores[part], hits.ids[part]), without)
        found = int((hits.ids >= 0).sum(axis=1).max(initial=0))
        return Hits(hits.scores[:, :found], hits.ids[:, :found])

    def _search(self, queries: Vectors, hits: Hits, without: Ids | None) -> None:
        """Fill hits [n, k]: fetch 2 k rows per query, and more if an image has many rows."""
        limit = min(MAX_ROWS, len(self))
        count = min(2 * hits.ids.shape[1], limit)
        while True:
            found = self._fetch(queries, count, without)
            complete = [self._fill(hits, n, rows) or len(rows) < count for n, rows in enumerate(found)]
            if count == limit or all(complete):
                return
            count = min(4 * count, limit)

    def _fetch(self, queries: Vectors, count: int, without: Ids | None) -> Sequence[Sequence[Mapping[str, Any]]]:
        params = dict(self._info.search or {})
        if "ef" in params:  # HNSW's candidate list must be at least as long as the result
            params["ef"] = max(params["ef"], count)
        data = list(queries.astype(self._info.dtype))
        unwanted = "" if without is None or not len(without) else f"image not in {_list(without)}"
        found: Sequence[Sequence[Mapping[str, Any]]] = self._server.call(
            "search", self._alias, data=data, anns_field="vector", limit=count, filter=unwanted,
            output_fields=["row", "image"], search_params={"metric_type": "IP", "params": params},
            consistency_level="Eventually",  # the collection of an alias does not change
        )  # fmt: skip
        return found

    def _fill(self, hits: Hits, n: int, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Write the best row of each image into the hits of query n. Return whether k images were found."""
        best: dict[int, float] = {}
        for row in sorted(rows, key=lambda row: (-row["distance"], row["entity"]["row"])):
            image = int(row["entity"]["image"])
            if image <= self._last:
                best.setdefault(image, row["distance"])
        k: int = hits.ids.shape[1]
        found = list(best.items())[:k]
        hits.ids[n, : len(found)] = [image for image, _ in found]
        hits.scores[n, : len(found)] = [score for _, score in found]
        return len(found) == k


class MilvusRows:
    """The vectors of an alias by row, with the methods of `VectorShards`. Each call is a request to the server.

    Rows are those of the collection that the alias refers to now; a missing row has id -1 and the zero vector.
    """

    def __init__(self, server: MilvusConnection, alias: str, info: CollectionInfo) -> None:
        self.dim = info.origin.dim
        self._server, self._alias, self._info = server, alias, info

    def __len__(self) -> int:
        return self._info.rows

    def ids_of(self, rows: ArrayLike) -> Ids:
        """Return the ids of rows, in an array of any shape."""
        wanted = np.asarray(rows, dtype=np.int64)
        found = {int(row["row"]): int(row["image"]) for row in self._query("row", wanted, "image")}
        return np.array([found.get(row, -1) for row in wanted.reshape(-1).tolist()], np.int64).reshape(wanted.shape)

    def first_rows(self, ids: ArrayLike) -> Ids:
        """Return the first row of each id, [n]; -1 for an id without rows."""
        wanted = np.asarray(ids, dtype=np.int64)
        found: dict[int, int] = {}
        for row in self._query("image", wanted, "row"):
            image, number = int(row["image"]), int(row["row"])
            found[image] = min(number, found.get(image, number))
        return np.array([found.get(image, -1) for image in wanted.tolist()], dtype=np.int64)

    def take(self, rows: ArrayLike) -> Vectors:
        """Return the vectors of rows: [n, dim] float32."""
        wanted = np.asarray(rows, dtype=np.int64)
        stored = {int(row["row"]): row["vector"] for row in self._query("row", wanted, "vector")}
        vectors = np.zeros((len(wanted), self.dim), dtype=np.float32)
        for n, row in enumerate(wanted.tolist()):
            if row in stored:
                vectors[n] = _vector(stored[row], self._info.dtype)
        return vectors

    def _query(self, key: str, wanted: Ids, field: str) -> Sequence[Mapping[str, Any]]:
        numbers = np.unique(wanted[wanted >= 0])
        if not len(numbers):
            return []
        found: Sequence[Mapping[str, Any]] = self._server.call(
            "query", self._alias, filter=f"{key} in {_list(numbers)}", output_fields=["row", "image", field],
            limit=MAX_ROWS, consistency_level="Eventually",
        )  # fmt: skip
        return found


def _list(ids: Iterable[Any]) -> str:
    return json.dumps([int(number) for number in ids])


def _vector(stored: Any, dtype: str) -> Vectors:
    """Convert a vector from the client's form: numbers, or for float16 bytes, plain or in a list of one."""
    if dtype == "float16":
        return np.frombuffer(stored if isinstance(stored, bytes) else stored[0], dtype=np.float16).astype(np.float32)
    return np.asarray(stored, dtype=np.float32)


class _Unavailable(BackendError):
    """A failure that may pass: the server does not respond, or is still loading."""


@contextmanager
def _translated_errors(config: MilvusConfig) -> Iterator[None]:
    """Convert errors of the client into BackendError with the server's address and what to do."""
    import grpc  # type: ignore[import-untyped, unused-ignore]  # comes with pymilvus
    from pymilvus import MilvusException

    where = f"the Milvus server at {config.uri}"
    advice = "start it, or check its address and key ([[packs]] in bundle.toml)"
    try:
        yield
    except grpc.RpcError as exc:  # the client does not retry these
        reason = f"reports an error: {exc.code().name} {exc.details()}"
        if exc.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            reason = f"did not respond within {config.timeout_s:g} s"
        raise BackendError(f"{where} {reason}; {advice}") from exc
    except MilvusException as exc:
        if exc.code in TRANSIENT_CODES or isinstance(exc.code, grpc.StatusCode):
            raise _Unavailable(f"{where} is not available ({exc.message}); {advice}") from exc
        raise BackendError(f"{where} reports an error: {exc.message}") from exc
