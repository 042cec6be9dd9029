"""Compaction: one segment with the same ids and the same search results, without deleted rows."""

import contextlib
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest
from listed_source import ListedSource, little_groups, with_news
from little_world import FACTS, FLAGS, bars, flag, png
from tiny_encoder import write_tiny_encoder

from gog_edge.errors import PackError
from gog_edge.indexing.build import build_pack
from gog_edge.indexing.commit import write_lock
from gog_edge.indexing.compact import MERGED_SHARDS, compact, copy_live_rows
from gog_edge.indexing.generation import PackOptions
from gog_edge.indexing.sources.base import ArticleRecord, ImageRecord, Skipped
from gog_edge.indexing.store_writer import FirstIds, StoreWriter
from gog_edge.indexing.tombstones import remove
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.manifest import MANIFEST, read_manifest
from gog_edge.retrieval.pack import Pack, verify_pack
from gog_edge.retrieval.retriever import Retriever
from gog_edge.retrieval.text.segment import SegmentReader
from gog_edge.types import ImageQuery, TextQuery

SMALL = PackOptions(shard_rows=2, tiles=True)
IMAGE_QUERIES = [ImageQuery(flag(name), f"What is the capital of {name}?") for name in FLAGS]
TEXT_QUERIES = [*(TextQuery(f"currency of {name}") for name in FACTS if name != "Chad"), TextQuery("Hispania")]


@pytest.fixture
def folder(tmp_path, tiny_encoder):
    """Build a pack of four segments with an added, a with_news and a deleted article."""
    folder = tmp_path / "pack"

    def build(groups, **more):
        build_pack(ListedSource(groups), folder, name="little", encoder=tiny_encoder, options=SMALL, workers=1, **more)

    build(little_groups(skip=["Italy"]))
    build(little_groups(), update=True)
    build(with_news(little_groups(), "Spain", "Spain has news."), update=True)
    malta = ImageRecord(png(bars((255, 255, 255), (200, 0, 0))), "Malta's", "CC0", "us", ("Malta",), lead=True)
    build(((ArticleRecord("Malta", (("Flag", "Malta has one."),), "CC BY 4.0"), malta),), add=True)
    remove(folder, articles=["Chad"])
    return folder


def answers(folder, encoder):
    pack = Pack.open(folder, encoder)
    images, texts = (Retriever(encoder, [pack]).search(queries) for queries in (IMAGE_QUERIES, TEXT_QUERIES))
    pack.close()
    # BM25 scores change a little when deleted paragraphs are not counted any more; the best article is the same.
    return images, [(result.evidence[0].titles, result.evidence[0].passages[0]) for result in texts]


def rows(folder, table, columns="*"):
    """Return the rows of a table in all segments, deleted ones included."""
    found = []
    for segment in read_manifest(folder).segments:
        db = sqlite3.connect(folder / segment.store)
        found += db.execute(f"SELECT {columns} FROM {table}").fetchall()
        db.close()
    return found


def vectors(folder, space):
    """Return the vectors of each id in order: id -> bytes."""
    found = {}
    for shard in getattr(read_manifest(folder), space).shards:
        for number, vector in zip(np.load(folder / shard.ids), np.load(folder / shard.vectors), strict=True):
            found.setdefault(int(number), []).append(vector.tobytes())
    return found


def test_search_results_are_unchanged_and_deleted_rows_are_dropped(folder, tiny_encoder):
    before, expected = read_manifest(folder), answers(folder, tiny_encoder)
    paragraphs, pixels = rows(folder, "paragraphs", "id, article, start, text"), dict(rows(folder, "pixels"))
    embedded = {space: vectors(folder, space) for space in ("images", "captions")}
    assert len(before.segments) == 4 and before.tombstones is not None

    manifest = compact(folder, tiny_encoder, SMALL)
    assert (manifest.generation, manifest.parent, manifest.tombstones) == (6, 5, None)
    assert manifest.counts == before.counts == manifest.segments[0].counts and len(manifest.segments) == 1
    assert verify_pack(folder) == manifest
    assert answers(folder, tiny_encoder) == expected
    articles = set(np.load(folder / before.tombstones.articles).tolist())
    images = set(np.load(folder / before.tombstones.images).tolist())
    assert articles and images
    live = [row for row in paragraphs if row[1] not in articles]
    assert rows(folder, "paragraphs", "id, article, start, text") == live
    assert dict(rows(folder, "pixels")) == {image: data for image, data in pixels.items() if image not in images}
    for space, own in embedded.items():
        assert vectors(folder, space) == {image: all_of for image, all_of in own.items() if image not in images}
    assert {shard.rows for shard in manifest.images.shards[:-1]} == {MERGED_SHARDS * SMALL.shard_rows}
    assert sum(len(own) for own in vectors(folder, "images").values()) == manifest.images.rows


