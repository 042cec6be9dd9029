"""From a snapshot to a pack: read in many processes, written by one; whatever is done stays done."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from gog_edge.errors import PackError, SourceError
from gog_edge.files import write_atomic
from gog_edge.indexing.commit import LOCK, current, prune, writing
from gog_edge.indexing.generation import NextGeneration, OnProgress, PackOptions
from gog_edge.indexing.sources.base import ArticleDraft, Chunk, ImageDraft, Item, RedirectDraft, Skipped, Source
from gog_edge.indexing.store_writer import DraftRefused, StoreWriter
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.manifest import BUILD, COMMAND, MANIFEST, Manifest

READING, WORDS = "reading", "words"  # stages: the snapshot, and the index of its words


def build_pack(
    source: Source,
    folder: Path,
    *,
    name: str,
    encoder: Encoder | None,
    options: PackOptions | None = None,
    workers: int | None = None,
    update: bool = False,
    add: bool = False,
    command: str = "",
    on_progress: OnProgress | None = None,
) -> Manifest:
    """Make a pack of a snapshot, or the next generation of one.

    Killed at any point and called again with the same arguments, it goes on: chunks that were written, shards that were
    embedded and indexes that were built are not made again.

    Args:
        source: the snapshot.
        folder: new or empty; a pack with `update` or `add`; or an unfinished build of just this.
        name: in citations and addresses.
        encoder: None for a pack that is searched by words alone.
        options: how the pack is made.
        workers: processes that read; one for each core when left out.
        update: the folder's pack becomes this snapshot: only what changed is written and embedded, what the snapshot
            does not hold any more goes.
        add: the snapshot comes to what the folder's pack holds; articles of the same key are replaced.
        command: what goes on with this build: told to who opens the pack too early.
        on_progress: is told (stage, done, total).

    Raises:
        PackError: the folder holds something else, is being written, or its disk is full.
        SourceError: the snapshot cannot be read; what was read before stays.
    """
    done = None if update or add else _same_build(source, folder, name, encoder)
    if done is not None:
        return done
    with _begun(source, folder, name, encoder, options, update=update, add=add) as generation:
        _ensure_store(generation, source, workers, command, on_progress)
        return generation.finish(only=update, on_progress=on_progress)


def read_snapshot(
    source: Source,
    folder: Path,
    *,
    name: str,
    encoder: Encoder | None,
    options: PackOptions | None = None,
    workers: int | None = None,
    update: bool = False,
    add: bool = False,
    command: str = "",
    on_progress: OnProgress | None = None,
) -> None:
    """Do only what `build_pack` does first, texts and pictures: others embed (`ray_embedding`), then it goes on.

    Arguments and errors are those of `build_pack`.
    """
    with _begun(source, folder, name, encoder, options, update=update, add=add) as generation:
        _ensure_store(generation, source, workers, command, on_progress)


def _same_build(source: Source, folder: Path, name: str, encoder: Encoder | None) -> Manifest | None:
    """The pack that a first build of just this made, where it was stopped after its commit."""
    made = current(folder)
    fingerprint = None if encoder is None else encoder.fingerprint
    if made is None or made.parent is not None or (made.name, made.encoder) != (name, fingerprint):
        return None
    if made.snapshot != source.snapshot():
        return None
    with writing(folder):
        prune(folder)
    return made


@contextmanager
def _begun(source: Source, folder: Path, name: str, encoder: Encoder | None, options: PackOptions | None, *,
           update: bool, add: bool) -> Iterator[NextGeneration]:
    """The generation that a build begins or goes on with, under the pack's lock."""
    _check_folder(folder)
    with writing(folder):
        parent = current(folder)
        if parent is not None and not (update or add):
            raise PackError(f"'{folder}' holds pack '{parent.name}' already; choose another folder, or --update it")
        if parent is None and (update or add):
            raise PackError(f"'{folder}' holds no pack; build one there first")
        generation = NextGeneration(folder, name=name, snapshot=source.snapshot(), encoder=encoder,
                                    options=options or PackOptions(), parent=parent)
        try:
            yield generation
        finally:
            generation.close()


