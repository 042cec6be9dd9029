"""A policy behind an OpenAI-compatible server says what it says on this box; what fails is told."""

import asyncio
import base64
import json
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from chat_server import ChatServer, delta, event
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from loopback import serving

from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.config import Budget, RemoteConfig
from gog_edge.errors import BackendError, BudgetExceeded, DialectError, GogEdgeError, PictureError
from gog_edge.picture import Picture, decode_picture
from gog_edge.policy.dialect.loader import load_dialect
from gog_edge.policy.local import LocalPolicy
from gog_edge.policy.manifest import DIALECT
from gog_edge.policy.remote import RemotePolicy, data_uri
from gog_edge.runtime import open_runtime
from gog_edge.types import Answer, Box, Evidence, GazeSearch, Observation, SearchResult, TextSearch

QUESTION = "Which country's flag is the second from the left?"
BUDGETS = {"min_pixels": 3136, "max_pixels": 78_400, "crop_max_pixels": 12_544}  # as tiny_policy has them


def picture(seed=0, height=200, width=260):
    return Picture(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def found(crop=None):
    return Observation(result=SearchResult((Evidence(("Peru",), (), None, 0.9),), 0.8), crop=crop)


def open_remote(url, **settings):
    return RemotePolicy.open(RemoteConfig(**{"url": f"{url}/v1", "model": "tiny", "dialect": "gog", **settings}))


def generate(conversation, **options):
    return conversation.generate(**{"max_tokens": 8, "deadline": None, **options})


# --- the same words as on this box ---------------------------------------------------------------


def free(policy):
    """The same policy held to no grammar, as the server's is."""
    return LocalPolicy(policy.model, policy.dialect, policy.sampling, grammar=False)


@pytest.fixture(scope="module")
def local(policies):
    return free(LocalPolicy.open(policies[True], 1))


@pytest.fixture(scope="module")
def dialect(policies):
    return policies[True] / DIALECT


def talk(policy):
    """Two turns, the second forced; what was said and what was heard of it."""
    pieces, conversation = [], policy.begin(picture(), QUESTION)
    first = generate(conversation, on_text=pieces.append)
    conversation.observe(found(picture(1, 80, 120).pixels))
    conversation.observe(Observation(notice="action_refused", detail="that was all"))
    second = generate(conversation, on_text=pieces.append, force_answer=True)
    conversation.close()
    assert "".join(pieces) == first.text + second.text
    return [(said.text, said.action, said.malformed, said.new_tokens) for said in (first, second)]


@pytest.mark.parametrize("continues", ["vllm", "llamacpp"])
def test_it_says_the_same_as_on_this_box(local, dialect, continues):
    server = ChatServer(local, continues)
    with serving(server.app()) as url:
        remote = talk(open_remote(url, dialect=dialect, continues=continues, **BUDGETS))
    assert remote == talk(local)
    assert remote[1][0].startswith("<answer>")


def test_later_turns_send_what_was_sent_unchanged(local, dialect):
    server = ChatServer(local)
    with serving(server.app()) as url:
        talk(open_remote(url, dialect=dialect, continues="vllm", **BUDGETS))
    first, second = server.bodies
    sent = first[: first.index(b'], "model"')]
    assert sent.startswith(b'{"messages": [') and second.startswith(sent + b", ")


def test_an_answer_can_be_asked_for_where_none_can_be_begun(local, dialect):
    server = ChatServer(local)
    with serving(server.app()) as url:
        policy = open_remote(url, dialect=dialect, continues="none", **BUDGETS)
        conversation = policy.begin(picture(), QUESTION)
        generate(conversation)
        conversation.observe(found())
        conversation.observe(Observation(notice=policy.rules.last_notice, detail="nothing more can be searched"))
        generate(conversation, force_answer=True)
    body = json.loads(server.bodies[-1])
    assert "continue_final_message" not in body
    assert [message["role"] for message in body["messages"]] == ["system", "user", "assistant", "user"]
    asked = body["messages"][-1]["content"][-1]["text"]
    assert asked == policy.dialect.notices["action_refused"].replace("{detail}", "nothing more can be searched")


@pytest.mark.parametrize(
    ("dialect", "continues", "notice"),
    [("gog", "none", "action_refused"), ("gog", "vllm", ""), ("mmsearch_r1", "none", "give_up"),
     ("mmsearch_r1", "vllm", "give_up")],
)
def test_the_loop_is_to_ask_for_an_answer_where_none_can_be_begun(dialect, continues, notice):
    rules = open_remote("http://127.0.0.1:9", dialect=dialect, continues=continues).rules
    assert rules == replace(load_dialect(dialect).loop_rules, last_notice=notice)


def test_a_picture_is_sent_as_the_server_will_see_it(local):
    given = picture(0, 900, 1400)
    server = ChatServer(local)
    with serving(server.app()) as url:
        generate(open_remote(url, **BUDGETS).begin(given, QUESTION), max_tokens=1)
        generate(open_remote(url, picture="jpeg", **BUDGETS).begin(given, QUESTION), max_tokens=1)
    for body, kind in zip(server.bodies, ("png", "jpeg"), strict=True):
        image, text = json.loads(body)["messages"][1]["content"]
        assert image["image_url"]["url"].startswith(f"data:image/{kind};base64,")
        assert text == {"type": "text", "text": QUESTION}
    image, _ = json.loads(server.bodies[0])["messages"][1]["content"]
    sent = decode_picture(base64.b64decode(image["image_url"]["url"].partition(",")[2]))
    assert sent.size == local.model.vision.resized(given.size)


def answered(runtime, sample):
    *_, last = runtime.ask(sample.picture.read_bytes(), sample.questions[0], budget=Budget(deadline_ms=600_000))
    return [(step.action, step.box, step.query, step.result) for step in last.record.steps], last.record.answer


def test_a_bundle_whose_policy_is_remote_answers_as_the_atlas(tmp_path):
    atlas = open_runtime(DEFAULT_BUNDLE, threads=1)
    atlas = replace(atlas, policy=free(atlas.policy))
    vision = atlas.policy.model.manifest.vision
    for part in ("encoder", "packs"):
        shutil.copytree(DEFAULT_BUNDLE / part, tmp_path / part)
    shutil.copy(DEFAULT_BUNDLE / "policy" / DIALECT, tmp_path / "spoken.toml")
    server = ChatServer(atlas.policy)
    with serving(server.app()) as url:
        (tmp_path / "bundle.toml").write_text(f"""
schema = 1
name = "remote atlas"
encoder = {{ path = "encoder" }}
packs = [{{ path = "packs/atlas" }}]
[policy]
url = "{url}/v1"
model = "tiny"
dialect = "spoken.toml"
continues = "vllm"
factor = {vision.factor}
min_pixels = {vision.min_pixels}
max_pixels = {vision.max_pixels}
crop_max_pixels = {vision.crop_max_pixels}
""")
        runtime = open_runtime(tmp_path, threads=1)
        assert runtime.policy.name == "tiny" and server.bodies == []
        for sample in atlas.samples:
            assert answered(runtime, sample) == answered(atlas, sample)
    assert len(server.bodies) > len(atlas.samples)


# --- a server that plays a part -------------------------------------------------------------------


class Part:
    """Streams what it is told; the path of a request names what it does."""

    def __init__(self):
        self.requests = []

    def app(self):
        app = FastAPI()
        app.add_api_route("/{kind}/v1/chat/completions", self.complete, methods=["POST"])
        return app

    async def complete(self, kind: str, request: Request):
        self.requests.append((request.headers, await request.json()))
        return getattr(self, kind)(len(self.requests))

    def stream(self, *events):
        async def pieces():
            for item in events:
                if isinstance(item, float):
                    await asyncio.sleep(item)
                elif isinstance(item, Exception):
                    raise item
                else:
                    yield item

        return StreamingResponse(pieces(), media_type="text/event-stream")

    def says(self, *texts):
        return self.stream(*(delta(content=text) for text in texts), delta(finish="stop"), event("[DONE]"))

    def answers(self, attempt):
        return self.says("<ans", "wer>Pe", "ru</answer>")

    def looks(self, attempt):
        return self.says("<img_search>[1, 2, 30, 40]", "</img_search>", " and so on", "<answer>no</answer>")

    def zooms(self, attempt):
        call = {"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [0, 0, 500, 500], "img_idx": attempt - 1}}
        return self.says(f"<tool_call>\n{json.dumps(call)}\n</tool_call>")

    def searches(self, attempt):
        return self.says("<text_search>Zürich\u2028\u0085 naïve</text_search>")

    def unescaped(self, attempt):
        chunk = {"choices": [{"delta": {"content": "<answer>a\u2028b\u0085c</answer>"}, "finish_reason": "stop"}]}
        return self.stream(b": hello\r\nevent: message\r\ndata:" + json.dumps(chunk, ensure_ascii=False).encode() +
                           b"\r\n\r\ndata: [DONE]\r\n\r\n")

    def repeats(self, attempt):
        return self.says("<ans", "wer>", "Pe", "ru</answer>")

    def goes_on(self, attempt):
        return self.says("<", "b>Peru</b></answer>")

    def says_little(self, attempt):
        return self.says("<an")

    def thinks(self, attempt):
        thoughts = [delta(reasoning_content="I could say <answer>no</answer>"), delta(reasoning_content=", hm")]
        return self.stream(*thoughts, delta(content="<answer>yes</answer>"), delta(finish="stop"), event("[DONE]"))

    def thinks_on(self, attempt):
        return self.stream(delta(reasoning="<answer>no</answer>"), delta(finish="length"), event("[DONE]"))

    def counts(self, attempt):
        usage = {"prompt_tokens": 900, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 850}}
        return self.stream(delta(content="<answer>Peru</answer>"), delta(finish="stop"),
                           event({"choices": [], "usage": usage}), event("[DONE]"))

    def breaks(self, attempt):
        return JSONResponse({"error": {"message": "out of memory", "type": "server_error"}}, 500)

    def forbids(self, attempt):
        return JSONResponse({"detail": "no such key"}, 401)

    def moved(self, attempt):
        return JSONResponse(None, 307, headers={"Location": "http://example.invalid/"})

    def full(self, attempt):
        if attempt != 2:
            return self.answers(attempt)
        words = "This model's maximum context length is 900 tokens. However, you requested 950."
        return JSONResponse({"object": "error", "message": words}, 400)

    def always_full(self, attempt):
        return JSONResponse({"error": {"type": "exceed_context_size_error", "message": "too long"}}, 400)

    def busy_once(self, attempt):
        return self.answers(attempt) if attempt > 1 else JSONResponse({"error": "loading"}, 503)

    def busy(self, attempt):
        return JSONResponse({"error": {"message": "loading model"}}, 503, headers={"Retry-After": "0"})

    def silent(self, attempt):
        return self.stream(60.0)

    def stalls(self, attempt):
        return self.stream(delta(content="<answer>Per"), 60.0)

    def cut(self, attempt):
        return self.stream(delta(content="<answer>Per"), OSError("the plug was pulled"))

    def cut_once(self, attempt):
        return self.answers(attempt) if attempt > 1 else self.stream(delta(role="assistant"), OSError("pulled"))

    def ends(self, attempt):
        return self.stream(delta(content="<answer>Per"))

    def fails_within(self, attempt):
        return self.stream(delta(content="<answer>Per"), event({"error": {"message": "the engine died", "code": 500}}))

    def page(self, attempt):
        return HTMLResponse("<html><body>Welcome</body></html>")

    def no_json(self, attempt):
        return self.stream("data: {not json\n\n")

    def no_chunk(self, attempt):
        return self.stream("data: [1, 2]\n\n")

    def no_text(self, attempt):
        return self.stream(delta(content=["<answer>"]))

    def deep(self, attempt):
        return self.stream("data: " + "[" * 200_000 + "\n")

    def packed(self, attempt):
        part = self.stream(delta(content="<answer>Per"), b"no gzip")
        part.headers["Content-Encoding"] = "gzip"
        return part

    def endless(self, attempt):
        return self.stream("data: " + "x" * (3 * 2**20))


@pytest.fixture
def part():
    return Part()


@pytest.fixture
def begin(part):
    """Opens a conversation with a server that plays one part."""
    with serving(part.app()) as url:

        def open_one(kind, **settings):
            return open_remote(f"{url}/{kind}", **settings).begin(picture(), QUESTION)

        yield open_one


def test_a_turn_is_told_as_it_comes(begin):
    pieces = []
    said = generate(begin("answers"), on_text=pieces.append)
    assert pieces == ["<ans", "wer>Pe", "ru</answer>"]
    assert (said.text, said.action, said.malformed) == ("<answer>Peru</answer>", Answer("Peru"), "")
    assert said.new_tokens == 3 and said.prefill_ms > 0


def test_an_action_is_told_once_and_before_the_turn_is_over(begin):
    heard = []
    said = generate(begin("looks"), on_text=heard.append, on_action=heard.append)
    assert [type(item) for item in heard] == [str, str, GazeSearch, str, str]
    assert said.action == heard[2]


def test_boxes_are_of_the_picture_that_was_sent(begin):
    conversation = begin("looks", factor=28, max_pixels=28 * 28 * 35)  # 260 x 200 is sent as 168 x 140
    assert generate(conversation).action == GazeSearch(Box(260 / 168, 2 * 200 / 140, 30 * 260 / 168, 40 * 200 / 140))


def test_boxes_may_lie_on_a_crop_where_the_dialect_says_so(begin):
    conversation = begin("zooms", dialect="qwen_agent", **BUDGETS)
    generate(conversation)
    crop = Box(100, 50, 160, 130)
    conversation.observe(replace(found(picture(1, 80, 60).pixels), crop_box=crop))
    assert generate(conversation).action == GazeSearch(Box(100, 50, 130, 90))


def test_words_of_all_languages_arrive_whole(begin):
    assert generate(begin("searches")).action == TextSearch("Zürich\u2028\u0085 naïve")
    assert generate(begin("unescaped")).action == Answer("a\u2028b\u0085c")


@pytest.mark.parametrize(
    ("kind", "pieces"),
    [("repeats", ["<answer>", "Pe", "ru</answer>"]), ("goes_on", ["<answer>", "<b>Peru</b></answer>"]),
     ("says_little", ["<answer>", "<an"])],
)
def test_an_opening_that_is_said_again_is_told_once(begin, part, kind, pieces):
    told = []
    said = generate(begin(kind, continues="llamacpp"), force_answer=True, on_text=told.append)
    assert told == pieces and said.text == "".join(pieces)
    assert part.requests[0][1]["messages"][-1] == {"role": "assistant", "content": "<answer>"}


def test_thinking_that_the_server_takes_out_is_told_between_marks(begin, part):
    pieces, conversation = [], begin("thinks")
    said = generate(conversation, on_text=pieces.append)
    assert said.text == "".join(pieces) == "<think>I could say <answer>no</answer>, hm</think><answer>yes</answer>"
    assert said.action == Answer("yes")
    conversation.observe(found())
    generate(conversation)
    assert part.requests[1][1]["messages"][2] == {
        "role": "assistant", "content": "<answer>yes</answer>",
        "reasoning_content": "I could say <answer>no</answer>, hm",
    }


def test_a_turn_that_ends_in_its_thinking_is_no_action(begin):
    said = generate(begin("thinks_on"))
    assert said.action is None and said.text == "<think><answer>no</answer></think>"


def test_the_servers_counts_are_taken(begin):
    said = generate(begin("counts"))
    assert (said.prompt_tokens, said.new_tokens) == (50, 7)


def test_a_request_holds_what_the_bundle_says(begin, part, monkeypatch):
    monkeypatch.setenv("A_KEY", "s3cret")
    settings = {"temperature": 0.7, "top_p": 0.8, "seed": 5, "options": {"chat_template_kwargs": {"thinking": False}}}
    generate(begin("answers", key_env="A_KEY", **settings), max_tokens=11)
    headers, body = part.requests[0]
    assert headers["authorization"] == "Bearer s3cret"
    assert {key: body[key] for key in ("model", "stream", "max_tokens", "temperature", "top_p", "seed")} == {
        "model": "tiny", "stream": True, "max_tokens": 11, "temperature": 0.7, "top_p": 0.8, "seed": 5}
    assert body["chat_template_kwargs"] == {"thinking": False}
    assert body["messages"][0]["content"] == load_dialect("gog").system_prompt


def test_no_key_is_sent_unless_one_is_named(begin, part):
    generate(begin("answers"))
    assert "authorization" not in part.requests[0][0]


def test_a_key_that_is_not_set_is_said(monkeypatch):
    monkeypatch.delenv("A_KEY", raising=False)
    with pytest.raises(BackendError, match="'A_KEY', which is empty or not set"):
        open_remote("http://127.0.0.1:1", key_env="A_KEY")


def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(monkeypatch):
    monkeypatch.setenv("A_KEY", "s3cret\nmore")
    with pytest.raises(BackendError, match="'A_KEY' holds what is no key") as caught:
        open_remote("http://127.0.0.1:1", key_env="A_KEY")
    assert "s3cret" not in str(caught.value)


def test_a_dialect_that_is_not_there_is_said():
    with pytest.raises(DialectError, match="klingon"):
        open_remote("http://127.0.0.1:1", dialect="klingon")


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("breaks", "refused with 500 .*: out of memory"),
        ("forbids", "refused with 401 .*: no such key; 'key_env'"),
        ("moved", "refused with 307"),
        ("unknown", "refused with 500"),
        ("cut", "broke off"),
        ("ends", "ended its stream in the middle"),
        ("fails_within", "said: the engine died"),
        ("page", "no event stream: <html>"),
        ("no_json", "no chat completion: {not json"),
        ("no_chunk", r"no chat completion: \[1, 2\]"),
        ("no_text", "no chat completion"),
        ("deep", "no chat completion"),
        ("endless", "more than 1048576 bytes"),
    ],
)
def test_what_fails_is_told_and_not_tried_again(begin, part, kind, words):
    with pytest.raises(BackendError, match=words) as caught:
        generate(begin(kind))
    assert "127.0.0.1" in str(caught.value)
    assert len(part.requests) == 1


