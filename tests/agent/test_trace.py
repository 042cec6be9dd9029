"""A trace is whole after every step, whatever ends the episode."""

import json
from pathlib import Path

import pytest
from stories import GAZE_GREEN, GAZE_RED, ColourRetriever, answer

from gog_edge.agent.loop import run_episode
from gog_edge.agent.trace import FORMAT, TraceFolder, TraceWriter, read_trace
from gog_edge.config import Budget
from gog_edge.errors import ArtifactError
from gog_edge.policy.scripted import ScriptedPolicy


def test_a_trace_holds_what_a_replay_needs(tell, picture, tmp_path):
    path = tmp_path / "traces" / "one.json"
    told = tell("Hmm.", GAZE_RED, answer("rubel"), trace=TraceWriter(path))
    trace = read_trace(path)
    assert trace["format"] == FORMAT
    assert trace["picture"] == {"sha256": picture.sha256, "width": 300, "height": 100}
    assert (trace["policy"], trace["workflow"]) == ("scripted", "gog")
    assert trace["budget"] == {"turns": 6, "tokens": 512, "deadline_ms": 20_000, "image_searches": None,
                               "text_searches": None}
    assert [step["text"] for step in trace["steps"]] == ["Hmm.", GAZE_RED, answer("rubel")]
    assert trace["steps"][0]["note"] == "there is no action in it"
    gaze = trace["steps"][1]
    assert gaze["box"] == [20, 20, 80, 80]
    assert gaze["evidence"][0]["passages"][1]["text"] == "The currency of Redland is the rubel."
    assert (gaze["found"], gaze["cached"]) == (0.97, False)
    assert gaze["new_tokens"] > 0
    assert trace["record"] == json.loads(json.dumps(told.record.to_json()))
    assert told.record.trace == str(path)
    assert trace["error"] is None


def test_a_crash_of_the_retriever_leaves_the_finished_steps(tell, tmp_path):
    path = tmp_path / "trace.json"
    with pytest.raises(OSError, match="disk went away"):
        tell(GAZE_RED, GAZE_GREEN, answer("leaf"), retriever=ColourRetriever(fails_at=1), trace=TraceWriter(path))
    trace = read_trace(path)
    assert [step["action"] for step in trace["steps"]] == ["gaze_search"]
    assert trace["record"] is None
    assert trace["error"] == {"type": "OSError", "message": "the disk went away"}


def test_the_file_is_whole_while_the_episode_runs(picture, tmp_path):
    path = tmp_path / "trace.json"
    policy = ScriptedPolicy([GAZE_RED, GAZE_GREEN, answer("leaf")])
    seen = set()
    for _ in run_episode(picture, "?", policy=policy, retriever=ColourRetriever(), budget=Budget(),
                         trace=TraceWriter(path)):
        seen.add(len(read_trace(path)["steps"]))
    assert seen == {0, 1, 2, 3}
    assert list(tmp_path.iterdir()) == [path]


def test_leaving_after_the_answer_is_no_error(picture, tmp_path):
    path = tmp_path / "trace.json"
    episode = run_episode(picture, "?", policy=ScriptedPolicy([answer("yes")]), retriever=ColourRetriever(),
                          budget=Budget(), trace=TraceWriter(path))
    while next(episode).kind != "answered":
        pass
    episode.close()
    assert read_trace(path)["error"] is None


def test_a_trace_that_cannot_be_written_is_said(tell, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot be written"):
        tell(answer("yes"), trace=TraceWriter(tmp_path / "file" / "trace.json"))


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "not JSON"), ("[]", "list"), ("{}", "format None"), ('{"format": 99}', "format 99"),
     ('{"format": 1, "picture": {}}', "no 'question'")],
)
def test_what_is_no_trace_is_refused(tmp_path, text, words):
    path = tmp_path / "trace.json"
    path.write_text(text)
    with pytest.raises(ArtifactError, match=words):
        read_trace(path)


def test_a_missing_trace_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="there is no"):
        read_trace(tmp_path / "none.json")


def test_a_folder_keeps_the_newest_traces(tell, tmp_path):
    folder = TraceFolder(tmp_path / "kept", keep=3)
    (folder.path / "mine.json").write_text("{}")
    paths = []
    for count in range(5):
        paths.append(Path(tell(answer(str(count)), trace=folder.new()).record.trace))
    assert sorted(folder.path.glob("*.trace.json")) == paths[2:] == sorted(paths)[2:]
    assert [read_trace(path)["record"]["answer"] for path in paths[2:]] == ["2", "3", "4"]
    assert (folder.path / "mine.json").exists()


def test_a_folder_that_cannot_be_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="file"):
        TraceFolder(tmp_path / "file")
