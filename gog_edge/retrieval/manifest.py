"""From what a search looked like to the chance that the thing is in the snapshot at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from gog_edge.errors import PackError
from gog_edge.files import HASH_AT_OPEN_BYTES, FileEntry, OnBytes, read_json, verify_files

# score: the best cosine. margin: how far the next thing is behind it. contrast: how far the candidates' mean is.
# agreement: one over the place that the captions' search gives the best thing, 0 where it does not find it.
IMAGE_FEATURES = ("score", "margin", "contrast", "agreement")
TEXT_FEATURES = ("coverage", "unknown", "rarity", "named")
FOUND = 0.5  # chance from which a thing counts as found


@dataclass(frozen=True, slots=True)
class Calibration:
    """A logistic model and what it was measured to do on queries that it was not fitted to.

    Its bias is such that `FOUND` stands where the stated share of absent things passes.
    """

    features: tuple[str, ...]
    weights: tuple[float, ...]  # one per feature; 0 where it did not earn its place
    bias: float
    target_false_accept: float  # share of absent things that may count as found
    false_accept: float  # measured at FOUND
    true_accept: float
    present: int  # queries; the model was fitted to one half of them and measured on the other
    absent: int
    caption_weight: float = 0.0  # how much captions count beside pictures when things are ranked

    @property
    def asks_captions(self) -> bool:
        """Whether captions must be searched for a picture."""
        return self.caption_weight > 0 or any(
            weight for name, weight in zip(self.features, self.weights, strict=True) if name == "agreement"
        )

    def chance(self, features: ArrayLike) -> float:
        """Chance, 0..1, that what was searched for is in the snapshot; `features` as named."""
        logit = float(np.dot(np.asarray(self.weights), np.asarray(features, dtype=np.float64))) + self.bias
        return float(1.0 / (1.0 + np.exp(-np.clip(logit, -60.0, 60.0))))

    def to_json(self) -> dict[str, Any]:
        """For a pack's manifest."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], names: tuple[str, ...]) -> Calibration:
        """Read what `to_json` gave.

        Raises:
            PackError: other features than `names`, or not of this form.
        """
        try:
            read = cls(**{**raw, "features": tuple(raw["features"]), "weights": tuple(map(float, raw["weights"]))})
        except (KeyError, TypeError, ValueError) as exc:
            raise PackError(f"pack: its calibration is not usable ({exc!r}); calibrate the pack again") from exc
        if read.features != names or len(read.weights) != len(names):
            raise PackError(f"pack: its calibration is for {read.features}, wanted {names}; calibrate it again")
        return read


SCHEMA = 2
MANIFEST = "MANIFEST.json"
GENERATIONS = "generations"
BUILD = "build"  # folder of what is not finished
COMMAND = f"{BUILD}/command"  # what goes on with it


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a pack was made from."""

    name: str
    date: str  # of the snapshot, ISO 8601
    uuid: str
    sha256: str  # of the source
    licence: str


@dataclass(frozen=True, slots=True)
class Counts:
    """How many rows there are."""

    articles: int
    paragraphs: int
    images: int


@dataclass(frozen=True, slots=True)
class Span:
    """A range of ids, both ends included; empty where `last` lies before `first`."""

    first: int
    last: int

    def __contains__(self, number: int) -> bool:
        return self.first <= number <= self.last


@dataclass(frozen=True, slots=True)
class Segment:
    """One SQLite file of a pack. Ids are unique within the pack and stable over generations."""

    store: str
    articles: Span
    paragraphs: Span
    images: Span
    counts: Counts  # rows of the file, dead ones included

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Segment:
        """Read the JSON object."""
        articles, paragraphs, images = (Span(**raw[name]) for name in ("articles", "paragraphs", "images"))
        return cls(str(raw["store"]), articles, paragraphs, images, Counts(**raw["counts"]))


@dataclass(frozen=True, slots=True)
class Shard:
    """Two files of embeddings, relative to the pack."""

    vectors: str  # float16 [rows, dim], of unit length
    ids: str  # int64 [rows], ids of images
    rows: int


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What makes vectors comparable: the same weights behind the same preprocessing, in whatever precision."""

    name: str
    weights_sha256: str
    preprocessing_sha256: str
    dim: int


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """The FAISS file of a generation, and what was measured when it was built."""

    path: str  # relative to the pack
    factory: str  # as FAISS's index_factory reads it
    params: dict[str, int]  # how it is searched: "nprobe" or "efSearch"
    candidates: int  # rows that are compared exactly with stored vectors for each query; 0: its own scores are exact
    rows: int  # rows it holds: the first of the space
    recall_k: int
    recall: float  # share of the recall_k exactly nearest that a search finds
    p50_ms_1: float  # median of a search with one query, and with eight at once
    p50_ms_8: float
    queries: int  # that measured it
    held_out: bool  # False: none were given, so these were stored vectors with noise


