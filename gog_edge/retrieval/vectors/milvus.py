"""A pack's vectors on a Milvus server: the same searches as on the box, for indexes that are larger than it.

    <pack>_<space>                      an alias; searches name it, and nothing else
    <pack>_<space>_<generation>_<index> a collection, which never changes once the alias names it
        row     int64, primary: number of the vector in the pack's Parquet export
        image   int64: id of the image, as the pack's store knows it
        vector  of unit length, searched by inner product: the cosine

`indexing.milvus_loading` fills collections and switches aliases. A collection says what it holds in a property and in
its description: some servers keep the one, some the other.
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
PROPERTY = "gog_edge"  # of a collection; holds a Holding as JSON
BATCH = 64  # queries of one call
MOST_ROWS = 16_384  # that a Milvus search or query gives back

# Codes of what may pass: the client did not reach the server; a collection is not, or not fully, loaded.
PASSING = (2, 101, 103)
LONG_S = 3_600.0  # loading may take this long, and building an index
AGAIN_S = 0.25  # between two tries
DTYPES = ("float32", "float16")


@dataclass(frozen=True, slots=True)
class Origin:
    """Which vectors these are: equal origins, equal vectors."""

    pack: str
    space: str
    generation: int
    encoder: str
    weights_sha256: str
    preprocessing_sha256: str
    dim: int
    shards_sha256: str  # over the hashes of the shards, in their order

    @classmethod
    def of(cls, manifest: Manifest, space: str) -> Origin:
        """What a pack's manifest says; PackError where the pack has no vectors."""
        encoder = manifest.encoder
        if encoder is None:
            raise PackError(f"pack '{manifest.name}' is searched by words alone: it has no vectors to serve")
        hashes = {entry.path: entry.sha256 for entry in manifest.files}
        shards = getattr(manifest, space).shards
        digest = hashlib.sha256("\n".join(hashes[shard.vectors] + hashes[shard.ids] for shard in shards).encode())
        return cls(manifest.name, space, manifest.generation, encoder.name, encoder.weights_sha256,
                   encoder.preprocessing_sha256, encoder.dim, digest.hexdigest())


@dataclass(frozen=True, slots=True)
class Holding:
    """What a collection holds, and how it is searched."""

    origin: Origin
    rows: int
    dtype: str = "float32"
    index: str = "FLAT"
    search: Mapping[str, int] | None = None  # parameters of a search

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str, where: str) -> Holding:
        """Read it back; PackError names `where` it stood."""
        try:
            raw = json.loads(text)
            return cls(**{**raw, "origin": Origin(**raw["origin"])})
        except (KeyError, TypeError, ValueError) as exc:
            raise PackError(f"{where} does not say what it holds ({exc!r}); write it again with this version") from exc


def alias_of(pack: str, space: str) -> str:
    """The name that searches use: Milvus takes letters, digits and underscores, no digit first."""
    name = re.sub(r"\W", "_", f"{pack}_{space}", flags=re.ASCII)
    return f"_{name}" if name[0].isdigit() else name


class MilvusServer:
    """A connection to a Milvus server, or to a file of milvus-lite; usable from several threads."""

    def __init__(self, config: MilvusConfig, client: MilvusClient) -> None:
        self.config, self._client = config, client

    @classmethod
    def open(cls, config: MilvusConfig) -> MilvusServer:
        """Reach the server.

        Raises:
            BackendError: the extra `milvus` is not installed, the key is not set, or nobody answers in time.
        """
        try:
            from pymilvus import MilvusClient  # only boxes that search on a server carry the client
        except ModuleNotFoundError as exc:
            raise BackendError(f"searching on {config.uri} needs pymilvus; pip install 'gog_edge[milvus]'") from exc
        token = os.environ.get(config.key_env, "") if config.key_env else ""
        if config.key_env and not token:
            raise BackendError(f"the key of {config.uri} is to be in the environment variable '{config.key_env}', "
                               "which is empty or not set; set it")
        for logger in ("pymilvus", "pymilvus.milvus_client"):  # they log, at length, what is then raised
            logging.getLogger(logger).setLevel(logging.CRITICAL)
        with _said(config):
            return cls(config, MilvusClient(uri=config.uri, token=token, timeout=config.timeout_s, dedicated=True))

    def call(self, method: str, *args: Any, timeout_s: float | None = None, **options: Any) -> Any:
        """Call a method of the client; BackendError when it fails. While the server is away it is tried again, until
        the time is up: a server that is started anew costs no search.
        """
        wait_s = timeout_s or self.config.timeout_s
        deadline = time.monotonic() + wait_s
        while True:
            try:
                with _said(self.config):
                    return getattr(self._client, method)(*args, timeout=wait_s, **options)
            except _Away:
                if time.monotonic() + AGAIN_S > deadline:
                    raise
                time.sleep(AGAIN_S)

    def holding(self, collection: str) -> Holding | None:
        """What a collection or an alias holds; None where it is not there, PackError where it is none of ours."""
        if not self.call("has_collection", collection):
            return None
        described = self.call("describe_collection", collection)
        said = described.get("properties", {}).get(PROPERTY) or described.get("description", "")
        where = f"collection '{collection}' on {self.config.uri}"
        if not said.startswith("{"):
            raise PackError(f"{where} was not written by gog_edge; give the pack another name, or drop the collection")
        return Holding.from_json(said, where)

    def target(self, alias: str) -> str | None:
        """The collection that an alias names, or None where there is no such alias."""
        if alias not in self.call("list_aliases")["aliases"]:
            return None
        return str(self.call("describe_alias", alias)["collection_name"])

    def count(self, collection: str) -> int:
        """Rows that a loaded collection holds now."""
        found = self.call("query", collection, filter="", output_fields=["count(*)"], consistency_level="Strong")
        return int(found[0]["count(*)"])

    def index(self, manifest: Manifest, space: str, gone: Ids) -> MilvusIndex:
        """The index of a pack's space (what is `gone` was not loaded). Raises as `MilvusIndex.open` does."""
        return MilvusIndex.open(self, manifest, space)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


