"""A folder of engines for "ort-cuda": graphs that ONNX Runtime's CUDA provider runs, caches in the GPU's memory."""

from __future__ import annotations

from pathlib import Path

from gog_edge.engines.built import DECODER, BuiltEngines
from gog_edge.engines.ort import OrtGraph, open_session
from gog_edge.engines.ort_decoder import LiftedDecoder
from gog_edge.engines.ort_device import CUDA
from gog_edge.engines.ort_tensors import CUDA_NAME, Device

CUDA_DEVICE = Device(CUDA_NAME)


def open_cuda_decoder(folder: Path, built: BuiltEngines) -> LiftedDecoder:
    """The decoder. Raises BackendError; ArtifactError when its graph is of another version."""
    path = folder / built.graph(DECODER).file
    return LiftedDecoder(open_session(path, providers=CUDA, decoder=True), path, device=CUDA_DEVICE)


def open_cuda_graph(folder: Path, built: BuiltEngines, name: str) -> OrtGraph:
    """A graph without state. Raises BackendError."""
    return OrtGraph(folder / built.graph(name).file, providers=CUDA)
