"""The atlas answered through the TensorRT engines' code, all of it, on a GPU in the host's memory (`host_gpu`)."""

import pytest
import tensorrt_rtx_bindings as trt
from host_gpu import HostRuntime, HostTensorRT, write_plan

from gog_edge.agent.events import Answered
from gog_edge.bundle import DEFAULT_BUNDLE, open_bundle
from gog_edge.engines import cuda, trt_plan
from gog_edge.engines import trt as engines
from gog_edge.engines.built import DECODER, IN_PLACE, MANIFEST, NEW_ROWS, TENSORRT_RTX, BuiltEngines, BuiltGraph
from gog_edge.engines.choice import EngineChoice
from gog_edge.exporting.engine_sources import bundle_graphs
from gog_edge.exporting.lift import lift_graph
from gog_edge.files import describe_files, write_json
from gog_edge.runtime import open_runtime

KINDS = {IN_PLACE: "standard", NEW_ROWS: "decomposed"}
ASKED = (("row.jpg", "What is the capital of the country of the second flag from the left?"),
         ("row.jpg", "How many flags are there?"))  # fmt: skip


@pytest.fixture(scope="module", params=[IN_PLACE, NEW_ROWS])
def folder(request, tmp_path_factory):
    """Engines of the atlas, as the builder leaves them, but for the plans."""
    out, found = tmp_path_factory.mktemp("engines"), bundle_graphs(open_bundle(DEFAULT_BUNDLE), 2048)
    described = []
    for graph in found.graphs:
        cache, context = (request.param, found.context) if graph.name == DECODER else ("", 0)
        lift_graph(graph.path, out / f"{graph.name}.onnx", KINDS[request.param], context=context)
        write_plan(out / f"{graph.name}.engine", out / f"{graph.name}.onnx", graph.profiles)
        sources = {entry.path: entry.sha256 for entry in graph.files}
        described.append(BuiltGraph(graph.name, f"{graph.name}.engine", sources, cache, graph.profiles))
    files = describe_files(out, [graph.file for graph in described])
    built = BuiltEngines(TENSORRT_RTX, trt.__version__, (89,), found.context, tuple(described), {}, tuple(files))
    write_json(out / MANIFEST, built.to_json())
    return out


@pytest.fixture
def runtime(monkeypatch):
    """Where NVIDIA's modules would be asked for, the host's stand."""
    device = HostRuntime(2**31)
    module = HostTensorRT(device)
    monkeypatch.setattr(engines, "trt_module", lambda engine: module)
    monkeypatch.setattr(cuda.Cuda, "open", classmethod(lambda cls, index=0: cls(device, index)))
    assert trt_plan.MODULES[TENSORRT_RTX] == trt.__name__
    return device


def answers(choice):
    opened = open_runtime(DEFAULT_BUNDLE, threads=1, choice=choice)
    said = []
    for name, question in ASKED:
        picture = (DEFAULT_BUNDLE / "samples" / name).read_bytes()
        events = list(opened.ask(picture, question))
        assert isinstance(events[-1], Answered)
        record = events[-1].record
        said.append((record.answer, [step.action for step in record.steps], record.citations))
    return said


def test_it_answers_as_on_the_cpu(folder, runtime):
    assert answers(EngineChoice(TENSORRT_RTX, folder)) == answers(EngineChoice())
    assert runtime.calls["cudaGraphLaunch"] > 10 and not runtime.lost
