"""Open and verify packs: one snapshot made searchable, with its store, vector indexes and calibration."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from gog_edge.errors import PackError, PictureError
from gog_edge.files import OnBytes
from gog_edge.picture import decode_picture
from gog_edge.retrieval.encoder import MIN_COMPATIBLE_COSINE, Encoder
from gog_edge.retrieval.manifest import Fingerprint, IdRange, Manifest, Space, read_manifest, verify_pack_files
from gog_edge.retrieval.text.segment import ImageFile
from gog_edge.retrieval.text.store import Store
from gog_edge.retrieval.vectors.faiss_index import Hits, VectorIndex
from gog_edge.retrieval.vectors.shards import Ids, Rows, VectorShards, read_ids
from gog_edge.types import Vectors

if TYPE_CHECKING:
    from gog_edge.retrieval.text.encoder import TextEncoder

_log = logging.getLogger(__name__)
SPOT_CHECKS = 64  # vectors per space whose ids are looked up at open; `verify_pack` checks all of them
LENGTH_TOLERANCE = 0.01  # of a unit vector stored as float16


# --- interfaces of a space's vectors ----------------------------------------------------------


class StoredVectors(Protocol):
    """Vectors by row: `VectorShards` from files, `MilvusRows` from a server.

    Ids and rows are int64. Rows are numbered from 0; an id may have several. The methods of vectors on a server raise
    BackendError if it fails.
    """

    def __len__(self) -> int:
        """Return the number of rows."""

    def ids_of(self, rows: Rows) -> Ids:
        """Return the ids of rows, in the same shape; -1 for row -1."""

    def first_rows(self, ids: ArrayLike) -> Rows:
        """Return the first row of each of n ids, [n]; -1 for an id without rows."""

    def take(self, rows: ArrayLike) -> Vectors:
        """Return the unit vectors [n, dim] float32 of n rows."""


class SpaceIndex(Protocol):
    """An index over a space: `VectorIndex` on the CPU, `GpuVectorIndex` on a GPU, `MilvusIndex` on a server."""

    @property
    def shards(self) -> StoredVectors:
        """Return the vectors that are searched."""

    def __len__(self) -> int:
        """Return the number of rows that are searched."""

    def search(self, queries: Vectors, k: int, *, without: Ids | None = None) -> Hits:
        """Return the k nearest ids of each query by cosine, deleted ones excluded.

        Args:
            queries: Unit vectors [n, dim] float32.
            k: At least 0; clipped to the index's limit and to the number of ids that can be found.
            without: Ids [m] int64 to ignore.

        Raises:
            BackendError: The GPU or the server failed.
            PackError: A file of vectors was truncated after it was opened.
        """

    def close(self) -> None:
        """Release threads and memory. No search may be running."""


class WordPack(Protocol):
    """What a search of words needs of a pack."""

    @property
    def store(self) -> Store:
        """Return the open store."""

    @property
    def manifest(self) -> Manifest:
        """Return the manifest."""


# Arguments: manifest, "images", "captions" or "paragraphs", deleted ids of this kind.
IndexOpener: TypeAlias = Callable[[Manifest, str, Ids], SpaceIndex]
# Arguments: vectors of the space, deleted ids.
IndexFactory: TypeAlias = Callable[[VectorShards, Ids], SpaceIndex]


# --- an open pack -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pack:
    """An open pack. It is read-only and may be used from several threads."""

    name: str  # of citations and URLs
    folder: Path
    manifest: Manifest
    store: Store = field(repr=False)
    images: SpaceIndex = field(repr=False)  # embeddings of whole images and of tiles
    captions: SpaceIndex = field(repr=False)  # embeddings of captions, by image id
    deleted_images: frozenset[int] = field(repr=False)
    caption_weight: float  # of the caption channel in the ranking of an image query
    uses_captions: bool  # whether an image query searches captions
    paragraphs: SpaceIndex | None = field(default=None, repr=False)  # embeddings of paragraphs; None: not searched

    @classmethod
    def open(cls, folder: Path, encoder: Encoder | None, open_index: IndexOpener | None = None, *,
             make_index: IndexFactory | None = None, text_encoder: TextEncoder | None = None) -> Pack:
        """Open a pack and check it: file hashes, ids against vectors and rows, the encoders, and the golden image.

        Args:
            folder: The pack.
            encoder: The encoder that the pack was built with; None is allowed for a pack without images.
            open_index: Opens the indexes of images and captions; then the pack's own files of these are not read.
            make_index: Builds the index of each space from the pack's vectors; then its own index files are not read.
            text_encoder: The text encoder that the pack was built with; without it, paragraphs are searched by words
                only. It is ignored if the pack has no embeddings of paragraphs.

        Raises:
            BackendError: Raised by `open_index` or `make_index`.
            PackError: Missing or altered files, an unknown schema, another encoder, counts that disagree, or a golden
                image that does not find itself.
        """
        manifest = read_manifest(folder)
        _check_encoder(manifest, encoder)
        _check_text_encoder(manifest, text_encoder)
        verify_pack_files(folder, manifest, full=False, vectors=open_index is None)
        articles, images = read_tombstones(folder, manifest)
        own_files = _file_opener(folder, make_index)
        opener = open_index or own_files
        image = manifest.image_calibration
        with ExitStack() as opened:  # closes everything again if a check fails
            store = opened.enter_context(closing(Store.open(folder, manifest.segments, articles.tolist())))
            image_index, caption_index = (opened.enter_context(closing(opener(manifest, space, images)))
                                          for space in ("images", "captions"))  # fmt: skip
            paragraphs = None
            if manifest.text_encoder is not None and text_encoder is not None:
                index = own_files(manifest, "paragraphs", store.deleted_paragraphs())
                paragraphs = opened.enter_context(closing(index))
            pack = cls(
                manifest.name, folder, manifest, store, image_index, caption_index, frozenset(images.tolist()),
                caption_weight=image.caption_weight if image else 0.0,
                uses_captions=image is not None and image.uses_captions, paragraphs=paragraphs,
            )  # fmt: skip
            pack._check_rows()
            pack._check_golden(encoder)
            if paragraphs is not None and text_encoder is not None:
                pack._check_paragraphs(paragraphs, text_encoder)
            opened.pop_all()
        return pack

    def image_file(self, image: int) -> ImageFile | None:
        """Return the stored file of an image, or None if the id is unknown or deleted."""
        return None if image in self.deleted_images else self.store.image_file(image)

    def main_images(self, articles: Sequence[int]) -> dict[int, int]:
        """Return the main image of each article that has one: article id -> image id."""
        return self.store.main_images(articles, self.deleted_images)

    def close(self) -> None:
        """Close the store and the indexes."""
        self.store.close()
        self.images.close()
        self.captions.close()
        if self.paragraphs is not None:
            self.paragraphs.close()

    def _check_rows(self) -> None:
        for segment, reader in zip(self.manifest.segments, self.store.readers, strict=True):
            if reader.counts() != segment.counts:
                raise PackError(f"pack '{self.name}': '{segment.store}' has {reader.counts()}, the manifest lists "
                                f"{segment.counts}; build the pack again")
        for vectors in (self.images.shards, self.captions.shards):
            self._check_ids(vectors, [segment.images for segment in self.manifest.segments])
            ids = _sample_ids(vectors)
            unknown = sorted(set(ids.tolist()) - self.store.images(ids.tolist()).keys())
            if unknown:
                raise PackError(f"pack '{self.name}': image rows and vectors disagree, first at image {unknown[0]}; "
                                "build the pack again")
        images = self.manifest.counts.images
        if self.manifest.encoder is not None and len(self.images) < images:
            raise PackError(f"pack '{self.name}': {images} image rows and {len(self.images)} vectors disagree; "
                            "build the pack again")

    def _check_ids(self, vectors: StoredVectors, ranges: Sequence[IdRange]) -> None:
        """Check that vectors from files have ids of the pack; whether each exists is known for a sample only."""
        if isinstance(vectors, VectorShards):
            inside = np.zeros(len(vectors), dtype=bool)
            for each in ranges:
                inside |= (vectors.ids >= each.first) & (vectors.ids <= each.last)
            if not inside.all():
                unknown = vectors.ids[int(np.argmin(inside))]
                raise PackError(f"pack '{self.name}': rows and vectors disagree: a vector has the id {unknown}, which "
                                "no segment has; build the pack again")

    def _check_golden(self, encoder: Encoder | None) -> None:
        """Embed the golden image again: it must find itself at its stored vector."""
        golden = self.manifest.golden
        if golden is None or encoder is None:
            return
        stored = self.image_file(golden)
        if stored is None:
            raise PackError(f"pack '{self.name}': the golden image {golden} is missing from the store; build the pack "
                            "again")
        try:
            pixels = decode_picture(stored.data).pixels
        except PictureError as exc:
            raise PackError(f"pack '{self.name}': the golden image {golden} cannot be decoded ({exc}); build the pack "
                            "again") from exc
        vector = encoder.embed_images([pixels])
        found = int(self.images.search(vector, 1).ids[0, 0])
        row = self.images.shards.first_rows(np.array([golden], dtype=np.int64))
        cosine = float(self.images.shards.take(row)[0] @ vector[0]) if row[0] >= 0 else 0.0
        if found != golden or cosine < MIN_COMPATIBLE_COSINE:
            raise PackError(
                f"pack '{self.name}': the golden image {golden} must find itself at cosine {MIN_COMPATIBLE_COSINE} or "
                f"above, found image {found} at cosine {cosine:.4f} to its own vector; this encoder computes other "
                "vectors than the pack holds, build the pack again"
            )

    def _check_paragraphs(self, index: SpaceIndex, text_encoder: TextEncoder) -> None:
        """Look up some ids in the store, and embed one live paragraph again: it must be at its stored vector."""
        from gog_edge.retrieval.text.encoder import passage_text

        self._check_ids(index.shards, [segment.paragraphs for segment in self.manifest.segments])
        ids = _sample_ids(index.shards)
        rows = self.store.paragraphs(ids.tolist())
        unknown = sorted(set(ids.tolist()) - rows.keys())
        if unknown or len(index) != self.manifest.counts.paragraphs:
            where = f", first at paragraph {unknown[0]}" if unknown else ""
            raise PackError(f"pack '{self.name}': {self.manifest.counts.paragraphs} paragraph rows and {len(index)} "
                            f"vectors disagree{where}; build the pack again")
        if not rows:
            return
        row = rows[min(rows)]
        place = index.shards.first_rows(np.array([row.id], dtype=np.int64))
        vector = text_encoder.embed_passages([passage_text(row.title, row.section, row.text)])
        cosine = float(index.shards.take(place)[0] @ vector[0])
        if cosine < MIN_COMPATIBLE_COSINE:
            raise PackError(
                f"pack '{self.name}': the vector of paragraph {row.id} must have a cosine of "
                f"{MIN_COMPATIBLE_COSINE} or above to the stored one, got {cosine:.4f}; this text encoder computes "
                "other vectors than the pack holds, build the pack again"
            )


def _sample_ids(vectors: StoredVectors) -> Ids:
    """Return the distinct ids of up to SPOT_CHECKS rows."""
    return np.unique(vectors.ids_of(np.linspace(0, len(vectors) - 1, min(SPOT_CHECKS, len(vectors))).astype(np.int64)))


def _check_encoder(manifest: Manifest, encoder: Encoder | None) -> None:
    if manifest.encoder is None:
        return
    if encoder is None:
        raise PackError(f"pack '{manifest.name}' needs the encoder '{manifest.encoder.name}' that it was built with; "
                        "open it with that encoder")
    _check_fingerprint(manifest.name, "encoder", encoder.fingerprint, manifest.encoder)


def _check_text_encoder(manifest: Manifest, text_encoder: TextEncoder | None) -> None:
    if manifest.text_encoder is None:
        return
    if text_encoder is None:
        _log.warning("pack '%s' has embeddings of paragraphs, but its text encoder '%s' is not given: paragraphs are "
                     "searched by words only", manifest.name, manifest.text_encoder.name)  # fmt: skip
        return
    _check_fingerprint(manifest.name, "text encoder", text_encoder.fingerprint, manifest.text_encoder)


def _check_fingerprint(pack: str, kind: str, given: Fingerprint, wanted: Fingerprint) -> None:
    for key, value in asdict(wanted).items():
        got = getattr(given, key)
        if got != value:
            raise PackError(
                f"pack '{pack}' was built with the {kind} '{wanted.name}', got '{given.name}': {key} must be {value}, "
                f"got {got}; open the pack with its own {kind} or build it again"
            )


# --- files ------------------------------------------------------------------------------------


def read_tombstones(folder: Path, manifest: Manifest) -> tuple[Ids, Ids]:
    """Return the sorted ids of deleted articles and of deleted images.

    Raises:
        PackError: A file is missing or does not contain ids.
    """
    if manifest.tombstones is None:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    files = manifest.tombstones.articles, manifest.tombstones.images
    articles, images = (read_ids(folder / path) for path in files)
    return articles, images


def open_shards(folder: Path, space: Space, dim: int) -> VectorShards:
    """Open the vectors of a space. Raises PackError as `VectorShards.open` does."""
    return VectorShards.open([(folder / shard.vectors, folder / shard.ids) for shard in space.shards], dim)


def _file_opener(folder: Path, make_index: IndexFactory | None) -> IndexOpener:
    """Return an opener of the pack's own vectors, with its own indexes or with those that `make_index` builds."""

    def open_index(manifest: Manifest, name: str, deleted: Ids) -> SpaceIndex:
        space: Space = getattr(manifest, name)
        shards = open_shards(folder, space, manifest.dim_of(name))
        if make_index is not None:
            return make_index(shards, deleted)
        return VectorIndex.open(folder, space.index, shards, tombstones=deleted)

    return open_index


