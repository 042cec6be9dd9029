"""The manifest of a pack (MANIFEST.json): one generation with its files, encoder, indexes and calibration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Le

from gog_edge.errors import ArtifactError, PackError
from gog_edge.files import HASH_AT_OPEN_BYTES, FileEntry, OnBytes, read_json, verify_files
from gog_edge.tables import Count, Name, Positive, build, shown

SCHEMA = 2
MANIFEST = "MANIFEST.json"
GENERATIONS = "generations"  # folder of the manifests of all generations
BUILD = "build"  # folder of a build in progress
COMMAND = f"{BUILD}/command"  # holds the command line that resumes the build

# Features of the calibration models, in the order of their weights.
# score: cosine of the best match. margin: difference to the next match. contrast: difference to the mean of all
# candidates. agreement: reciprocal rank that the caption search gives the best match, 0 if it does not return it.
IMAGE_FEATURES = ("score", "margin", "contrast", "agreement")
TEXT_FEATURES = ("coverage", "unknown", "rarity", "named")  # see `fusion.WordRanking`
# Of packs with paragraph vectors; see `fusion.DenseRanking`.
DENSE_TEXT_FEATURES = (*TEXT_FEATURES, "similarity", "similarity_margin")
FOUND_THRESHOLD = 0.5  # probability from which the subject of a query counts as found

MAX_DIM = 65_536  # length of a vector


# --- parts of a generation --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The source that a pack was built from."""

    name: str
    date: str  # of the snapshot, ISO 8601
    uuid: str
    sha256: str  # of the source
    licence: str


@dataclass(frozen=True, slots=True)
class Counts:
    """Numbers of rows."""

    articles: Count
    paragraphs: Count
    images: Count


@dataclass(frozen=True, slots=True)
class IdRange:
    """A range of ids with both ends included; empty if `last` is below `first`."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Segment:
    """One SQLite file of a pack. Ids are unique within the pack and stable across generations."""

    store: Name
    articles: IdRange
    paragraphs: IdRange
    images: IdRange
    counts: Counts  # rows of the file, deleted ones included

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Segment:
        """Read the JSON object. Raises PackError for a field that is missing or has another type."""
        return build(cls, raw, "segment", error=PackError, where="pack")


@dataclass(frozen=True, slots=True)
class Shard:
    """Two files of embeddings; paths are relative to the pack."""

    vectors: Name  # float16 [rows, dim], of unit length
    ids: Name  # int64 [rows], ids of images or of paragraphs
    rows: Count


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The identity of an encoder; vectors compare if weights and preprocessing are the same, at any precision."""

    name: str
    weights_sha256: str
    preprocessing_sha256: str
    dim: Annotated[int, Ge(1), Le(MAX_DIM)]  # length of a vector

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], *, where: str = "") -> Fingerprint:
        """Read the fields from the manifest of an encoder or a text encoder; others are ignored.

        Raises:
            ArtifactError: A field is missing or has another type; the message begins with `where`.
        """
        return build(cls, raw, "", error=ArtifactError, where=where, known_only=True)


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """The FAISS file of a generation and the measurements taken when it was built."""

    path: Name  # relative to the pack
    factory: str  # string for FAISS's index_factory
    params: dict[str, int]  # search parameters: "nprobe" or "efSearch"
    candidates: Count  # rows per query that are rescored with stored vectors; 0 if the index's own scores are exact
    rows: Count  # rows in the index: the first ones of the space
    recall_k: Count
    recall: float  # share of the `recall_k` exact nearest neighbours that a search returns
    p50_ms_1: float  # median latency of a search with one query
    p50_ms_8: float  # and with a batch of eight
    queries: int  # number of queries in the measurement
    held_out: bool  # False: the queries were stored vectors with noise, because no others were given

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> IndexEntry:
        """Read the JSON object. Raises PackError for a field that is missing or has another type."""
        return build(cls, raw, "index", error=PackError, where="pack")