def test_ids_are_never_reused(folder, tiny_encoder):
    last = read_manifest(folder).segments[-1]
    remove(folder, articles=["Malta"])  # has the highest ids
    compact(folder, tiny_encoder)
    fresh = ((ArticleRecord("Cuba", (("Flag", "Cuba has one."),), "CC0"),
              ImageRecord(png(bars((0, 0, 255), (0, 0, 0))), "Cuba's", "CC0", "us", ("Cuba",))),)
    manifest = build_pack(ListedSource(fresh), folder, name="little", encoder=tiny_encoder, options=SMALL, workers=1,
                          add=True)
    for kind in ("articles", "paragraphs", "images"):
        assert getattr(manifest.segments[-1], kind).first == getattr(last, kind).last + 1
    assert verify_pack(folder) == manifest
    pack = Pack.open(folder, tiny_encoder)
    assert pack.store.article_by_key("Cuba") == last.articles.last + 1 and pack.store.article_by_key("Malta") is None
    pack.close()


def test_an_update_after_compaction_embeds_only_changes(folder, tiny_encoder):
    compact(folder, tiny_encoder, SMALL)
    before = read_manifest(folder)
    groups = with_news(little_groups(skip=["Chad"]), "Spain", "Spain has news.")
    groups = with_news(groups, "Norway", "Norway has snow.")
    manifest = build_pack(ListedSource(groups), folder, name="little", encoder=tiny_encoder, options=SMALL, workers=1,
                          update=True)
    assert manifest.segments[-1].counts.articles == 1 and manifest.segments[-1].counts.images == 0
    assert manifest.images.shards == before.images.shards


def test_the_files_of_the_parent_remain_until_the_next_commit(folder, tiny_encoder):
    old = Pack.open(folder, tiny_encoder)
    expected = Retriever(tiny_encoder, [old]).search(IMAGE_QUERIES + TEXT_QUERIES)
    parent = read_manifest(folder)
    compact(folder, tiny_encoder)
    assert all((folder / path).is_file() for path in parent.paths)
    remove(folder, articles=["Malta"])
    assert not any((folder / segment.store).exists() for segment in parent.segments)
    # An open pack is not affected.
    assert Retriever(tiny_encoder, [old]).search(IMAGE_QUERIES + TEXT_QUERIES) == expected
    old.close()
    compact(folder, tiny_encoder)
    assert {path.name for path in folder.iterdir()} >= {MANIFEST} and not (folder / "build").exists()
    assert verify_pack(folder).counts.articles == len(FACTS) - 1


def captioned(caption):
    image = ImageRecord(png(bars((10, 20, 30), (200, 100, 0))), caption, "CC0", "us", ("Cuba",), lead=True)
    return (ArticleRecord("Cuba", (("Flag", f"Cuba: {caption}."),), "CC0"), image)


@pytest.mark.parametrize("captions", [("a castel", "a castle"), ("one", "two", "three")])
def test_corrected_captions_replace_the_old_ones(tmp_path, tiny_encoder, captions):
    folder = tmp_path / "pack"
    for number, caption in enumerate(captions):
        build_pack(ListedSource((*little_groups(), captioned(caption))), folder, name="little", encoder=tiny_encoder,
                   options=SMALL, workers=1, update=number > 0)
    whole = build_pack(ListedSource((*little_groups(), captioned(captions[-1]))), tmp_path / "new", name="little",
                       encoder=tiny_encoder, options=SMALL, workers=1)
    assert read_manifest(folder).captions.rows == whole.captions.rows + len(captions) - 1
    manifest = compact(folder, tiny_encoder, SMALL)
    assert manifest.captions.rows == whole.captions.rows and verify_pack(folder) == manifest
    mine, fresh = (sorted(row for own in vectors(one, "captions").values() for row in own)
                   for one in (folder, tmp_path / "new"))
    assert mine == fresh
    later = build_pack(ListedSource((*little_groups(), captioned(captions[0]))), folder, name="little",
                       encoder=tiny_encoder, options=SMALL, workers=1, update=True)
    assert later.captions.rows == manifest.captions.rows + 1  # a dropped caption is embedded again when it returns