class MilvusIndex:
    """Nearest images by cosine, as `VectorIndex` finds them; may be searched from several threads.

    When the alias is switched to a later generation, searches go on there: images that this pack does not know yet are
    left out.
    """

    def __init__(self, server: MilvusServer, alias: str, holding: Holding, last: int) -> None:
        """`last`: the highest image id that the pack's store knows."""
        self._server, self._alias, self._holding, self._last = server, alias, holding, last
        self.shards = MilvusRows(server, alias, holding)

    @classmethod
    def open(cls, server: MilvusServer, manifest: Manifest, space: str) -> MilvusIndex:
        """Find a pack's space on a server and check that it is just this generation's.

        Raises:
            PackError: it is not there, of another generation, encoder or pack, or rows are missing.
            BackendError: the server is away.
        """
        origin, alias = Origin.of(manifest, space), alias_of(manifest.name, space)
        where = f"pack '{manifest.name}': '{alias}' on {server.config.uri}"
        advice = f"run `python -m index.load_milvus PACK {server.config.uri}` with this pack, or copy the pack served"
        holding = server.holding(alias)
        if holding is None:
            raise PackError(f"{where} is not there; {advice}")
        served, wanted = asdict(holding.origin), asdict(origin)
        for key, value in wanted.items():
            if served[key] != value:
                raise PackError(f"{where} has {key} {served[key]}, the pack here has {value}; {advice}")
        server.call("load_collection", alias, timeout_s=LONG_S)  # at once where it is loaded
        rows = server.count(alias)
        if rows != holding.rows:
            raise PackError(f"{where} holds {rows} vectors, {holding.rows} were written; {advice}")
        return cls(server, alias, holding, max(segment.images.last for segment in manifest.segments))

    def __len__(self) -> int:
        return self._holding.rows

    def close(self) -> None:
        """Nothing ends: the connection is the server's, which other packs search too."""

    def search(self, queries: Vectors, k: int, *, without: Ids | None = None) -> Hits:
        """The k nearest images of each query, as `VectorIndex.search` gives them.

        Args:
            queries: [n, dim] float32, of unit length.
            k: images wanted; cut to MAX_K and to the number of images there are.
            without: ids that are not wanted, [m] int64.

        Raises:
            BackendError: the server is away, or refuses.
        """
        k = max(0, min(k, MAX_K, len(self)))
        hits = Hits(np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1, np.int64))
        if k:
            for at in range(0, len(queries), BATCH):
                part = slice(at, at + BATCH)
                self._search(queries[part], Hits(hits.scores[part], hits.ids[part]), without)
        found = int((hits.ids >= 0).sum(axis=1).max(initial=0))
        return Hits(hits.scores[:, :found], hits.ids[:, :found])

    def _search(self, queries: Vectors, hits: Hits, without: Ids | None) -> None:
        """Fill hits [n, k]: twice as many rows as images are asked for, and more where that is not enough."""
        most = min(MOST_ROWS, len(self))
        asked = min(2 * hits.ids.shape[1], most)
        while True:
            found = self._rows(queries, asked, without)
            complete = [self._fill(hits, n, rows) or len(rows) < asked for n, rows in enumerate(found)]
            if asked == most or all(complete):
                return
            asked = min(4 * asked, most)

    def _rows(self, queries: Vectors, count: int, without: Ids | None) -> Sequence[Sequence[Mapping[str, Any]]]:
        params = dict(self._holding.search or {})
        if "ef" in params:  # HNSW keeps at least as many as it gives back
            params["ef"] = max(params["ef"], count)
        data = list(queries.astype(self._holding.dtype))
        unwanted = "" if without is None or not len(without) else f"image not in {_list(without)}"
        found: Sequence[Sequence[Mapping[str, Any]]] = self._server.call(
            "search", self._alias, data=data, anns_field="vector", limit=count, filter=unwanted,
            output_fields=["row", "image"], search_params={"metric_type": "IP", "params": params},
            consistency_level="Eventually",  # nothing changes behind an alias
        )  # fmt: skip
        return found

    def _fill(self, hits: Hits, n: int, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Write the best row of each image; whether there were enough."""
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
    """The vectors of an alias, by row, as `VectorShards` gives those of the box; what is not there (any more) is -1, 0.

    They are asked for, so ask for few. Rows are those of the generation that the alias names now.
    """

    def __init__(self, server: MilvusServer, alias: str, holding: Holding) -> None:
        self.dim = holding.origin.dim
        self._server, self._alias, self._holding = server, alias, holding

    def __len__(self) -> int:
        return self._holding.rows

    def ids_of(self, rows: ArrayLike) -> Ids:
        """Ids of rows: int64, of their shape."""
        wanted = np.asarray(rows, dtype=np.int64)
        found = {int(row["row"]): int(row["image"]) for row in self._query("row", wanted, "image")}
        return np.array([found.get(row, -1) for row in wanted.reshape(-1).tolist()], np.int64).reshape(wanted.shape)

    def first_rows(self, ids: ArrayLike) -> Ids:
        """The first row of each id: [n] int64."""
        wanted = np.asarray(ids, dtype=np.int64)
        found: dict[int, int] = {}
        for row in self._query("image", wanted, "row"):
            image, number = int(row["image"]), int(row["row"])
            found[image] = min(number, found.get(image, number))
        return np.array([found.get(image, -1) for image in wanted.tolist()], dtype=np.int64)

    def take(self, rows: ArrayLike) -> Vectors:
        """Vectors of rows: [n, dim] float32."""
        wanted = np.asarray(rows, dtype=np.int64)
        stored = {int(row["row"]): row["vector"] for row in self._query("row", wanted, "vector")}
        vectors = np.zeros((len(wanted), self.dim), dtype=np.float32)
        for n, row in enumerate(wanted.tolist()):
            if row in stored:
                vectors[n] = _vector(stored[row], self._holding.dtype)
        return vectors

    def _query(self, key: str, wanted: Ids, field: str) -> Sequence[Mapping[str, Any]]:
        numbers = np.unique(wanted[wanted >= 0])
        if not len(numbers):
            return []
        found: Sequence[Mapping[str, Any]] = self._server.call(
            "query", self._alias, filter=f"{key} in {_list(numbers)}", output_fields=["row", "image", field],
            limit=MOST_ROWS, consistency_level="Eventually",
        )  # fmt: skip
        return found


def _list(ids: Iterable[Any]) -> str:
    return json.dumps([int(number) for number in ids])


def _vector(stored: Any, dtype: str) -> Vectors:
    """A vector as the client gives it: numbers, or for halves their bytes, alone or in a list of one."""
    if dtype == "float16":
        return np.frombuffer(stored if isinstance(stored, bytes) else stored[0], dtype=np.float16).astype(np.float32)
    return np.asarray(stored, dtype=np.float32)


class _Away(BackendError):
    """Nobody answers: it may pass."""


@contextmanager
def _said(config: MilvusConfig) -> Iterator[None]:
    """Say of the client's errors which server it was and what to do."""
    import grpc  # type: ignore[import-untyped, unused-ignore]  # comes with pymilvus
    from pymilvus import MilvusException

    where = f"the Milvus server at {config.uri}"
    advice = "start it, or check its address and key ([[packs]] in bundle.toml)"
    try:
        yield
    except grpc.RpcError as exc:  # what the client does not try again
        said = f"refuses: {exc.code().name} {exc.details()}"
        if exc.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            said = f"gave no answer within {config.timeout_s:g} s"
        raise BackendError(f"{where} {said}; {advice}") from exc
    except MilvusException as exc:
        if exc.code in PASSING or isinstance(exc.code, grpc.StatusCode):
            raise _Away(f"{where} is away ({exc.message}); {advice}") from exc
        raise BackendError(f"{where} refuses: {exc.message}") from exc