@dataclass(frozen=True, slots=True)
class Space:
    """Vectors that are searched together, and the index over the first of them."""

    shards: tuple[Shard, ...] = ()
    index: IndexEntry | None = None  # None: exact search

    @property
    def rows(self) -> int:
        """Return the total number of vectors."""
        return sum(shard.rows for shard in self.shards)

    @property
    def paths(self) -> Iterator[str]:
        """Yield the paths of all files."""
        for shard in self.shards:
            yield from (shard.vectors, shard.ids)
        if self.index is not None:
            yield self.index.path


@dataclass(frozen=True, slots=True)
class IndexTarget:
    """Requirements on the index, given when the pack was first built and kept by later generations."""

    memory: Positive | None  # bytes; None: no limit, the fastest index
    recall: float  # share of the ten nearest neighbours that the index must return


@dataclass(frozen=True, slots=True)
class Tombstones:
    """Paths of files with the sorted int64 ids of deleted rows."""

    articles: Name
    images: Name


@dataclass(frozen=True, slots=True)
class Calibration:
    """A logistic model of the probability that a query's subject is in the pack, with its measured error rates.

    The bias is chosen so that the stated share of absent subjects reaches `FOUND_THRESHOLD`.
    """

    features: tuple[str, ...]
    weights: tuple[float, ...]  # one per feature; 0 for a feature that did not improve the model
    bias: float
    target_false_accept: float  # share of absent subjects that may count as found
    false_accept: float  # share measured at FOUND_THRESHOLD, on queries that the model was not fitted to
    true_accept: float  # share of present subjects that count as found, likewise
    present: Count  # queries whose subject is in the pack; one half for fitting, the other for measuring
    absent: Count
    caption_weight: Annotated[float, Ge(0)] = 0.0  # weight of the caption channel relative to the image channel

    @property
    def uses_captions(self) -> bool:
        """Return whether an image query must search captions too."""
        return self.caption_weight > 0 or any(
            weight for name, weight in zip(self.features, self.weights, strict=True) if name == "agreement"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], names: tuple[str, ...]) -> Calibration:
        """Read the JSON object.

        Raises:
            PackError: A field is missing or has another form, or the features differ from `names`.
        """
        read = build(cls, raw, "calibration", error=PackError, where="pack: invalid manifest; calibrate the pack again")
        if read.features != names or len(read.weights) != len(names):
            raise PackError(f"pack: the calibration must have the features {names} and as many weights, got "
                            f"{shown(read.features)} and {len(read.weights)}; calibrate the pack again")
        return read