@dataclass(frozen=True, slots=True)
class Space:
    """Vectors that are searched together, and the index over the first of them."""

    shards: tuple[Shard, ...] = ()
    index: IndexEntry | None = None  # None: searched exactly

    @property
    def rows(self) -> int:
        """Vectors in all."""
        return sum(shard.rows for shard in self.shards)

    @property
    def paths(self) -> Iterator[str]:
        """Every file."""
        for shard in self.shards:
            yield from (shard.vectors, shard.ids)
        if self.index is not None:
            yield self.index.path

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Space:
        """Read the JSON object."""
        index = raw["index"]
        return cls(tuple(Shard(**shard) for shard in raw["shards"]), None if index is None else IndexEntry(**index))


@dataclass(frozen=True, slots=True)
class SearchTarget:
    """What the search was to be when the pack was built; later generations keep to it."""

    memory: int | None  # bytes; None: what is quickest
    recall: float  # share of the ten nearest that an index must find


@dataclass(frozen=True, slots=True)
class Tombstones:
    """Files of sorted int64 ids of what is no longer there."""

    articles: str
    images: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """One generation of a pack."""

    name: str
    generation: int
    parent: int | None
    snapshot: Snapshot
    encoder: Fingerprint | None  # None: a pack of texts alone
    segments: tuple[Segment, ...]
    images: Space  # pictures, whole and in tiles
    captions: Space  # what is written under them
    tombstones: Tombstones | None
    counts: Counts  # of what is live
    target: SearchTarget
    duplicate_cosine: float  # stored images at least this near show the same thing
    golden: int | None  # id of the image that must find itself; None where there is no image
    report: str | None  # what was skipped
    files: tuple[FileEntry, ...]
    image_calibration: Calibration | None = None
    text_calibration: Calibration | None = None

    @property
    def paths(self) -> Iterator[str]:
        """Every file that this generation uses."""
        yield from (segment.store for segment in self.segments)
        yield from self.images.paths
        yield from self.captions.paths
        if self.tombstones is not None:
            yield from (self.tombstones.articles, self.tombstones.images)
        if self.report is not None:
            yield self.report

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
                encoder=None if raw["encoder"] is None else Fingerprint(**raw["encoder"]),
                segments=tuple(Segment.from_json(segment) for segment in raw["segments"]),
                images=Space.from_json(raw["images"]),
                captions=Space.from_json(raw["captions"]),
                tombstones=None if raw["tombstones"] is None else Tombstones(**raw["tombstones"]),
                counts=Counts(**raw["counts"]),
                target=SearchTarget(**raw["target"]),
                duplicate_cosine=float(raw["duplicate_cosine"]),
                golden=None if raw["golden"] is None else int(raw["golden"]),
                report=None if raw["report"] is None else str(raw["report"]),
                files=tuple(FileEntry(**entry) for entry in raw["files"]),
                image_calibration=_calibration(raw["calibration"], "image", IMAGE_FEATURES),
                text_calibration=_calibration(raw["calibration"], "text", TEXT_FEATURES),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as exc:
            raise PackError(f"pack: its manifest is not usable ({exc!r}); build the pack again") from exc

    def calibrated(self, image: Calibration | None, text: Calibration | None) -> Manifest:
        """The same generation with other calibrations."""
        return replace(self, image_calibration=image, text_calibration=text)

    def check_listed(self) -> None:
        """PackError when a file is used whose hash is not told."""
        listed = {entry.path for entry in self.files}
        for path in self.paths:
            if path not in listed:
                raise PackError(f"pack '{self.name}': its manifest uses '{path}' without its hash; build it again")


def _calibration(raw: Mapping[str, Any], channel: str, names: tuple[str, ...]) -> Calibration | None:
    return None if raw.get(channel) is None else Calibration.from_json(raw[channel], names)


def read_manifest(folder: Path) -> Manifest:
    """Read a pack's manifest without opening the pack; PackError when it is not one, or not one yet."""
    if (folder / BUILD).is_dir() and not (folder / MANIFEST).exists():
        raise PackError(f"pack '{folder}' is not finished: its first build still runs, or was stopped and goes on with "
                        f"{command_of(folder)}")
    return Manifest.from_json(read_json(folder / MANIFEST, what="pack", error=PackError))


def command_of(folder: Path) -> str:
    """What goes on with an unfinished build, in words."""
    command = folder / COMMAND
    return f"`{command.read_text(encoding='utf-8')}`" if command.is_file() else "the command that began it"


def generation_path(folder: Path, generation: int) -> Path:
    """Where the manifest of a generation is kept."""
    return folder / GENERATIONS / f"{generation:06d}.json"


def verify_files_of(folder: Path, manifest: Manifest, *, full: bool, vectors: bool = True,
                    on_bytes: OnBytes | None = None) -> None:
    """Compare files with the manifest's sizes and hashes; PackError names the first that is missing or altered.

    Without `full`, large files are compared by size only, and so are vectors and indexes that are large together: a
    pack must open in a second, and its golden image tells whether they are its own. Without `vectors` those are left
    out.
    `on_bytes` is told how much was hashed.
    """
    manifest.check_listed()
    spaces = {*manifest.images.paths, *manifest.captions.paths}
    entries = [entry for entry in manifest.files if vectors or entry.path not in spaces]
    large = sum(entry.size for entry in entries if entry.path in spaces) > HASH_AT_OPEN_BYTES
    verify_files(folder, entries, what="pack", error=PackError, full=full, by_size=spaces if large else (),
                 on_bytes=on_bytes)
