"""POST /v1/ask over real HTTP: answers, events, and invalid requests."""

import base64
import json
import socket
import struct
import threading
import time
import zlib
from pathlib import Path

import httpx
import pytest
from playback import BOXES, QUESTION, SCRIPT, PlaybackPolicy, png, scene

from gog_edge.agent.trace import TraceFolder, read_trace
from gog_edge.errors import BackendError
from gog_edge.types import Answer

EVENTS = {"Accept": "text/event-stream"}
WAIT = 60  # seconds; generous, for machines that are busy


def ask_sample(client, **more):
    return client.post("/v1/ask", json={"sample": "three flags.png", "question": QUESTION, **more})


def test_each_episode_writes_a_trace_if_a_folder_is_given(start, make_runtime, tmp_path):
    folder = TraceFolder(tmp_path / "traces")
    with httpx.Client(base_url=start(make_runtime(), traces=folder), timeout=60) as client:
        bodies = [ask_sample(client).json() for _ in range(2)]
    for body in bodies:
        trace = read_trace(Path(body["trace"]))
        assert trace["question"] == QUESTION and trace["record"]["answer"] == body["answer"]
    assert len(list(folder.path.iterdir())) == 2


def read_events(response) -> list[tuple[str, dict]]:
    blocks = [block.splitlines() for block in response.text.split("\n\n") if block]
    return [(kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for kind, data in blocks]


def check_answer(body: dict) -> None:
    assert body["answer"] == "The Romanian leu."
    assert body["found"] == pytest.approx(0.97)
    (citation,) = body["citations"]
    assert citation["article"] == "Romania"
    assert citation["text"] == "The currency of Romania is the Romanian leu."
    assert citation["image"]["image"] == 2
    gaze, answer = body["steps"]
    assert gaze["action"] == "gaze_search"
    box = BOXES["Romania"]
    assert gaze["box"] == pytest.approx([box.x0, box.y0, box.x1, box.y1])
    assert gaze["evidence"][0]["titles"] == ["Romania"]
    assert answer["action"] == "answer"
    assert body["timings_ms"]["total"] > 0


def check_error(response, status: int, kind: str, *words: str) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"type", "message"}
    assert error["type"] == kind
    for word in words:
        assert word in error["message"]


# --- answers ------------------------------------------------------------------------------------


def test_sample_as_json(client):
    response = ask_sample(client)
    assert response.status_code == 200
    check_answer(response.json())


def test_multipart(client, scene_png):
    form = {"files": {"picture": ("a.png", scene_png)}, "data": {"question": QUESTION}}
    response = client.post("/v1/ask", **form)
    assert response.status_code == 200, response.text
    check_answer(response.json())


@pytest.mark.parametrize("head", ["", "data:image/png;base64,"])
def test_base64(client, scene_png, head):
    picture = head + base64.b64encode(scene_png).decode()
    response = client.post("/v1/ask", json={"picture": picture, "question": QUESTION})
    assert response.status_code == 200, response.text
    check_answer(response.json())


def test_events_in_order(client):
    got = client.post("/v1/ask", json={"sample": "three flags.png", "question": QUESTION}, headers=EVENTS)
    assert got.headers["content-type"].startswith("text/event-stream")
    assert got.headers["cache-control"] == "no-store"
    events = read_events(got)
    kinds = [kind for kind, _ in events]
    assert kinds[0] == "started" and kinds[-1] == "answered"
    assert [kind for kind in kinds if kind != "spoke"] == ["started", "acted", "found", "acted", "answered"]
    generated = "".join(data["text"] for kind, data in events if kind == "spoke" and data["step"] == 0)
    assert generated.strip() == SCRIPT[0][0]
    assert all(data["kind"] == kind for kind, data in events)
    check_answer(events[-1][1])


