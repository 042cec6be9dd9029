"""The demo bundle as people start it: `python -m gog_edge.serve` answers the questions about its samples."""

import json
import signal
import subprocess
import sys

import httpx
import pytest

from gog_edge.bundle import DEFAULT_BUNDLE, open_bundle

SAMPLES = open_bundle(DEFAULT_BUNDLE).samples
# Questions that the shipped policy answers wrongly. Each is a strict xfail: remove it when the policy is trained again.
WRONG = {("pair.jpg", 0): "the policy answers Doha instead of Riga"}


def questions():
    for sample in SAMPLES:
        for number, (question, accepted) in enumerate(zip(sample.questions, sample.expected, strict=True)):
            wrong = WRONG.get((sample.picture.name, number))
            marks = pytest.mark.xfail(strict=True, reason=wrong) if wrong else ()
            yield pytest.param(sample.picture.name, question, accepted, marks=marks)


@pytest.fixture(scope="module")
def url():
    """The address of a server in a process of its own, which must stop when it is told to."""
    command = [sys.executable, "-m", "gog_edge.serve", "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            assert "http://127.0.0.1:" in line, line
            yield next(word for word in line.split() if word.startswith("http://"))
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) in (0, -signal.SIGTERM)
            assert process.stdout.read() == ""  # one line only
        finally:
            process.kill()


@pytest.fixture(scope="module")
def client(url):
    with httpx.Client(base_url=url, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def ask(client):
    """Asks each question once."""
    answers = {}

    def answer(picture, question):
        if (picture, question) not in answers:
            reply = client.post("/v1/ask", json={"sample": picture, "question": question})
            assert reply.status_code == 200, reply.text
            answers[picture, question] = reply.json()
        return answers[picture, question]

    return answer


@pytest.mark.parametrize(("picture", "question", "accepted"), [*questions()])
def test_sample_questions_have_the_expected_answer(ask, picture, question, accepted):
    assert ask(picture, question)["answer"] in accepted


@pytest.mark.parametrize(("picture", "question"), [case.values[:2] for case in questions()])
def test_citations_contain_the_answer_and_show_an_image(client, ask, picture, question):
    record = ask(picture, question)
    for citation in record["citations"]:
        assert record["answer"] and record["answer"] in citation["text"]
    assert not (record["citations"] and record["related"])
    for passage in (*record["citations"], *record["related"]):
        assert passage["licence"]
        if passage["image"] is not None:
            stored = client.get(f"/v1/images/{passage['image']['pack']}/{passage['image']['image']}")
            assert stored.status_code == 200 and stored.headers["content-type"].startswith("image/")


def test_every_sample_has_an_answer_with_citations(ask):
    cited = {case.values[0] for case in questions() if ask(*case.values[:2])["citations"]}
    assert cited == {sample.picture.name for sample in SAMPLES}


def test_a_flag_that_is_not_in_the_pack_has_no_sources(ask):
    (sample,) = (sample for sample in SAMPLES if ("not in my snapshot",) in sample.expected)
    record = ask(sample.picture.name, sample.questions[sample.expected.index(("not in my snapshot",))])
    assert record["citations"] == record["related"] == [] and record["found"] < 0.5


def test_the_answer_about_a_flag_is_cited_from_the_article_that_it_found(ask):
    sample = SAMPLES[0]
    record = ask(sample.picture.name, sample.questions[0])
    (gaze, _) = record["steps"]
    assert gaze["action"] == "gaze_search" and gaze["evidence"][0]["titles"] == ["Finland"]
    assert {citation["article"] for citation in record["citations"]} == {"Finland"}


def test_events_contain_the_boxes_of_gazes(client):
    body = {"sample": SAMPLES[0].picture.name, "question": SAMPLES[0].questions[0]}
    text = client.post("/v1/ask", json=body, headers={"Accept": "text/event-stream"}).text
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]
    assert [events[0]["kind"], events[-1]["kind"]] == ["started", "answered"]
    width, height = events[0]["size"]
    boxes = [event["box"] for event in events if event["kind"] == "acted" and event["action"] == "gaze_search"]
    assert boxes
    for x0, y0, x1, y1 in boxes:
        assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
    assert events[-1]["answer"] == SAMPLES[0].expected[0][0]


def test_the_command_line_gives_the_same_answer(ask):
    sample = SAMPLES[0]
    command = [sys.executable, "-m", "gog_edge.cli", "ask", str(sample.picture), sample.questions[0], "--json",
               "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    record, served = json.loads(done.stdout), ask(sample.picture.name, sample.questions[0])
    assert (record["answer"], record["citations"]) == (served["answer"], served["citations"])
