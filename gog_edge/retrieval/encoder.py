"""Vectors of crops that were embedded before, over questions and callers: nearly the same crop has the same vector.

The memory of an episode (`agent.memory`) is another thing: it keeps results, so that the policy can be told that it
looked there before. This one keeps vectors and tells nobody: a second question about the same picture, a framing that
another one nearly covers, and overlapping crops of one call run the encoder once.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from gog_edge.engines.base import Floats, GraphEngine
from gog_edge.engines.manifest import IMAGE, TEXT
from gog_edge.engines.onnx.session import CPU, OrtGraph
from gog_edge.engines.registry import EngineSet
from gog_edge.errors import ArtifactError
from gog_edge.files import MODEL_MANIFEST, read_json, verify_files
from gog_edge.retrieval.manifest import Fingerprint
from gog_edge.types import Box, ImageQuery, Pixels, Size, Vectors

PER_PICTURE = 64  # crops of one picture that are remembered


@dataclass(frozen=True, slots=True, eq=False)
class Crop:
    """Pixels, and where they were cut from where that is known."""

    pixels: Pixels
    picture: str = ""  # hash of the whole picture
    box: Box | None = None


def crops_of(query: ImageQuery) -> list[Crop]:
    """A query's pixels and views, with their places."""
    pixels = (query.pixels, *query.views)
    if query.region is None:
        return [Crop(one) for one in pixels]
    return [Crop(one, query.region.picture, box) for one, box in zip(pixels, query.region.boxes, strict=True)]


@dataclass(slots=True, eq=False)
class _Seen:
    """A crop that was embedded, or is about to be."""

    box: Box
    row: int = -1  # in the batch
    vector: NDArray[np.float32] | None = None  # [dim]


class CropCache:
    """The latest crops by picture; may be used from several threads."""

    def __init__(self, capacity: int, same_iou: float) -> None:
        """`capacity` vectors are kept; crops that overlap by `same_iou` (0..1) are one."""
        self._capacity, self._same_iou = capacity, same_iou
        self._pictures: OrderedDict[str, list[_Seen]] = OrderedDict()  # the latest used last
        self._lock = threading.Lock()

    def __len__(self) -> int:
        with self._lock:
            return sum(map(len, self._pictures.values()))

    def embed(self, crops: Sequence[Crop], encode: Callable[[list[Pixels]], Vectors]) -> Vectors:
        """Unit vectors [n, dim] of crops; `encode` gets, in one call, those that are not known."""
        fresh: list[Pixels] = []
        planned: dict[str, list[_Seen]] = {}
        found: list[_Seen] = []
        for crop in crops:
            seen = self._recall(crop, planned)
            if seen is None:
                seen = _Seen(crop.box or Box(0, 0, 0, 0), row=len(fresh))
                fresh.append(crop.pixels)
                if crop.box is not None:
                    planned.setdefault(crop.picture, []).append(seen)
            found.append(seen)
        vectors = encode(fresh)
        for seen in (seen for seen in found if seen.vector is None):
            seen.vector = vectors[seen.row].copy()
        self._keep(planned)
        return np.stack([seen.vector for seen in found if seen.vector is not None]) if found else vectors

    def _recall(self, crop: Crop, planned: dict[str, list[_Seen]]) -> _Seen | None:
        if crop.box is None:
            return None
        with self._lock:
            known = list(self._pictures.get(crop.picture, ()))
            if known:
                self._pictures.move_to_end(crop.picture)
        same = self._overlapping(crop.box, [*known, *planned.get(crop.picture, ())])
        return max(same, default=(0.0, None), key=lambda pair: pair[0])[1]

    def _overlapping(self, box: Box, seen: Sequence[_Seen]) -> Iterator[tuple[float, _Seen | None]]:
        for one in seen:
            iou = one.box.iou(box)
            if iou >= self._same_iou:
                yield iou, one

    def _keep(self, planned: dict[str, list[_Seen]]) -> None:
        with self._lock:
            for picture, seen in planned.items():
                self._pictures[picture] = [*self._pictures.pop(picture, ()), *seen][-PER_PICTURE:]
            while self._pictures and sum(map(len, self._pictures.values())) > self._capacity:
                self._pictures.popitem(last=False)


SCHEMA = 1
RESIZES = ("squash", "shortest", "longest")
AT_ONCE = 16  # pictures or texts a run of a graph: what lies between the operators of more no longer fits the caches
SCALED_PIXELS = 2**24  # 64 MiB: of slivers that would have more once they cover the frame, the middle is computed

