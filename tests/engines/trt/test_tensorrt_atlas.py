"""The atlas through all of the TensorRT engines' code, executed on `fake_gpu`."""

import pytest
from tensorrt_fixtures import write_engines

from gog_edge.agent.events import Answered
from gog_edge.bundle import DEFAULT_BUNDLE, open_bundle
from gog_edge.engines.manifest import IN_PLACE, NEW_ROWS, TENSORRT_RTX
from gog_edge.engines.registry import EngineChoice
from gog_edge.runtime import open_runtime

QUESTIONS = (("row.jpg", "What is the capital of the country of the second flag from the left?"),
         ("row.jpg", "How many flags are there?"))  # fmt: skip


@pytest.fixture(scope="module", params=[IN_PLACE, NEW_ROWS])
def folder(request, tmp_path_factory):
    return write_engines(open_bundle(DEFAULT_BUNDLE), tmp_path_factory.mktemp("engines"), request.param)


def ask_all(choice):
    opened = open_runtime(DEFAULT_BUNDLE, threads=1, choice=choice)
    answers = []
    for name, question in QUESTIONS:
        picture = (DEFAULT_BUNDLE / "samples" / name).read_bytes()
        events = list(opened.ask(picture, question))
        assert isinstance(events[-1], Answered)
        record = events[-1].record
        answers.append((record.answer, [step.action for step in record.steps], record.citations))
    opened.close()
    return answers


def test_answers_equal_those_on_the_cpu(folder, fake_gpu):
    assert ask_all(EngineChoice(TENSORRT_RTX, folder)) == ask_all(EngineChoice())
    assert fake_gpu.calls["cudaGraphLaunch"] > 10 and not fake_gpu.lost