# --- the manifest -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Manifest:
    """One generation of a pack."""

    name: Name
    generation: Positive
    parent: Count | None
    snapshot: Snapshot
    encoder: Fingerprint | None  # None: a pack without images
    segments: tuple[Segment, ...]
    images: Space  # embeddings of whole images and of tiles
    captions: Space  # embeddings of captions
    tombstones: Tombstones | None
    counts: Counts  # rows that are not deleted
    target: IndexTarget
    duplicate_cosine: float  # cosine from which two stored images count as duplicates
    golden: int | None  # id of an image whose vector must find itself; None if the pack has no image
    report: str | None  # path of the list of skipped input
    files: tuple[FileEntry, ...]
    image_calibration: Calibration | None = None
    text_calibration: Calibration | None = None
    text_encoder: Fingerprint | None = None  # of the paragraphs; None: they have no embeddings
    paragraphs: Space = Space()  # embeddings of paragraphs

    @property
    def text_features(self) -> tuple[str, ...]:
        """Return the features of the text calibration."""
        return TEXT_FEATURES if self.text_encoder is None else DENSE_TEXT_FEATURES

    def dim_of(self, space: str) -> int:
        """Return the length of the vectors of "images", "captions" or "paragraphs"; 0 without their encoder."""
        encoder = self.text_encoder if space == "paragraphs" else self.encoder
        return 0 if encoder is None else encoder.dim

    @property
    def paths(self) -> Iterator[str]:
        """Yield the paths of all files that this generation uses."""
        yield from (segment.store for segment in self.segments)
        yield from self.images.paths
        yield from self.captions.paths
        yield from self.paragraphs.paths
        if self.tombstones is not None:
            yield from (self.tombstones.articles, self.tombstones.images)
        if self.report is not None:
            yield self.report

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of MANIFEST.json."""
        value = asdict(self)
        if self.text_encoder is None:  # the JSON of such a pack stays as it was before there were text encoders
            del value["text_encoder"], value["paragraphs"]
        calibration = {"image": value.pop("image_calibration"), "text": value.pop("text_calibration")}
        return {"schema": SCHEMA, "kind": "pack", **value, "calibration": calibration}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Manifest:
        """Read the JSON object of MANIFEST.json.

        Raises:
            PackError: Another kind or schema, or a field is missing or has another form.
        """
        if raw.get("kind") != "pack" or raw.get("schema") != SCHEMA:
            raise PackError(f"pack: the manifest must have kind 'pack' and schema {SCHEMA}, got "
                            f"{shown(raw.get('kind'))} and {shown(raw.get('schema'))}; build the pack again with this "
                            "version")
        where = "pack: invalid manifest; copy or build the pack again"
        if not isinstance(calibration := raw.get("calibration"), Mapping):
            raise PackError(f"{where}: 'calibration' must be an object, got {shown(calibration)}")
        fields = {key: value for key, value in raw.items() if key not in ("image_calibration", "text_calibration")}
        read = build(cls, fields, "", error=PackError, where=where, known_only=True)
        if read.text_encoder is None and read.paragraphs != Space():
            raise PackError(f"{where}: 'paragraphs' requires 'text_encoder', the encoder of its vectors")
        return read.with_calibration(_calibration(calibration, "image", IMAGE_FEATURES),
                                     _calibration(calibration, "text", read.text_features))

    def with_calibration(self, image: Calibration | None, text: Calibration | None) -> Manifest:
        """Return the same generation with other calibrations."""
        return replace(self, image_calibration=image, text_calibration=text)


def _calibration(raw: Mapping[str, Any], channel: str, names: tuple[str, ...]) -> Calibration | None:
    return None if raw.get(channel) is None else Calibration.from_json(raw[channel], names)


# --- files ------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a pack without opening the pack.

    Raises:
        PackError: The folder has no manifest, or an invalid one, or its first build has not finished.
    """
    if (folder / BUILD).is_dir() and not (folder / MANIFEST).exists():
        raise PackError(f"pack: the first build of '{folder}' has not finished; if it is not running, resume it with "
                        f"{resume_command(folder)}")
    return Manifest.from_json(read_json(folder / MANIFEST, what="pack", error=PackError))


def resume_command(folder: Path) -> str:
    """Return a phrase that names the command that resumes an unfinished build."""
    command = folder / COMMAND
    return f"`{command.read_text(encoding='utf-8')}`" if command.is_file() else "the command that started it"


def generation_path(folder: Path, generation: int) -> Path:
    """Return the path of a generation's manifest."""
    return folder / GENERATIONS / f"{generation:06d}.json"


def verify_pack_files(folder: Path, manifest: Manifest, *, full: bool, vectors: bool = True,
                      on_bytes: OnBytes | None = None) -> None:
    """Compare the files of a pack with the sizes and hashes in its manifest.

    A pack must open within a second. Therefore, unless `full` is set, large files are compared by size only, and so
    are vectors and indexes if they are large together; the golden image of the pack detects wrong ones.

    Args:
        folder: The pack.
        manifest: Its manifest.
        full: Whether to hash every file.
        vectors: Whether to check the vectors and indexes of images and captions, which a server may hold instead.
        on_bytes: Called with the number of bytes of each hashed block.

    Raises:
        PackError: Names the first file that is missing, altered, or used but not listed with a hash.
    """
    listed = {entry.path for entry in manifest.files}
    for path in manifest.paths:
        if path not in listed:
            raise PackError(f"pack '{manifest.name}': the manifest lists no hash for '{path}'; build the pack again")
    image_paths = {*manifest.images.paths, *manifest.captions.paths}
    vector_paths = {*image_paths, *manifest.paragraphs.paths}
    entries = [entry for entry in manifest.files if vectors or entry.path not in image_paths]
    large = sum(entry.size for entry in entries if entry.path in vector_paths) > HASH_AT_OPEN_BYTES
    verify_files(folder, entries, what="pack", error=PackError, full=full, by_size=vector_paths if large else (),
                 on_bytes=on_bytes)
