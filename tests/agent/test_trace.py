"""A trace is complete after every step, whatever ends the episode."""

import json
from pathlib import Path

import pytest
from scripted_policy import ScriptedPolicy
from scripted_world import GAZE_GREEN, GAZE_RED, ColourRetriever, answer

from gog_edge.agent.loop import EpisodeClosed, run_episode
from gog_edge.agent.trace import FORMAT, TraceFolder, TraceWriter, read_trace
from gog_edge.config import Budget
from gog_edge.errors import ArtifactError


def test_a_trace_contains_what_a_replay_needs(play, picture, tmp_path):
    path = tmp_path / "traces" / "one.json"
    outcome = play("Hmm.", GAZE_RED, answer("rubel"), trace=TraceWriter(path))
    trace = read_trace(path)
    assert trace["format"] == FORMAT
    assert trace["picture"] == {"sha256": picture.sha256, "width": 300, "height": 100}
    assert (trace["policy"], trace["workflow"]) == ("scripted", "gog")
    assert trace["budget"] == {"turns": 6, "tokens": 512, "deadline_ms": 20_000, "image_searches": None,
                               "text_searches": None}
    assert [step["text"] for step in trace["steps"]] == ["Hmm.", GAZE_RED, answer("rubel")]
    assert trace["steps"][0]["note"] == "it contains no action"
    gaze = trace["steps"][1]
    assert gaze["box"] == [20, 20, 80, 80]
    assert gaze["evidence"][0]["passages"][1]["text"] == "The currency of Redland is the rubel."
    assert (gaze["found"], gaze["cached"]) == (0.97, False)
    assert gaze["new_tokens"] > 0
    assert trace["record"] == json.loads(json.dumps(outcome.record.to_json()))
    assert outcome.record.trace == str(path)
    assert trace["error"] is None


def test_an_error_of_the_retriever_leaves_the_completed_steps(play, tmp_path):
    path = tmp_path / "trace.json"
    with pytest.raises(OSError, match="disk went away"):
        play(GAZE_RED, GAZE_GREEN, answer("leaf"), retriever=ColourRetriever(fails_at=1), trace=TraceWriter(path))
    trace = read_trace(path)
    assert [step["action"] for step in trace["steps"]] == ["gaze_search"]
    assert trace["record"] is None
    assert trace["error"] == {"type": "OSError", "message": "the disk went away"}


def test_the_file_is_valid_while_the_episode_runs(picture, tmp_path):
    path = tmp_path / "trace.json"
    policy = ScriptedPolicy([GAZE_RED, GAZE_GREEN, answer("leaf")])
    step_counts = set()
    run_episode(picture, "?", policy=policy, retriever=ColourRetriever(), budget=Budget(), trace=TraceWriter(path),
                on_event=lambda _: step_counts.add(len(read_trace(path)["steps"])))
    assert step_counts == {0, 1, 2, 3}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("last", "error"), [("answered", None), ("started", "EpisodeClosed")])
def test_a_stopped_episode_is_an_error_unless_it_was_answered(picture, tmp_path, last, error):
    path = tmp_path / "trace.json"

    def on_event(event):
        if event.kind == last:
            raise EpisodeClosed("the client has gone")

    with pytest.raises(EpisodeClosed):
        run_episode(picture, "?", policy=ScriptedPolicy([answer("yes")]), retriever=ColourRetriever(),
                    budget=Budget(), trace=TraceWriter(path), on_event=on_event)
    trace = read_trace(path)
    assert trace["error"] == (error and {"type": error, "message": "the client has gone"})
    assert (trace["record"] is None) == (error is not None)


def test_a_trace_that_cannot_be_written_is_an_error(play, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot be written"):
        play(answer("yes"), trace=TraceWriter(tmp_path / "file" / "trace.json"))


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "not JSON"), ("[]", "list"), ("{}", "format None"), ('{"format": 99}', "format 99"),
     ('{"format": 1, "picture": {}}', "no 'question'")],
)
def test_files_that_are_not_traces_are_refused(tmp_path, text, words):
    path = tmp_path / "trace.json"
    path.write_text(text)
    with pytest.raises(ArtifactError, match=words):
        read_trace(path)


def test_a_missing_trace_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="does not exist"):
        read_trace(tmp_path / "none.json")


def test_a_folder_keeps_the_newest_traces(play, tmp_path):
    folder = TraceFolder(tmp_path / "kept", keep=3)
    (folder.path / "mine.json").write_text("{}")
    paths = []
    for count in range(5):
        paths.append(Path(play(answer(str(count)), trace=folder.new()).record.trace))
    assert sorted(folder.path.glob("*.trace.json")) == paths[2:] == sorted(paths)[2:]
    assert [read_trace(path)["record"]["answer"] for path in paths[2:]] == ["2", "3", "4"]
    assert (folder.path / "mine.json").exists()


def test_a_folder_that_cannot_be_created_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="file"):
        TraceFolder(tmp_path / "file")
