"""Writes a new pack: the store row by row, vectors shard by shard, the manifest last."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from gog_edge.errors import PackError
from gog_edge.files import describe_files, write_json
from gog_edge.indexing.index_writer import build_index
from gog_edge.indexing.store_writer import ArticleDraft, ImageDraft, StoreWriter
from gog_edge.picture import decode_picture
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.index import Ids
from gog_edge.retrieval.pack import MANIFEST, IndexEntry, Manifest, Shard, Snapshot
from gog_edge.types import Pixels, Vectors

__all__ = ["ArticleDraft", "ImageDraft", "PackWriter", "Snapshot"]

STORE = "store.sqlite"
BATCH = 64  # images embedded at once
SHARD_ROWS = 65_536
GOLDEN_SAMPLE = 512
DUPLICATE_COSINE = 0.995


class PackWriter:
    """Writes one pack into an empty or new folder. Use as a context manager; nothing is a pack before `commit`.

    The same drafts, encoder and settings give the same store, vectors and index.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        snapshot: Snapshot,
        encoder: Encoder,
        duplicate_cosine: float = DUPLICATE_COSINE,
        half: bool = False,
        shard_rows: int = SHARD_ROWS,
    ) -> None:
        """`half` stores vectors as float16.

        Raises:
            PackError: the folder is not empty, or the name does not fit into an address.
        """
        if not name or not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
            raise PackError(f"a pack cannot be named {name!r}; use letters, digits, '-' and '_'")
        if folder.exists() and any(folder.iterdir()):
            raise PackError(f"'{folder}' is not empty; a pack is never overwritten, choose another folder or remove it")
        (folder / "vectors").mkdir(parents=True)
        self.folder = folder
        self._name, self._snapshot, self._encoder = name, snapshot, encoder
        self._duplicate_cosine, self._shard_rows = duplicate_cosine, shard_rows
        self._dtype = np.float16 if half else np.float32
        self._store = StoreWriter(folder / STORE)
        self._waiting: list[tuple[int, Pixels]] = []  # images not embedded yet
        self._embedded: list[tuple[Ids, Vectors]] = []  # not in a shard yet
        self._shards: list[Shard] = []

    def __enter__(self) -> PackWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._store.close()

    def add_article(self, draft: ArticleDraft) -> int:
        """Write an article and return its id; PackError when its title is empty or taken."""
        return self._store.add_article(draft)

    def add_image(self, draft: ImageDraft) -> None:
        """Write an image of articles that were added before.

        The same file given twice is stored once and belongs to the articles of both.

        Raises:
            PackError: an article is not there, or the file is of a kind that is not stored.
            PictureError: the file cannot be decoded.
        """
        pixels = decode_picture(draft.png).pixels
        image = self._store.add_image(draft)
        if image is None:
            return
        self._waiting.append((image, pixels))
        if len(self._waiting) >= BATCH:
            self._embed()

    def add(self, articles: Iterable[ArticleDraft], images: Iterable[ImageDraft]) -> None:
        """Write articles, then images."""
        for article in articles:
            self.add_article(article)
        for image in images:
            self.add_image(image)

    def commit(self, *, factory: str | None = None) -> Manifest:
        """Build the index (`factory` of FAISS, chosen by size when not given) and write the manifest.

        Raises:
            PackError: there is no image, or no image finds itself.
        """
        self._embed()
        self._write_shard()
        counts = self._store.finish()
        if not counts.images:
            raise PackError(f"pack '{self._name}' has no image; add one, or search its text with another tool")
        ids, vectors = self._all_vectors()
        index = build_index(self.folder, "index/gen-000001.faiss", ids, vectors, factory)
        names = [STORE, index.path, *(path for shard in self._shards for path in (shard.vectors, shard.ids))]
        _sync(self.folder / name for name in names)
        manifest = self._manifest(index, _golden(ids, vectors), names)
        write_json(self.folder / MANIFEST, manifest.to_json())
        return manifest

    def _manifest(self, index: IndexEntry, golden: int, names: Sequence[str]) -> Manifest:
        return Manifest(
            name=self._name,
            generation=1,
            parent=None,
            snapshot=self._snapshot,
            encoder=self._encoder.fingerprint,
            store=STORE,
            index=index,
            shards=tuple(self._shards),
            tombstones=(),
            counts=self._store.counts,
            duplicate_cosine=self._duplicate_cosine,
            golden=golden,
            files=tuple(describe_files(self.folder, names)),
        )

    def _embed(self) -> None:
        if self._waiting:
            ids = np.array([image for image, _ in self._waiting], dtype=np.int64)
            self._embedded.append((ids, self._encoder.embed_images([pixels for _, pixels in self._waiting])))
            self._waiting.clear()
        if sum(len(ids) for ids, _ in self._embedded) >= self._shard_rows:
            self._write_shard()

    def _write_shard(self) -> None:
        if not self._embedded:
            return
        stem = f"vectors/part-{len(self._shards):06d}"
        shard = Shard(f"{stem}.npy", f"{stem}.ids.npy", sum(len(ids) for ids, _ in self._embedded))
        vectors = np.concatenate([vectors for _, vectors in self._embedded])
        np.save(self.folder / shard.vectors, vectors.astype(self._dtype))
        np.save(self.folder / shard.ids, np.concatenate([ids for ids, _ in self._embedded]))
        self._shards.append(shard)
        self._embedded.clear()

    def _all_vectors(self) -> tuple[Ids, Vectors]:
        """Ids [n] and vectors [n, dim] float32 as stored."""
        ids = [np.load(self.folder / shard.ids) for shard in self._shards]
        vectors = [np.load(self.folder / shard.vectors).astype(np.float32) for shard in self._shards]
        return np.concatenate(ids), np.concatenate(vectors)


def _golden(ids: Ids, vectors: Vectors) -> int:
    """The image, of a sample, that is farthest from all others: only its own encoder brings it back."""
    sample = np.linspace(0, len(ids) - 1, min(GOLDEN_SAMPLE, len(ids))).astype(np.int64)
    if len(ids) == 1:
        return int(ids[0])
    cosines = vectors[sample] @ vectors.T
    cosines[np.arange(len(sample)), sample] = -1.0
    return int(ids[sample[np.argmin(cosines.max(axis=1))]])


def _sync(paths: Iterable[Path]) -> None:
    """Bring files to the disk before the manifest names them."""
    for path in paths:
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
