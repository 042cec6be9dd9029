"""The policy speaks in its own thread, so that its words can be passed on while it still speaks."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from threading import Event
from types import TracebackType

from gog_edge.agent.events import Spoke
from gog_edge.errors import GogEdgeError
from gog_edge.policy.base import Conversation
from gog_edge.types import Action, Utterance


class EpisodeClosed(GogEdgeError):
    """Nobody listens any more; stops a policy in the middle of a turn."""


class Voice:
    """Runs the turns of one conversation, all in one thread; leaving it closes the conversation."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="policy")

    def __enter__(self) -> Voice:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, at: TracebackType | None) -> None:
        self._thread.shutdown()  # waits: a cache must not be given back while a turn writes to it
        self._conversation.close()

    def speak(self, step: int, *, max_tokens: int, deadline: float, force_answer: bool,
              on_action: Callable[[Action], None] | None = None) -> Generator[Spoke, None, Utterance]:
        """Yield the pieces of one turn as they come; the turn itself is the generator's value.

        Closing the generator stops the policy at its next piece. `on_action` is called in the policy's thread.
        """
        pieces: SimpleQueue[str | None] = SimpleQueue()
        closed = Event()

        def hear(text: str) -> None:
            if closed.is_set():
                raise EpisodeClosed("the episode was closed")
            pieces.put(text)

        turn = self._thread.submit(self._conversation.generate, max_tokens=max_tokens, deadline=deadline,
                                   force_answer=force_answer, on_text=hear, on_action=on_action)
        turn.add_done_callback(lambda _: pieces.put(None))
        try:
            for text in iter(pieces.get, None):
                yield Spoke(step, text)
        finally:
            closed.set()
        return turn.result()
