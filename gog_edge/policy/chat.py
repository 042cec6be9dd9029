"""The strings around turns and pictures, so that a live session only ever appends."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """What a chat template puts around each part; found and proved at export, kept in the policy's manifest.

    Special tokens (`<|im_start|>` and the like) stand in these strings as text: only these strings may become special
    tokens, never what a person, a policy or an article says.
    """

    system_open: str
    system_close: str
    user_open: str
    user_close: str
    assistant_open: str
    assistant_close: str
    image_open: str
    image_token: str  # stands once for each merged token of a picture
    image_close: str
    eos: str
