"""The two CLIP towers as ONNX graphs: pictures and words -> unit vectors of one space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from gog_edge.engines.base import GraphEngine
from gog_edge.engines.ort import CPU, OrtGraph
from gog_edge.errors import ArtifactError
from gog_edge.files import read_json, verify_files
from gog_edge.types import Pixels, Size, Vectors

SCHEMA = 1
RESIZES = ("squash", "shortest", "longest")


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What makes vectors comparable: the same weights behind the same preprocessing."""

    name: str
    weights_sha256: str
    preprocessing_sha256: str
    dim: int


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
    def open(cls, folder: Path, *, threads: int | None = None, providers: Sequence[str] = CPU) -> Encoder:
        """Open an encoder folder written by `export.export_clip`, on exactly the ONNX Runtime providers asked for.

        Raises:
            ArtifactError: a file is missing or altered, or the manifest is of another kind or schema.
            BackendError: a provider is not to be had, or a graph cannot be loaded.
        """
        manifest = read_json(folder / "manifest.json", what="encoder")
        if manifest.get("kind") != "encoder" or manifest.get("schema") != SCHEMA:
            raise ArtifactError(
                f"encoder: '{folder}' is of kind {manifest.get('kind')!r}, schema {manifest.get('schema')!r}; "
                f"this version reads kind 'encoder', schema {SCHEMA}; export it again"
            )
        try:
            fingerprint = _fingerprint(manifest)
            spec = _image_spec(manifest["image"])
            length, pad = int(manifest["text"]["context_length"]), int(manifest["text"]["pad_id"])
            verify_files(folder, manifest["files"], what="encoder")
        except (KeyError, TypeError, ValueError) as exc:
            raise ArtifactError(f"encoder: the manifest of '{folder}' is unusable ({exc!r}); export it again") from exc
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length, pad_id=pad)
        image, text = (
            OrtGraph(folder / name, threads=threads, providers=providers) for name in ("image.onnx", "text.onnx")
        )
        return cls(fingerprint, spec, image, text, tokenizer)

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self.fingerprint.dim

    def embed_images(self, images: Sequence[Pixels]) -> Vectors:
        """Unit vectors [n, dim] of n pictures of any sizes, in one run of the image graph."""
        if not images:
            return np.empty((0, self.dim), dtype=np.float32)
        pixels = np.stack([preprocess(image, self.spec) for image in images])
        return self._unit(self._image.run({"pixels": pixels})["embedding"])

    def embed_texts(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors [n, dim] of n texts, cut at the context length, in one run of the text graph."""
        if not texts:
            return np.empty((0, self.dim), dtype=np.float32)
        encodings = self._tokenizer.encode_batch(list(texts))
        tokens = np.array([encoding.ids for encoding in encodings], dtype=np.int64)
        return self._unit(self._text.run({"tokens": tokens})["embedding"])

    def _unit(self, raw: NDArray[Any]) -> Vectors:
        vectors = raw.astype(np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise ArtifactError(
                f"encoder '{self.fingerprint.name}': a graph returned shape {vectors.shape}, its manifest says "
                f"[n, {self.dim}]; export it again"
            )
        lengths: NDArray[np.float32] = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.divide(vectors, np.maximum(lengths, 1e-12), dtype=np.float32)


def preprocess(pixels: Pixels, spec: ImageSpec) -> NDArray[np.float32]:
    """Resize and normalise one picture: [3, height, width] float32."""
    image = _fit(Image.fromarray(np.ascontiguousarray(pixels)), spec)
    mean, std = (np.array(values, dtype=np.float32) for values in (spec.mean, spec.std))
    # One multiplication and one addition a pixel: (value / 255 - mean) / std.
    values = np.asarray(image, dtype=np.float32) * (1 / (255 * std)) - mean / std
    return np.ascontiguousarray(values.transpose(2, 0, 1), dtype=np.float32)


def _fit(image: Image.Image, spec: ImageSpec) -> Image.Image:
    """Bring a picture to the wanted size in the manner the model was trained with."""
    width, height = spec.size.width, spec.size.height
    if spec.resize == "squash":
        return image.resize((width, height), spec.interpolation)
    pick = max if spec.resize == "shortest" else min
    scale = pick(width / image.width, height / image.height)
    inner = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    scaled = image.resize(inner, spec.interpolation)
    canvas = Image.new("RGB", (width, height), (spec.fill,) * 3)
    canvas.paste(scaled, (round((width - scaled.width) / 2), round((height - scaled.height) / 2)))
    return canvas


def _fingerprint(manifest: Mapping[str, Any]) -> Fingerprint:
    return Fingerprint(
        str(manifest["name"]),
        str(manifest["weights_sha256"]),
        str(manifest["preprocessing_sha256"]),
        int(manifest["dim"]),
    )


def _image_spec(raw: Mapping[str, Any]) -> ImageSpec:
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
