"""A pack: one snapshot made searchable. Opening it checks that everything in it belongs together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from gog_edge.errors import PackError, PictureError
from gog_edge.files import OnBytes
from gog_edge.picture import decode_picture
from gog_edge.retrieval.encoder import INTERCHANGEABLE_COSINE, Encoder
from gog_edge.retrieval.manifest import Counts, Manifest, Space, read_manifest, verify_files_of
from gog_edge.retrieval.text.segment import StoredPicture
from gog_edge.retrieval.text.store import Store
from gog_edge.retrieval.vectors.faiss_index import Hits, VectorIndex
from gog_edge.retrieval.vectors.shards import Ids, Rows, VectorShards, read_ids
from gog_edge.types import Vectors

SPOT_CHECKS = 64  # ids of vectors that are looked up in the store at open; `verify_pack` looks at all


class StoredVectors(Protocol):
    """Vectors by row, as `VectorShards` has them."""

    def __len__(self) -> int: ...

    def ids_of(self, rows: Rows) -> Ids:
        """Ids of rows; -1 where there is none."""

    def first_rows(self, ids: ArrayLike) -> Rows:
        """The first row of each id; -1 where there is none."""

    def take(self, rows: ArrayLike) -> Vectors:
        """Vectors of rows: [n, dim] float32."""


class SpaceIndex(Protocol):
    """What searches a space: `VectorIndex` on this box, `server.MilvusIndex` elsewhere."""

    @property
    def shards(self) -> StoredVectors:
        """What is searched."""

    def __len__(self) -> int: ...

    def search(self, queries: Vectors, k: int, *, without: Ids | None = None) -> Hits:
        """The k nearest of each query."""

    def close(self) -> None:
        """End what helps searching; nobody may be searching."""


OpenIndex: TypeAlias = Callable[[Manifest, str, Ids], SpaceIndex]  # "images" or "captions", ids of images that are gone
MakeIndex: TypeAlias = Callable[[VectorShards, Ids], SpaceIndex]  # a space's vectors, ids of images that are gone


@dataclass(frozen=True, slots=True)
class Pack:
    """An open pack; reading only, from any number of threads."""

    folder: Path
    manifest: Manifest
    store: Store = field(repr=False)
    images: SpaceIndex = field(repr=False)  # pictures, whole and in tiles
    captions: SpaceIndex = field(repr=False)  # what is written under pictures, by image id
    gone_images: frozenset[int] = field(repr=False)

    @classmethod
    def open(cls, folder: Path, encoder: Encoder | None, open_index: OpenIndex | None = None, *,
             make_index: MakeIndex | None = None) -> Pack:
        """Open a pack and check it: files by hash, ids against vectors against rows, the encoder, a golden query.

        Args:
            folder: the pack.
            encoder: its own; None will do for a pack of texts alone.
            open_index: gives the indexes of its spaces; its files of vectors and indexes are not looked for then.
            make_index: makes them from the pack's own vectors, in the place of its indexes: `Gpu.index` does.

        Raises:
            BackendError: of `make_index`.
            PackError: missing or altered files, another schema, another encoder, counts that disagree, or a golden
                image that does not find itself.
        """
        manifest = read_manifest(folder)
        _check_encoder(manifest, encoder)
        verify_files_of(folder, manifest, full=False, vectors=open_index is None)
        articles, images = read_tombstones(folder, manifest)
        opener = open_index or _opener(folder, 0 if encoder is None else encoder.dim, make_index)
        with ExitStack() as opened:  # what is refused leaves nothing open
            store = opened.enter_context(closing(Store.open(folder, manifest.segments, articles.tolist())))
            pictures, captions = (opened.enter_context(closing(opener(manifest, space, images)))
                                  for space in ("images", "captions"))  # fmt: skip
            pack = cls(folder, manifest, store, pictures, captions, frozenset(images.tolist()))
            pack._check_counts()
            pack._check_golden(encoder)
            opened.pop_all()
        return pack

    @property
    def name(self) -> str:
        """Name in citations and addresses."""
        return self.manifest.name

    def picture(self, image: int) -> StoredPicture | None:
        """The file of an image as it is served, or None where there is no such image (any more)."""
        return None if image in self.gone_images else self.store.picture(image)

    def live_main_images(self, articles: Sequence[int]) -> dict[int, int]:
        """The image of each article that is most its own, where one is left: article id -> image id."""
        return self.store.main_images(articles, self.gone_images)

    def close(self) -> None:
        """Close the store and the searches."""
        self.store.close()
        self.images.close()
        self.captions.close()

    def _check_counts(self) -> None:
        for segment, reader in zip(self.manifest.segments, self.store.readers, strict=True):
            if reader.counts() != segment.counts:
                raise PackError(f"pack '{self.name}': '{segment.store}' has {reader.counts()}, wanted "
                                f"{segment.counts}; build it again")
        for vectors in (self.images.shards, self.captions.shards):
            rows = np.linspace(0, len(vectors) - 1, min(SPOT_CHECKS, len(vectors))).astype(np.int64)
            ids = np.unique(vectors.ids_of(rows))
            strange = sorted(set(ids.tolist()) - self.store.images(ids.tolist()).keys())
            if strange:
                raise PackError(f"pack '{self.name}': image rows and vectors disagree, first at image {strange[0]}; "
                                "build it again")
        images = self.manifest.counts.images
        if self.manifest.encoder is not None and len(self.images) < images:
            raise PackError(f"pack '{self.name}': {images} image rows and {len(self.images)} vectors disagree; "
                            "build it again")

    def _check_golden(self, encoder: Encoder | None) -> None:
        golden = self.manifest.golden
        if golden is None or encoder is None:
            return
        stored = self.picture(golden)
        if stored is None:
            raise PackError(f"pack '{self.name}': its golden image {golden} is not in the store; build it again")
        try:
            pixels = decode_picture(stored.data).pixels
        except PictureError as exc:
            raise PackError(f"pack '{self.name}': its golden image {golden} cannot be decoded ({exc})") from exc
        vector = encoder.embed_images([pixels])
        found = int(self.images.search(vector, 1).ids[0, 0])
        row = self.images.shards.first_rows(np.array([golden], dtype=np.int64))
        cosine = float(self.images.shards.take(row)[0] @ vector[0]) if row[0] >= 0 else 0.0
        if found != golden or cosine < INTERCHANGEABLE_COSINE:
            raise PackError(
                f"pack '{self.name}': its golden image {golden} found image {found} and is at cosine {cosine:.4f} to "
                f"its own vector (wanted {INTERCHANGEABLE_COSINE}); this encoder computes other vectors; build it again"
            )


def read_tombstones(folder: Path, manifest: Manifest) -> tuple[Ids, Ids]:
    """Ids of articles and of images that are no longer there, sorted; PackError where a file holds no ids."""
    if manifest.tombstones is None:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    files = manifest.tombstones.articles, manifest.tombstones.images
    articles, images = (read_ids(folder / path) for path in files)
    return articles, images


def verify_pack(folder: Path, on_bytes: OnBytes | None = None, *, vectors: bool = True) -> Manifest:
    """Read everything of a pack: every file by hash, every page of the store, every id and every vector.

    `on_bytes` is told how much was hashed. Without `vectors`, their files may lie elsewhere and are not looked for.

    Raises:
        PackError: names the first file, row or vector that is wrong.
    """
    manifest = read_manifest(folder)
    verify_files_of(folder, manifest, full=True, vectors=vectors, on_bytes=on_bytes)
    articles, images = read_tombstones(folder, manifest)
    store = Store.open(folder, manifest.segments, articles.tolist())
    try:
        _verify_rows(manifest, store, articles, images)
        rows = store.image_ids()
    finally:
        store.close()
    for kind in (manifest.images, manifest.captions) if vectors else ():
        _verify_vectors(folder, manifest, kind, rows)
    return manifest


def _verify_rows(manifest: Manifest, store: Store, articles: Ids, images: Ids) -> None:
    for segment, reader in zip(manifest.segments, store.readers, strict=True):
        reader.check()
        if reader.recount() != segment.counts:
            raise PackError(f"pack '{manifest.name}': '{segment.store}' has {reader.recount()}, wanted "
                            f"{segment.counts}; build it again")
    for kind, gone, rows in (
        ("article", articles, np.concatenate([reader.article_ids() for reader in store.readers])),
        ("image", images, store.image_ids()),
    ):
        unknown = np.setdiff1d(gone, rows)
        if len(unknown):
            raise PackError(f"pack '{manifest.name}': tombstone {int(unknown[0])} is no {kind} of it; build it again")
    dead = Counts(len(articles), 0, len(images))
    live = store.counts()
    if (live.articles - dead.articles, live.images - dead.images) != (manifest.counts.articles, manifest.counts.images):
        raise PackError(f"pack '{manifest.name}': {live} less {dead} is not {manifest.counts}; build it again")


def _verify_vectors(folder: Path, manifest: Manifest, space: Space, rows: Ids) -> None:
    if manifest.encoder is None:
        return
    shards = open_shards(folder, space, manifest.encoder.dim)
    at = 0
    for block in shards.blocks():
        lengths = np.linalg.norm(block, axis=1)
        said = lengths[lengths != 0]  # words that an encoder does not know may come to nothing
        if not np.isfinite(lengths).all() or np.abs(said - 1).max(initial=0) > 0.01:
            raise PackError(f"pack '{manifest.name}': a vector near row {at} is not of unit length; build it again")
        at += len(block)
    if space is manifest.images:
        ids = np.unique(shards.ids_of(np.arange(len(shards), dtype=np.int64)))
        wrong = np.setxor1d(ids, rows)
        if len(wrong):
            raise PackError(f"pack '{manifest.name}': {len(rows)} image rows and {len(ids)} vectors disagree, first at "
                            f"image {int(wrong[0])}; build it again")


def _check_encoder(manifest: Manifest, encoder: Encoder | None) -> None:
    if manifest.encoder is None:
        return
    if encoder is None:
        raise PackError(f"pack '{manifest.name}' was built with encoder '{manifest.encoder.name}'; open it with that")
    mine, theirs = asdict(encoder.fingerprint), asdict(manifest.encoder)
    for key, value in theirs.items():
        if mine[key] != value:
            raise PackError(
                f"pack '{manifest.name}' was built with encoder '{manifest.encoder.name}', this one is "
                f"'{encoder.fingerprint.name}': {key} is {mine[key]}, the pack says {value}; open it with its own "
                "encoder or build it again"
            )


def open_shards(folder: Path, space: Space, dim: int) -> VectorShards:
    """The vectors of a space, mapped. Raises PackError as `VectorShards.open` does."""
    return VectorShards.open([(folder / shard.vectors, folder / shard.ids) for shard in space.shards], dim)


def _opener(folder: Path, dim: int, make_index: MakeIndex | None) -> OpenIndex:
    """The pack's own files."""

    def open_index(manifest: Manifest, name: str, gone: Ids) -> SpaceIndex:
        space: Space = getattr(manifest, name)
        shards = open_shards(folder, space, dim)
        if make_index is not None:
            return make_index(shards, gone)
        return VectorIndex.open(folder, space.index, shards, tombstones=gone)

    return open_index
