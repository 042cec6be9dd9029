"""Packs on Milvus: collections in milvus-lite, in this process or in a server process that is stopped and killed."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import faiss
import numpy as np
import pytest
from listed_source import ListedSource, little_groups
from little_world import SNAPSHOT, articles, flag, images, png
from pymilvus import DataType, MilvusClient
from tiny_encoder import write_tiny_encoder

from gog_edge.config import MilvusConfig
from gog_edge.errors import BackendError, PackError
from gog_edge.indexing.build import build_pack
from gog_edge.indexing.distribution.milvus_loading import collection_name, load_export
from gog_edge.indexing.distribution.parquet_export import export_parquet, read_export_info
from gog_edge.indexing.generation import PackOptions, PackWriter, Snapshot
from gog_edge.indexing.sources.base import ArticleRecord, ImageRecord
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.manifest import read_manifest
from gog_edge.retrieval.pack import Pack, open_shards
from gog_edge.retrieval.retriever import Retriever
from gog_edge.retrieval.vectors.milvus import PROPERTY, MilvusConnection, alias_name
from gog_edge.types import ImageQuery, TextQuery

PICTURES = 800
DIM = 128


def noise(seed):
    """Return a picture of 4 x 4 random squares."""
    squares = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return squares.repeat(8, axis=0).repeat(8, axis=1)


@pytest.fixture(scope="module")
def wide_encoder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tiny_encoder.DIM", DIM)
        return Encoder.open(write_tiny_encoder(tmp_path_factory.mktemp("wide")), threads=1)


@pytest.fixture(scope="module")
def crowd(tmp_path_factory, wide_encoder):
    """A pack with 4,800 vectors of 800 pictures: one of the whole picture and five of its tiles."""
    folder = tmp_path_factory.mktemp("crowd") / "pack"
    snapshot = Snapshot("noise", "2026-01-01", "0" * 36, "0" * 64, "CC0")
    with PackWriter(folder, name="crowd", snapshot=snapshot, encoder=wide_encoder,
                    options=PackOptions(tiles=True, shard_rows=300)) as writer:
        records = [ArticleRecord(f"Picture {n}", (("", f"Picture {n} is."),), "CC0") for n in range(PICTURES)]
        writer.add(records, [ImageRecord(png(noise(n)), "red", "CC0", "us", (f"Picture {n}",), lead=True)
                              for n in range(PICTURES)])  # fmt: skip
        writer.commit()
    return folder


@pytest.fixture(scope="module")
def crowd_export(crowd, tmp_path_factory):
    folder = tmp_path_factory.mktemp("crowd_export")
    export_parquet(crowd, folder)
    return folder


@pytest.fixture(scope="module")
def queries(wide_encoder):
    return wide_encoder.embed_images([noise(10_000 + n) for n in range(70)])  # more than one call


def open_lite(path):
    return MilvusConnection.open(MilvusConfig(str(path)))


@pytest.fixture(scope="module")
def lite(tmp_path_factory):
    """A connection to milvus-lite in this process."""
    yield from _lite(tmp_path_factory.mktemp("lite") / "crowd.db")


@pytest.fixture
def own_lite(tmp_path):
    yield from _lite(tmp_path / "own.db")


def _lite(path):
    from milvus_lite.server_manager import server_manager_instance

    server = open_lite(path)
    yield server
    server.close()
    server_manager_instance.release_server(str(path))


def exact_search(folder, dim, queries, k):
    """Return cosines and ids of FAISS's exact search over all stored vectors, each id once."""
    shards = open_shards(folder, read_manifest(folder).images, dim)
    vectors, ids = np.concatenate(list(shards.blocks())), shards.ids_of(np.arange(len(shards)))
    index = faiss.IndexFlatIP(dim)
    index.add(vectors)
    scores, rows = index.search(queries, len(vectors))
    found = []
    for own_scores, own_rows in zip(scores, rows, strict=True):
        best = {}
        for score, image in zip(own_scores.tolist(), ids[own_rows].tolist(), strict=True):
            best.setdefault(image, score)
        found.append(list(best.items())[:k])
    return np.array([[score for _, score in own] for own in found]), np.array([[i for i, _ in own] for own in found])


