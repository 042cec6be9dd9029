"""Engines built for TensorRT or TensorRT for RTX, opened on this box's GPU, or refused with what to do."""

from __future__ import annotations

from pathlib import Path

from gog_edge.engines.base import DecoderEngine, GraphEngine
from gog_edge.engines.cuda import Cuda
from gog_edge.engines.manifest import DECODER, BuiltEngines
from gog_edge.engines.tensorrt.decoder import DecoderShape, TrtDecoder
from gog_edge.engines.tensorrt.graph import TrtGraph
from gog_edge.engines.tensorrt.plan import Plan, check_device, check_version, trt_module


def open_plan(folder: Path, built: BuiltEngines, name: str, *, device: int = 0) -> Plan:
    """Load one of the engines that lie in a folder, as its manifest `built` describes them.

    Raises:
        ArtifactError: there is none of that name, or its file is truncated, foreign, or not the one described.
        BackendError: TensorRT, driver or GPU are missing, of another release, or of an SM it was not built for;
            OutOfDeviceMemory: the weights do not fit; DeviceLost.
    """
    graph = built.graph(name)
    trt = trt_module(built.engine)
    check_version(trt, built)
    cuda = Cuda.open(device)
    check_device(cuda.properties(), built)
    return Plan(trt, cuda, folder, built, graph)


def open_graph(folder: Path, built: BuiltEngines, name: str, *, device: int = 0) -> GraphEngine:
    """A graph without state: vision, image or text. See `open_plan` for what it raises."""
    return TrtGraph(open_plan(folder, built, name, device=device))


def open_decoder(folder: Path, built: BuiltEngines, spec: DecoderShape, *, device: int = 0) -> DecoderEngine:
    """The decoder, whose policy's manifest has `spec`. See `open_plan` for what it raises."""
    plan = open_plan(folder, built, DECODER, device=device)
    decoder = TrtDecoder(plan, built.graph(DECODER), built, spec)
    decoder.warm()
    return decoder
