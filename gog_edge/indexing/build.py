"""Builds a pack from a snapshot, or updates one: worker processes parse, one process writes.

A build can be killed at any point; the same call resumes it.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

from gog_edge.errors import PackError, SourceError
from gog_edge.files import write_atomic
from gog_edge.indexing import OnProgress
from gog_edge.indexing.commit import LOCK, current_manifest, prune, write_lock
from gog_edge.indexing.generation import GenerationBuilder, PackOptions
from gog_edge.indexing.sources.base import (
    ArticleRecord,
    Chunk,
    ImageRecord,
    Record,
    RedirectRecord,
    SharedFile,
    Skipped,
    Source,
    Used,
    Verifiable,
)
from gog_edge.indexing.store_writer import RecordError, StoreWriter
from gog_edge.indexing.vectors.embedding import Encoders, fingerprint_of
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.manifest import BUILD, COMMAND, MANIFEST, Manifest
from gog_edge.retrieval.text.encoder import TextEncoder

READING, WORDS = "reading", "words"  # stages: parsing the snapshot, and building the word index


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
    text_encoder: TextEncoder | None = None,
    verify: bool = True,
) -> Manifest:
    """Build a pack from a snapshot, or the next generation of one, and return its manifest.

    If it was killed, a call with the same arguments resumes it: complete chunks, shards and indexes are reused.

    Args:
        source: the snapshot.
        folder: new or empty; a pack if `update` or `add` is given; or an unfinished build with the same arguments.
        name: name of the pack in citations and addresses.
        encoder: None for a pack without images.
        options: how the pack is built.
        workers: worker processes that parse; one per core by default.
        update: replace the content of the pack by this snapshot. Only changes are written and embedded; articles that
            the snapshot does not contain are deleted.
        add: add the snapshot to the content of the pack; articles of the same key are replaced.
        command: command line that resumes this build, for the message when an unfinished pack is opened.
        on_progress: called with (stage, done, total).
        text_encoder: embeds the paragraphs; None for a pack whose paragraphs are searched by words only.
        verify: compare the checksum of a snapshot that contains one before anything is read.

    Raises:
        PackError: the folder contains something else, the pack is being written, or the disk is full.
        SourceError: the snapshot cannot be read, or its checksum differs. What was read before remains.
    """
    _check_folder(folder)
    encoders = Encoders(encoder, text_encoder)
    with write_lock(folder):
        current = current_manifest(folder)
        if current is not None and not update and not add and _is_result(current, source, name, encoders):
            prune(folder, current)
            return current
        if verify:
            _verify(source, folder, on_progress)
        with _generation(source, folder, current, name, encoders, options, change=update or add) as generation:
            _ensure_store(generation, source, workers, command, on_progress)
            return generation.finish(delete_missing=update, on_progress=on_progress)


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
    text_encoder: TextEncoder | None = None,
    verify: bool = True,
) -> None:
    """Write the store only, the first step of `build_pack`. The vectors can then be embedded by `ray_embedding`.

    Arguments and errors are those of `build_pack`, which completes the build.
    """
    _check_folder(folder)
    encoders = Encoders(encoder, text_encoder)
    with write_lock(folder):
        current = current_manifest(folder)
        if verify:
            _verify(source, folder, on_progress)
        with _generation(source, folder, current, name, encoders, options, change=update or add) as generation:
            _ensure_store(generation, source, workers, command, on_progress)


def _is_result(current: Manifest, source: Source, name: str, encoders: Encoders) -> bool:
    """Return whether a pack is the result of a first build with these arguments, which was stopped after its commit."""
    built_with = current.encoder, current.text_encoder
    return (current.parent is None and current.name == name and current.snapshot == source.snapshot()
            and built_with == (fingerprint_of(encoders.image), fingerprint_of(encoders.text)))


def _verify(source: Source, folder: Path, on_progress: OnProgress | None) -> None:
    """Compare the checksum of the snapshot, unless a call that this one resumes did so before it started the build."""
    if isinstance(source, Verifiable) and not (folder / BUILD).is_dir():
        source.verify(on_progress)


@contextmanager
def _generation(source: Source, folder: Path, current: Manifest | None, name: str, encoders: Encoders,
                options: PackOptions | None, *, change: bool) -> Iterator[GenerationBuilder]:
    """Start or resume a generation. The caller holds the pack's lock."""
    if current is not None and not change:
        raise PackError(f"'{folder}' contains pack '{current.name}' already; choose another folder, or give --update")
    if current is None and change:
        raise PackError(f"'{folder}' does not contain a pack; build one first, without --update")
    generation = GenerationBuilder(folder, name=name, snapshot=source.snapshot(), encoder=encoders.image,
                                   options=options or PackOptions(), parent=current, text_encoder=encoders.text)
    try:
        yield generation
    finally:
        generation.close()


