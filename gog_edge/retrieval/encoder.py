"""Embed pictures and texts with the two towers of a CLIP model, and cache the vectors of crops."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Gt, Le
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from gog_edge.engines.base import Floats, GraphEngine
from gog_edge.engines.manifest import IMAGE, TEXT
from gog_edge.engines.onnx.session import CPU_PROVIDERS, OrtGraph
from gog_edge.engines.registry import EngineSet
from gog_edge.errors import ArtifactError
from gog_edge.files import MODEL_MANIFEST, FileEntry, open_tokenizer, read_json, verify_files
from gog_edge.retrieval.manifest import Fingerprint
from gog_edge.tables import build, shown
from gog_edge.types import Box, ImageQuery, Pixels, Size, Vectors

SCHEMA = 1
MAX_SIDE = 4096  # pixels of the frame that a picture is scaled to
Spread = Annotated[float, Gt(0)]
MAX_BATCH = 16  # inputs per run of a graph; the activations of larger batches exceed the CPU caches
MAX_SCALED_PIXELS = 2**24  # of a picture scaled to cover the frame; of a longer sliver only the middle is computed
# Minimum cosine between the vectors of one input from two encoders with the same fingerprint. An export at another
# precision must reach it to keep the fingerprint of the weights that it was made from.
MIN_COMPATIBLE_COSINE = 0.99


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """How a picture is preprocessed for the image graph."""

    size: Size
    mean: tuple[float, float, float]  # of values from 0 to 1
    std: tuple[float, float, float]
    interpolation: Image.Resampling
    resize: str  # "squash", "shortest" or "longest"
    fill: int = 0  # padding value of "longest", 0 to 255


class Encoder:
    """A CLIP model: an image graph and a text graph with a shared vector space; may be used from several threads."""

    def __init__(
        self,
        fingerprint: Fingerprint,
        spec: ImageSpec,
        image: GraphEngine,
        text: GraphEngine,
        tokenizer: Tokenizer,
    ) -> None:
        self.fingerprint = fingerprint
        self.spec = spec
        self._image = image
        self._text = text
        self._tokenizer = tokenizer

    @classmethod
    def open(cls, folder: Path, *, threads: int | None = None, providers: Sequence[str] = CPU_PROVIDERS,
             engines: EngineSet | None = None) -> Encoder:
        """Open an encoder folder that `gog-edge export clip` wrote.

        Args:
            folder: The encoder.
            threads: Of ONNX Runtime, per graph; None: its default.
            providers: ONNX Runtime execution providers; there is no fallback to others.
            engines: Engines built from the folder's graphs, which replace them.

        Raises:
            ArtifactError: A file is missing or altered, or the manifest has another kind or schema.
            BackendError: A provider is not available, or a graph cannot be loaded.
        """
        manifest = read_encoder_manifest(folder)
        tokenizer = open_tokenizer(folder / "tokenizer.json", what="encoder")
        tokenizer.enable_truncation(manifest.text.context_length)
        tokenizer.enable_padding(length=manifest.text.context_length, pad_id=manifest.text.pad_id)
        # The encoder runs next to a policy that generates, or next to threads that decode pictures. Threads that spin
        # while they wait would take cores from these; on a busy machine that halves the encoder's own speed.
        image, text = (
            OrtGraph(folder / f"{name}.onnx", threads=threads, providers=providers, spinning=False)
            if engines is None else engines.open_graph(name)
            for name in (IMAGE, TEXT)
        )
        return cls(manifest.fingerprint, manifest.image, image, text, tokenizer)

    @property
    def dim(self) -> int:
        """Return the length of a vector."""
        return self.fingerprint.dim

    def embed_images(self, images: Sequence[Pixels]) -> Vectors:
        """Return unit vectors [n, dim] of n pictures of any size."""
        return self.embed_pixels(self.preprocess(images))

    def preprocess(self, images: Sequence[Pixels]) -> Floats:
        """Return the input of `embed_pixels`, [n, 3, height, width] float32, for n pictures of any size."""
        batch = np.empty((len(images), 3, self.spec.size.height, self.spec.size.width), np.float32)
        for image, planes in zip(images, batch, strict=True):
            planes[...] = preprocess(image, self.spec)
        return batch

    def embed_pixels(self, batch: Floats) -> Vectors:
        """Return unit vectors [n, dim] of preprocessed pictures [n, 3, height, width]."""
        if not len(batch):
            return np.empty((0, self.dim), dtype=np.float32)
        parts = [batch[start : start + MAX_BATCH] for start in range(0, len(batch), MAX_BATCH)]
        return self._unit(np.concatenate([self._image.run({"pixels": part})["embedding"] for part in parts]))

    def embed_texts(self, texts: Sequence[str]) -> Vectors:
        """Return unit vectors [n, dim] of n texts, truncated at the context length."""
        if not texts:
            return np.empty((0, self.dim), dtype=np.float32)
        encodings = self._tokenizer.encode_batch(list(texts))
        tokens = np.array([encoding.ids for encoding in encodings], dtype=np.int64)
        parts = [tokens[start : start + MAX_BATCH] for start in range(0, len(tokens), MAX_BATCH)]
        return self._unit(np.concatenate([self._text.run({"tokens": part})["embedding"] for part in parts]))

    def _unit(self, raw: NDArray[Any]) -> Vectors:
        vectors = raw.astype(np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise ArtifactError(
                f"encoder '{self.fingerprint.name}': a graph must return the shape [n, {self.dim}] of its manifest, "
                f"got {vectors.shape}; export it again"
            )
        lengths: NDArray[np.float32] = np.linalg.norm(vectors, axis=1, keepdims=True)
        if not np.isfinite(lengths).all():
            raise ArtifactError(f"encoder '{self.fingerprint.name}': a vector is not finite; export or copy it again")
        return np.divide(vectors, np.maximum(lengths, 1e-12), dtype=np.float32)


# --- the manifest -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TextInput:
    """How a text is tokenized for the text graph."""

    context_length: Annotated[int, Ge(1), Le(65_536)]  # tokens of a text; longer texts are truncated
    pad_id: Annotated[int, Ge(0), Le(2**31 - 1)]  # of the token that shorter texts are padded with


@dataclass(frozen=True, slots=True)
class EncoderManifest:
    """The contents of an encoder's `manifest.json` that its users need."""

    fingerprint: Fingerprint
    image: ImageSpec
    text: TextInput
    files: tuple[FileEntry, ...]