@pytest.mark.parametrize("kind", ["silent", "stalls"])
def test_a_server_that_falls_silent_is_left(begin, part, kind):
    with pytest.raises(BackendError, match="said nothing for 0.3 s"):
        generate(begin(kind, read_s=0.3))
    assert len(part.requests) == 1


@pytest.mark.parametrize("kind", ["busy_once", "cut_once"])
def test_what_may_pass_before_the_first_word_is_tried_again(begin, part, kind):
    assert generate(begin(kind)).action == Answer("Peru")
    first, second = (body for _, body in part.requests)
    assert first == second


def test_trying_again_has_an_end(begin, part):
    with pytest.raises(BackendError, match=r"503 .*: loading model \(2 attempts\)"):
        generate(begin("busy", retries=1))
    assert len(part.requests) == 2


def test_a_stream_that_cannot_be_unpacked_is_told(begin):
    with pytest.raises(BackendError, match="broke off"):
        generate(begin("packed", retries=0))


def test_nobody_waits_for_an_attempt_beyond_the_deadline(begin, part):
    with pytest.raises(BackendError, match="1 attempts"):
        generate(begin("busy", retries=9), deadline=time.monotonic() + 0.4)


def test_a_server_that_is_away_is_said():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    conversation = open_remote(f"http://127.0.0.1:{port}", retries=0).begin(picture(), QUESTION)
    with pytest.raises(BackendError, match=f"{port}/v1 cannot be reached.*'url' in bundle.toml"):
        generate(conversation)


