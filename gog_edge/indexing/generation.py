"""The next generation of a pack, in the making: each step may be killed and is done again only where it is not done.

    1. the store      build/store.sqlite, chunk by chunk, then renamed to store/NNNNNN.sqlite
    2. the vectors    shard by shard, each written beside and renamed
    3. the indexes    written beside and renamed, with a note of what was measured in build/
    4. the manifest   generations/NNNNNN.json, then MANIFEST.json by rename: the commit

Files that are named by a manifest are never written again. Those that neither the generation in force nor its parent
names are removed at the next commit: whoever still has the parent open goes on reading it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np

from gog_edge.errors import PackError
from gog_edge.files import full_disk_said, read_json, write_json
from gog_edge.indexing.commit import SETTINGS, commit, prune, unfinished, write_report, write_tombstones, writing
from gog_edge.indexing.embedding import CAPTIONS, ShardPlan, embed_shards, plan_shards
from gog_edge.indexing.index_planning import golden_image, heldout_crops, plans
from gog_edge.indexing.index_writer import build_index
from gog_edge.indexing.sources.base import ArticleDraft, ImageDraft
from gog_edge.indexing.store_writer import Start, StoreWriter
from gog_edge.indexing.tombstones import dead_images, live_counts, replaced
from gog_edge.picture import decode_picture
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.manifest import BUILD, IndexEntry, Manifest, SearchTarget, Segment, Snapshot, Space, command_of
from gog_edge.retrieval.pack import read_tombstones
from gog_edge.retrieval.text.segment import SegmentReader
from gog_edge.retrieval.vectors.faiss_index import VectorIndex
from gog_edge.retrieval.vectors.shards import Ids, VectorShards
from gog_edge.types import Vectors

SHARD_ROWS = 16_384  # about five minutes of a ViT-B-32 in int8 on two cores: what a kill costs at most
RETARGETED = {"duplicate_cosine", "memory", "recall", "factory"}  # options that may change while a build goes on
DELTA_ROWS = 20_000  # rows beside the index that are searched exactly, at most, or
DELTA_SHARE = 0.05  # this share of the indexed ones
QUERIES = 256  # held-out crops that an index is measured with
_NOBODY = np.empty(0, np.int64)
OnProgress: TypeAlias = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True, slots=True)
class PackOptions:
    """How a pack is made."""

    duplicate_cosine: float = 0.995  # stored images at least this near show the same thing
    captions: bool = True  # captions are embedded too
    tiles: bool = False  # lead images are embedded in parts too: six vectors instead of one
    shard_rows: int = SHARD_ROWS  # images of a shard, the unit of resumption
    memory: int | None = None  # bytes that the search may take; None: what is quickest
    recall: float = 0.95  # share of the ten nearest that the index must find
    factory: str | None = None  # of FAISS, instead of the planner's choice

    @classmethod
    def of(cls, manifest: Manifest) -> PackOptions:
        """How a pack was made, as far as its next generation should be made alike."""
        whole = sum(segment.counts.images for segment in manifest.segments)
        return cls(
            duplicate_cosine=manifest.duplicate_cosine,
            captions=manifest.captions.rows > 0,
            tiles=manifest.images.rows > whole,
            memory=manifest.target.memory,
            recall=manifest.target.recall,
        )


class NextGeneration:
    """What comes after `parent`, or the first of a new pack. Hold the pack's lock while it is made."""

    def __init__(self, folder: Path, *, name: str, snapshot: Snapshot, encoder: Encoder | None, options: PackOptions,
                 parent: Manifest | None) -> None:
        """Begin, or go on with what was begun with just these settings.

        Raises:
            PackError: the name does not fit into an address, something else was begun here, or the encoder is not the
                pack's.
        """
        if not name or not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
            raise PackError(f"a pack cannot be named {name!r}; use letters, digits, '-' and '_'")
        if parent is not None and parent.encoder != (None if encoder is None else encoder.fingerprint):
            raise PackError(f"pack '{parent.name}' was built with another encoder; use that one, or build it anew")
        self.folder, self.name, self.snapshot, self.encoder = folder, name, snapshot, encoder
        self.options, self.parent = options, parent
        self.number = 1 if parent is None else parent.generation + 1
        self._begin()
        self._segments = () if parent is None else parent.segments
        self._gone, self._dead = (_NOBODY, _NOBODY) if parent is None else read_tombstones(folder, parent)
        self._earlier = [SegmentReader.open(folder / segment.store) for segment in self._segments]

    def _begin(self) -> None:
        settings = {
            "generation": self.number, "name": self.name, "snapshot": asdict(self.snapshot),
            "encoder": None if self.encoder is None else asdict(self.encoder.fingerprint),
            "options": asdict(self.options),
        }  # fmt: skip
        settings = json.loads(json.dumps(settings))
        begun = unfinished(self.folder)
        if begun is None:
            prune(self.folder)
            (self.folder / BUILD).mkdir(parents=True)
        else:
            self._check_begun(begun, settings)
        if begun != settings:
            for index in (self.folder / BUILD).glob("index-*.json"):
                index.unlink()  # was made for another target
            write_json(self.folder / SETTINGS, settings)

    def _check_begun(self, begun: dict[str, Any], settings: dict[str, Any]) -> None:
        """PackError where what was begun has other texts or vectors than what is to be."""
        for old, new in ((begun, {**settings, "options": begun["options"]}), (begun["options"], settings["options"])):
            for key, value in new.items():
                if key not in RETARGETED and old.get(key) != value:
                    raise PackError(
                        f"'{self.folder}' holds an unfinished build with another {key} ({old.get(key)}, now {value}); "
                        f"finish it with {command_of(self.folder)}, or remove '{self.folder / BUILD}'"
                    )

    def close(self) -> None:
        """Close what is open; what is done stays."""
        for reader in self._earlier:
            reader.close()

    # --- the store ----------------------------------------------------------------------------

    @property
    def store(self) -> str:
        """Its file, relative to the pack."""
        return f"store/{self.number:06d}.sqlite"

    @property
    def store_done(self) -> bool:
        """Whether the texts are written."""
        return (self.folder / self.store).is_file()

    def open_store(self) -> StoreWriter:
        """The segment to write into; what was written in whole chunks is there already."""
        start = Start.after(self._segments[-1]) if self._segments else Start()
        return StoreWriter(self.folder / BUILD / "store.sqlite", start=start, earlier=self._earlier,
                           gone=frozenset(self._gone.tolist()))

    def finish_store(self, writer: StoreWriter) -> None:
        """Build the word index and put the segment where it belongs."""
        segment = writer.finish(self.store)
        write_json(self.folder / BUILD / "segment.json", asdict(segment))
        (self.folder / self.store).parent.mkdir(exist_ok=True)
        (self.folder / BUILD / "store.sqlite").replace(self.folder / self.store)

    def segment(self) -> Segment:
        """The finished segment."""
        return Segment.from_json(read_json(self.folder / BUILD / "segment.json", what="pack", error=PackError))

    # --- vectors and indexes ------------------------------------------------------------------

    def plans(self) -> list[ShardPlan]:
        """The shards of the finished segment."""
        options = self.options
        return plan_shards(self.segment(), self.number, rows=options.shard_rows, tiles=options.tiles,
                           captions=options.captions)

    def embed(self, on_progress: OnProgress | None = None) -> tuple[Space, Space]:
        """Embed what is not embedded yet: the pictures' and the captions' vectors, those of earlier generations first.

        Their indexes are the parent's.
        """
        before = (Space(), Space()) if self.parent is None else (self.parent.images, self.parent.captions)
        if self.encoder is None:
            return before
        reader = SegmentReader.open(self.folder / self.store)
        try:
            shards = embed_shards(self.folder, self.plans(), reader, self.encoder, on_progress)
        finally:
            reader.close()
        new = [tuple(shard for kind, shard in shards if (kind == CAPTIONS) is captions) for captions in (False, True)]
        images, captions = (Space((*space.shards, *more), space.index) for space, more in zip(before, new, strict=True))
        return images, captions

    def index(self, kind: str, space: Space, queries: Vectors | None, share: float = 1.0,
              on_progress: OnProgress | None = None) -> Space:
        """The space with an index over (nearly) all of it: the one it has where that covers enough.

        `share` of the memory that the search may take is this index's.
        """
        if self._covered(space):
            return space
        note = self.folder / BUILD / f"index-{kind}.json"
        if note.is_file():
            return Space(space.shards, IndexEntry(**read_json(note, what="pack", error=PackError)))
        options = self.options
        entry = build_index(
            self.folder, f"index/{self.number:06d}-{kind}.faiss", self.shards(space), queries,
            memory=None if options.memory is None else int(share * options.memory),
            recall=options.recall, factory=options.factory, on_progress=on_progress,
        )  # fmt: skip
        write_json(note, asdict(entry))
        return Space(space.shards, entry)

    @staticmethod
    def _covered(space: Space) -> bool:
        """Whether so few rows stand beside the index that they may be searched exactly."""
        indexed = space.index.rows if space.index else 0
        allowed = max(DELTA_ROWS, DELTA_SHARE * indexed) if indexed else 0
        return space.rows - indexed <= allowed

    def shards(self, space: Space) -> VectorShards:
        """The vectors of a space."""
        dim = self.encoder.dim if self.encoder else 0
        return VectorShards.open([(self.folder / s.vectors, self.folder / s.ids) for s in space.shards], dim)

    # --- the commit ---------------------------------------------------------------------------

    def finish(self, *, only: bool = False, on_progress: OnProgress | None = None) -> Manifest:
        """Embed, index and commit.

        Args:
            only: what this generation's source does not hold any more goes too.
            on_progress: is told (stage, done, total).

        Raises:
            PackError: the disk is full, or no index reaches the wanted recall; what is done stays for the next try.
        """
        if self.parent is not None and self._brings_nothing(self.parent, only):
            prune(self.folder)
            return self.parent
        with full_disk_said(self.folder, PackError):
            self._check_memory()
            spaces = self.embed(on_progress)
            readers = [*self._earlier, SegmentReader.open(self.folder / self.store)]
            try:
                gone = np.union1d(self._gone, replaced(readers[-1], self._earlier, only=only))
                dead = dead_images(readers, gone, self._dead, readers[-1])
                images, captions = self._indexed(spaces, readers, dead, on_progress)
                counts = live_counts(readers, gone, dead)
                report = write_report(self.folder, self.number, readers[-1].skipped())
            finally:
                readers[-1].close()
            manifest = Manifest(
                name=self.name,
                generation=self.number,
                parent=None if self.parent is None else self.parent.generation,
                snapshot=self.snapshot if only or self.parent is None else self.parent.snapshot,
                encoder=None if self.encoder is None else self.encoder.fingerprint,
                segments=(*self._segments, self.segment()),
                images=images,
                captions=captions,
                tombstones=write_tombstones(self.folder, self.number, gone, dead),
                counts=counts,
                target=SearchTarget(self.options.memory, self.options.recall),
                duplicate_cosine=self.options.duplicate_cosine,
                golden=self._golden(images, dead),
                report=report,
                files=(),
                image_calibration=None if self.parent is None else self.parent.image_calibration,
                text_calibration=None if self.parent is None else self.parent.text_calibration,
            )
            return commit(self.folder, manifest, self.parent)

    def _golden(self, images: Space, dead: Ids) -> int | None:
        if not images.rows:
            return None
        index = VectorIndex.open(self.folder, images.index, self.shards(images), tombstones=dead)
        return golden_image(index, dead, None if self.parent is None else self.parent.golden)

    def _check_memory(self) -> None:
        """PackError where no index can fit: said before days of embedding, not after."""
        options = self.options
        if options.memory is None or self.encoder is None or options.factory is not None:
            return
        rows = self.segment().counts.images + (0 if self.parent is None else self.parent.images.rows)
        share = 2 if options.captions else 1
        if rows:
            plans(rows, self.encoder.dim, options.memory // share)

    def _brings_nothing(self, parent: Manifest, only: bool) -> bool:
        """Whether all of it is there already: as when a command is started again that was stopped after its commit."""
        if only and self.snapshot != parent.snapshot:
            return False
        reader = SegmentReader.open(self.folder / self.store)
        try:
            return reader.is_empty() and not len(np.setdiff1d(replaced(reader, self._earlier, only=only), self._gone))
        finally:
            reader.close()

    def _indexed(self, spaces: tuple[Space, Space], readers: list[SegmentReader], dead: Ids,
                 on_progress: OnProgress | None) -> tuple[Space, Space]:
        if self.encoder is None:
            return spaces
        if all(self._covered(space) for space in spaces):
            return spaces
        queries = heldout_crops(readers, dead, self.encoder, QUERIES)
        rows = sum(space.rows for space in spaces)
        images, captions = (self.index(kind, space, queries, space.rows / max(1, rows), on_progress)
                            for kind, space in zip(("images", "captions"), spaces, strict=True))
        return images, captions


__all__ = ["ArticleDraft", "ImageDraft", "PackOptions", "PackWriter", "Snapshot"]


class PackWriter:
    """Writes one pack into an empty or new folder. Use as a context manager; nothing is a pack before `commit`.

    The same drafts, encoder and settings give the same store, vectors and index.
    """

    def __init__(self, folder: Path, *, name: str, snapshot: Snapshot, encoder: Encoder | None,
                 options: PackOptions | None = None) -> None:
        """Without an encoder, the pack is searched by words alone.

        Raises:
            PackError: the folder is not empty, or the name does not fit into an address.
        """
        if folder.exists() and any(folder.iterdir()):
            raise PackError(f"'{folder}' is not empty; a pack is never overwritten, choose another folder or remove it")
        self.folder = folder
        self._generation = NextGeneration(folder, name=name, snapshot=snapshot, encoder=encoder,
                                          options=options or PackOptions(), parent=None)
        self._lock = writing(folder)
        self._lock.__enter__()
        self._store = self._generation.open_store()

    def __enter__(self) -> PackWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._store.close()
        self._generation.close()
        self._lock.__exit__(kind, value, trace)

    def add_article(self, draft: ArticleDraft) -> int:
        """Write an article and return its id; PackError when its title is empty or its key is taken."""
        return self._store.add_article(draft)

    def add_image(self, draft: ImageDraft) -> None:
        """Write an image of articles that were added before.

        The same file given twice is stored once and belongs to the articles of both.

        Raises:
            PackError: an article is not there, or the file is of a kind that is not stored.
            PictureError: the file cannot be decoded.
        """
        decode_picture(draft.data)
        self._store.add_image(draft)

    def add(self, articles: Iterable[ArticleDraft], images: Iterable[ImageDraft]) -> None:
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
            raise PackError(f"'{self.folder}': there is no article; add one, or remove '{self.folder / BUILD}'")
        self._generation.finish_store(self._store)
        return self._generation.finish()
