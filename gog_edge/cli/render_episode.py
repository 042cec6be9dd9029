"""What is told on a terminal: an episode, each step as it comes; what a probe found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Column, Table

from gog_edge.agent.events import Acted, Answered, AnswerRecord, Event, Found, Refused
from gog_edge.policy.dialect.dialect import Dialect
from gog_edge.policy.probe import Finding, Report
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


class ShowProbe:
    """Prints what a probe found; call it with the report."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()

    @contextmanager
    def waiting(self, questions: int, dialects: int) -> Iterator[Callable[[Finding], None]]:
        """Tells that something goes on; what it gives is called with each finding."""
        tried = 0

        def told() -> str:
            return f"asking {questions} questions, {tried} of {dialects} dialects tried"

        def count(finding: Finding) -> None:
            nonlocal tried
            tried += 1
            status.update(told())

        with self.console.status(told()) as status:
            yield count

    def __call__(self, report: Report, written: Dialect | None) -> None:
        """Print the table and the verdict."""
        self.console.print(_findings(report))
        best = report.best
        if best is None:
            nearest = max(report.findings, key=lambda finding: finding.share)
            self.console.print(f"[red]No dialect fits[/]: write one (see {_name(nearest)}) and try it with --dialect.")
            self.console.print(f"In {_name(nearest)} it said, for example: {escape(repr(nearest.example[:200]))}")
            return
        boxes = f"boxes in {best.box_frame}" if best.boxes else f"no box was said, {best.box_frame} is not proved"
        self.console.print(f"It speaks [bold]{_name(best)}[/], {boxes}.", highlight=False)
        done = "Written beside the checkpoint." if written else "--write puts this dialect beside the checkpoint."
        self.console.print(f"[dim]{done}[/]")


def _findings(report: Report) -> Table:
    table = Table("dialect", Column("parsed", justify="right"), "said", "boxes", "verdict")
    for finding in report.findings:
        said = [f"{number} {kind}" for kind, number in finding.kinds.items()]
        said += [f"{finding.plain} without marks"] if finding.plain else []
        verdict = "[green]fits[/]" if not finding.against else f"[dim]{escape(finding.against)}[/]"
        name = _name(finding) + ("\n(its own)" if finding.candidate.own else "")
        table.add_row(name, f"{finding.parsed}/{finding.turns}", "\n".join(said), _boxes(finding), verdict)
    return table


def _boxes(finding: Finding) -> str:
    """Where boxes fall, as shares of those written."""
    if not finding.boxes:
        return "none"
    shares = {"> 1000": finding.over_1000, "> picture": finding.over_resized, "all <= 1": finding.below_1}
    lines = [f"in {finding.box_frame}" if finding.box_frame else "in no frame"]
    return "\n".join([*lines, *(f"{name} {share:.0%}" for name, share in shares.items())])


def _name(finding: Finding) -> str:
    return escape(finding.candidate.dialect.name)


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