def test_skipped_records_are_added_up_over_all_segments(tmp_path):
    writers = []
    for number, start in enumerate((FirstIds(), FirstIds(100, 100, 100))):
        writer = StoreWriter(tmp_path / f"{number}.sqlite", first_ids=start)
        with writer.chunk(0):
            writer.add_article(ArticleRecord(f"Place {number}", (("", "It is there."),), "CC0"))
            for one in range(2 + number):
                writer.report.write(Skipped("image does not decode", f"{number}-{one}.png"))
        writers.append(writer.finish(f"{number}.sqlite"))
    stores = [tmp_path / segment.store for segment in writers]
    copy_live_rows(tmp_path / "one.sqlite", stores, np.empty(0, np.int64), np.empty(0, np.int64))
    reader = SegmentReader.open(tmp_path / "one.sqlite")
    assert [(one["reason"], one["count"]) for one in reader.report()["skipped"]] == [("image does not decode", 5)]
    reader.close()


def test_a_pack_without_images(tmp_path):
    build_pack(ListedSource(little_groups()), tmp_path / "pack", name="texts", encoder=None, workers=1)
    remove(tmp_path / "pack", articles=["Chad"])
    manifest = compact(tmp_path / "pack", None)
    assert manifest.counts.articles == len(FACTS) - 1 and manifest.images.rows == 0
    assert verify_pack(tmp_path / "pack") == manifest


def test_another_encoder_is_refused(folder, tmp_path):
    other = Encoder.open(write_tiny_encoder(tmp_path / "other", seed=7), threads=1)
    for encoder in (other, None):
        with pytest.raises(PackError, match="another encoder"):
            compact(folder, encoder)
    assert read_manifest(folder).generation == 5


def test_a_second_writer_is_refused(folder, tiny_encoder):
    with write_lock(folder), pytest.raises(PackError, match="written by another process"):
        compact(folder, tiny_encoder)


@pytest.mark.parametrize("limit", [2_000, 40_000])
def test_a_full_disk_leaves_the_current_generation(folder, tiny_encoder, limit):
    expected = answers(folder, tiny_encoder)
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, usual[1]))  # behaves like a full disk
    try:
        with pytest.raises(PackError, match="disk of .* is full.*free some space"):
            compact(folder, tiny_encoder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert verify_pack(folder).generation == 5
    assert answers(folder, tiny_encoder) == expected
    assert compact(folder, tiny_encoder).generation == 6


# Forks a child for each job, so that a kill always interrupts the job itself.
_CHANGES = """
import os, sys
from pathlib import Path
from gog_edge.indexing.tombstones import remove
from gog_edge.indexing.compact import compact
from gog_edge.retrieval.encoder import Encoder
folder, encoder = Path(sys.argv[1]), Path(sys.argv[2])
for line in sys.stdin:
    child = os.fork()
    if not child:
        what = line.split()
        if what[0] == "remove":
            remove(folder, articles=what[1:])
        else:
            compact(folder, Encoder.open(encoder, threads=1))
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_generation(folder, tiny_encoder,
                                                                               tiny_encoder_folder):
    rng = np.random.default_rng(5)
    expected, generation = read_manifest(folder).counts.articles, 5
    names = iter([name for name in FACTS if name != "Chad"])
    command = [sys.executable, "-c", _CHANGES, str(folder), str(tiny_encoder_folder)]
    killed = 0
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        for turn in range(24):
            job = f"remove {next(names)}" if turn % 4 == 3 else "compact"
            process.stdin.write(job + "\n")
            process.stdin.flush()
            child = int(process.stdout.readline())
            time.sleep(rng.uniform(0, 0.15))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            killed += int(process.stdout.readline()) == signal.SIGKILL
            manifest = verify_pack(folder)
            assert manifest.generation - generation in (0, 1)
            if job != "compact" and manifest.generation > generation:
                expected -= 1
            assert manifest.counts.articles == expected
            generation = manifest.generation
        process.stdin.close()
    assert killed >= 5
    Pack.open(folder, tiny_encoder).close()
    assert compact(folder, tiny_encoder).generation == generation + 1
    folders = {path.name for path in folder.iterdir() if path.is_dir()}
    assert folders == {"generations", "index", "reports", "store", "tombstones", "vectors"}