@dataclass(frozen=True, slots=True)
class _ImageTable:
    """The field `image` of the manifest."""

    width: Annotated[int, Ge(1), Le(MAX_SIDE)]
    height: Annotated[int, Ge(1), Le(MAX_SIDE)]
    mean: tuple[float, float, float]
    std: tuple[Spread, Spread, Spread]
    interpolation: Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
    resize: Literal["squash", "shortest", "longest"]
    fill: Annotated[int, Ge(0), Le(255)] = 0


@dataclass(frozen=True, slots=True)
class _EncoderTable:
    """The fields of the manifest that are read besides those of `Fingerprint`."""

    image: _ImageTable
    text: TextInput
    files: tuple[FileEntry, ...]


def read_encoder_manifest(folder: Path) -> EncoderManifest:
    """Read an encoder folder's manifest and verify its files.

    Raises:
        ArtifactError: A file is missing or altered, or the manifest has another kind or schema, or an invalid field.
    """
    raw = read_json(folder / MODEL_MANIFEST, what="encoder")
    if raw.get("kind") != "encoder" or raw.get("schema") != SCHEMA:
        raise ArtifactError(
            f"encoder: the manifest of '{folder}' must have kind 'encoder' and schema {SCHEMA}, got "
            f"{shown(raw.get('kind'))} and {shown(raw.get('schema'))}; export it again with this version"
        )
    where = f"encoder: invalid manifest in '{folder}'; export it again"
    fingerprint = Fingerprint.from_json(raw, where=where)
    table = build(_EncoderTable, raw, "", error=ArtifactError, where=where, known_only=True)
    verify_files(folder, table.files, what="encoder")
    return EncoderManifest(fingerprint, _image_spec(table.image), table.text, table.files)


def parse_image_spec(raw: Mapping[str, Any]) -> ImageSpec:
    """Read the field `image` of an encoder's manifest. Raises ArtifactError for an invalid field."""
    return _image_spec(build(_ImageTable, raw, "image", error=ArtifactError))