# --- results ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "search"), [("FLAT", {}), ("IVF_FLAT", {"nprobe": 4096}), ("HNSW", {"ef": 2048})])
def test_ids_order_and_cosines_equal_exact_search_by_faiss(crowd, crowd_export, lite, queries, kind, search):
    load_export(crowd_export, lite, index=kind, search=search)
    index = lite.open_index(read_manifest(crowd), "images", np.empty(0, np.int64))
    assert len(index) == 6 * PICTURES and len(index.shards) == len(index)
    for k in (1, 24):
        scores, ids = exact_search(crowd, DIM, queries, k)
        hits = index.search(queries, k)
        assert hits.ids.dtype == np.int64 and hits.scores.dtype == np.float32
        np.testing.assert_allclose(hits.scores, scores, atol=1e-5)
        np.testing.assert_array_equal(hits.ids, ids)


def test_results_and_rows_equal_those_of_the_packs_own_index(crowd, crowd_export, wide_encoder, lite, queries):
    load_export(crowd_export, lite, index="FLAT")
    pack = Pack.open(crowd, wide_encoder)
    index = lite.open_index(pack.manifest, "images", np.empty(0, np.int64))
    without = np.array([1, 2, 3, *range(100, 700)], dtype=np.int64)
    for k, unwanted in [(0, None), (5, None), (24, without), (5000, without), (5000, None)]:
        here, there = (one.search(queries[:3], k, without=unwanted) for one in (pack.images, index))
        assert there.ids.shape == here.ids.shape
        np.testing.assert_allclose(there.scores, here.scores, atol=1e-3)
        assert not k or np.mean(there.ids == here.ids) > 0.999  # equal cosines may be in either order
        assert unwanted is None or not np.isin(there.ids, unwanted).any()
    assert len(index.search(queries[:0], 5).ids) == 0
    ids = np.array([7, 1, 800, 7], dtype=np.int64)
    rows = index.shards.first_rows(ids)
    np.testing.assert_array_equal(index.shards.take(rows), pack.images.shards.take(pack.images.shards.first_rows(ids)))
    np.testing.assert_array_equal(index.shards.ids_of(rows), ids)
    unknown = index.shards.first_rows(np.array([PICTURES + 1]))
    assert unknown.tolist() == [-1] and not index.shards.take(unknown).any() and index.shards.ids_of(unknown) == [-1]
    pack.close()


COLOURS = {
    "France": "blue white red",
    "Italy": "green white red",
    "Norway": "red blue red",
    "Spain": "red",
    "Portugal": "green red red",
    "Chad": "blue red",
    "Guinea": "red green",
    "Papua New Guinea": "black black red",
    "Germany": "black red",
}


@pytest.fixture
def coloured(tmp_path, tiny_encoder):
    """The little world with distinct captions of words that the tiny encoder knows."""
    folder = tmp_path / "coloured"
    with PackWriter(folder, name="coloured", snapshot=SNAPSHOT, encoder=tiny_encoder) as writer:
        known = [draft for draft in images() if draft.articles[0] in COLOURS]
        writer.add(articles(), [replace(draft, caption=COLOURS[draft.articles[0]]) for draft in known])
        writer.commit()
    return folder


def test_a_pack_without_vector_files_gives_the_same_results(coloured, tiny_encoder, tmp_path, own_lite):
    folder = shutil.copytree(coloured, tmp_path / "box")
    export_parquet(coloured, tmp_path / "export")
    load_export(tmp_path / "export", own_lite)
    shutil.rmtree(folder / "vectors")
    shutil.rmtree(folder / "index", ignore_errors=True)
    with pytest.raises(PackError, match="missing"):
        Pack.open(folder, tiny_encoder)
    asked = [ImageQuery(flag("Norway"), "what is the capital?"), TextQuery("currency of Chad"), TextQuery("black flag")]
    packs = [Pack.open(coloured, tiny_encoder), Pack.open(folder, tiny_encoder, own_lite.open_index)]
    here, there = (Retriever(tiny_encoder, [pack]).search(asked) for pack in packs)
    for mine, theirs in zip(here, there, strict=True):
        assert theirs.found == pytest.approx(mine.found, abs=1e-3) and len(theirs.evidence) == len(mine.evidence)
        for one, other in zip(theirs.evidence, mine.evidence, strict=True):
            assert one.score == pytest.approx(other.score, abs=1e-3)
            assert replace(one, score=0) == replace(other, score=0)
    for pack in packs:
        pack.close()
    (folder / read_manifest(folder).segments[0].store).unlink()
    with pytest.raises(PackError, match="missing"):
        Pack.open(folder, tiny_encoder, own_lite.open_index)


