"""A folder of engines for "ort-rtx": graphs that ONNX Runtime runs by NVIDIA's provider for TensorRT for RTX.

The provider is a plugin, a package of its own beside ONNX Runtime's build for the processor. It compiles a graph when
it is opened, and kernels when they first run: https://nvidia.github.io/TensorRT-RTX-EP-ABI.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from threading import Lock
from typing import Any

import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidProtobuf, NoSuchFile

from gog_edge.engines.built import DECODER, RTX_PLUGIN, BuiltEngines, BuiltGraph
from gog_edge.engines.ort import LOAD_ERRORS, START_ERRORS, SessionGraph, session_options
from gog_edge.engines.ort_decoder import LiftedDecoder
from gog_edge.engines.ort_device import RUN_ERRORS, device_errors, failure_of
from gog_edge.engines.ort_tensors import Device
from gog_edge.engines.trt_shapes import spanning
from gog_edge.errors import ArtifactError, BackendError

INSTALL = "pip install 'gog_edge[ort-rtx]' (beside onnxruntime, not onnxruntime-gpu)"
GPUS = "SM 8.6, 8.9, 12.0 and later"  # as the package's tensorrt_rtx_provider_options.h has them
DRIVER = "libcuda"
RTX_DEVICE = Device("gpu", 0, 0x10DE)  # NVIDIA's

_registering, _registered = Lock(), set[str]()


def rtx_devices() -> list[Any]:
    """The GPUs that the provider runs on here, at least one: ONNX Runtime's `OrtEpDevice`.

    BackendError where the plugin, the driver or such a GPU is missing.
    """
    name = _register()
    found = [device for device in ort.get_ep_devices() if device.ep_name == name]
    if not found:
        raise BackendError(
            f"NVIDIA's RTX provider sees no GPU that it runs on ({GPUS}); ask for --engine ort-cuda or ort; "
            "`gog-edge doctor` says what this box has"
        )
    return found


def _register() -> str:
    """Load the plugin, once in a process -> the name of its provider."""
    try:
        plugin = importlib.import_module(RTX_PLUGIN)
    except ImportError as exc:
        raise BackendError(f"ONNX Runtime has no RTX provider of NVIDIA here ({exc}); install it: {INSTALL}") from exc
    name = str(plugin.get_ep_name())
    with _registering:
        if name not in _registered:
            try:
                ort.register_execution_provider_library(name, plugin.get_library_path())
            except (*RUN_ERRORS, OSError, AttributeError) as exc:
                mend = "NVIDIA's driver 580 or newer" if DRIVER in str(exc) else f"both anew: {INSTALL}"
                raise BackendError(
                    f"NVIDIA's RTX provider for ONNX Runtime {ort.__version__} cannot be loaded ({_reason(exc)}); "
                    f"install {mend}; `gog-edge doctor` says what this box has"
                ) from exc
            _registered.add(name)
    return name


def _reason(exc: Exception) -> str:
    """What the loader said, without the library's path."""
    return str(exc).rpartition("with error: ")[2]  # the whole of another error


def provider_options(path: Path, graph: BuiltGraph, cache: Path) -> dict[str, str]:
    """What the provider is told for a graph; `cache`: folder for kernels that it compiled, where there is one.

    CUDA graphs stay off: how it captures says nothing of conversations, whose caches lie at different addresses.
    """
    options = {}
    if graph.profiles:
        # One profile for all shapes: releases of the plugin differ in whether a run may choose among several.
        shapes = spanning(graph.profiles)
        for place, which in enumerate(("min", "opt", "max")):
            said = (f"{name}:{'x'.join(map(str, bounds[place]))}" for name, bounds in shapes.items())
            options[f"nv_profile_{which}_shapes"] = ",".join(said)
    if path.with_name(f"{path.name}.data").exists():  # in the graph's own message, no more than 2 GB would fit
        options["nv_use_external_data_initializer"] = "1"
    if cache.is_dir():
        options["nv_runtime_cache_path"] = str(cache)
    return options


def open_rtx_session(path: Path, graph: BuiltGraph, cache: Path) -> ort.InferenceSession:
    """Load a graph, every operator of it, on the first GPU that the provider runs on. BackendError otherwise.

    ArtifactError where its file cannot be read.
    """
    devices, options = rtx_devices(), session_options()
    # The plugin gets the graph as it was written: so TensorRT's parser takes it, and so it was measured.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.add_provider_for_devices(devices[:1], provider_options(path, graph, cache))
    try:
        with device_errors(f"'{path}' cannot be loaded"):
            return ort.InferenceSession(str(path), options, enable_fallback=False)
    except (InvalidProtobuf, NoSuchFile) as exc:
        raise ArtifactError(f"engines: '{path}' cannot be read ({exc}); build them again") from exc
    except (*START_ERRORS, *LOAD_ERRORS) as exc:
        raise BackendError(
            f"NVIDIA's RTX provider does not run all of '{path}': {failure_of(exc)}; ask for --engine ort-cuda, and "
            "report this"
        ) from exc


def open_rtx_decoder(folder: Path, built: BuiltEngines, cache: Path) -> LiftedDecoder:
    """The decoder, its caches in the GPU's memory. Raises BackendError; ArtifactError when it is of another version."""
    graph = built.graph(DECODER)
    path = folder / graph.file
    return LiftedDecoder(open_rtx_session(path, graph, cache), path, device=RTX_DEVICE)


def open_rtx_graph(folder: Path, built: BuiltEngines, name: str, cache: Path) -> SessionGraph:
    """A graph without state. Raises BackendError."""
    graph = built.graph(name)
    return SessionGraph(open_rtx_session(folder / graph.file, graph, cache), on_device=True)
