"""The plain strings of a chat template: found by rendering it, proved by rendering it again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gog_edge.errors import CheckpointError
from gog_edge.policy.manifest import ChatFormat

# Words no template contains.
SYSTEM, ASK, AFTER, SAY, AGAIN = "@@system@@", "@@ask@@", "@@after@@", "@@say@@", "@@again@@"
Message = dict[str, Any]

# ChatML as Qwen's models take it, for checkpoints that are made here.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def extract_chat_format(template: str, *, image_token: str, eos: str) -> ChatFormat:
    """Cut a jinja template into the strings around turns and pictures.

    A thinking model's template opens the thought after the prompt, and leaves finished thoughts out of what it renders
    later. A live session keeps them: to take one back would mean to compute everything after it again.
    Raises CheckpointError when the template does more than put fixed strings around them.
    """
    system, user = _message("system", SYSTEM), _message("user", ASK)
    first = _render(template, [system, user])
    system_open, between, user_close = _cut(first, SYSTEM, ASK)
    assistant_open = _render(template, [system, user], prompt=True).removeprefix(first)
    user_open = _cut(_render(template, [system, user, _message("user", AGAIN)]), ASK, AGAIN)[1].removeprefix(user_close)
    again = _render(template, [system, user, _message("assistant", SAY), _message("user", AGAIN)])
    before, after, _ = _cut(again, SAY, AGAIN)
    assistant_close, told_open = after.removesuffix(user_open), before.removeprefix(first)
    around = _render(template, [system, _message("user", ASK, None, AFTER)])
    image_open, image_close = _around_image(_cut(around, ASK, AFTER)[1], image_token)
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
    _prove(template, found, told_open)
    return found


def _prove(template: str, chat: ChatFormat, told_open: str) -> None:
    """A whole conversation must come out the same, with the template and with the strings.

    `told_open` stands before what the assistant said earlier: a thinking model's template opens only the new turn's
    thought.
    """
    image = chat.image_open + chat.image_token + chat.image_close
    thinks = chat.assistant_open != told_open
    cat = "A cat." if thinks else "<think>a</think> A cat."
    if thinks and not chat.assistant_open.startswith(told_open):
        raise CheckpointError(
            f"the chat template opens the assistant's turn as {chat.assistant_open!r} and tells it later as "
            f"{told_open!r}: a live session cannot follow it"
        )
    messages = [
        _message("system", "You look."),
        _message("user", None, "What is\nthis? "),
        _message("assistant", cat),
        _message("user", "Found: ", None, None, "More?"),
        _message("assistant", "No."),
        _message("user", "Why?"),
    ]
    expected = (
        f"{chat.system_open}You look.{chat.system_close}"
        f"{chat.user_open}{image}What is\nthis? {chat.user_close}"
        f"{told_open}{cat}{chat.assistant_close}"
        f"{chat.user_open}Found: {image}{image}More?{chat.user_close}"
        f"{told_open}No.{chat.assistant_close}"
        f"{chat.user_open}Why?{chat.user_close}{chat.assistant_open}"
    )
    rendered = _render(template, messages, prompt=True)
    if rendered != expected:
        at = next((i for i, (a, b) in enumerate(zip(rendered, expected, strict=False)) if a != b), len(expected))
        raise CheckpointError(
            "the chat template does more than put fixed strings around turns and pictures: a live session cannot "
            f"follow it (from character {at}: {rendered[at : at + 40]!r}, expected {expected[at : at + 40]!r})"
        )


def _message(role: str, *parts: str | None) -> Message:
    """A message of texts and pictures (None); a single text stands plainly, as most callers write it."""
    if len(parts) == 1 and parts[0] is not None:
        return {"role": role, "content": parts[0]}
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content}


def _render(template: str, messages: Sequence[Message], *, prompt: bool = False) -> str:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    try:
        compiled = environment.from_string(template)
        return compiled.render(messages=messages, add_generation_prompt=prompt, tools=None)
    except TemplateError as exc:
        raise CheckpointError(f"the chat template cannot be rendered: {exc}; take the one of its base model") from exc


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _cut(text: str, first: str, second: str) -> tuple[str, str, str]:
    """What stands before, between and after two words."""
    before, found, rest = text.partition(first)
    between, found_too, after = rest.partition(second)
    if not found or not found_too:
        raise CheckpointError(f"the chat template leaves out what is said ({first if not found else second})")
    return before, between, after


def _around_image(text: str, image_token: str) -> tuple[str, str]:
    opening, found, closing = text.partition(image_token)
    if not found:
        raise CheckpointError(f"the chat template writes a picture as {text!r}, without '{image_token}'")
    return opening, closing