# --- generations ----------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path, tiny_encoder):
    """Two generations of a pack in two folders, and the exports of both."""
    build = {"name": "two-fold", "encoder": tiny_encoder, "workers": 1}
    build_pack(ListedSource(little_groups(skip=["Italy", "Spain"])), tmp_path / "pack", **build)
    old = shutil.copytree(tmp_path / "pack", tmp_path / "old")
    build_pack(ListedSource(little_groups(skip=["France"])), tmp_path / "pack", update=True, **build)
    for folder, name in ((old, "first"), (tmp_path / "pack", "second")):
        export_parquet(folder, tmp_path / name)
    return old, tmp_path / "pack", tmp_path / "first", tmp_path / "second"


def test_no_search_fails_while_the_alias_is_switched(two, tiny_encoder, own_lite):
    old, new, first, second = two
    load_export(first, own_lite)
    pack = Pack.open(old, tiny_encoder, own_lite.open_index)
    retriever, errors, done, counts = Retriever(tiny_encoder, [pack]), [], threading.Event(), []

    def search():
        while not done.is_set():
            try:
                (result,) = retriever.search([ImageQuery(flag("Norway"))])
                assert result.evidence[0].titles == ("Norway", "Svalbard")
                counts.append(1)
            except BaseException as exc:
                errors.append(exc)
                return

    thread = threading.Thread(target=search)
    thread.start()
    loaded = load_export(second, own_lite, drop_old=True)
    before = len(counts)
    time.sleep(0.3)
    done.set()
    thread.join()
    assert not errors and len(counts) > before
    assert [one.dropped for one in loaded] == [("two_fold_images_000001_ivf_flat",),
                                               ("two_fold_captions_000001_ivf_flat",)]
    assert sorted(own_lite.call("list_collections")) == sorted(one.collection for one in loaded)
    known = set(pack.store.image_ids().tolist())
    spain = tiny_encoder.embed_images([flag("Spain")])
    assert set(pack.images.search(spain, 20).ids[0].tolist()) <= known  # Spain was added by the second generation
    pack.close()
    with pytest.raises(PackError, match="must have the pack's generation 1, got 2"):
        Pack.open(old, tiny_encoder, own_lite.open_index)
    pack = Pack.open(new, tiny_encoder, own_lite.open_index)
    titles = {flown: Retriever(tiny_encoder, [pack]).search([ImageQuery(flag(flown))])[0].evidence[0].titles
              for flown in ("Spain", "Italy", "France")}
    assert titles["Spain"] == ("Spain",) and titles["Italy"] == ("Italy",) and titles["France"] != ("France",)
    pack.close()


def test_an_unfinished_load_is_repeated_and_a_finished_one_is_not(two, own_lite):
    first = two[2]
    info = replace(read_export_info(first / "images.parquet"), dtype="float32", index="FLAT", search={})
    schema = MilvusClient.create_schema()
    schema.add_field("row", DataType.INT64, is_primary=True)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=24)
    properties = {PROPERTY: info.to_json()}
    own_lite.call("create_collection", collection_name(info), schema=schema, properties=properties)
    progress = []
    loaded = load_export(first, own_lite, index="FLAT", on_progress=lambda *step: progress.append(step))
    assert ("images", info.rows, info.rows) in progress and loaded[0].info == info
    progress.clear()
    assert load_export(first, own_lite, index="FLAT", on_progress=lambda *step: progress.append(step)) == loaded
    assert progress == []
    with pytest.raises(PackError, match="is being served and contains other vectors"):
        load_export(first, own_lite, index="FLAT", search={"nprobe": 3})


# --- refusals -------------------------------------------------------------------------------------


def test_collections_of_another_pack_or_generation_are_refused(two, tiny_encoder, tmp_path, own_lite):
    old, _, first, _ = two
    manifest, no_ids = read_manifest(old), np.empty(0, np.int64)

    def refused(words, manifest=manifest):
        with pytest.raises(PackError, match=words):
            own_lite.open_index(manifest, "images", no_ids)

    refused("'two_fold_images' on .*own.db does not exist; load this pack with `gog-edge pack load-milvus")
    own_lite.call("create_collection", "two_fold_images", dimension=24)
    refused("was not written by gog_edge")
    own_lite.call("drop_collection", "two_fold_images")
    (loaded, _) = load_export(first, own_lite)
    encoder = replace(manifest.encoder, weights_sha256="00")
    refused("must have the pack's weights_sha256 00, got", replace(manifest, encoder=encoder))
    refused("must have the pack's generation 7, got 1", replace(manifest, generation=7))
    no_images = replace(manifest.images, shards=())
    refused("must have the pack's shards_sha256", replace(manifest, images=no_images))
    refused("has no vectors: it was built without an encoder", replace(manifest, encoder=None))
    own_lite.call("delete", loaded.collection, ids=[0])
    refused(f"must have {loaded.info.rows} vectors, got {loaded.info.rows - 1}")
    with pytest.raises(PackError, match="does not contain images.parquet; run `gog-edge pack export-parquet"):
        load_export(tmp_path, own_lite)
    with pytest.raises(BackendError, match="the index must be one of FLAT, IVF_FLAT, .*got 'LSH' and 'float32'"):
        load_export(first, own_lite, index="LSH")
    with pytest.raises(BackendError, match="reports an error: .*Float16"):  # milvus-lite does not support float16
        load_export(first, own_lite, index="HNSW", dtype="float16")


