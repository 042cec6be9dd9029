"""Policies lifted for TensorRT and opened on `host_gpu`; conftest files import the fixtures."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import tensorrt_rtx_bindings as true_trt
from host_gpu import HostRuntime, HostTensorRT, write_plan

from gog_edge.engines import tensorrt as engines
from gog_edge.engines.cuda import Cuda
from gog_edge.engines.manifest import (
    DECODER,
    IN_PLACE,
    MANIFEST,
    NEW_ROWS,
    TENSORRT_RTX,
    VISION,
    BuiltEngines,
    BuiltGraph,
)
from gog_edge.engines.tensorrt.decoder import TrtDecoder
from gog_edge.engines.tensorrt.graph import TrtGraph
from gog_edge.engines.tensorrt.plan import MODULES, Plan
from gog_edge.exporting.conversion.convert import lift_graph
from gog_edge.exporting.engines.profiles import vision_profiles
from gog_edge.exporting.engines.sources import bundle_graphs
from gog_edge.files import describe_files, write_json
from gog_edge.policy.manifest import read_manifest

CONTEXT = 64
KINDS = {IN_PLACE: "standard", NEW_ROWS: "decomposed"}


@dataclass
class World:
    """A folder of engines, and the machine that they run on."""

    policy: Path
    folder: Path
    built: BuiltEngines
    runtime: HostRuntime
    trt: HostTensorRT

    def plan(self, name):
        return Plan(self.trt, Cuda(self.runtime), self.folder, self.built, self.built.graph(name))

    def decoder(self):
        return TrtDecoder(self.plan(DECODER), self.built.graph(DECODER), self.built, self.spec)

    def vision(self, **options):
        return TrtGraph(self.plan(VISION), **options)

    @property
    def spec(self):
        return read_manifest(self.policy).text


def step_profiles(spec, steps=((1, 1, 8), (1, 16, 32))):
    """As the builder makes them, for small steps."""
    profiles = []
    for step in steps:
        profile = {"inputs_embeds": [(1, t, spec.hidden) for t in step], "rows": [(1,), (1,), (4,)]}
        profile |= {name: [(1, t, spec.head_dim // 2) for t in step] for name in ("cos", "sin")}
        if spec.deepstack:
            profile["deepstack"] = [(spec.deepstack, t, spec.hidden) for t in step]
        profiles.append({name: tuple(shapes) for name, shapes in profile.items()})
    return tuple(profiles)


def write_engines(bundle, out, cache=IN_PLACE):
    """All engines of a bundle, as the builder leaves them, but for the plans."""
    found, described = bundle_graphs(bundle, 2048), []
    out.mkdir(parents=True, exist_ok=True)
    for graph in found.graphs:
        decoder = graph.name == DECODER
        lift_graph(graph.path, out / f"{graph.name}.onnx", KINDS[cache], context=found.context * decoder)
        write_plan(out / f"{graph.name}.engine", out / f"{graph.name}.onnx", graph.profiles)
        sources = {entry.path: entry.sha256 for entry in graph.files}
        described.append(BuiltGraph(graph.name, f"{graph.name}.engine", sources, cache * decoder, graph.profiles))
    files = describe_files(out, [graph.file for graph in described])
    built = BuiltEngines(TENSORRT_RTX, true_trt.__version__, (89,), found.context, tuple(described), {}, tuple(files))
    write_json(out / MANIFEST, built.to_json())
    return out


@pytest.fixture
def host_gpu(monkeypatch):
    """Where NVIDIA's modules would be asked for, the host's stand."""
    device = HostRuntime(2**31)
    module = HostTensorRT(device)
    monkeypatch.setattr(engines, "trt_module", lambda engine: module)
    monkeypatch.setattr(Cuda, "open", classmethod(lambda cls, index=0: cls(device, index)))
    assert MODULES[TENSORRT_RTX] == true_trt.__name__
    return device


@pytest.fixture(scope="session")
def lifted(policies, qwen3_policy, tmp_path_factory):
    """The graphs of a policy, lifted once each: name and cache -> folder with decoder.onnx and vision.onnx."""
    folders = {"tied": policies[True], "untied": policies[False], "qwen3": qwen3_policy}
    done = {}

    def lift(name, cache):
        if (name, cache) not in done:
            out = tmp_path_factory.mktemp("lifted")
            for graph in (DECODER, VISION):
                context = CONTEXT if graph == DECODER else 0
                lift_graph(folders[name] / f"{graph}.onnx", out / f"{graph}.onnx", KINDS[cache], context=context)
            done[name, cache] = folders[name], out
        return done[name, cache]

    return lift


@pytest.fixture
def world(lifted, tmp_path_factory):
    """Open a policy's engines: `world(name, cache)`."""

    def make(name="tied", cache=IN_PLACE, *, memory=2**30, **trt):
        policy, graphs = lifted(name, cache)
        manifest, runtime = read_manifest(policy), HostRuntime(memory)
        profiles = {DECODER: step_profiles(manifest.text), VISION: vision_profiles(manifest.vision)}
        folder = tmp_path_factory.mktemp("engines")
        for graph, shapes in profiles.items():
            write_plan(folder / f"{graph}.engine", graphs / f"{graph}.onnx", shapes)
        described = tuple(
            BuiltGraph(graph, f"{graph}.engine", {}, cache if graph == DECODER else "", profiles[graph])
            for graph in profiles
        )
        built = BuiltEngines(TENSORRT_RTX, "1.7.1.116", (86, 89), CONTEXT, described, {}, ())
        return World(policy, folder, built, runtime, HostTensorRT(runtime, **trt))

    return make