def test_unicode_line_ends_in_events_are_escaped(start, make_runtime):
    text = "one\u2028two\u2029three\x85four"
    url = start(make_runtime(PlaybackPolicy([(text, Answer(text))])))
    response = httpx.post(url + "/v1/ask", json={"sample": "three flags.png", "question": QUESTION}, headers=EVENTS,
                          timeout=WAIT)
    content = response.content.decode()
    assert len(content.splitlines()) == content.count("\n") and "\\u2028" in content
    assert read_events(response)[-1][1]["answer"] == text


def test_events_are_sent_while_the_policy_is_generating(start, make_runtime):
    gate = threading.Event()
    url = start(make_runtime(PlaybackPolicy(gate=gate)))
    body = {"sample": "three flags.png", "question": QUESTION}
    with httpx.stream("POST", url + "/v1/ask", json=body, headers=EVENTS, timeout=WAIT) as response:
        pieces = response.iter_text()
        assert "event: started" in next(pieces)
        assert not gate.is_set()  # the first turn has not begun
        gate.set()
        assert "event: answered" in "".join(pieces)


def test_workflow_and_budget_reach_the_loop(client):
    whole = ask_sample(client, workflow="full_image", budget={"turns": 1}).json()
    assert [step["action"] for step in whole["steps"]][:1] == ["image_search"]
    assert whole["ended"] == "turns"
    direct = ask_sample(client, workflow="direct").json()
    assert direct["answer"] == "I cannot tell."
    assert direct["citations"] == direct["related"] == []


@pytest.mark.parametrize("workflow", [None, "", "gog"])
def test_the_default_workflow_may_be_null_or_empty(client, workflow):
    answers = (ask_sample(client, workflow=workflow).json(), ask_sample(client).json())
    given, default = ([step["action"] for step in answer["steps"]] for answer in answers)
    assert given == default == ["gaze_search", "answer"]


# --- wrong input --------------------------------------------------------------------------------


def test_not_a_picture(client):
    response = client.post("/v1/ask", files={"picture": ("a.png", b"hello")}, data={"question": "What is it?"})
    check_error(response, 400, "PictureError", "JPEG")