def test_aliases_have_only_characters_that_milvus_allows():
    assert alias_name("wiki", "images") == "wiki_images"
    assert alias_name("wiki-2026", "captions") == "wiki_2026_captions"
    assert alias_name("7seas", "images") == "_7seas_images"


# --- an unavailable server ------------------------------------------------------------------------


@pytest.fixture
def process(tmp_path):
    """The URI of a milvus-lite server, and a function that starts it; all processes are killed at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "milvus_lite", "server", "--data-dir", str(tmp_path / "served"),
               "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip
    started = []

    def start():
        started.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        return started[-1]

    yield f"http://127.0.0.1:{port}", start
    for one in started:
        one.kill()
        one.wait()


def connect(config, seconds=30):
    end = time.monotonic() + seconds
    while True:
        try:
            return MilvusConnection.open(config)
        except BackendError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def test_an_unavailable_server_is_named_and_a_restarted_one_is_used_again(
    little_pack_folder, tiny_encoder, tmp_path, process
):
    uri, start = process
    config = MilvusConfig(uri, timeout_s=1.5)
    message = rf"the Milvus server at {uri} is not available .*start it, or check its address"
    with pytest.raises(BackendError, match=message):
        MilvusConnection.open(config)
    running = start()
    server = connect(config)
    export_parquet(little_pack_folder, tmp_path / "export")
    load_export(tmp_path / "export", server)
    pack = Pack.open(little_pack_folder, tiny_encoder, server.open_index)
    spain = tiny_encoder.embed_images([flag("Spain")])
    found = pack.images.search(spain, 5)

    running.send_signal(signal.SIGSTOP)
    os.waitpid(running.pid, os.WUNTRACED)  # until it is stopped
    with pytest.raises(BackendError, match="did not respond within 1.5 s"):
        pack.images.search(spain, 5)
    running.send_signal(signal.SIGCONT)
    assert pack.images.search(spain, 5).ids.tolist() == found.ids.tolist()

    running.kill()
    running.wait()
    began = time.monotonic()
    with pytest.raises(BackendError, match=rf"{uri} is not available"):
        pack.images.search(spain, 5)
    assert time.monotonic() - began < 5

    start()
    again = connect(config)
    # A restarted milvus-lite has not loaded the collection; opening the index does.
    again.open_index(pack.manifest, "images", np.empty(0, np.int64))
    assert pack.images.search(spain, 5).ids.tolist() == found.ids.tolist()
    again.close()
    server.close()
    pack.close()


def test_a_missing_token_and_a_missing_client_are_errors(monkeypatch):
    monkeypatch.delenv("MILVUS_KEY", raising=False)
    message = "variable 'MILVUS_KEY' is empty or not set; set it to the token of http://h:1"
    with pytest.raises(BackendError, match=message):
        MilvusConnection.open(MilvusConfig("http://h:1", key_env="MILVUS_KEY"))
    code = """if True:
        import sys
        sys.modules["pymilvus"] = None
        from gog_edge.config import MilvusConfig
        from gog_edge.errors import BackendError
        from gog_edge.retrieval.vectors.milvus import MilvusConnection
        try:
            MilvusConnection.open(MilvusConfig("http://10.0.0.5:19530"))
        except BackendError as exc:
            print(exc)
    """
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "http://10.0.0.5:19530 needs pymilvus; run pip install 'gog_edge[milvus]'" in printed


def test_the_runtime_does_not_import_the_client():
    modules = "sys, gog_edge.runtime, gog_edge.retrieval.retriever, gog_edge.retrieval.vectors.milvus"
    code = f"import {modules}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert not {"pymilvus", "milvus_lite", "grpc", "pyarrow", "ray"} & set(loaded.split())
