"""The `gog-edge` command, over a policy that plays a script."""

import json
import subprocess
import sys

import pytest
from playback import BOXES, QUESTION, SCRIPT, PlaybackPolicy, playback_runtime, scene
from typer.testing import CliRunner

from gog_edge import runtime
from gog_edge.agent.trace import read_trace
from gog_edge.cli import app
from gog_edge.types import Answer


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "scene.png"
    scene().save(path)
    return path


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs `gog-edge` with a scripted runtime in place of a bundle."""
    monkeypatch.setattr(runtime, "open_runtime", lambda folder, threads, choice: playback_runtime(tmp_path))
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def test_ask_json_is_one_object(run, picture):
    done = run("ask", picture, QUESTION, "--json")
    assert done.exit_code == 0, done.output
    value = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert {"answer", "found", "citations", "steps", "timings_ms", "trace"} <= value.keys()
    assert value["answer"] == "The Romanian leu."
    assert 0 <= value["found"] <= 1
    (citation,) = value["citations"]
    assert citation.keys() == {"pack", "article", "section", "paragraph", "text", "image", "licence", "span"}
    gaze, _ = value["steps"]
    assert {"action", "box", "query", "evidence", "ms"} <= gaze.keys()
    box = BOXES["Romania"]
    assert gaze["box"] == [box.x0, box.y0, box.x1, box.y1]
    assert value["trace"] is None


def test_ask_shows_steps_answer_and_source(run, picture):
    done = run("ask", picture, QUESTION)
    assert done.exit_code == 0, done.output
    text = " ".join(done.stdout.split())
    assert "gazes at (400, 60) to (520, 140)" in text
    assert "The Romanian leu." in text
    assert "[1]" in text and "The currency of Romania is the Romanian leu." in text and "CC0" in text


def test_ask_shows_a_passage_without_the_answer_as_related(run, picture, monkeypatch, tmp_path):
    script = [SCRIPT[0], ("", Answer("a sort of money"))]
    monkeypatch.setattr(runtime, "open_runtime",
                        lambda folder, threads, choice: playback_runtime(tmp_path, PlaybackPolicy(script)))
    text = " ".join(run("ask", picture, QUESTION).stdout.split())
    assert "Related: The currency of Romania is the Romanian leu." in text and "[1]" not in text
    value = json.loads(run("ask", picture, QUESTION, "--json").stdout)
    assert value["citations"] == [] and value["related"][0]["article"] == "Romania"


def test_ask_writes_a_trace(run, picture, tmp_path):
    trace = tmp_path / "traces" / "one.json"
    value = json.loads(run("ask", picture, QUESTION, "--json", "--trace", trace).stdout)
    assert value["trace"] == str(trace)
    assert read_trace(trace)["question"] == QUESTION


def test_workflow(run, picture):
    value = json.loads(run("ask", picture, QUESTION, "--json", "--workflow", "direct").stdout)
    assert [step["action"] for step in value["steps"]] == ["answer"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["missing.png", "Which?"], 1, "missing.png"),
        (["{picture}", ""], 2, "question is empty"),
        (["{picture}", "Which?", "--workflow", "hasty"], 2, "hasty"),
        (["{text}", "Which?"], 1, "JPEG"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--json"]], ids=["plain", "json"])
def test_errors_are_one_line_and_usage_exits_with_2(run, picture, tmp_path, words, code, said, more):
    text = tmp_path / "a.txt"
    text.write_text("hello")
    done = run("ask", *(word.format(picture=picture, text=text) for word in words), *more)
    assert done.exit_code == code
    assert done.stdout == ""
    assert said in done.stderr and done.stderr.count("\n") == 1


def test_missing_bundle(picture, tmp_path):
    done = CliRunner().invoke(app, ["ask", str(picture), "Which?", "--bundle", str(tmp_path / "none")])
    assert done.exit_code == 1
    assert "bundle.toml" in done.stderr


@pytest.mark.parametrize(("words", "code", "says"), [
    (["--engine", "cuda"], 2, "must be one of ort, ort-cuda, tensorrt, tensorrt-rtx"),
    (["--engines", "somewhere"], 2, "name the engine that they were built for"),
    (["--engine", "tensorrt-rtx", "--engines", "nowhere"], 1, "no engines in 'nowhere'; build them: gog-edge export "),
])
def test_engines_that_cannot_be_had_are_one_line(picture, words, code, says):
    done = CliRunner().invoke(app, ["ask", str(picture), "Which?", *words])
    assert done.exit_code == code and done.stdout == ""
    assert says in done.stderr and done.stderr.count("\n") == 1


def test_serve_refuses_with_exit_code_1(tmp_path):
    done = CliRunner().invoke(app, ["serve", "--port", "0", "--bundle", str(tmp_path)])
    assert done.exit_code == 1
    assert "bundle.toml" in done.stderr


def test_help_loads_nothing_heavy():
    code = ("import sys; from typer.testing import CliRunner; from gog_edge.cli import app; "
            "result = CliRunner().invoke(app, ['--help']); assert 'serve' in result.output, result.output; "
            "print(sys.modules.keys() & {'numpy', 'PIL', 'fastapi', 'uvicorn', 'onnxruntime', 'faiss'})")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "set()", done.stderr
