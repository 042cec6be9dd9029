"""Prints packs to the terminal: contents, skipped input, and the progress of a build."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from gog_edge.errors import PackError
from gog_edge.files import folder_bytes, read_json
from gog_edge.planner import format_size
from gog_edge.retrieval.manifest import Calibration, Manifest, Space, generation_path

FINISHING = "finishing"  # the stage after the last reported one


def print_pack(folder: Path, manifest: Manifest, *, seconds: Mapping[str, float] | None = None,
               console: Console | None = None) -> None:
    """Print the contents of a pack, and the seconds that each stage of its build took."""
    console = console or Console()
    table = Table("property", "value", title=f"pack '{manifest.name}', generation {manifest.generation}")
    for name, value in (*_properties(manifest), *_sizes(folder, manifest)):
        table.add_row(name, escape(value))
    if seconds:
        table.add_section()
        for stage, took in seconds.items():
            table.add_row(stage, f"{took:,.1f} s")
    console.print(table)
    print_report(folder, manifest, console)


def print_report(folder: Path, manifest: Manifest, console: Console | None = None) -> None:
    """Print what became of the snapshot's items."""
    console = console or Console()
    report = read_report(folder, manifest)
    if report["items"]:
        console.print(_items_table(report["items"]))
    if report["skipped"]:
        console.print(_skipped_table(report["skipped"]))
    for notice in report["notices"]:
        console.print(f"warning: {notice}", markup=False, highlight=False, soft_wrap=True)