def _check_folder(folder: Path) -> None:
    """Raise PackError for a folder with other files, so that a build does not mix with them."""
    if (folder / LOCK).exists() or (folder / MANIFEST).is_file() or not folder.is_dir():
        return
    others = sorted(path.name for path in folder.iterdir())
    if others:
        raise PackError(f"'{folder}' contains '{others[0]}', which does not belong to a pack; choose a new folder")


# --- the store ----------------------------------------------------------------------------------


def _ensure_store(generation: GenerationBuilder, source: Source, workers: int | None, command: str,
                  on_progress: OnProgress | None) -> None:
    if command:
        write_atomic(generation.folder / COMMAND, command.encode())
    if not generation.store_done:
        _write_store(generation, source, workers or os.cpu_count() or 1, on_progress)


def _write_store(generation: GenerationBuilder, source: Source, workers: int, on_progress: OnProgress | None) -> None:
    writer = generation.open_store()
    try:
        if not writer.finished:
            source.prepare(generation.folder / BUILD)
            _write_chunks(source, writer, workers, on_progress)
        if not writer.counts.articles and generation.parent is None:
            raise PackError(f"'{generation.folder}': no article of the snapshot could be read; skipped: "
                            f"{writer.report.reasons() or 'nothing'}")
        if on_progress is not None:
            on_progress(WORDS, 0, 1)
        generation.finish_store(writer)
        if on_progress is not None:
            on_progress(WORDS, 1, 1)
    finally:
        writer.close()


def _write_chunks(source: Source, writer: StoreWriter, workers: int, on_progress: OnProgress | None) -> None:
    chunks, total = source.chunks(), source.size
    done = sum(chunk.size for chunk in islice(chunks, writer.chunks))
    for chunk, records in parse_chunks(source, chunks, workers):
        with writer.chunk(chunk.number):
            write_records(writer, records)
        done += chunk.size
        if on_progress is not None:
            on_progress(READING, done, total)


def parse_chunks(source: Source, chunks: Iterator[Chunk], workers: int) -> Iterator[tuple[Chunk, list[Record]]]:
    """Yield the chunks in order with their records, parsed by worker processes that run a few chunks ahead.

    Raises:
        SourceError: a worker process died.
    """
    if workers == 1:
        yield from ((chunk, list(source.parse(chunk))) for chunk in chunks)
        return
    # spawn, because a fork would copy a part of the threads of ONNX Runtime and FAISS
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_set_source,
                             initargs=(source,)) as pool:
        pending: deque[tuple[Chunk, Future[list[Record]]]] = deque()
        for chunk in islice(chunks, 2 * workers):
            pending.append((chunk, pool.submit(_parse, chunk)))
        try:
            while pending:
                chunk, future = pending.popleft()
                try:
                    records = future.result()
                except BrokenProcessPool as exc:
                    raise SourceError(f"a worker process died while parsing chunk {chunk.number} of the snapshot (out "
                                      "of memory, or a crash in a library); what was read remains. Run the same "
                                      "command with --workers 1 to see the cause") from exc
                pending.extend((more, pool.submit(_parse, more)) for more in islice(chunks, 1))
                yield chunk, records
        finally:
            pool.shutdown(cancel_futures=True)


_source: Source | None = None  # of a worker process


def _set_source(source: Source) -> None:
    global _source
    _source = source


def _parse(chunk: Chunk) -> list[Record]:
    if _source is None:
        raise PackError("a worker process was started without its source; run the same command again")
    return list(_source.parse(chunk))


def write_records(writer: StoreWriter, records: Sequence[Record]) -> None:
    """Write the records of a chunk. Those that the writer rejects, and the items they are from, count as skipped."""
    images: dict[str, list[ImageRecord]] = {}  # by the key of their article
    for record in records:
        if isinstance(record, ImageRecord):
            for key in record.articles:
                images.setdefault(key, []).append(record)
    rejected: dict[str, list[Skipped]] = {}  # by the key of their article
    for record in records:
        try:
            _write_record(writer, record, images, rejected)
        except RecordError as error:
            rejected.setdefault(_article_of(record), []).append(error.skipped)
    counted = {record.article for record in records if isinstance(record, Used)}
    for skipped in (one for key, own in rejected.items() if key not in counted for one in own):
        writer.report.write(skipped)


def _write_record(writer: StoreWriter, record: Record, images: dict[str, list[ImageRecord]],
                  rejected: dict[str, list[Skipped]]) -> None:
    match record:
        case ArticleRecord():
            writer.add_article(record, images.get(record.identity, ()))
        case ImageRecord():
            writer.add_image(record)
        case RedirectRecord():
            writer.add_redirect(record)
        case Used() if record.article in rejected:
            writer.report.skip_all(rejected[record.article][0].reason, record.kind, record.count, [record.item])
        case SharedFile() if record.article in rejected and not record.reason:
            writer.report.write(replace(record, reason=rejected[record.article][0].reason))
        case _:
            writer.report.write(record)


def _article_of(record: Record) -> str:
    match record:
        case ArticleRecord():
            return record.identity
        case ImageRecord():
            return record.articles[0] if record.articles else ""
    return ""