# Vectors of one thing that are this near each other may be searched among each other: what an export in another
# precision must keep to, so that it may bear the fingerprint of the weights that it was made from.
INTERCHANGEABLE_COSINE = 0.99


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """How pixels become the image graph's input."""

    size: Size
    mean: tuple[float, float, float]  # of values in 0..1
    std: tuple[float, float, float]
    interpolation: Image.Resampling
    resize: str  # one of RESIZES
    fill: int = 0  # 0..255, pads what "longest" leaves over


class Encoder:
    """Embeds pictures and words; both towers may be used from several threads."""

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
    def open(cls, folder: Path, *, threads: int | None = None, providers: Sequence[str] = CPU,
             engines: EngineSet | None = None) -> Encoder:
        """Open an encoder folder written by `export.export_clip`, on exactly the ONNX Runtime providers asked for.

        `engines`, built from the folder's graphs, run in place of the graphs themselves.

        Raises:
            ArtifactError: a file is missing or altered, or the manifest is of another kind or schema.
            BackendError: a provider is not to be had, or a graph cannot be loaded.
        """
        manifest = read_json(folder / MODEL_MANIFEST, what="encoder")
        if manifest.get("kind") != "encoder" or manifest.get("schema") != SCHEMA:
            raise ArtifactError(
                f"encoder: '{folder}' is of kind {manifest.get('kind')!r}, schema {manifest.get('schema')!r}; "
                f"this version reads kind 'encoder', schema {SCHEMA}; export it again"
            )
        try:
            fingerprint = _fingerprint(manifest)
            spec = image_spec(manifest["image"])
            length, pad = int(manifest["text"]["context_length"]), int(manifest["text"]["pad_id"])
            verify_files(folder, manifest["files"], what="encoder")
        except (KeyError, TypeError, ValueError) as exc:
            raise ArtifactError(f"encoder: the manifest of '{folder}' is unusable ({exc!r}); export it again") from exc
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length, pad_id=pad)
        # An encoder works beside a policy that speaks, or beside what decodes pictures: threads that spin while they
        # wait would take the cores from these, and on a busy box that halves its own speed.
        image, text = (
            OrtGraph(folder / f"{name}.onnx", threads=threads, providers=providers, spinning=False)
            if engines is None else engines.open_graph(name)
            for name in (IMAGE, TEXT)
        )
        return cls(fingerprint, spec, image, text, tokenizer)

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self.fingerprint.dim

    def embed_images(self, images: Sequence[Pixels]) -> Vectors:
        """Unit vectors [n, dim] of n pictures of any sizes."""
        return self.embed_pixels(self.preprocess(images))

    def preprocess(self, images: Sequence[Pixels]) -> Floats:
        """What `embed_pixels` takes [n, 3, height, width], of n pictures of any sizes; safe in any thread."""
        batch = np.empty((len(images), 3, self.spec.size.height, self.spec.size.width), np.float32)
        for image, planes in zip(images, batch, strict=True):
            planes[...] = preprocess(image, self.spec)
        return batch

    def embed_pixels(self, batch: Floats) -> Vectors:
        """Unit vectors [n, dim] of preprocessed pictures [n, 3, height, width]; safe in any thread."""
        if not len(batch):
            return np.empty((0, self.dim), dtype=np.float32)
        parts = [batch[start : start + AT_ONCE] for start in range(0, len(batch), AT_ONCE)]
        return self._unit(np.concatenate([self._image.run({"pixels": part})["embedding"] for part in parts]))

    def embed_texts(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors [n, dim] of n texts, cut at the context length."""
        if not texts:
            return np.empty((0, self.dim), dtype=np.float32)
        encodings = self._tokenizer.encode_batch(list(texts))
        tokens = np.array([encoding.ids for encoding in encodings], dtype=np.int64)
        parts = [tokens[start : start + AT_ONCE] for start in range(0, len(tokens), AT_ONCE)]
        return self._unit(np.concatenate([self._text.run({"tokens": part})["embedding"] for part in parts]))

    def _unit(self, raw: NDArray[Any]) -> Vectors:
        vectors = raw.astype(np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise ArtifactError(
                f"encoder '{self.fingerprint.name}': a graph returned shape {vectors.shape}, its manifest says "
                f"[n, {self.dim}]; export it again"
            )
        lengths: NDArray[np.float32] = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.divide(vectors, np.maximum(lengths, 1e-12), dtype=np.float32)


def preprocess(pixels: Pixels, spec: ImageSpec) -> Floats:
    """Resize and normalise one picture: [3, height, width] float32, value for value what open_clip gives."""
    fitted = np.asarray(_fit(Image.fromarray(np.ascontiguousarray(pixels)), spec))
    planes = np.empty((3, *fitted.shape[:2]), np.float32)
    for channel, values in enumerate(_normalised(spec.mean, spec.std)):
        np.take(values, fitted[:, :, channel], out=planes[channel], mode="clip")
    return planes


@cache
def _normalised(mean: tuple[float, float, float], std: tuple[float, float, float]) -> Floats:
    """[3, 256]: what becomes of each value of each channel; looked up, it costs a seventh of computing it."""
    values = np.arange(256, dtype=np.float32) / np.float32(255)
    centre, spread = (np.array(numbers, dtype=np.float32)[:, None] for numbers in (mean, std))
    return np.asarray((values - centre) / spread, dtype=np.float32)


def _fit(image: Image.Image, spec: ImageSpec) -> Image.Image:
    """Bring a picture to the wanted size in the manner the model was trained with, rounding as open_clip rounds."""
    frame = (spec.size.width, spec.size.height)
    if spec.resize == "squash":
        return image.resize(frame, spec.interpolation)
    return (_cover if spec.resize == "shortest" else _contain)(image, frame, spec)


def _cover(image: Image.Image, frame: tuple[int, int], spec: ImageSpec) -> Image.Image:
    """The middle of the picture, scaled until it just covers the frame."""
    scaled = _covering(image.size, frame)
    if scaled[0] * scaled[1] > SCALED_PIXELS:
        for axis in (0, 1):  # in Pillow's order
            image = _stretch(image, axis, scaled[axis], frame[axis], spec.interpolation)
        return image
    left, top = (round((whole - kept) / 2) for whole, kept in zip(scaled, frame, strict=True))
    return image.resize(scaled, spec.interpolation).crop((left, top, left + frame[0], top + frame[1]))


def _stretch(image: Image.Image, axis: int, whole: int, kept: int, kernel: Image.Resampling) -> Image.Image:
    """Scale one axis to `whole` pixels and keep the middle ones, computing no others; right to a value or two."""
    side, first = image.size[axis], round((whole - kept) / 2)
    step = side / whole
    start, stop = first * step, min(side, (first + kept) * step)
    reach = 3 * ceil(max(step, 1))  # more than the kernel sees on either side
    low, high = max(0, int(start) - reach), min(side, ceil(stop) + reach)
    cut, box, size = [0, 0, *image.size], [0.0, 0.0, *image.size], list(image.size)
    cut[axis], cut[axis + 2] = low, high
    # Pillow takes the box in single precision, which is coarse far from the start: hence the cut.
    box[axis], box[axis + 2] = start - low, stop - low
    size[axis] = kept
    return image.crop((cut[0], cut[1], cut[2], cut[3])).resize(size, kernel, box=(box[0], box[1], box[2], box[3]))


def _covering(size: tuple[int, int], frame: tuple[int, int]) -> tuple[int, int]:
    """Width and height after scaling: one side is the frame's, the other is no shorter."""
    width, height = size
    if frame[0] != frame[1]:
        ratio = min(width / frame[0], height / frame[1])
        return round(width / ratio), round(height / ratio)
    short = min(size)
    return (frame[0], int(frame[0] * height / short)) if width == short else (int(frame[0] * width / short), frame[1])


def _contain(image: Image.Image, frame: tuple[int, int], spec: ImageSpec) -> Image.Image:
    """The whole picture in the middle of the frame; a side that would vanish keeps one pixel."""
    ratio = max(side / wanted for side, wanted in zip(image.size, frame, strict=True))
    scaled = image.resize([max(1, round(side / ratio)) for side in image.size], spec.interpolation)
    canvas = Image.new("RGB", frame, (spec.fill,) * 3)
    canvas.paste(scaled, ((frame[0] - scaled.width) // 2, (frame[1] - scaled.height) // 2))
    return canvas


def _fingerprint(manifest: Mapping[str, Any]) -> Fingerprint:
    return Fingerprint(
        str(manifest["name"]),
        str(manifest["weights_sha256"]),
        str(manifest["preprocessing_sha256"]),
        int(manifest["dim"]),
    )


def image_spec(raw: Mapping[str, Any]) -> ImageSpec:
    """The field `image` of an encoder's manifest; KeyError, TypeError or ValueError where it is none."""
    resize = str(raw["resize"])
    if resize not in RESIZES:
        raise ValueError(f"resize is '{resize}', known are {', '.join(RESIZES)}")
    return ImageSpec(
        Size(int(raw["width"]), int(raw["height"])),
        _triple(raw["mean"]),
        _triple(raw["std"]),
        Image.Resampling[str(raw["interpolation"]).upper()],
        resize,
        int(raw.get("fill", 0)),
    )


def _triple(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
