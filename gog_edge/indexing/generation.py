"""Builds the next generation of a pack in steps that can each be killed and are resumed where they stopped.

    1. the store      build/store.sqlite, chunk by chunk, then renamed to store/NNNNNN.sqlite
    2. the vectors    shard by shard, each file written atomically
    3. the indexes    each file written atomically, with its measurements in build/
    4. the manifest   generations/NNNNNN.json, then MANIFEST.json by rename: the commit

Files that a manifest refers to are never written again. Files that neither the current generation nor its parent uses
are deleted at the next commit, so that processes that have the parent open can continue to read it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from gog_edge.errors import PackError
from gog_edge.files import full_disk_as, read_json, write_json
from gog_edge.indexing import OnProgress
from gog_edge.indexing.commit import (
    SETTINGS,
    commit_generation,
    prune,
    unfinished_build,
    write_lock,
    write_report,
    write_tombstones,
)
from gog_edge.indexing.sources.base import ArticleRecord, ImageRecord
from gog_edge.indexing.tombstones import deleted_images, live_counts, replaced_articles
from gog_edge.indexing.vectors.embedding import (
    CAPTIONS,
    IMAGES,
    PARAGRAPHS,
    TILES,
    Encoders,
    ShardPlan,
    check_encoders,
    embed_shards,
    fingerprint_of,
    held_out_queries,
    memory_shares,
    plan_shards,
)
from gog_edge.indexing.vectors.index_planning import plans
from gog_edge.indexing.vectors.index_writer import build_index, golden_image
from gog_edge.picture import decode_picture
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.manifest import (
    BUILD,
    IndexEntry,
    IndexTarget,
    Manifest,
    Segment,
    Snapshot,
    Space,
    resume_command,
)
from gog_edge.retrieval.pack import open_shards, read_tombstones
from gog_edge.retrieval.text.encoder import TextEncoder
from gog_edge.retrieval.text.segment import STORE_SCHEMA, SegmentReader
from gog_edge.retrieval.text.store import paragraphs_of
from gog_edge.retrieval.vectors.faiss_index import VectorIndex
from gog_edge.retrieval.vectors.shards import Ids, VectorShards
from gog_edge.types import Vectors

if TYPE_CHECKING:
    from gog_edge.indexing.store_writer import StoreWriter

SHARD_ROWS = 16_384  # about five minutes of an int8 ViT-B-32 on two cores, which is the most that a kill costs
CHANGEABLE_OPTIONS = {"duplicate_cosine", "memory", "recall", "factory"}  # when an unfinished build is resumed
MAX_UNINDEXED_ROWS = 20_000  # rows outside of the index, which are searched exactly; or, if larger,
MAX_UNINDEXED_SHARE = 0.05  # this share of the indexed rows
SPACES = (IMAGES, CAPTIONS, PARAGRAPHS)
_NO_IDS = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class PackOptions:
    """How a pack is built."""

    duplicate_cosine: float = 0.995  # cosine from which two stored images count as duplicates
    captions: bool = True  # embed captions
    tiles: bool = False  # embed parts of lead images too: six vectors instead of one
    shard_rows: int = SHARD_ROWS  # images or paragraphs of a shard, the unit of resumption
    memory: int | None = None  # bytes that a search may take; None: no limit, the fastest index
    recall: float = 0.95  # share of the ten nearest neighbours that an index must return
    factory: str | None = None  # string for FAISS's index_factory instead of the planned indexes

    @classmethod
    def from_manifest(cls, manifest: Manifest) -> PackOptions:
        """Return the options of a pack that apply to its next generation."""
        images = sum(segment.counts.images for segment in manifest.segments)
        return cls(
            duplicate_cosine=manifest.duplicate_cosine,
            captions=manifest.captions.rows > 0,
            tiles=manifest.images.rows > images,
            memory=manifest.target.memory,
            recall=manifest.target.recall,
        )


class GenerationBuilder:
    """A builder of the generation after `parent`, or of the first one. The caller holds the pack's lock."""

    def __init__(self, folder: Path, *, name: str, snapshot: Snapshot, encoder: Encoder | None, options: PackOptions,
                 parent: Manifest | None, text_encoder: TextEncoder | None = None) -> None:
        """Start a build, or resume the unfinished one, which must have the same settings.

        Raises:
            PackError: the name is not valid in an address, the folder contains an unfinished build with other settings,
                or an encoder is not the pack's.
        """
        if not name or not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
            raise PackError(f"the name of a pack must consist of letters, digits, '-' and '_', got {name!r}")
        self.encoders = Encoders(encoder, text_encoder)
        if parent is not None:
            check_encoders(parent, self.encoders)
        self.folder, self.name, self.snapshot = folder, name, snapshot
        self.options, self.parent = options, parent
        self.number = 1 if parent is None else parent.generation + 1
        self._start_or_resume()
        self._segments = () if parent is None else parent.segments
        self._deleted = (_NO_IDS, _NO_IDS) if parent is None else read_tombstones(folder, parent)  # articles, images
        self._earlier = [SegmentReader.open(folder / segment.store) for segment in self._segments]

    def _start_or_resume(self) -> None:
        settings = {
            "store_schema": STORE_SCHEMA, "generation": self.number, "name": self.name,
            "snapshot": asdict(self.snapshot),
            **self.encoders.to_json(),
            "options": asdict(self.options),
        }  # fmt: skip
        settings = json.loads(json.dumps(settings))
        unfinished = unfinished_build(self.folder, self.parent)
        if unfinished is None:
            prune(self.folder, self.parent)
            (self.folder / BUILD).mkdir(parents=True)
        else:
            self._check_settings(unfinished, settings)
        if unfinished != settings:
            for measured in (self.folder / BUILD).glob("index-*.json"):
                measured.unlink()  # the index has another target
            write_json(self.folder / SETTINGS, settings)

    def _check_settings(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        """Raise PackError if the unfinished build has other texts or vectors."""
        for before, now in ((old, {**new, "options": old["options"]}), (old["options"], new["options"])):
            for key, value in now.items():
                if key not in CHANGEABLE_OPTIONS and before.get(key) != value:
                    raise PackError(
                        f"'{self.folder}' contains an unfinished build with another {key} ({before.get(key)}, now "
                        f"{value}); complete it with {resume_command(self.folder)}, or delete '{self.folder / BUILD}'"
                    )

    def close(self) -> None:
        """Close the earlier segments. Completed steps remain."""
        for reader in self._earlier:
            reader.close()

    # --- the store ----------------------------------------------------------------------------

    @property
    def store(self) -> str:
        """Return the path of the finished store, relative to the pack."""
        return f"store/{self.number:06d}.sqlite"

    @property
    def store_done(self) -> bool:
        """Return whether the store is finished."""
        return (self.folder / self.store).is_file()

    def open_store(self) -> StoreWriter:
        """Return a writer of the segment, which contains the chunks written before a kill."""
        from gog_edge.indexing.store_writer import FirstIds, StoreWriter  # needs sqlite-utils; embedding does not

        first_ids = FirstIds.after(self._segments[-1]) if self._segments else FirstIds()
        return StoreWriter(self.folder / BUILD / "store.sqlite", first_ids=first_ids, earlier=self._earlier,
                           deleted=frozenset(self._deleted[0].tolist()))

    def finish_store(self, writer: StoreWriter) -> None:
        """Build the word index and move the segment to its final place."""
        segment = writer.finish(self.store)
        write_json(self.folder / BUILD / "segment.json", asdict(segment))
        (self.folder / self.store).parent.mkdir(exist_ok=True)
        (self.folder / BUILD / "store.sqlite").replace(self.folder / self.store)

    def segment(self) -> Segment:
        """Return the finished segment."""
        return Segment.from_json(read_json(self.folder / BUILD / "segment.json", what="pack", error=PackError))

    # --- vectors and indexes ------------------------------------------------------------------

    def shard_plans(self) -> list[ShardPlan]:
        """Return the shards of the finished segment."""
        options, encoders = self.options, self.encoders
        used = {IMAGES: encoders.image is not None, TILES: encoders.image is not None and options.tiles,
                CAPTIONS: encoders.image is not None and options.captions, PARAGRAPHS: encoders.text is not None}
        return plan_shards(self.segment(), self.number, rows=options.shard_rows,
                           kinds=[kind for kind, needed in used.items() if needed])

    def embed(self, on_progress: OnProgress | None = None) -> dict[str, Space]:
        """Embed the shards that are missing.

        Returns:
            Each of SPACES: the shards of earlier generations first, with the parent's indexes.
        """
        spaces = {kind: Space() if self.parent is None else getattr(self.parent, kind) for kind in SPACES}
        reader = SegmentReader.open(self.folder / self.store)
        try:
            shards = embed_shards(self.folder, self.shard_plans(), reader, self.encoders, on_progress)
        finally:
            reader.close()
        for kind, shard in shards:
            kind = IMAGES if kind == TILES else kind
            spaces[kind] = Space((*spaces[kind].shards, shard), spaces[kind].index)
        return spaces

    def build_index(self, kind: str, space: Space, queries: Vectors | None, share: float = 1.0,
                    on_progress: OnProgress | None = None) -> Space:
        """Return the space with a new index, or with its present one if few rows are outside of it.

        Args:
            kind: one of SPACES.
            space: the vectors.
            queries: as in `index_writer.build_index`.
            share: share of the memory limit that this index may take.
            on_progress: called with (stage, done, total).
        """
        if self._is_indexed(space):
            return space
        measured = self.folder / BUILD / f"index-{kind}.json"
        if measured.is_file():
            return Space(space.shards, IndexEntry.from_json(read_json(measured, what="pack", error=PackError)))
        options = self.options
        entry = build_index(
            self.folder, f"index/{self.number:06d}-{kind}.faiss", self._open_shards(kind, space), queries,
            memory=None if options.memory is None else int(share * options.memory),
            recall=options.recall, factory=options.factory, on_progress=on_progress,
        )  # fmt: skip
        write_json(measured, asdict(entry))
        return Space(space.shards, entry)

    @staticmethod
    def _is_indexed(space: Space) -> bool:
        """Return whether so few rows are outside of the index that they can be searched exactly."""
        indexed = space.index.rows if space.index else 0
        allowed = max(MAX_UNINDEXED_ROWS, MAX_UNINDEXED_SHARE * indexed) if indexed else 0
        return space.rows - indexed <= allowed

    def _open_shards(self, kind: str, space: Space) -> VectorShards:
        return open_shards(self.folder, space, self.encoders.dim_of(kind))

    # --- the commit ---------------------------------------------------------------------------

    def finish(self, *, delete_missing: bool = False, on_progress: OnProgress | None = None) -> Manifest:
        """Embed, index and commit.

        Args:
            delete_missing: also delete what the snapshot of this generation does not contain.
            on_progress: called with (stage, done, total).

        Raises:
            PackError: the disk is full, or no index reaches the recall. Completed steps remain.
        """
        if self.parent is not None and self._is_unchanged(self.parent, delete_missing):
            prune(self.folder, self.parent)
            return self.parent
        with full_disk_as(self.folder, PackError):
            self._check_memory()
            spaces = self.embed(on_progress)
            readers = [*self._earlier, SegmentReader.open(self.folder / self.store)]
            new = readers[-1]
            try:
                replaced = replaced_articles(new, self._earlier, delete_missing=delete_missing)
                articles = np.union1d(self._deleted[0], replaced)
                images = deleted_images(readers, articles, self._deleted[1], new)
                paragraphs = paragraphs_of(readers, articles.tolist())
                spaces = self._build_indexes(spaces, readers, images, paragraphs, on_progress)
                counts = live_counts(readers, articles, images)
                report = write_report(self.folder, self.number, new.report())
            finally:
                new.close()
            parent = self.parent
            manifest = Manifest(
                name=self.name,
                generation=self.number,
                parent=None if parent is None else parent.generation,
                snapshot=self.snapshot if delete_missing or parent is None else parent.snapshot,
                encoder=fingerprint_of(self.encoders.image),
                segments=(*self._segments, self.segment()),
                images=spaces[IMAGES],
                captions=spaces[CAPTIONS],
                tombstones=write_tombstones(self.folder, self.number, articles, images),
                counts=counts,
                target=IndexTarget(self.options.memory, self.options.recall),
                duplicate_cosine=self.options.duplicate_cosine,
                golden=self._golden(spaces[IMAGES], images),
                report=report,
                files=(),
                image_calibration=None if parent is None else parent.image_calibration,
                text_calibration=None if parent is None else parent.text_calibration,
                text_encoder=fingerprint_of(self.encoders.text),
                paragraphs=spaces[PARAGRAPHS],
            )
            return commit_generation(self.folder, manifest, parent)

    def _golden(self, images: Space, deleted: Ids) -> int | None:
        if not images.rows:
            return None
        index = VectorIndex.open(self.folder, images.index, self._open_shards(IMAGES, images), tombstones=deleted)
        return golden_image(index, deleted, None if self.parent is None else self.parent.golden)

    def _check_memory(self) -> None:
        """Raise PackError if no index can fit the memory, which is better known before embedding than after it."""
        options, parent, new = self.options, self.parent, self.segment().counts
        if options.memory is None or options.factory is not None:
            return
        images = new.images + (0 if parent is None else parent.images.rows)
        paragraphs = new.paragraphs + (0 if parent is None else parent.paragraphs.rows)
        rows = {IMAGES: images, CAPTIONS: images if options.captions else 0, PARAGRAPHS: paragraphs}
        for kind, share in memory_shares(rows, self.encoders).items():
            plans(rows[kind], self.encoders.dim_of(kind), int(share * options.memory))

    def _is_unchanged(self, parent: Manifest, delete_missing: bool) -> bool:
        """Return whether the parent contains everything already, as when a command is repeated after its commit."""
        if delete_missing and self.snapshot != parent.snapshot:
            return False
        reader = SegmentReader.open(self.folder / self.store)
        try:
            if not reader.is_empty():
                return False
            replaced = replaced_articles(reader, self._earlier, delete_missing=delete_missing)
            return not len(np.setdiff1d(replaced, self._deleted[0]))
        finally:
            reader.close()

    def _build_indexes(self, spaces: dict[str, Space], readers: list[SegmentReader], images: Ids, paragraphs: Ids,
                       on_progress: OnProgress | None) -> dict[str, Space]:
        """Return the spaces with indexes; `images` and `paragraphs` are the deleted ids."""
        shares = memory_shares({kind: space.rows for kind, space in spaces.items()}, self.encoders)
        missing = [kind for kind in shares if not self._is_indexed(spaces[kind])]
        queries = held_out_queries(missing, readers, images, paragraphs, self.encoders)
        return {kind: self.build_index(kind, space, queries[kind], shares[kind], on_progress) if kind in missing
                else space for kind, space in spaces.items()}  # fmt: skip


class PackWriter:
    """A writer of a pack from records in memory, into an empty or new folder. Use it as a context manager.

    The folder is not a pack before `commit`. The same records, encoder and options give the same store, vectors and
    index.
    """

    def __init__(self, folder: Path, *, name: str, snapshot: Snapshot, encoder: Encoder | None,
                 options: PackOptions | None = None, text_encoder: TextEncoder | None = None) -> None:
        """Create the folder.

        Without an encoder the pack has no images; without a text encoder, paragraphs are searched by words only.

        Raises:
            PackError: the folder is not empty, or the name is not valid in an address.
        """
        if folder.exists() and any(folder.iterdir()):
            raise PackError(f"'{folder}' is not empty, and packs are never overwritten; choose another folder, or "
                            "delete it")
        self.folder = folder
        self._builder = GenerationBuilder(folder, name=name, snapshot=snapshot, encoder=encoder,
                                          options=options or PackOptions(), parent=None, text_encoder=text_encoder)
        self._open, self._transaction = ExitStack(), ExitStack()
        self._open.enter_context(write_lock(folder))
        self._open.callback(self._builder.close)
        self._store = self._builder.open_store()
        self._open.callback(self._store.close)
        self._transaction.enter_context(self._store.chunk(0))

    def __enter__(self) -> PackWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._open:
            self._transaction.__exit__(kind, value, trace)

    def add_article(self, record: ArticleRecord) -> int:
        """Write an article and return its id.

        Raises:
            PackError: its title has no word, or its key exists already.
        """
        return self._store.add_article(record)

    def add_image(self, record: ImageRecord) -> None:
        """Write an image of articles that were added before. A file that is given twice is stored once.

        Raises:
            PackError: an article was not added, or the format is not stored.
            PictureError: the file cannot be decoded.
        """
        decode_picture(record.data)
        self._store.add_image(record)

    def add(self, articles: Iterable[ArticleRecord], images: Iterable[ImageRecord]) -> None:
        """Write articles, then images."""
        for article in articles:
            self.add_article(article)
        for image in images:
            self.add_image(image)

    def commit(self) -> Manifest:
        """Embed, index, and write the manifest.

        Raises:
            PackError: there is no article, or no image finds itself.
        """
        if not self._store.counts.articles:
            raise PackError(f"'{self.folder}' has no article; add one before the commit")
        self._transaction.close()
        self._builder.finish_store(self._store)
        return self._builder.finish()
