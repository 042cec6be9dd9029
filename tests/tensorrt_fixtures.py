"""Policies converted for TensorRT and opened on the fake GPU of `fake_gpu`."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import tensorrt_rtx_bindings as real_tensorrt
from fake_gpu import FakeCuda, FakeTensorRT, write_plan

from gog_edge.engines.cuda import Cuda
from gog_edge.engines.manifest import (
    DECODER,
    IN_PLACE,
    MANIFEST,
    NEW_ROWS,
    TENSORRT_RTX,
    VISION,
    BuiltGraph,
    EngineManifest,
)
from gog_edge.engines.tensorrt import plan as plan_module
from gog_edge.engines.tensorrt.decoder import TrtDecoder
from gog_edge.engines.tensorrt.graph import TrtGraph
from gog_edge.engines.tensorrt.plan import MODULES, Plan
from gog_edge.exporting.conversion.convert import convert_graph
from gog_edge.exporting.engines.profiles import vision_profiles
from gog_edge.exporting.engines.sources import bundle_graphs
from gog_edge.files import describe_files, write_json
from gog_edge.policy.manifest import read_manifest

CONTEXT = 64
KINDS = {IN_PLACE: "standard", NEW_ROWS: "decomposed"}  # of conversion, by how the cache is updated


@dataclass
class FakeMachine:
    """A folder of engines and the fake GPU that they run on."""

    policy: Path
    folder: Path
    built: EngineManifest
    cuda: FakeCuda
    trt: FakeTensorRT

    def plan(self, name):
        return Plan(self.trt, Cuda(self.cuda), self.folder, self.built, self.built.graph(name))

    def decoder(self):
        return TrtDecoder(self.plan(DECODER), self.built.graph(DECODER), self.built, self.spec)

    def vision(self, **options):
        return TrtGraph(self.plan(VISION), **options)

    @property
    def spec(self):
        return read_manifest(self.policy).text


def step_profiles(spec, steps=((1, 1, 8), (1, 16, 32))):
    """Profiles like the builder's, for small steps."""
    profiles = []
    for step in steps:
        profile = {"inputs_embeds": [(1, t, spec.hidden) for t in step], "rows": [(1,), (1,), (4,)]}
        profile |= {name: [(1, t, spec.head_dim // 2) for t in step] for name in ("cos", "sin")}
        if spec.deepstack:
            profile["deepstack"] = [(spec.deepstack, t, spec.hidden) for t in step]
        profiles.append({name: tuple(shapes) for name, shapes in profile.items()})
    return tuple(profiles)


def write_engines(bundle, out, cache=IN_PLACE):
    """Write all engines of a bundle as the builder does, but with the plans of `fake_gpu`."""
    found, built_graphs = bundle_graphs(bundle, 2048), []
    out.mkdir(parents=True, exist_ok=True)
    for graph in found.graphs:
        decoder = graph.name == DECODER
        convert_graph(graph.path, out / f"{graph.name}.onnx", KINDS[cache], context=found.context * decoder)
        write_plan(out / f"{graph.name}.engine", out / f"{graph.name}.onnx", graph.profiles)
        sources = {entry.path: entry.sha256 for entry in graph.files}
        built_graphs.append(BuiltGraph(graph.name, f"{graph.name}.engine", sources, cache * decoder, graph.profiles))
    files = describe_files(out, [graph.file for graph in built_graphs])
    built = EngineManifest(TENSORRT_RTX, real_tensorrt.__version__, (89,), found.context, tuple(built_graphs), {},
                           tuple(files))  # fmt: skip
    write_json(out / MANIFEST, built.to_json())
    return out


@pytest.fixture
def fake_gpu(monkeypatch):
    """Replace NVIDIA's modules by the fakes wherever they would be imported."""
    device = FakeCuda(2**31)
    module = FakeTensorRT(device)
    monkeypatch.setattr(plan_module, "import_tensorrt", lambda engine: module)
    monkeypatch.setattr(Cuda, "open", classmethod(lambda cls, index=0: cls(device, index)))
    assert MODULES[TENSORRT_RTX] == real_tensorrt.__name__
    return device


@pytest.fixture(scope="session")
def converted(policies, qwen3_policy, tmp_path_factory):
    """Return a function (name, cache) -> (policy folder, folder with its converted decoder.onnx and vision.onnx)."""
    folders = {"tied": policies[True], "untied": policies[False], "qwen3": qwen3_policy}
    done = {}

    def convert(name, cache):
        if (name, cache) not in done:
            out = tmp_path_factory.mktemp("converted")
            for graph in (DECODER, VISION):
                context = CONTEXT if graph == DECODER else 0
                convert_graph(folders[name] / f"{graph}.onnx", out / f"{graph}.onnx", KINDS[cache], context=context)
            done[name, cache] = folders[name], out
        return done[name, cache]

    return convert


@pytest.fixture
def fake_machine(converted, tmp_path_factory):
    """Return a function (policy, cache) -> FakeMachine."""

    def make(name="tied", cache=IN_PLACE, *, memory=2**30, **trt):
        policy, graphs = converted(name, cache)
        manifest, cuda = read_manifest(policy), FakeCuda(memory)
        profiles = {DECODER: step_profiles(manifest.text), VISION: vision_profiles(manifest.vision)}
        folder = tmp_path_factory.mktemp("engines")
        for graph, shapes in profiles.items():
            write_plan(folder / f"{graph}.engine", graphs / f"{graph}.onnx", shapes)
        built_graphs = tuple(
            BuiltGraph(graph, f"{graph}.engine", {}, cache if graph == DECODER else "", profiles[graph])
            for graph in profiles
        )
        built = EngineManifest(TENSORRT_RTX, "1.7.1.116", (86, 89), CONTEXT, built_graphs, {}, ())
        return FakeMachine(policy, folder, built, cuda, FakeTensorRT(cuda, **trt))

    return make
