"""Extraction of a chat template's fixed strings: found by rendering it, and verified by rendering a conversation."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from types import FrameType
from typing import Any

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gog_edge.errors import CheckpointError
from gog_edge.policy.manifest import ChatFormat
from gog_edge.tables import shown

MAX_TEMPLATE = 2**18  # characters; those of released models have up to ten thousand
MAX_SECONDS = 5.0  # for one rendering, which takes milliseconds
MAX_FACTOR, MAX_POWER = 10**6, 64

# Placeholders that no template contains.
SYSTEM, QUESTION, AFTER_IMAGE, ANSWER = "@@system@@", "@@question@@", "@@after@@", "@@answer@@"
NEXT_QUESTION = "@@next@@"
Message = dict[str, Any]

# ChatML as Qwen's models use it, for checkpoints that are created here.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def extract_chat_format(template: str, *, image_token: str, eos: str) -> ChatFormat:
    """Return the strings that a Jinja template puts around turns and pictures.

    The template of a thinking model opens a thought after the prompt, and drops earlier thoughts when it renders a
    conversation again. A live session keeps them, since removing one would invalidate the KV cache after it.

    Raises:
        CheckpointError: the template does more than put fixed strings around turns and pictures.
    """
    system, user = _message("system", SYSTEM), _message("user", QUESTION)
    first = _render(template, [system, user])
    system_open, between, user_close = _split(first, SYSTEM, QUESTION)
    assistant_open = _render(template, [system, user], prompt=True).removeprefix(first)
    two_questions = _render(template, [system, user, _message("user", NEXT_QUESTION)])
    user_open = _split(two_questions, QUESTION, NEXT_QUESTION)[1].removeprefix(user_close)
    history = [system, user, _message("assistant", ANSWER), _message("user", NEXT_QUESTION)]
    before, after, _ = _split(_render(template, history), ANSWER, NEXT_QUESTION)
    assistant_close, history_open = after.removesuffix(user_open), before.removeprefix(first)
    with_image = _render(template, [system, _message("user", QUESTION, None, AFTER_IMAGE)])
    image_open, image_close = _split_image(_split(with_image, QUESTION, AFTER_IMAGE)[1], image_token)
    found = ChatFormat(
        system_open=system_open,
        system_close=between.removesuffix(user_open),
        user_open=user_open,
        user_close=user_close,
        assistant_open=assistant_open,
        assistant_close=assistant_close,
        image_open=image_open,
        image_token=image_token,
        image_close=image_close,
        eos=eos,
    )
    _verify(template, found, history_open)
    return found


def _verify(template: str, chat: ChatFormat, history_open: str) -> None:
    """Check that a whole conversation is the same, rendered by the template and assembled from the strings.

    `history_open` is what the template puts before earlier assistant turns: that of a thinking model opens a thought
    only in the new turn.
    """
    image = chat.image_open + chat.image_token + chat.image_close
    thinks = chat.assistant_open != history_open
    answer = "A cat." if thinks else "<think>a</think> A cat."
    if thinks and not chat.assistant_open.startswith(history_open):
        raise CheckpointError(
            f"the chat template opens the assistant's turn with {chat.assistant_open!r}, but renders earlier ones with "
            f"{history_open!r}: a live session cannot reproduce this"
        )
    messages = [
        _message("system", "You look."),
        _message("user", None, "What is\nthis? "),
        _message("assistant", answer),
        _message("user", "Found: ", None, None, "More?"),
        _message("assistant", "No."),
        _message("user", "Why?"),
    ]
    expected = (
        f"{chat.system_open}You look.{chat.system_close}"
        f"{chat.user_open}{image}What is\nthis? {chat.user_close}"
        f"{history_open}{answer}{chat.assistant_close}"
        f"{chat.user_open}Found: {image}{image}More?{chat.user_close}"
        f"{history_open}No.{chat.assistant_close}"
        f"{chat.user_open}Why?{chat.user_close}{chat.assistant_open}"
    )
    rendered = _render(template, messages, prompt=True)
    if rendered != expected:
        at = next((i for i, (a, b) in enumerate(zip(rendered, expected, strict=False)) if a != b), len(expected))
        raise CheckpointError(
            "the chat template does more than put fixed strings around turns and pictures: a live session cannot "
            f"reproduce it (from character {at}: {rendered[at : at + 40]!r}, expected {expected[at : at + 40]!r})"
        )


def _message(role: str, *parts: str | None) -> Message:
    """Return a message of texts and pictures (None); the content of a single text is a string."""
    if len(parts) == 1 and parts[0] is not None:
        return {"role": role, "content": parts[0]}
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content}


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, without the operators that can make values of any size."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute a product or a power of small numbers; nothing else is needed to format a conversation."""
        numbers = all(isinstance(value, (int, float)) and abs(value) <= MAX_FACTOR for value in (left, right))
        if not numbers or (operator == "**" and abs(right) > MAX_POWER):
            raise SecurityError(f"it multiplies {shown(left)} by {shown(right)}")
        return super().call_binop(context, operator, left, right)


def _render(template: str, messages: Sequence[Message], *, prompt: bool = False) -> str:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _raise_template_error
    try:
        if len(template) > MAX_TEMPLATE:
            raise TemplateError(f"it has {len(template)} characters, the limit is {MAX_TEMPLATE}")
        compiled = environment.from_string(template)
        with _time_limit(MAX_SECONDS):
            rendered = str(compiled.render(messages=messages, add_generation_prompt=prompt, tools=None))
        rendered.encode()  # half of a character cannot be written
    except Exception as exc:  # a template may raise anything
        reason = " ".join((str(exc).strip() or type(exc).__name__).split())[:300]
        raise CheckpointError(f"cannot render the chat template: {reason}; use the one of its base model") from exc
    return rendered


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError inside the block when it takes longer; only lines of Python code are interrupted."""
    end, before = monotonic() + seconds, sys.gettrace()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if monotonic() > end:
            raise TimeoutError(f"it takes more than {seconds:.0f} seconds")
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def _raise_template_error(message: str) -> None:
    raise TemplateError(message)


def _split(text: str, first: str, second: str) -> tuple[str, str, str]:
    """Return the text before, between and after two placeholders."""
    before, found_first, rest = text.partition(first)
    between, found_second, after = rest.partition(second)
    if not found_first or not found_second:
        missing = second if found_first else first
        raise CheckpointError(f"the chat template omits the content of a message ({missing})")
    return before, between, after


def _split_image(text: str, image_token: str) -> tuple[str, str]:
    before, found, after = text.partition(image_token)
    if not found:
        raise CheckpointError(f"the chat template renders a picture as {text!r}, without '{image_token}'")
    return before, after