def pack_json(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Return the contents as a JSON object: the manifest without its files, the report, and sizes in bytes."""
    value = manifest.to_json()
    value.pop("files")
    value |= {**read_report(folder, manifest), "bytes": _pack_bytes(manifest),
              "bytes_on_disk": folder_bytes(folder), "bytes_superseded": superseded_bytes(folder, manifest)}
    return value


def read_report(folder: Path, manifest: Manifest) -> dict[str, list[Any]]:
    """Return what became of the snapshot's items when this generation was built.

    "items" holds the kinds of items with the numbers that were present, used and skipped; "skipped" the reasons with
    kind, count and examples, the most frequent first; "notices" what the owner of the snapshot should know.
    """
    stored = {} if manifest.report is None else read_json(folder / manifest.report, what="pack", error=PackError)
    skipped = list(stored.get("skipped", ()))
    items = [{**item, "skipped": sum(one["count"] for one in skipped if one.get("kind") == item["kind"])}
             for item in stored.get("items", ())]
    return {"items": items, "skipped": skipped, "notices": list(stored.get("notices", ()))}


def _properties(manifest: Manifest) -> Iterator[tuple[str, str]]:
    snapshot, counts = manifest.snapshot, manifest.counts
    yield "snapshot", f"{snapshot.name}, {snapshot.date}, {snapshot.licence}"
    yield "parent", "none" if manifest.parent is None else f"generation {manifest.parent}"
    yield "articles, paragraphs, images", f"{counts.articles:,}, {counts.paragraphs:,}, {counts.images:,}"
    stored = [sum(getattr(segment.counts, kind) for segment in manifest.segments) for kind in ("articles", "images")]
    deleted = stored[0] - counts.articles, stored[1] - counts.images
    yield "segments", str(len(manifest.segments))
    if any(deleted):
        yield "deleted", f"{deleted[0]:,} articles, {deleted[1]:,} images; `gog-edge pack compact` frees their space"
    encoder, text_encoder = manifest.encoder, manifest.text_encoder
    if encoder is None and text_encoder is None:
        yield "encoder", "none: searched by words only"
        return
    if encoder is not None:
        yield "encoder", f"{encoder.name}, {encoder.dim} dimensions"
        yield "images", _describe_space(manifest.images)
        yield "captions", _describe_space(manifest.captions)
    if text_encoder is not None:
        of_encoder = f"{text_encoder.name}, {text_encoder.dim} dimensions"
        yield "paragraphs", f"{of_encoder}; {_describe_space(manifest.paragraphs)}"
    yield from _calibrations(manifest)


def _describe_space(space: Space) -> str:
    index = space.index
    rows = f"{space.rows:,} vectors"
    if index is None:
        return f"{rows}, searched exactly"
    unindexed = f", {space.rows - index.rows:,} outside of the index" if space.rows > index.rows else ""
    return (f"{rows}; {index.factory}{unindexed}, recall@{index.recall_k} {index.recall:.3f}, p50 "
            f"{index.p50_ms_1:.2f} ms for one query, {index.p50_ms_8:.2f} ms for eight")


def calibration_changes(before: Manifest, after: Manifest) -> list[str]:
    """Return one line each for the image and the text calibration, with the previous figures."""
    return [f"{name}: {now}; before: {then}" if then != now else f"{name}: {now}, as before"
            for (name, then), (_, now) in zip(_calibrations(before), _calibrations(after), strict=True)]


def _calibrations(manifest: Manifest) -> Iterator[tuple[str, str]]:
    yield "image calibration", _describe_calibration(manifest.image_calibration)
    yield "text calibration", _describe_calibration(manifest.text_calibration)


def _describe_calibration(calibration: Calibration | None) -> str:
    if calibration is None:
        return "not calibrated"
    return f"accepts {calibration.true_accept:.3f} of the present, {calibration.false_accept:.3f} of the absent"


def _sizes(folder: Path, manifest: Manifest) -> Iterator[tuple[str, str]]:
    yield "size", format_size(_pack_bytes(manifest))
    yield "on disk", f"{format_size(folder_bytes(folder))}{describe_superseded(folder, manifest)}"


def describe_superseded(folder: Path, manifest: Manifest) -> str:
    """Return what the next change will free, to be appended to a line; empty if there is nothing."""
    size = superseded_bytes(folder, manifest)
    return f"; {format_size(size)} of it belong to the previous generation and are freed by the next change" if size \
        else ""


def superseded_bytes(folder: Path, manifest: Manifest) -> int:
    """Return the bytes of files that only the previous generation uses, which other processes may have open."""
    if manifest.parent is None or not generation_path(folder, manifest.parent).is_file():
        return 0
    before = read_json(generation_path(folder, manifest.parent), what="pack", error=PackError)
    used = {entry.path for entry in manifest.files}
    return sum(int(entry["size"]) for entry in before["files"] if entry["path"] not in used)


def _pack_bytes(manifest: Manifest) -> int:
    return sum(entry.size for entry in manifest.files)


def _items_table(items: Iterable[Mapping[str, Any]]) -> Table:
    """Return the numbers of items; a last column appears if some of them were neither used nor skipped."""
    numbers = [(item, item["present"] - item["used"] - item["skipped"]) for item in items]
    columns = [Column(name, justify="right") for name in ("present", "used", "skipped")]
    table = Table("items", *columns, title="snapshot")
    if any(missing for _, missing in numbers):
        table.add_column("not accounted for", justify="right")
    for item, missing in numbers:
        counts = (item["present"], item["used"], item["skipped"], *((missing,) if len(table.columns) > 4 else ()))
        table.add_row(escape(item["kind"]), *(f"{count:,}" for count in counts))
    return table


def _skipped_table(skipped: Iterable[Mapping[str, Any]]) -> Table:
    table = Table("reason", "kind", Column("count", justify="right"), "examples", title="skipped")
    for entry in skipped:
        examples = escape("\n".join(entry["examples"][:2]))
        table.add_row(escape(entry["reason"]), escape(entry.get("kind", "")), f"{entry['count']:,}", examples)
    return table


# --- progress -----------------------------------------------------------------------------------


class StageProgress:
    """Progress bars on stderr, one per stage. Call it with (stage, done, total); use it as a context manager.

    `seconds` is the time of each stage so far, in the order of their start.
    """

    def __init__(self, console: Console | None = None) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), _Rate(),
                   TimeRemainingColumn())
        self._progress = Progress(*columns, console=console or Console(stderr=True))
        self._tasks: dict[str, TaskID] = {}
        self._last_call = time.monotonic()
        self.seconds: dict[str, float] = {}

    def __enter__(self) -> StageProgress:
        self._last_call = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.seconds:
            self._add_time(FINISHING)
        if kind is None:
            self._complete_all()
        self._progress.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Update a stage; done = 0 starts it."""
        self._add_time(stage if done or not self.seconds else next(reversed(self.seconds)))
        self._progress.start()
        if stage not in self._tasks:
            self._complete_all()
            self._tasks[stage] = self._progress.add_task(stage, total=total or 1, completed=done)
        self._progress.update(self._tasks[stage], completed=done if total else 1, total=total or 1)

    def counter(self, stage: str, total: int) -> Callable[[int], None]:
        """Return a function that advances a stage by the size it is called with."""
        done = 0

        def advance(size: int) -> None:
            nonlocal done
            done += size
            self(stage, done, total)

        return advance

    def _complete_all(self) -> None:
        for task in self._progress.tasks:
            self._progress.update(task.id, completed=task.total)

    def _add_time(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last_call
        self._last_call = now


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f}/s" if speed else "", style="dim")


@contextmanager
def spinner(text: str) -> Iterator[None]:
    """Show a spinner with a text on stderr."""
    with Console(stderr=True).status(text):
        yield