@pytest.mark.parametrize(("kind", "text"), [("stalls", "<answer>Per"), ("silent", "")])
def test_a_deadline_ends_the_turn_with_what_there_is(begin, kind, text):
    said = generate(begin(kind), deadline=time.monotonic() + 0.5)
    assert said.text == text
    assert said.action == (Answer("Per") if text else None)


def test_whoever_listens_can_stop_the_turn(begin):
    def enough(piece):
        raise GogEdgeError("enough")

    with pytest.raises(GogEdgeError, match="enough"):
        generate(begin("stalls"), on_text=enough)


def test_an_error_of_who_listens_stays_that_error(begin):
    def late(piece):
        raise TimeoutError("of the listener")

    with pytest.raises(TimeoutError, match="of the listener"):
        generate(begin("answers"), on_text=late, deadline=time.monotonic() + 60)


def test_after_a_failure_the_same_turn_can_be_asked_for_again(begin, part):
    conversation = begin("cut")
    with pytest.raises(BackendError):
        generate(conversation)
    part.cut = part.answers
    assert generate(conversation).action == Answer("Peru")
    assert part.requests[0][1] == part.requests[1][1]


def test_a_full_context_drops_what_did_not_fit_and_leaves_room_for_an_answer(begin, part):
    conversation = begin("full", continues="vllm")
    generate(conversation)
    conversation.observe(found(picture(2, 90, 90).pixels))
    with pytest.raises(BudgetExceeded, match="maximum context length is 900"):
        generate(conversation)
    assert isinstance(generate(conversation, force_answer=True).action, Answer)
    messages = part.requests[-1][1]["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [kind["type"] for kind in messages[3]["content"]] == ["text"]


def test_a_question_that_does_not_fit_is_said(begin):
    with pytest.raises(BackendError, match="picture and question do not fit: .*too long.*'max_pixels'"):
        generate(begin("always_full"))


def test_a_picture_too_thin_to_look_at_is_refused_before_anything_is_sent():
    policy = open_remote("http://127.0.0.1:1")
    with pytest.raises(PictureError, match="too thin"):
        policy.begin(Picture(np.zeros((2, 900, 3), np.uint8)), QUESTION)


def test_proxies_of_the_machine_see_nothing(begin, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert generate(begin("answers")).action == Answer("Peru")


def test_png_keeps_every_pixel():
    pixels = picture(4, 28, 56).pixels
    sent = base64.b64decode(data_uri(pixels, "png").partition(",")[2])
    assert np.array_equal(decode_picture(sent).pixels, pixels)


def test_a_box_without_a_remote_policy_loads_no_http_client():
    code = "import sys, gog_edge.serve.app, gog_edge.runtime, gog_edge.policy.local; print('httpx' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "False\n"