def test_truncated_picture(client, scene_png):
    files = {"picture": ("a.png", scene_png[: len(scene_png) // 2])}
    check_error(client.post("/v1/ask", files=files, data={"question": "What is it?"}), 400, "PictureError")


def test_picture_bomb(client):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    response = client.post("/v1/ask", files={"picture": ("a.png", bomb)}, data={"question": "What is it?"})
    check_error(response, 400, "PictureError", "60000 x 60000")


def test_invalid_input_has_its_status_also_for_event_streams(client):
    response = client.post("/v1/ask", json={"picture": "aGVsbG8=", "question": "What is it?"}, headers=EVENTS)
    check_error(response, 400, "PictureError")


@pytest.mark.parametrize("question", ["", "   \n ", "x" * 2001, "a\x00b"], ids=["empty", "blank", "long", "control"])
def test_invalid_questions(client, question):
    response = client.post("/v1/ask", json={"sample": "three flags.png", "question": question})
    check_error(response, 400, "QuestionError")


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        (b'{"sample": "\\ud800", "question": "what?"}', 404, "NotFound"),
        (b'{"sample": "three flags.png", "question": "what?", "\\ud800": 1}', 422, "RequestError"),
    ],
)
def test_a_lone_surrogate_in_a_name_is_escaped_in_the_error(client, body, status, kind):
    reply = client.post("/v1/ask", content=body, headers={"content-type": "application/json"})
    check_error(reply, status, kind, "\\ud800")


def test_lone_surrogate(client):
    body = b'{"sample": "three flags.png", "question": "what \\ud800?"}'
    response = client.post("/v1/ask", content=body, headers={"Content-Type": "application/json"})
    check_error(response, 400, "QuestionError")


def test_question_that_is_not_utf8(client, scene_png):
    response = client.post("/v1/ask", files={"picture": ("a.png", scene_png), "question": (None, b"caf\xe9?")})
    check_error(response, 400, "QuestionError", "UTF-8")


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "a list"),
        (b'{"sample": "a", "question": "a?", "budget": 3}', "'budget' must be an object, got a number"),
        (b'{"sample": "a", "question": null}', "'question' must be a valid string, got None"),
        (b'{"question": "a?"}', "neither"),
        (b'{"sample": "a", "picture": "", "question": "a?"}', "both"),
        (b'{"sample": 3, "question": "a?"}', "'sample'"),
        (b'{"sample": "a", "question": ["a?"]}', "'question'"),
        (b'{"sample": "a", "question": "a?", "colour": 1}', "'colour'"),
        (b'{"sample": "a", "question": "a?", "workflow": "hasty"}', "full_image"),
        (b'{"sample": "a", "question": "a?", "workflow": false}', "'workflow' must be "),
        (b'{"sample": "a", "question": "a?", "workflow": 0}', "'workflow' must be "),
        (b'{"sample": "a", "question": "a?", "workflow": []}', "'workflow' must be "),
        (b'{"sample": "a", "question": "a?", "workflow": {}}', "'workflow' must be "),
        (b'{"picture": 5, "question": "a?"}', "'picture' must be a base64 string or a data URI, got 5"),
        (b'{"picture": ["a"], "question": "a?"}', "'picture' must be a base64 string or a data URI, got ['a']"),
        (b'{"sample": "a", "question": "a?", "budget": {"turns": 1000}}', "'budget.turns' must be between 1 and 6"),
        (b'{"sample": "a", "question": "a?", "budget": {"turns": true}}', "'budget.turns' must be a valid integer"),
        (b'{"sample": "a", "question": "a?", "budget": {"euros": 1}}', "'euros'"),
    ],
)
def test_invalid_bodies(client, body, word):
    response = client.post("/v1/ask", content=body, headers={"Content-Type": "application/json"})
    check_error(response, 422, "RequestError", word)


def test_other_content_types(client):
    response = client.post("/v1/ask", content=b"question=a", headers={"Content-Type": "text/plain"})
    check_error(response, 422, "RequestError", "application/json")
    response = client.post("/v1/ask", content=b"nothing", headers={"Content-Type": "multipart/form-data; boundary=x"})
    check_error(response, 422, "RequestError")


def test_picture_that_is_not_base64(client):
    check_error(client.post("/v1/ask", json={"picture": "héhé", "question": "a?"}), 400, "PictureError", "base64")
    body = {"picture": "http://elsewhere/a.png,b", "question": "a?"}
    check_error(client.post("/v1/ask", json=body), 400, "PictureError", "data URI")


def test_unknown_sample(client):
    response = client.post("/v1/ask", json={"sample": "../bundle.toml", "question": "a?"})
    check_error(response, 404, "NotFound", "/v1/samples")


def test_huge_body_is_refused_before_it_is_read(start, make_runtime):
    url = start(make_runtime(picture_bytes=10_000))
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=WAIT) as wire:
        wire.sendall(f"POST /v1/ask HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
                     f"Content-Length: {10**12}\r\n\r\n{{".encode())
        assert b"413" in wire.recv(4096).splitlines()[0]


def test_huge_body_of_unknown_length(start, make_runtime):
    url = start(make_runtime(picture_bytes=10_000))
    pieces = (b"x" * 10_000 for _ in range(20))
    headers = {"Content-Type": "application/json"}
    response = httpx.post(url + "/v1/ask", content=pieces, headers=headers, timeout=WAIT)
    check_error(response, 413, "TooLarge", "10000")


def test_picture_above_the_limit(start, make_runtime):
    url = start(make_runtime(picture_bytes=200))
    files = {"picture": ("a.png", png(scene()))}
    response = httpx.post(url + "/v1/ask", files=files, data={"question": "a?"}, timeout=WAIT)
    check_error(response, 400, "PictureError", "200")


