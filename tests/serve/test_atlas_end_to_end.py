"""The atlas as people start it: `python -m gog_edge.serve`, a question about a sample, an answer with its source."""

import json
import signal
import subprocess
import sys

import httpx
import pytest

from gog_edge.bundle import DEFAULT_BUNDLE

pytestmark = pytest.mark.skipif(not (DEFAULT_BUNDLE / "bundle.toml").is_file(), reason="the atlas is not built yet")


@pytest.fixture(scope="module")
def served():
    """Address of a server in its own process; afterwards it must stop when told to."""
    command = [sys.executable, "-m", "gog_edge.serve", "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            assert "http://127.0.0.1:" in line, line
            yield next(word for word in line.split() if word.startswith("http://"))
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) in (0, -signal.SIGTERM)
            assert process.stdout.read() == ""  # one line, no more
        finally:
            process.kill()


def test_sample_questions_are_answered_with_sources(served):
    with httpx.Client(base_url=served, timeout=120) as client:
        samples = client.get("/v1/samples").json()["samples"]
        assert samples
        cited = 0
        for sample in samples[:3]:
            body = {"sample": sample["name"], "question": sample["questions"][0]}
            answer = client.post("/v1/ask", json=body).json()
            assert answer["answer"], answer
            for citation in answer["citations"]:
                cited += 1
                assert citation["text"] and citation["licence"]
                image = citation["image"]
                if image is not None:
                    stored = client.get(f"/v1/images/{image['pack']}/{image['image']}")
                    assert stored.status_code == 200 and stored.headers["content-type"].startswith("image/")
        assert cited


def test_events_tell_where_it_gazed(served):
    with httpx.Client(base_url=served, timeout=120) as client:
        sample = client.get("/v1/samples").json()["samples"][0]
        body = {"sample": sample["name"], "question": sample["questions"][0]}
        text = client.post("/v1/ask", json=body, headers={"Accept": "text/event-stream"}).text
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]
    assert [events[0]["kind"], events[-1]["kind"]] == ["started", "answered"]
    width, height = events[0]["size"]
    boxes = [event["box"] for event in events if event["kind"] == "acted" and event["action"] == "gaze_search"]
    assert boxes
    for x0, y0, x1, y1 in boxes:
        assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height


def test_command_line_answers_too(served):
    sample = json.loads((DEFAULT_BUNDLE / "samples" / "samples.json").read_text())[0]
    command = [sys.executable, "-m", "gog_edge.cli", "ask", str(DEFAULT_BUNDLE / "samples" / sample["picture"]),
               sample["questions"][0], "--json", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["answer"]
