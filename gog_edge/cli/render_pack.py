"""What is told on a terminal of a pack: what is in it, what was skipped, how its making goes on."""

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
from gog_edge.files import read_json
from gog_edge.planner import as_size
from gog_edge.retrieval.manifest import Calibration, Manifest, Space, generation_path

FINISHING = "finishing"  # what is done after the last stage that tells of itself


def show_pack(folder: Path, manifest: Manifest, *, seconds: Mapping[str, float] | None = None,
              console: Console | None = None) -> None:
    """Print what is in a pack, and how long each stage of its making took."""
    console = console or Console()
    table = Table("what", "value", title=f"pack '{manifest.name}', generation {manifest.generation}")
    for what, value in (*_facts(manifest), *_on_disk(folder, manifest)):
        table.add_row(what, escape(value))
    if seconds:
        table.add_section()
        for stage, took in seconds.items():
            table.add_row(stage, f"{took:,.1f} s")
    console.print(table)
    skipped = read_skipped(folder, manifest)
    if skipped:
        console.print(_skipped_table(skipped))


def pack_json(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """The same as one object: the manifest without its list of files, what was skipped, and sizes in bytes."""
    value = manifest.to_json()
    value.pop("files")
    value |= {"skipped": read_skipped(folder, manifest), "bytes": _bytes(manifest), "bytes_on_disk": _disk(folder),
              "bytes_superseded": superseded_bytes(folder, manifest)}
    return value


def read_skipped(folder: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """What was left out when this generation was built: reason, count, examples; the most first."""
    if manifest.report is None:
        return []
    return list(read_json(folder / manifest.report, what="pack", error=PackError)["skipped"])


def _facts(manifest: Manifest) -> Iterator[tuple[str, str]]:
    snapshot, counts = manifest.snapshot, manifest.counts
    yield "snapshot", f"{snapshot.name}, {snapshot.date}, {snapshot.licence}"
    yield "parent", "none" if manifest.parent is None else f"generation {manifest.parent}"
    yield "articles, paragraphs, images", f"{counts.articles:,}, {counts.paragraphs:,}, {counts.images:,}"
    held = [sum(getattr(segment.counts, kind) for segment in manifest.segments) for kind in ("articles", "images")]
    gone = held[0] - counts.articles, held[1] - counts.images
    yield "segments", str(len(manifest.segments))
    if any(gone):
        yield "removed, replaced", f"{gone[0]:,} articles, {gone[1]:,} images; `gog-edge pack compact` drops them"
    if manifest.encoder is None:
        yield "encoder", "none: searched by words alone"
        return
    yield "encoder", f"{manifest.encoder.name}, {manifest.encoder.dim} values"
    yield "pictures", _about_space(manifest.images)
    yield "captions", _about_space(manifest.captions)
    yield from _calibrations(manifest)


def _about_space(space: Space) -> str:
    index = space.index
    rows = f"{space.rows:,} vectors"
    if index is None:
        return f"{rows}, searched one by one"
    beside = f", {space.rows - index.rows:,} beside it" if space.rows > index.rows else ""
    return (f"{rows}; {index.factory}{beside}, recall@{index.recall_k} {index.recall:.3f}, p50 {index.p50_ms_1:.2f} ms "
            f"for one crop, {index.p50_ms_8:.2f} ms for eight")


def recalibrated(before: Manifest, after: Manifest) -> list[str]:
    """What a calibration says now, and what it took the place of: a line for pictures, a line for words."""
    return [f"{what}: {now}; before: {then}" if then != now else f"{what}: {now}, as before"
            for (what, then), (_, now) in zip(_calibrations(before), _calibrations(after), strict=True)]


def _calibrations(manifest: Manifest) -> Iterator[tuple[str, str]]:
    yield "found, pictures", _about_calibration(manifest.image_calibration)
    yield "found, words", _about_calibration(manifest.text_calibration)


def _about_calibration(one: Calibration | None) -> str:
    if one is None:
        return "not calibrated"
    return f"accepts {one.true_accept:.3f} of the present, {one.false_accept:.3f} of the absent"


def _on_disk(folder: Path, manifest: Manifest) -> Iterator[tuple[str, str]]:
    yield "size", as_size(_bytes(manifest))
    yield "on disk", f"{as_size(_disk(folder))}{about_superseded(folder, manifest)}"


def about_superseded(folder: Path, manifest: Manifest) -> str:
    """What the next change will free: files that only the generation before still names. Empty where there is none."""
    size = superseded_bytes(folder, manifest)
    return f"; {as_size(size)} of it are the generation before's, which the next change removes" if size else ""


def superseded_bytes(folder: Path, manifest: Manifest) -> int:
    """Bytes of the files that the generation before needs and this one does not: kept for who has it open."""
    if manifest.parent is None or not generation_path(folder, manifest.parent).is_file():
        return 0
    before = read_json(generation_path(folder, manifest.parent), what="pack", error=PackError)
    own = {entry.path for entry in manifest.files}
    return sum(int(entry["size"]) for entry in before["files"] if entry["path"] not in own)


def _bytes(manifest: Manifest) -> int:
    return sum(entry.size for entry in manifest.files)


def _disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _skipped_table(skipped: Iterable[Mapping[str, Any]]) -> Table:
    table = Table("skipped", Column("how many", justify="right"), "for example", title="what did not come in")
    for one in skipped:
        table.add_row(escape(one["reason"]), f"{one['count']:,}", escape("\n".join(one["examples"][:2])))
    return table


# --- while it is made ---------------------------------------------------------------------------


class Stages:
    """Bars on stderr for stages as they come: call it with (stage, done, total). Use as a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), _Rate(),
                   TimeRemainingColumn())
        self._progress = Progress(*columns, console=console or Console(stderr=True))
        self._tasks: dict[str, TaskID] = {}
        self._told = time.monotonic()
        self.seconds: dict[str, float] = {}  # that each stage took, in the order they came

    def __enter__(self) -> Stages:
        self._told = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.seconds:
            self._count(FINISHING)
        if kind is None:
            self._finish_all()
        self._progress.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Tell how far a stage is; with done = 0, that it begins."""
        self._count(stage if done or not self.seconds else next(reversed(self.seconds)))
        self._progress.start()
        if stage not in self._tasks:
            self._finish_all()
            self._tasks[stage] = self._progress.add_task(stage, total=total or 1, completed=done)
        self._progress.update(self._tasks[stage], completed=done if total else 1, total=total or 1)

    def counting(self, stage: str, total: int) -> Callable[[int], None]:
        """Tells of a stage piece by piece: call what it gives with the size of each."""
        done = 0

        def count(size: int) -> None:
            nonlocal done
            done += size
            self(stage, done, total)

        return count

    def _finish_all(self) -> None:
        for task in self._progress.tasks:
            self._progress.update(task.id, completed=task.total)

    def _count(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._told
        self._told = now


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f}/s" if speed else "", style="dim")


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Tells on stderr that something goes on."""
    with Console(stderr=True).status(what):
        yield