# --- concurrent questions, clients that disconnect, errors ---------------------------------------------------------


def wait_for(condition) -> None:
    until = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < until, "timeout"
        time.sleep(0.01)


def test_questions_beyond_the_queue_are_refused(start, make_runtime):
    gate = threading.Event()
    policy = PlaybackPolicy(gate=gate)
    url = start(make_runtime(policy, concurrent=1), waiting=1)
    answers = []
    with httpx.Client(base_url=url, timeout=WAIT) as client:
        threads = [threading.Thread(target=lambda: answers.append(ask_sample(client))) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_for(lambda: client.get("/readyz").status_code == 503)
        wait_for(lambda: policy.opened)  # a job counts as admitted before its worker opens the conversation
        assert len(policy.opened) == 1  # the other one waits
        refused = ask_sample(client)
        check_error(refused, 503, "Busy", "2 questions")
        assert int(refused.headers["retry-after"]) > 0
        assert client.get("/healthz").status_code == 200
        gate.set()
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200, 200]
        wait_for(lambda: client.get("/readyz").status_code == 200)
        assert 'outcome="busy"} 1' in client.get("/metrics").text


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
def test_a_client_that_disconnects_stops_its_episode(start, make_runtime, accept):
    policy = PlaybackPolicy(script=[("word " * 10_000, SCRIPT[0][1])], pause_s=0.01)
    url = start(make_runtime(policy))
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"sample": "three flags.png", "question": QUESTION})
    with socket.create_connection((host, int(port)), timeout=WAIT) as wire:
        wire.sendall(f"POST /v1/ask HTTP/1.1\r\nHost: {host}\r\nAccept: {accept}\r\nContent-Type: application/json\r\n"
                     f"Content-Length: {len(body)}\r\n\r\n{body}".encode())
        wait_for(lambda: policy.opened)
        assert not policy.opened[0].closed.is_set()
    assert policy.opened[0].closed.wait(WAIT)
    wait_for(lambda: 'outcome="stopped"} 1' in httpx.get(url + "/metrics", timeout=WAIT).text)


def test_internal_errors_have_no_details(start, make_runtime):
    url = start(make_runtime(PlaybackPolicy(fault=RuntimeError("secret path"))))
    with httpx.Client(base_url=url, timeout=WAIT) as client:
        response = ask_sample(client)
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "InternalError"
        assert "secret" not in response.text and "Traceback" not in response.text
        assert response.headers["connection"] == "close"  # otherwise the next request would use a closed connection
        assert 'outcome="failed"} 1' in client.get("/metrics").text
        assert ask_sample(client).status_code == 500  # the worker is free again


def test_error_after_the_first_event_ends_the_stream(start, make_runtime):
    body = {"sample": "three flags.png", "question": QUESTION}
    url = start(make_runtime(PlaybackPolicy(fault=BackendError("the engine is gone; restart"))))
    (first, _), (kind, data) = read_events(httpx.post(url + "/v1/ask", json=body, headers=EVENTS, timeout=WAIT))
    assert [first, kind] == ["started", "error"]
    assert data == {"error": {"type": "BackendError", "message": "the engine is gone; restart"}}


def test_an_internal_error_after_the_first_event_is_an_event(start, make_runtime, caplog):
    body = {"sample": "three flags.png", "question": QUESTION}
    url = start(make_runtime(PlaybackPolicy(fault=RuntimeError("secret path"))))
    (first, _), (kind, data) = read_events(httpx.post(url + "/v1/ask", json=body, headers=EVENTS, timeout=WAIT))
    assert [first, kind, data["error"]["type"]] == ["started", "error", "InternalError"]
    assert "secret" not in str(data) and "secret path" in caplog.text
    assert 'outcome="failed"} 1' in httpx.get(url + "/metrics", timeout=WAIT).text
