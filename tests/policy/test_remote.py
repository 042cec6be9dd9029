"""A policy behind an OpenAI-compatible server generates the same as in this process; failures have clear messages."""

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
from gog_edge.policy.dialect.loader import DIALECT_FILE, load_dialect
from gog_edge.policy.local import LocalPolicy
from gog_edge.policy.remote import RemotePolicy, data_uri
from gog_edge.runtime import open_runtime
from gog_edge.types import Answer, Box, Evidence, GazeSearch, Observation, SearchResult, TextSearch

QUESTION = "Which country's flag is the second from the left?"
BUDGETS = {"min_pixels": 3136, "max_pixels": 78_400, "crop_max_pixels": 12_544}  # as in tiny_policy


def picture(seed=0, height=200, width=260):
    return Picture(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def found(crop=None):
    return Observation(result=SearchResult((Evidence(("Peru",), (), None, 0.9),), 0.8), crop=crop)


def open_remote(url, **settings):
    return RemotePolicy.open(RemoteConfig(**{"url": f"{url}/v1", "model": "tiny", "dialect": "gog", **settings}))


def generate(conversation, **options):
    return conversation.generate(**{"max_tokens": 8, "deadline": None, **options})


# --- against the same policy in this process ---------------------------------------------------------------


def without_grammar(policy):
    """Return the same policy without a grammar, like that of the server."""
    return LocalPolicy(policy.model, policy.dialect, policy.sampling, grammar=False)


@pytest.fixture(scope="module")
def local(policies):
    return without_grammar(LocalPolicy.open(policies[True], 1))


@pytest.fixture(scope="module")
def dialect(policies):
    return policies[True] / DIALECT_FILE


def converse(policy):
    """Generate two turns, the second forced; return texts, actions and token counts."""
    pieces, conversation = [], policy.begin(picture(), QUESTION)
    first = generate(conversation, on_text=pieces.append)
    conversation.observe(found(picture(1, 80, 120).pixels))
    conversation.observe(Observation(notice="action_refused", detail="that was all"))
    second = generate(conversation, on_text=pieces.append, force_answer=True)
    conversation.close()
    assert "".join(pieces) == first.text + second.text
    return [(turn.text, turn.action, turn.malformed, turn.new_tokens) for turn in (first, second)]


@pytest.mark.parametrize("continues", ["vllm", "llamacpp"])
def test_a_remote_policy_generates_the_same_as_a_local_one(local, dialect, continues):
    server = ChatServer(local, continues)
    with serving(server.app()) as url:
        remote = converse(open_remote(url, dialect=dialect, continues=continues, **BUDGETS))
    assert remote == converse(local)
    assert remote[1][0].startswith("<answer>")


def test_later_requests_repeat_the_earlier_messages_unchanged(local, dialect):
    server = ChatServer(local)
    with serving(server.app()) as url:
        converse(open_remote(url, dialect=dialect, continues="vllm", **BUDGETS))
    first, second = server.bodies
    sent = first[: first.index(b'], "model"')]
    assert sent.startswith(b'{"messages": [') and second.startswith(sent + b", ")


def test_an_answer_is_requested_in_words_if_the_server_cannot_continue_a_turn(local, dialect):
    server = ChatServer(local)
    with serving(server.app()) as url:
        policy = open_remote(url, dialect=dialect, continues="none", **BUDGETS)
        conversation = policy.begin(picture(), QUESTION)
        generate(conversation)
        conversation.observe(found())
        conversation.observe(Observation(notice=policy.rules.final_notice, detail="nothing more can be searched"))
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
def test_the_rules_have_a_final_notice_if_the_server_cannot_continue_a_turn(dialect, continues, notice):
    rules = open_remote("http://127.0.0.1:9", dialect=dialect, continues=continues).rules
    assert rules == replace(load_dialect(dialect).loop_rules, final_notice=notice)


def test_pictures_are_sent_in_the_size_that_the_server_uses(local):
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


def answer_of(runtime, sample):
    *_, last = runtime.ask(sample.picture.read_bytes(), sample.questions[0], budget=Budget(deadline_ms=600_000))
    return [(step.action, step.box, step.query, step.result) for step in last.record.steps], last.record.answer


def test_a_bundle_with_a_remote_policy_answers_like_the_atlas(tmp_path):
    atlas = open_runtime(DEFAULT_BUNDLE, threads=1)
    atlas = replace(atlas, policy=without_grammar(atlas.policy))
    vision = atlas.policy.model.manifest.vision
    for name in ("encoder", "packs"):
        shutil.copytree(DEFAULT_BUNDLE / name, tmp_path / name)
    shutil.copy(DEFAULT_BUNDLE / "policy" / DIALECT_FILE, tmp_path / "mine.toml")
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
dialect = "mine.toml"
continues = "vllm"
factor = {vision.factor}
min_pixels = {vision.min_pixels}
max_pixels = {vision.max_pixels}
crop_max_pixels = {vision.crop_max_pixels}
""")
        runtime = open_runtime(tmp_path, threads=1)
        assert runtime.policy.name == "tiny" and server.bodies == []
        for sample in atlas.samples:
            assert answer_of(runtime, sample) == answer_of(atlas, sample)
    assert len(server.bodies) > len(atlas.samples)


# --- a scripted server -------------------------------------------------------------------


class ScriptedServer:
    """A server with one behaviour per method; the path of a request names it."""

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
        response = self.stream(delta(content="<answer>Per"), b"no gzip")
        response.headers["Content-Encoding"] = "gzip"
        return response

    def endless(self, attempt):
        return self.stream("data: " + "x" * (3 * 2**20))


@pytest.fixture
def server():
    return ScriptedServer()


@pytest.fixture
def begin(server):
    """Return a function that starts a conversation with one behaviour of the scripted server."""
    with serving(server.app()) as url:

        def open_one(kind, **settings):
            return open_remote(f"{url}/{kind}", **settings).begin(picture(), QUESTION)

        yield open_one


def test_text_is_passed_on_as_it_arrives(begin):
    pieces = []
    turn = generate(begin("answers"), on_text=pieces.append)
    assert pieces == ["<ans", "wer>Pe", "ru</answer>"]
    assert (turn.text, turn.action, turn.malformed) == ("<answer>Peru</answer>", Answer("Peru"), "")
    assert turn.new_tokens == 3 and turn.prefill_ms > 0


def test_the_action_is_reported_once_and_before_the_end_of_the_turn(begin):
    received = []
    turn = generate(begin("looks"), on_text=received.append, on_action=received.append)
    assert [type(item) for item in received] == [str, str, GazeSearch, str, str]
    assert turn.action == received[2]


def test_boxes_refer_to_the_picture_that_was_sent(begin):
    conversation = begin("looks", factor=28, max_pixels=28 * 28 * 35)  # 260 x 200 is sent as 168 x 140
    assert generate(conversation).action == GazeSearch(Box(260 / 168, 2 * 200 / 140, 30 * 260 / 168, 40 * 200 / 140))


def test_boxes_refer_to_a_crop_if_the_dialect_allows_it(begin):
    conversation = begin("zooms", dialect="qwen_agent", **BUDGETS)
    generate(conversation)
    crop = Box(100, 50, 160, 130)
    conversation.observe(replace(found(picture(1, 80, 60).pixels), crop_box=crop))
    assert generate(conversation).action == GazeSearch(Box(100, 50, 130, 90))


def test_text_with_unusual_line_separators_arrives_complete(begin):
    assert generate(begin("searches")).action == TextSearch("Zürich\u2028\u0085 naïve")
    assert generate(begin("unescaped")).action == Answer("a\u2028b\u0085c")


@pytest.mark.parametrize(
    ("kind", "pieces"),
    [("repeats", ["<answer>", "Pe", "ru</answer>"]), ("goes_on", ["<answer>", "<b>Peru</b></answer>"]),
     ("says_little", ["<answer>", "<an"])],
)
def test_a_repeated_opening_is_removed(begin, server, kind, pieces):
    received = []
    turn = generate(begin(kind, continues="llamacpp"), force_answer=True, on_text=received.append)
    assert received == pieces and turn.text == "".join(pieces)
    assert server.requests[0][1]["messages"][-1] == {"role": "assistant", "content": "<answer>"}


def test_separated_reasoning_is_passed_on_between_tags(begin, server):
    pieces, conversation = [], begin("thinks")
    turn = generate(conversation, on_text=pieces.append)
    assert turn.text == "".join(pieces) == "<think>I could say <answer>no</answer>, hm</think><answer>yes</answer>"
    assert turn.action == Answer("yes")
    conversation.observe(found())
    generate(conversation)
    assert server.requests[1][1]["messages"][2] == {
        "role": "assistant", "content": "<answer>yes</answer>",
        "reasoning_content": "I could say <answer>no</answer>, hm",
    }


def test_a_turn_that_ends_in_reasoning_has_no_action(begin):
    turn = generate(begin("thinks_on"))
    assert turn.action is None and turn.text == "<think><answer>no</answer></think>"


def test_token_counts_come_from_the_usage_of_the_server(begin):
    turn = generate(begin("counts"))
    assert (turn.prompt_tokens, turn.new_tokens) == (50, 7)


def test_a_request_has_the_settings_of_the_bundle(begin, server, monkeypatch):
    monkeypatch.setenv("A_KEY", "s3cret")
    settings = {"temperature": 0.7, "top_p": 0.8, "seed": 5, "options": {"chat_template_kwargs": {"thinking": False}}}
    generate(begin("answers", key_env="A_KEY", **settings), max_tokens=11)
    headers, body = server.requests[0]
    assert headers["authorization"] == "Bearer s3cret"
    assert {key: body[key] for key in ("model", "stream", "max_tokens", "temperature", "top_p", "seed")} == {
        "model": "tiny", "stream": True, "max_tokens": 11, "temperature": 0.7, "top_p": 0.8, "seed": 5}
    assert body["chat_template_kwargs"] == {"thinking": False}
    assert body["messages"][0]["content"] == load_dialect("gog").system_prompt


def test_no_key_is_sent_without_key_env(begin, server):
    generate(begin("answers"))
    assert "authorization" not in server.requests[0][0]


def test_a_missing_key_is_an_error(monkeypatch):
    monkeypatch.delenv("A_KEY", raising=False)
    with pytest.raises(BackendError, match="'A_KEY', which is empty or not set"):
        open_remote("http://127.0.0.1:1", key_env="A_KEY")


def test_a_key_that_is_not_printable_is_rejected_and_not_shown(monkeypatch):
    monkeypatch.setenv("A_KEY", "s3cret\nmore")
    with pytest.raises(BackendError, match="'A_KEY' must be printable ASCII") as caught:
        open_remote("http://127.0.0.1:1", key_env="A_KEY")
    assert "s3cret" not in str(caught.value)


def test_an_unknown_dialect_is_rejected():
    with pytest.raises(DialectError, match="klingon"):
        open_remote("http://127.0.0.1:1", dialect="klingon")


# --- failures ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("breaks", "rejected the request with 500 .*: out of memory"),
        ("forbids", "rejected the request with 401 .*: no such key; .*'key_env'"),
        ("moved", "rejected the request with 307"),
        ("unknown", "rejected the request with 500"),
        ("cut", "closed the connection"),
        ("ends", "ended its stream before the turn was complete"),
        ("fails_within", "reported an error: the engine died"),
        ("page", "not an event stream: <html>"),
        ("no_json", "not a chat completion chunk: {not json"),
        ("no_chunk", r"not a chat completion chunk: \[1, 2\]"),
        ("no_text", "not a chat completion chunk"),
        ("deep", "not a chat completion chunk"),
        ("endless", "more than 1048576 bytes"),
    ],
)
def test_permanent_failures_are_not_retried(begin, server, kind, words):
    with pytest.raises(BackendError, match=words) as caught:
        generate(begin(kind))
    assert "127.0.0.1" in str(caught.value)
    assert len(server.requests) == 1


@pytest.mark.parametrize("kind", ["silent", "stalls"])
def test_a_server_that_sends_no_data_times_out(begin, server, kind):
    with pytest.raises(BackendError, match="sent no data for 0.3 s"):
        generate(begin(kind, read_s=0.3))
    assert len(server.requests) == 1


@pytest.mark.parametrize("kind", ["busy_once", "cut_once"])
def test_temporary_failures_before_the_first_token_are_retried(begin, server, kind):
    assert generate(begin(kind)).action == Answer("Peru")
    first, second = (body for _, body in server.requests)
    assert first == second


def test_the_number_of_retries_is_limited(begin, server):
    with pytest.raises(BackendError, match=r"503 .*: loading model \(2 attempts\)"):
        generate(begin("busy", retries=1))
    assert len(server.requests) == 2


def test_a_stream_with_an_invalid_encoding_is_an_error(begin):
    with pytest.raises(BackendError, match="closed the connection"):
        generate(begin("packed", retries=0))


def test_no_retry_starts_after_the_deadline(begin, server):
    with pytest.raises(BackendError, match="1 attempts"):
        generate(begin("busy", retries=9), deadline=time.monotonic() + 0.4)


def test_an_unreachable_server_is_an_error_with_the_remedy():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    conversation = open_remote(f"http://127.0.0.1:{port}", retries=0).begin(picture(), QUESTION)
    with pytest.raises(BackendError, match=f"{port}/v1 cannot be reached.*'url' in bundle.toml"):
        generate(conversation)


@pytest.mark.parametrize(("kind", "text"), [("stalls", "<answer>Per"), ("silent", "")])
def test_the_deadline_ends_the_turn_with_the_text_so_far(begin, kind, text):
    turn = generate(begin(kind), deadline=time.monotonic() + 0.5)
    assert turn.text == text
    assert turn.action == (Answer("Per") if text else None)


def test_an_error_of_a_callback_stops_the_turn(begin):
    def enough(piece):
        raise GogEdgeError("enough")

    with pytest.raises(GogEdgeError, match="enough"):
        generate(begin("stalls"), on_text=enough)


def test_an_error_of_a_callback_is_raised_unchanged(begin):
    def late(piece):
        raise TimeoutError("of the callback")

    with pytest.raises(TimeoutError, match="of the callback"):
        generate(begin("answers"), on_text=late, deadline=time.monotonic() + 60)


def test_a_turn_can_be_repeated_after_a_failure(begin, server):
    conversation = begin("cut")
    with pytest.raises(BackendError):
        generate(conversation)
    server.cut = server.answers
    assert generate(conversation).action == Answer("Peru")
    assert server.requests[0][1] == server.requests[1][1]


def test_a_full_context_drops_the_queued_turn_and_an_answer_can_be_forced(begin, server):
    conversation = begin("full", continues="vllm")
    generate(conversation)
    conversation.observe(found(picture(2, 90, 90).pixels))
    with pytest.raises(BudgetExceeded, match="maximum context length is 900"):
        generate(conversation)
    assert isinstance(generate(conversation, force_answer=True).action, Answer)
    messages = server.requests[-1][1]["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [kind["type"] for kind in messages[3]["content"]] == ["text"]


def test_a_question_longer_than_the_context_is_an_error(begin):
    with pytest.raises(BackendError, match="picture and question exceed the context: .*too long.*'max_pixels'"):
        generate(begin("always_full"))


def test_a_picture_that_is_too_narrow_is_rejected_before_a_request():
    policy = open_remote("http://127.0.0.1:1")
    with pytest.raises(PictureError, match="too narrow"):
        policy.begin(Picture(np.zeros((2, 900, 3), np.uint8)), QUESTION)


def test_proxies_of_the_environment_are_ignored(begin, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert generate(begin("answers")).action == Answer("Peru")


def test_png_is_lossless():
    pixels = picture(4, 28, 56).pixels
    sent = base64.b64decode(data_uri(pixels, "png").partition(",")[2])
    assert np.array_equal(decode_picture(sent).pixels, pixels)


def loaded_modules(imports):
    code = f"import sys, {imports}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return set(done.stdout.split())


def test_the_server_imports_no_http_client_without_a_remote_policy():
    loaded = loaded_modules("gog_edge.serve.app, gog_edge.runtime, gog_edge.policy.local")
    assert not loaded & {"httpx", "torch", "transformers"}


def test_a_remote_policy_imports_no_engine():
    loaded = loaded_modules("gog_edge.policy.remote")
    assert "httpx" in loaded and not loaded & {"onnxruntime", "llguidance", "torch", "transformers"}