def _image_spec(table: _ImageTable) -> ImageSpec:
    kernel = Image.Resampling[table.interpolation.upper()]
    return ImageSpec(Size(table.width, table.height), table.mean, table.std, kernel, table.resize, table.fill)


def rgb_floats(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the values of the three channels as floats. Raises ValueError for another number of values."""
    red, green, blue = (float(value) for value in values)
    return red, green, blue


# --- preprocessing ----------------------------------------------------------------------------


def preprocess(pixels: Pixels, spec: ImageSpec) -> Floats:
    """Resize and normalise one picture to [3, height, width] float32, with the same values as open_clip."""
    fitted = np.asarray(_fit(Image.fromarray(np.ascontiguousarray(pixels)), spec))
    planes = np.empty((3, *fitted.shape[:2]), np.float32)
    for channel, values in enumerate(_normalised_values(spec.mean, spec.std)):
        np.take(values, fitted[:, :, channel], out=planes[channel], mode="clip")
    return planes


@cache
def _normalised_values(mean: tuple[float, float, float], std: tuple[float, float, float]) -> Floats:
    """Return the normalised value of each byte and channel, [3, 256]; a lookup takes a seventh of the computation."""
    values = np.arange(256, dtype=np.float32) / np.float32(255)
    centre, spread = (np.array(numbers, dtype=np.float32)[:, None] for numbers in (mean, std))
    return np.asarray((values - centre) / spread, dtype=np.float32)


def _fit(image: Image.Image, spec: ImageSpec) -> Image.Image:
    """Resize a picture to the frame as the model was trained with, with open_clip's rounding."""
    frame = (spec.size.width, spec.size.height)
    if spec.resize == "squash":
        return image.resize(frame, spec.interpolation)
    return (_cover if spec.resize == "shortest" else _contain)(image, frame, spec)


def _cover(image: Image.Image, frame: tuple[int, int], spec: ImageSpec) -> Image.Image:
    """Return the middle of the picture, scaled to just cover the frame."""
    scaled = _covering(image.size, frame)
    if scaled[0] * scaled[1] > MAX_SCALED_PIXELS:
        for axis in (0, 1):  # the order in which Pillow resizes
            image = _stretch(image, axis, scaled[axis], frame[axis], spec.interpolation)
        return image
    left, top = (round((whole - kept) / 2) for whole, kept in zip(scaled, frame, strict=True))
    return image.resize(scaled, spec.interpolation).crop((left, top, left + frame[0], top + frame[1]))


def _stretch(image: Image.Image, axis: int, whole: int, kept: int, kernel: Image.Resampling) -> Image.Image:
    """Scale one axis to `whole` pixels but compute only the middle `kept` of them, exact to one or two values."""
    side, first = image.size[axis], round((whole - kept) / 2)
    step = side / whole
    start, stop = first * step, min(side, (first + kept) * step)
    reach = 3 * ceil(max(step, 1))  # pixels on either side, more than the kernel's support
    low, high = max(0, int(start) - reach), min(side, ceil(stop) + reach)
    cut, box, size = [0, 0, *image.size], [0.0, 0.0, *image.size], list(image.size)
    cut[axis], cut[axis + 2] = low, high
    # Pillow reads the box in single precision, which is coarse far from the origin: crop before resizing.
    box[axis], box[axis + 2] = start - low, stop - low
    size[axis] = kept
    return image.crop((cut[0], cut[1], cut[2], cut[3])).resize(size, kernel, box=(box[0], box[1], box[2], box[3]))


def _covering(size: tuple[int, int], frame: tuple[int, int]) -> tuple[int, int]:
    """Return width and height after scaling: one side equals the frame's, the other is at least as long."""
    width, height = size
    if frame[0] != frame[1]:
        ratio = min(width / frame[0], height / frame[1])
        return round(width / ratio), round(height / ratio)
    short = min(size)
    return (frame[0], int(frame[0] * height / short)) if width == short else (int(frame[0] * width / short), frame[1])


def _contain(image: Image.Image, frame: tuple[int, int], spec: ImageSpec) -> Image.Image:
    """Return the whole picture in the middle of the padded frame; a side keeps at least one pixel."""
    ratio = max(side / wanted for side, wanted in zip(image.size, frame, strict=True))
    scaled = image.resize([max(1, round(side / ratio)) for side in image.size], spec.interpolation)
    canvas = Image.new("RGB", frame, (spec.fill,) * 3)
    canvas.paste(scaled, ((frame[0] - scaled.width) // 2, (frame[1] - scaled.height) // 2))
    return canvas


# --- crop vectors -----------------------------------------------------------------------------

MAX_CROPS_PER_PICTURE = 64  # in the cache


@dataclass(frozen=True, slots=True, eq=False)
class Crop:
    """Pixels and the region that they were cut from, if known."""

    pixels: Pixels
    picture: str = ""  # hash of the whole picture
    box: Box | None = None


def query_crops(query: ImageQuery) -> list[Crop]:
    """Return the pixels and views of a query with their regions."""
    pixels = (query.pixels, *query.views)
    if query.region is None:
        return [Crop(one) for one in pixels]
    return [Crop(one, query.region.picture, box) for one, box in zip(pixels, query.region.boxes, strict=True)]


@dataclass(slots=True, eq=False)
class _CachedCrop:
    """A region with its vector, or with the row of the batch that will compute it."""

    box: Box
    row: int = -1
    vector: NDArray[np.float32] | None = None  # [dim]


class CropVectorCache:
    """An LRU cache of crop vectors by picture, shared by questions and threads.

    A crop that nearly covers a cached one gets its vector. So a second question about a picture, similar framings, and
    overlapping crops of one call run the encoder once. The search cache of an episode (`agent.actions`) is separate: it
    keeps whole results, so that the policy is told about a repeated gaze.
    """

    def __init__(self, capacity: int, same_iou: float) -> None:
        """Keep up to `capacity` vectors; crops whose boxes overlap by an IoU of `same_iou` (0 to 1) share one."""
        self._capacity, self._same_iou = capacity, same_iou
        self._pictures: OrderedDict[str, list[_CachedCrop]] = OrderedDict()  # the most recently used last
        self._lock = threading.Lock()

    def __len__(self) -> int:
        with self._lock:
            return sum(map(len, self._pictures.values()))

    def embed(self, crops: Sequence[Crop], encode: Callable[[list[Pixels]], Vectors]) -> Vectors:
        """Return the unit vectors [n, dim] of crops; `encode` is called once, with those that are not cached."""
        new: list[Pixels] = []
        planned: dict[str, list[_CachedCrop]] = {}
        found: list[_CachedCrop] = []
        for crop in crops:
            cached = self._lookup(crop, planned)
            if cached is None:
                cached = _CachedCrop(crop.box or Box(0, 0, 0, 0), row=len(new))
                new.append(crop.pixels)
                if crop.box is not None:
                    planned.setdefault(crop.picture, []).append(cached)
            found.append(cached)
        vectors = encode(new)
        for cached in (cached for cached in found if cached.vector is None):
            cached.vector = vectors[cached.row].copy()
        self._store(planned)
        return np.stack([cached.vector for cached in found if cached.vector is not None]) if found else vectors

    def _lookup(self, crop: Crop, planned: dict[str, list[_CachedCrop]]) -> _CachedCrop | None:
        """Return the cached or planned crop with the largest overlap, if it is large enough."""
        if crop.box is None:
            return None
        with self._lock:
            cached = list(self._pictures.get(crop.picture, ()))
            if cached:
                self._pictures.move_to_end(crop.picture)
        overlapping = self._overlapping(crop.box, [*cached, *planned.get(crop.picture, ())])
        return max(overlapping, default=(0.0, None), key=lambda pair: pair[0])[1]

    def _overlapping(self, box: Box, cached: Sequence[_CachedCrop]) -> Iterator[tuple[float, _CachedCrop | None]]:
        for one in cached:
            iou = one.box.iou(box)
            if iou >= self._same_iou:
                yield iou, one

    def _store(self, planned: dict[str, list[_CachedCrop]]) -> None:
        with self._lock:
            for picture, crops in planned.items():
                self._pictures[picture] = [*self._pictures.pop(picture, ()), *crops][-MAX_CROPS_PER_PICTURE:]
            while self._pictures and sum(map(len, self._pictures.values())) > self._capacity:
                self._pictures.popitem(last=False)