# --- full verification ------------------------------------------------------------------------


def verify_pack(folder: Path, on_bytes: OnBytes | None = None, *, vectors: bool = True) -> Manifest:
    """Read a whole pack and check it: every file hash, every page of the store, every id and every vector.

    Args:
        folder: The pack.
        on_bytes: Called with the number of bytes of each hashed block.
        vectors: Whether to check vectors and indexes of images and captions; False if a server holds them.

    Raises:
        PackError: Names the first file, row or vector that is wrong.
    """
    manifest = read_manifest(folder)
    verify_pack_files(folder, manifest, full=True, vectors=vectors, on_bytes=on_bytes)
    articles, images = read_tombstones(folder, manifest)
    store = Store.open(folder, manifest.segments, articles.tolist())
    try:
        _verify_rows(manifest, store, articles, images)
        images_stored, paragraphs_stored = store.image_ids(), store.paragraph_ids()
    finally:
        store.close()
    if vectors and manifest.encoder is not None:
        _verify_vectors(folder, manifest, "images", images_stored)
        _verify_vectors(folder, manifest, "captions", None)
    if manifest.text_encoder is not None:
        _verify_vectors(folder, manifest, "paragraphs", paragraphs_stored)
    return manifest


def _verify_rows(manifest: Manifest, store: Store, articles: Ids, images: Ids) -> None:
    for segment, reader in zip(manifest.segments, store.readers, strict=True):
        reader.check_integrity()
        if reader.count_rows() != segment.counts:
            raise PackError(f"pack '{manifest.name}': '{segment.store}' has {reader.count_rows()}, the manifest lists "
                            f"{segment.counts}; build the pack again")
    for kind, deleted, rows in (
        ("article", articles, np.concatenate([reader.article_ids() for reader in store.readers])),
        ("image", images, store.image_ids()),
    ):
        unknown = np.setdiff1d(deleted, rows)
        if len(unknown):
            raise PackError(f"pack '{manifest.name}': tombstone {int(unknown[0])} refers to an unknown {kind}; build "
                            "the pack again")
    total, counts = store.counts(), manifest.counts
    if (total.articles - len(articles), total.images - len(images)) != (counts.articles, counts.images):
        raise PackError(f"pack '{manifest.name}': {total.articles} articles and {total.images} images less "
                        f"{len(articles)} and {len(images)} deleted ones must be {counts.articles} and "
                        f"{counts.images}; build the pack again")


def _verify_vectors(folder: Path, manifest: Manifest, name: str, rows: Ids | None) -> None:
    """Check the lengths of a space's vectors, and unless `rows` is None that they have exactly these ids."""
    shards = open_shards(folder, getattr(manifest, name), manifest.dim_of(name))
    start = 0
    for block in shards.blocks():
        lengths = np.linalg.norm(block, axis=1)
        nonzero = lengths[lengths != 0]  # a caption of unknown words only may have the zero vector
        if not np.isfinite(lengths).all() or np.abs(nonzero - 1).max(initial=0) > LENGTH_TOLERANCE:
            raise PackError(f"pack '{manifest.name}': a vector in rows {start} to {start + len(block) - 1} does not "
                            "have unit length; build the pack again")
        start += len(block)
    if rows is not None:
        ids = np.unique(shards.ids_of(np.arange(len(shards), dtype=np.int64)))
        wrong = np.setxor1d(ids, rows)
        if len(wrong):
            kind = name.removesuffix("s")
            raise PackError(f"pack '{manifest.name}': {len(rows)} {kind} rows and {len(ids)} vectors disagree, first "
                            f"at {kind} {int(wrong[0])}; build the pack again")
