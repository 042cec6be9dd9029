"""An episode on a terminal: each step as it comes, then the answer and where it comes from."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table

from gog_edge.agent.events import Acted, Answered, AnswerRecord, Event, Found, Refused
from gog_edge.types import Box, Citation, SearchResult

_DOES = {
    "gaze_search": "gazes at {box} and searches with it",
    "image_search": "searches with the whole picture",
    "text_search": "searches for “{query}”",
    "answer": "answers",
}


class Show:
    """Prints events; call it with each."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()

    def __call__(self, event: Event) -> None:
        """Print one event."""
        match event:
            case Acted():
                does = _DOES[event.action].format(box=_box(event.box), query=event.query)
                self.console.print(f"[bold]{event.step + 1}[/] {escape(does)}" + _dim(event.note), highlight=False)
            case Found():
                self._result(event.result, event.ms)
            case Refused():
                reason = escape(event.reason)
                self.console.print(f"[bold]{event.step + 1}[/] [yellow]refused[/]: {reason}", highlight=False)
            case Answered():
                self._answer(event.record)
            case _:
                pass  # the start, and words that the answer repeats

    def _result(self, result: SearchResult, ms: float) -> None:
        head = f"found {result.found:.0%}, {ms:.0f} ms" + (", from memory" if result.cached else "")
        self.console.print(Padding(_dim(head).strip(), (0, 0, 0, 2)), highlight=False)
        for evidence in result.evidence[:3]:
            titles = escape(" = ".join(evidence.titles))
            self.console.print(Padding(f"{titles} [dim]{evidence.score:.3f}[/]", (0, 0, 0, 2)), highlight=False)
            for passage in evidence.passages:
                self.console.print(Padding(f"[dim]{escape(passage.text)}[/]", (0, 0, 0, 4)), highlight=False)

    def _answer(self, record: AnswerRecord) -> None:
        answer = escape(record.answer) or "[yellow]no answer[/]"
        self.console.print(Panel(f"[bold]{answer}[/]", expand=False, border_style="green"), highlight=False)
        if record.citations:
            self.console.print(_citations(record.citations))
        times = ", ".join(f"{stage} {ms:.0f}" for stage, ms in record.timings_ms.items())
        self.console.print(f"[dim]ms: {times}[/]", highlight=False)


def _citations(citations: tuple[Citation, ...]) -> Table:
    table = Table.grid(padding=(0, 1))
    for number, citation in enumerate(citations, 1):
        passage = citation.passage
        source = f"{passage.pack}, {passage.article}, paragraph {passage.paragraph}, {passage.licence}"
        table.add_row(f"[green]\\[{number}][/]", f"{escape(passage.text)}\n[dim]{escape(source)}[/]")
    return table


def _box(box: Box | None) -> str:
    return f"({box.x0:.0f}, {box.y0:.0f}) to ({box.x1:.0f}, {box.y1:.0f})" if box else "nothing"


def _dim(text: str) -> str:
    return f" [dim]{escape(text)}[/]" if text else ""
