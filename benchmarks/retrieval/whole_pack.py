"""Measure a whole search in a pack of any size: synthetic vectors with articles and pictures around them.

    python -m benchmarks.retrieval.whole_pack 1000000 runs/bench-retrieval encoder

The vectors are those of `benchmarks.retrieval.corpus`. The encoder must have their 512 dimensions and is not run,
because the queries are vectors as well. The pack has no golden image, since no vector belongs to a picture. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gog_edge.cli.common import command_imports, command_main

with command_imports(__name__):
    import numpy as np
    import psutil
    from rich.progress import track

    from benchmarks.retrieval.corpus import SyntheticVectors, write_shards
    from gog_edge.files import write_array
    from gog_edge.indexing.commit import commit_generation, write_lock
    from gog_edge.indexing.generation import GenerationBuilder, PackOptions
    from gog_edge.indexing.sources.base import ArticleRecord, ImageRecord
    from gog_edge.indexing.store_writer import StoreWriter
    from gog_edge.retrieval.encoder import Encoder
    from gog_edge.retrieval.manifest import MANIFEST, IndexTarget, Manifest, Shard, Snapshot, Space
    from gog_edge.retrieval.pack import Pack
    from gog_edge.retrieval.retriever import Retriever
    from gog_edge.retrieval.vectors.shards import VectorShards
    from gog_edge.types import Vectors

SNAPSHOT = Snapshot("made", "2026-01-01", "made", "made", "CC0")
IMAGES_PER_ARTICLE, PARAGRAPHS = 3, 6
ARTICLES_PER_CHUNK = 2_000
SEARCHES = 300  # of one and of eight crops
HELD_OUT = 125  # pictures whose crops are used to tune the index
VOCABULARY = 30_000  # words


@dataclass(frozen=True, slots=True)
class WholeFigures:
    """Times of a whole search after encoding: nearest images, duplicates, articles, paragraphs, one fused result."""

    rows: int
    open_s: float
    p50_ms_1: float
    p50_ms_8: float
    p95_ms_8: float
    resident_mib: float  # of this process after all searches, including the encoder


def write_pack(folder: Path, rows: int, encoder: Encoder, work: Path) -> Manifest:
    """Write a pack of `rows` images; `work` is the folder of the vectors."""
    source = SyntheticVectors.make(encoder.dim)
    files = write_shards(source, rows, work)
    shutil.rmtree(folder, ignore_errors=True)
    with write_lock(folder):
        generation = GenerationBuilder(folder, name="made", snapshot=SNAPSHOT, encoder=encoder,
                                       options=PackOptions(captions=False), parent=None)  # fmt: skip
        store = generation.open_store()
        _write_rows(store, rows)
        generation.finish_store(store)
        space = Space(_link_shards(folder, files))
        shards = VectorShards.open(files, encoder.dim)
        queries = source.pictures(shards, HELD_OUT, seed=1).reshape(-1, encoder.dim)
        images = generation.build_index("images", space, queries)
        segment = generation.segment()
        manifest = Manifest(
            name="made", generation=1, parent=None, snapshot=SNAPSHOT, encoder=encoder.fingerprint,
            segments=(segment,), images=images, captions=Space(), tombstones=None, counts=segment.counts,
            duplicate_cosine=0.995, golden=None, report=None, files=(), target=IndexTarget(None, 0.95),
        )  # fmt: skip
        generation.close()
        return commit_generation(folder, manifest, None)


def _write_rows(store: StoreWriter, rows: int) -> None:
    articles = -(-rows // IMAGES_PER_ARTICLE)
    rng = np.random.default_rng(3)
    shares = 1 / np.arange(1, VOCABULARY + 1)  # Zipf's law
    words = rng.choice(VOCABULARY, (10_000, 50), p=shares / shares.sum())
    texts = [" ".join(f"word{number}" for number in row) for row in words.tolist()]
    image = 0
    for number, start in enumerate(track(range(0, articles, ARTICLES_PER_CHUNK), description="articles")):
        with store.chunk(number):
            for article in range(start, min(start + ARTICLES_PER_CHUNK, articles)):
                paragraphs = tuple((f"Section {n // 2}", texts[(article * 7 + n) % len(texts)])
                                   for n in range(PARAGRAPHS))  # fmt: skip
                store.add_article(ArticleRecord(f"Thing {article}", paragraphs, "CC0"))
                for _ in range(min(IMAGES_PER_ARTICLE, rows - image)):
                    store.add_image(ImageRecord(tiny_png(image), f"Picture {image}", "CC0", "", (f"Thing {article}",)))
                    image += 1


def tiny_png(number: int) -> bytes:
    """Return a PNG of two pixels, different for each number (PNG specification, sections 5 and 11)."""
    row = b"\0" + number.to_bytes(6, "big")
    header = struct.pack(">IIBBBBB", 2, 1, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        _png_chunk(name, data) for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(row)), (b"IEND", b""))
    )


def _png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _link_shards(folder: Path, files: list[tuple[Path, Path]]) -> tuple[Shard, ...]:
    """Link the vectors into the pack as its shards. Ids of the store begin at 1."""
    (folder / "vectors").mkdir()
    shards = []
    for number, (vectors, ids) in enumerate(files):
        store_ids = np.load(ids) + 1
        stem = f"vectors/000001-images-{number:06d}"
        shard = Shard(f"{stem}.npy", f"{stem}.ids.npy", len(store_ids))
        os.link(vectors, folder / shard.vectors)
        write_array(folder / shard.ids, store_ids)
        shards.append(shard)
    return tuple(shards)


def measure_pack(folder: Path, encoder: Encoder) -> WholeFigures:
    """Open a pack of `write_pack` and search it, alternating between one crop and eight crops."""
    began = time.perf_counter()
    pack = Pack.open(folder, encoder)
    opened = time.perf_counter() - began
    retriever = Retriever(encoder, [pack])
    pictures = SyntheticVectors.make(encoder.dim).pictures(pack.images.shards, SEARCHES, seed=2)
    one, eight = [], []
    for crops in pictures:
        one.append(_seconds(retriever, crops[:1]))
        eight.append(_seconds(retriever, crops))
    resident = psutil.Process().memory_info().rss / 2**20
    rows = len(pack.images.shards)
    pack.close()
    p50_1, p50_8, p95_8 = (round(float(np.percentile(times, percent)) * 1e3, 3)
                           for times, percent in ((one, 50), (eight, 50), (eight, 95)))  # fmt: skip
    return WholeFigures(rows, round(opened, 3), p50_1, p50_8, p95_8, round(resident, 1))


def _seconds(retriever: Retriever, crops: Vectors) -> float:
    began = time.perf_counter()
    retriever.search_vectors(crops)
    return time.perf_counter() - began


@command_main
def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark: write the pack if it does not exist, and measure it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=int, help="number of images in the pack")
    parser.add_argument("work", type=Path, help="folder for vectors and packs, as of benchmarks.bench_retrieval")
    parser.add_argument("encoder", type=Path, help="folder of an encoder with 512 dimensions")
    args = parser.parse_args(argv)
    encoder, folder = Encoder.open(args.encoder), args.work / f"pack-{args.rows}"
    if not (folder / MANIFEST).is_file():
        write_pack(folder, args.rows, encoder, args.work / "vectors")
    print(json.dumps(asdict(measure_pack(folder, encoder))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
