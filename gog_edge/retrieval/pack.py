"""A pack: one snapshot made searchable. Opening it checks that everything in it belongs together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from gog_edge.errors import PackError, PictureError
from gog_edge.files import FileEntry, read_json, verify_files
from gog_edge.picture import decode_picture
from gog_edge.retrieval.calibration import IMAGE_FEATURES, TEXT_FEATURES, Calibration
from gog_edge.retrieval.encoder import Encoder, Fingerprint
from gog_edge.retrieval.index import Ids, ImageIndex, VectorShards
from gog_edge.retrieval.store import Counts, Store, StoredPicture

SCHEMA = 1
MANIFEST = "MANIFEST.json"
# The stored vector of the golden image and one embedded now differ by rounding only: fp16 storage, another provider.
GOLDEN_COSINE = 0.99


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a pack was made from."""

    name: str
    date: str  # of the snapshot, ISO 8601
    uuid: str
    sha256: str  # of the source
    licence: str


@dataclass(frozen=True, slots=True)
class Shard:
    """Two files of an embedding shard, relative to the pack."""

    vectors: str
    ids: str
    rows: int
    indexed: bool = True  # False: added after the index was built; searched exactly beside it


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """The FAISS file of a generation."""

    path: str
    factory: str
    params: dict[str, int]
    recall_k: int
    recall: float  # measured at build against exact search


@dataclass(frozen=True, slots=True)
class Manifest:
    """MANIFEST.json: it names every file of one generation; who holds it holds a consistent pack."""

    name: str
    generation: int
    parent: int | None
    snapshot: Snapshot
    encoder: Fingerprint
    store: str
    index: IndexEntry
    shards: tuple[Shard, ...]
    tombstones: tuple[int, ...]  # ids of images that are no longer there
    counts: Counts
    duplicate_cosine: float  # stored images at least this near show the same thing
    golden: int  # id of the image that must find itself
    files: tuple[FileEntry, ...]
    image_calibration: Calibration | None = None
    text_calibration: Calibration | None = None

    def to_json(self) -> dict[str, Any]:
        """The JSON object of the file."""
        value = asdict(self)
        calibration = {"image": value.pop("image_calibration"), "text": value.pop("text_calibration")}
        return {"schema": SCHEMA, "kind": "pack", **value, "calibration": calibration}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Manifest:
        """Read the JSON object.

        Raises:
            PackError: another kind or schema, or a field is missing or of another form.
        """
        if raw.get("kind") != "pack" or raw.get("schema") != SCHEMA:
            raise PackError(
                f"pack: its manifest is of kind {raw.get('kind')!r}, schema {raw.get('schema')!r}; this version reads "
                f"kind 'pack', schema {SCHEMA}; build it again with this version"
            )
        try:
            return cls(
                name=str(raw["name"]),
                generation=int(raw["generation"]),
                parent=None if raw["parent"] is None else int(raw["parent"]),
                snapshot=Snapshot(**raw["snapshot"]),
                encoder=Fingerprint(**raw["encoder"]),
                store=str(raw["store"]),
                index=IndexEntry(**raw["index"]),
                shards=tuple(Shard(**shard) for shard in raw["shards"]),
                tombstones=tuple(int(image) for image in raw["tombstones"]),
                counts=Counts(**raw["counts"]),
                duplicate_cosine=float(raw["duplicate_cosine"]),
                golden=int(raw["golden"]),
                files=tuple(FileEntry(**entry) for entry in raw["files"]),
                image_calibration=_calibration(raw["calibration"], "image", IMAGE_FEATURES),
                text_calibration=_calibration(raw["calibration"], "text", TEXT_FEATURES),
            )
        except (KeyError, TypeError, ValueError) as exc:
            raise PackError(f"pack: its manifest is not usable ({exc!r}); build the pack again") from exc

    def calibrated(self, image: Calibration | None, text: Calibration | None) -> Manifest:
        """The same generation with other calibrations."""
        return replace(self, image_calibration=image, text_calibration=text)


def _calibration(raw: Mapping[str, Any], channel: str, names: tuple[str, ...]) -> Calibration | None:
    return None if raw.get(channel) is None else Calibration.from_json(raw[channel], names)


def read_manifest(folder: Path) -> Manifest:
    """Read a pack's manifest without opening the pack; PackError when it is not one."""
    return Manifest.from_json(read_json(folder / MANIFEST, what="pack", error=PackError))


def verify_pack(folder: Path) -> Manifest:
    """Hash every file of a pack, however large; PackError names the first that is missing or altered."""
    manifest = read_manifest(folder)
    verify_files(folder, manifest.files, what="pack", error=PackError, full=True)
    return manifest