def _ensure_store(generation: NextGeneration, source: Source, workers: int | None, command: str,
                  on_progress: OnProgress | None) -> None:
    if command:
        write_atomic(generation.folder / COMMAND, command.encode())
    if not generation.store_done:
        _write_store(generation, source, workers or os.cpu_count() or 1, on_progress)


def _check_folder(folder: Path) -> None:
    """A folder with something else in it is not built into, nor is one that only looks like a pack's."""
    if (folder / LOCK).exists() or (folder / MANIFEST).is_file() or not folder.is_dir():
        return
    strange = sorted(path.name for path in folder.iterdir())
    if strange:
        raise PackError(f"'{folder}' holds '{strange[0]}', which is no part of a pack; choose a new folder")


def _write_store(generation: NextGeneration, source: Source, workers: int, on_progress: OnProgress | None) -> None:
    writer = generation.open_store()
    try:
        if not writer.finished:
            source.prepare(generation.folder / BUILD)
            _read(source, writer, workers, on_progress)
        if not writer.counts.articles and generation.parent is None:
            raise PackError(f"'{generation.folder}': the snapshot has no article that could be read; see what was "
                            f"skipped: {writer.skipped_reasons() or 'nothing'}")
        if on_progress is not None:
            on_progress(WORDS, 0, 1)
        generation.finish_store(writer)
        if on_progress is not None:
            on_progress(WORDS, 1, 1)
    finally:
        writer.close()


def _read(source: Source, writer: StoreWriter, workers: int, on_progress: OnProgress | None) -> None:
    chunks, total = source.chunks(), source.size
    done = sum(chunk.size for chunk in islice(chunks, writer.chunks))
    for chunk, items in read_ahead(source, chunks, workers):
        with writer.chunk(chunk.number):
            write_items(writer, items)
        done += chunk.size
        if on_progress is not None:
            on_progress(READING, done, total)


def read_ahead(source: Source, chunks: Iterator[Chunk], workers: int) -> Iterator[tuple[Chunk, list[Item]]]:
    """Chunks in order with what they hold, parsed in other processes a little ahead."""
    if workers == 1:
        yield from ((chunk, list(source.parse(chunk))) for chunk in chunks)
        return
    # spawn: a fork would carry ONNX Runtime's and FAISS's threads along, half of them
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_hold,
                             initargs=(source,)) as pool:
        waiting: deque[tuple[Chunk, Future[list[Item]]]] = deque()
        for chunk in islice(chunks, 2 * workers):
            waiting.append((chunk, pool.submit(_parse, chunk)))
        try:
            while waiting:
                chunk, future = waiting.popleft()
                try:
                    items = future.result()
                except BrokenProcessPool as exc:
                    raise SourceError(f"a reading process died at part {chunk.number} of the snapshot (killed for "
                                      "memory, or by a file that no library survives); what was read stays: start the "
                                      "same command with --workers 1 to see why") from exc
                waiting.extend((more, pool.submit(_parse, more)) for more in islice(chunks, 1))
                yield chunk, items
        finally:
            pool.shutdown(cancel_futures=True)


_source: Source | None = None  # of a worker process


def _hold(source: Source) -> None:
    global _source
    _source = source


def _parse(chunk: Chunk) -> list[Item]:
    if _source is None:
        raise PackError("a reading process was started without its source; start the build again")
    return list(_source.parse(chunk))


def write_items(writer: StoreWriter, items: Sequence[Item]) -> None:
    """Write what a chunk holds; what cannot be written is counted."""
    shown: dict[str, list[ImageDraft]] = {}
    for item in items:
        if isinstance(item, ImageDraft):
            for key in item.articles:
                shown.setdefault(key, []).append(item)
    for item in items:
        try:
            _write_item(writer, item, shown)
        except DraftRefused as refused:
            writer.skip(refused.skipped)


def _write_item(writer: StoreWriter, item: Item, shown: dict[str, list[ImageDraft]]) -> None:
    match item:
        case ArticleDraft():
            writer.add_article(item, shown.get(item.identity, ()))
        case ImageDraft():
            writer.add_image(item)
        case RedirectDraft():
            writer.add_redirect(item)
        case Skipped():
            writer.skip(item)

