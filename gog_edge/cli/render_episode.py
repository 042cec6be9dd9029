"""Terminal output of `gog-edge ask` (each step as it happens) and `gog-edge probe`."""

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
from gog_edge.policy.probe import DialectFinding, ProbeReport
from gog_edge.types import Box, Citation, SearchResult

_DOES = {
    "gaze_search": "gazes at {box} and searches with it",
    "image_search": "searches with the whole picture",
    "text_search": "searches for “{query}”",
    "answer": "answers",
}


class EpisodePrinter:
    """Prints the events of an episode; call it with each event."""

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
                pass  # the start, and generated text that the answer repeats

    def _result(self, result: SearchResult, ms: float) -> None:
        head = f"found {result.found:.0%}, {ms:.0f} ms" + (", cached" if result.cached else "")
        self.console.print(Padding(_dim(head).strip(), (0, 0, 0, 2)), highlight=False)
        for evidence in result.evidence[:3]:
            titles = escape(" = ".join(evidence.titles))
            self.console.print(Padding(f"{titles} [dim]{evidence.score:.3f}[/]", (0, 0, 0, 2)), highlight=False)
            for passage in evidence.passages:
                self.console.print(Padding(f"[dim]{escape(passage.text)}[/]", (0, 0, 0, 4)), highlight=False)

    def _answer(self, record: AnswerRecord) -> None:
        answer = escape(record.answer) or "[yellow]no answer[/]"
        self.console.print(Panel(f"[bold]{answer}[/]", expand=False, border_style="green"), highlight=False)
        for passages, related in ((record.citations, False), (record.related, True)):
            if passages:
                self.console.print(_passages(passages, related=related))
        times = ", ".join(f"{stage} {ms:.0f}" for stage, ms in record.timings_ms.items())
        self.console.print(f"[dim]ms: {times}[/]", highlight=False)


class ProbePrinter:
    """Prints the progress and the report of a probe."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()

    @contextmanager
    def waiting(self, questions: int, dialects: int) -> Iterator[Callable[[DialectFinding], None]]:
        """Show progress; yield a function to be called with each finding."""
        tried = 0

        def status_text() -> str:
            return f"asking {questions} questions, {tried} of {dialects} dialects tried"

        def count(finding: DialectFinding) -> None:
            nonlocal tried
            tried += 1
            status.update(status_text())

        with self.console.status(status_text()) as status:
            yield count

    def __call__(self, report: ProbeReport, written: Dialect | None) -> None:
        """Print the table of findings and the result."""
        self.console.print(_findings(report))
        best = report.best
        if best is None:
            nearest = max(report.findings, key=lambda finding: finding.share)
            name, example = _name(nearest), escape(repr(nearest.example[:200]))
            self.console.print(f"[red]No dialect fits[/]: write one (start from {name}) and try it with --dialect.")
            self.console.print(f"With {name} the policy wrote, for example: {example}")
            return
        boxes = f"boxes in {best.box_frame}" if best.boxes else f"no boxes, so {best.box_frame} is unconfirmed"
        self.console.print(f"The dialect is [bold]{_name(best)}[/], {boxes}.", highlight=False)
        done = "Written to the policy's folder." if written else "--write stores this dialect in the policy's folder."
        self.console.print(f"[dim]{done}[/]")


def _findings(report: ProbeReport) -> Table:
    table = Table("dialect", Column("parsed", justify="right"), "actions", "boxes", "verdict")
    for finding in report.findings:
        actions = [f"{number} {kind}" for kind, number in finding.kinds.items()]
        actions += [f"{finding.plain} without tags"] if finding.plain else []
        verdict = "[green]fits[/]" if not finding.rejection else f"[dim]{escape(finding.rejection)}[/]"
        name = _name(finding) + ("\n(its own)" if finding.candidate.own else "")
        table.add_row(name, f"{finding.parsed}/{finding.turns}", "\n".join(actions), _boxes(finding), verdict)
    return table


def _boxes(finding: DialectFinding) -> str:
    """Return where boxes fall, as fractions of those written."""
    if not finding.boxes:
        return "none"
    shares = {"> 1000": finding.over_1000, "> picture": finding.over_resized, "all <= 1": finding.below_1}
    lines = [f"in {finding.box_frame}" if finding.box_frame else "in no frame"]
    return "\n".join([*lines, *(f"{name} {share:.0%}" for name, share in shares.items())])


def _name(finding: DialectFinding) -> str:
    return escape(finding.candidate.dialect.name)


def _passages(citations: tuple[Citation, ...], *, related: bool) -> Table:
    """Return the passages that contain the answer, numbered, or those that are only related to it."""
    table = Table.grid(padding=(0, 1))
    for number, citation in enumerate(citations, 1):
        passage = citation.passage
        source = f"{passage.pack}, {passage.article}, paragraph {passage.paragraph}, {passage.licence}"
        mark = "[yellow]Related:[/]" if related else f"[green]\\[{number}][/]"
        table.add_row(mark, f"{escape(passage.text)}\n[dim]{escape(source)}[/]")
    return table


def _box(box: Box | None) -> str:
    return f"({box.x0:.0f}, {box.y0:.0f}) to ({box.x1:.0f}, {box.y1:.0f})" if box else "nothing"


def _dim(text: str) -> str:
    return f" [dim]{escape(text)}[/]" if text else ""
