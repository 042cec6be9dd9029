"""A server with OpenAI's chat protocol for a local policy, as vLLM, SGLang and llama.cpp implement it."""

import base64
import json
from dataclasses import dataclass, field

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from gog_edge.picture import decode_picture
from gog_edge.policy.local import LocalPolicy
from gog_edge.policy.session import Session


def event(value) -> str:
    """Return a server-sent event."""
    return f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n"


def delta(finish=None, **fields) -> str:
    """Return an event with a piece of a turn."""
    return event({"object": "chat.completion.chunk",
                  "choices": [{"index": 0, "delta": fields, "finish_reason": finish}]})


@dataclass
class ChatServer:
    """A stateless chat server that keeps the bodies of its requests."""

    policy: LocalPolicy
    continues: str = "vllm"
    bodies: list[bytes] = field(default_factory=list)
    # Encoding a text may give other tokens than those it was decoded from. Prefix caches keep the tokens, and so
    # does this server.
    generated: dict[str, list[int]] = field(default_factory=dict)

    def app(self) -> FastAPI:
        app = FastAPI()
        app.add_api_route("/v1/chat/completions", self.complete, methods=["POST"])
        return app

    async def complete(self, request: Request) -> StreamingResponse:
        self.bodies.append(await request.body())
        return StreamingResponse(self.stream(json.loads(self.bodies[-1])), media_type="text/event-stream")

    def stream(self, body):
        assert (body["model"], body["stream"], body["temperature"]) == ("tiny", True, 0.0)
        session = Session(self.policy.model.decoder)
        self.read(session, body)
        prompt, pieces = len(session.tokens), []
        turn = session.generate(max_tokens=body["max_tokens"], on_text=pieces.append)
        self.generated[turn.text] = list(turn.tokens)
        yield delta(role="assistant", content="")
        if self.continues == "llamacpp" and body["messages"][-1]["role"] == "assistant":
            pieces[:1] = [body["messages"][-1]["content"] + "".join(pieces[:1])]  # llama.cpp repeats the opening
        for piece in pieces:
            yield delta(content=piece)
        yield delta(finish="stop" if turn.stop_reason == "end" else "length")
        yield event({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": len(turn.tokens)}})
        yield event("[DONE]")

    def read(self, session: Session, body) -> None:
        chat, messages = self.policy.model.manifest.chat, body["messages"]
        for number, message in enumerate(messages):
            role = message["role"]
            session.append_template(getattr(chat, f"{role}_open"))
            self.append(session, message["content"])
            if role == "assistant" and number == len(messages) - 1 and self.continues_turn(body):
                return
            session.append_template(getattr(chat, f"{role}_close"))
        session.append_template(chat.assistant_open)

    def continues_turn(self, body) -> bool:
        if self.continues == "vllm":
            return body.get("continue_final_message") is True and body.get("add_generation_prompt") is False
        return self.continues == "llamacpp"

    def append(self, session: Session, content) -> None:
        if isinstance(content, str):
            session.append_tokens(self.generated.get(content) or self.policy.model.decoder.encode(content))
            return
        chat, vision = self.policy.model.manifest.chat, self.policy.model.vision
        for part in content:
            if part["type"] == "text":
                session.append_text(part["text"])
                continue
            head, _, data = part["image_url"]["url"].partition(",")
            assert head in ("data:image/png;base64", "data:image/jpeg;base64")
            pixels = decode_picture(base64.b64decode(data, validate=True)).pixels
            image = vision.encode(pixels)
            # The client sends pictures in the size that the server uses.
            assert (image.resized.height, image.resized.width) == pixels.shape[:2]
            session.append_template(chat.image_open)
            session.append_image(image)
            session.append_template(chat.image_close)
