"""What a turn is heard with: its words are passed on as they come, its action as soon as that is certain."""

from __future__ import annotations

from collections.abc import Callable

from gog_edge.errors import MalformedAction
from gog_edge.policy.dialect import Dialect, Frame
from gog_edge.types import Action


class Listener:
    """Hears one turn, piece by piece."""

    def __init__(self, dialect: Dialect, frame: Frame, on_text: Callable[[str], None] | None,
                 on_action: Callable[[Action], None] | None) -> None:
        self._dialect, self._frame = dialect, frame
        self._on_text, self._on_action = on_text, on_action
        self.text = ""

    def hear(self, piece: str) -> None:
        """Take what was said next."""
        if not piece:
            return
        self.text += piece
        if self._on_text is not None:
            self._on_text(piece)
        if self._on_action is not None:
            action = self._dialect.closed_action(self.text, self._frame)
            if action is not None:
                tell, self._on_action = self._on_action, None
                tell(action)

    def understood(self) -> tuple[Action | None, str]:
        """The action of the whole turn; None and the reason when there is none."""
        try:
            return self._dialect.parse(self.text, self._frame), ""
        except MalformedAction as exc:
            return None, str(exc)