@dataclass(frozen=True, slots=True)
class Pack:
    """An open pack; reading only, from any number of threads."""

    folder: Path
    manifest: Manifest
    store: Store = field(repr=False)
    index: ImageIndex = field(repr=False)

    @classmethod
    def open(cls, folder: Path, encoder: Encoder) -> Pack:
        """Open a pack and check it: files by hash, ids against vectors against rows, the encoder, a golden query.

        Raises:
            PackError: missing or altered files, another schema, another encoder, counts that disagree, or a golden
                image that does not find itself.
        """
        manifest = read_manifest(folder)
        _check_encoder(manifest, encoder)
        _check_listed(manifest)
        verify_files(folder, manifest.files, what="pack", error=PackError)
        store = Store.open(folder / manifest.store)
        try:
            index = _open_index(folder, manifest)
            _check_counts(manifest, store, index)
            pack = cls(folder, manifest, store, index)
            pack._check_golden(encoder)
        except BaseException:
            store.close()
            raise
        return pack

    @property
    def name(self) -> str:
        """Name in citations and addresses."""
        return self.manifest.name

    def picture(self, image: int) -> StoredPicture | None:
        """The file of an image as it is served, or None where there is no such image (any more)."""
        return None if image in self.manifest.tombstones else self.store.picture(image)

    def live_main_images(self, articles: Sequence[int]) -> dict[int, int]:
        """The image of each article that is most its own, where one is left: article id -> image id."""
        return self.store.main_images(articles, self.manifest.tombstones)

    def close(self) -> None:
        """Close the store."""
        self.store.close()

    def _check_golden(self, encoder: Encoder) -> None:
        golden = self.manifest.golden
        stored = self.picture(golden)
        if stored is None:
            raise PackError(f"pack '{self.name}': its golden image {golden} is not in the store; build it again")
        try:
            pixels = decode_picture(stored.data).pixels
        except PictureError as exc:
            raise PackError(f"pack '{self.name}': its golden image {golden} cannot be decoded ({exc})") from exc
        vector = encoder.embed_images([pixels])
        found = int(self.index.search(vector, 1).ids[0, 0])
        cosine = float(self.index.take([golden])[0] @ vector[0])
        if found != golden or cosine < GOLDEN_COSINE:
            raise PackError(
                f"pack '{self.name}': its golden image {golden} found image {found} and is at cosine {cosine:.4f} to "
                f"its own vector (wanted {GOLDEN_COSINE}); this encoder computes other vectors; build it again here"
            )


def _check_encoder(manifest: Manifest, encoder: Encoder) -> None:
    mine, theirs = asdict(encoder.fingerprint), asdict(manifest.encoder)
    for key, value in theirs.items():
        if mine[key] != value:
            raise PackError(
                f"pack '{manifest.name}' was built with encoder '{manifest.encoder.name}', this one is "
                f"'{encoder.fingerprint.name}': {key} is {mine[key]}, the pack says {value}; open it with its own "
                "encoder or build it again"
            )


def _check_listed(manifest: Manifest) -> None:
    listed = {entry.path for entry in manifest.files}
    used = [manifest.store, manifest.index.path, *(path for s in manifest.shards for path in (s.vectors, s.ids))]
    for path in used:
        if path not in listed:
            raise PackError(f"pack '{manifest.name}': its manifest uses '{path}' without its hash; build it again")


def _open_index(folder: Path, manifest: Manifest) -> ImageIndex:
    files = [(folder / shard.vectors, folder / shard.ids) for shard in manifest.shards]
    shards = VectorShards.open(files, manifest.encoder.dim)
    late: list[Ids] = [np.load(folder / shard.ids) for shard in manifest.shards if not shard.indexed]
    return ImageIndex.open(
        folder / manifest.index.path,
        manifest.index.params,
        shards,
        delta=np.concatenate(late) if late else np.empty(0, dtype=np.int64),
        tombstones=np.array(manifest.tombstones, dtype=np.int64),
    )


def _check_counts(manifest: Manifest, store: Store, index: ImageIndex) -> None:
    counts = store.counts()
    if counts != manifest.counts:
        raise PackError(f"pack '{manifest.name}': its store has {counts}, wanted {manifest.counts}; build it again")
    rows = store.image_ids()
    if not np.array_equal(rows, index.ids):
        wrong = np.setxor1d(rows, index.ids)
        raise PackError(
            f"pack '{manifest.name}': {len(rows)} image rows and {len(index.ids)} vectors disagree, first at image "
            f"{int(wrong[0])}; build it again"
        )
    unknown = np.setdiff1d(np.array(manifest.tombstones, dtype=np.int64), rows)
    if len(unknown):
        raise PackError(f"pack '{manifest.name}': tombstone {int(unknown[0])} is no image of it; build it again")
