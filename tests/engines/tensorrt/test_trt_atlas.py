"""The atlas answered through the TensorRT engines' code, all of it, on a GPU in the host's memory (`host_gpu`)."""

import pytest
from trt_world import write_engines

from gog_edge.agent.events import Answered
from gog_edge.bundle import DEFAULT_BUNDLE, open_bundle
from gog_edge.engines.manifest import IN_PLACE, NEW_ROWS, TENSORRT_RTX
from gog_edge.engines.registry import EngineChoice
from gog_edge.runtime import open_runtime

ASKED = (("row.jpg", "What is the capital of the country of the second flag from the left?"),
         ("row.jpg", "How many flags are there?"))  # fmt: skip


@pytest.fixture(scope="module", params=[IN_PLACE, NEW_ROWS])
def folder(request, tmp_path_factory):
    return write_engines(open_bundle(DEFAULT_BUNDLE), tmp_path_factory.mktemp("engines"), request.param)


def answers(choice):
    opened = open_runtime(DEFAULT_BUNDLE, threads=1, choice=choice)
    said = []
    for name, question in ASKED:
        picture = (DEFAULT_BUNDLE / "samples" / name).read_bytes()
        events = list(opened.ask(picture, question))
        assert isinstance(events[-1], Answered)
        record = events[-1].record
        said.append((record.answer, [step.action for step in record.steps], record.citations))
    opened.close()
    return said


def test_it_answers_as_on_the_cpu(folder, host_gpu):
    assert answers(EngineChoice(TENSORRT_RTX, folder)) == answers(EngineChoice())
    assert host_gpu.calls["cudaGraphLaunch"] > 10 and not host_gpu.lost
