"""Vectors of paragraphs in a pack: how they are built, resumed, updated, deleted and compacted."""

from dataclasses import asdict, replace

import numpy as np
import pytest
from listed_source import ListedSource
from little_world import SNAPSHOT, articles, images
from tiny_text_encoder import DIM, write_tiny_text_encoder

from gog_edge.errors import PackError
from gog_edge.files import read_json
from gog_edge.indexing.build import build_pack, read_snapshot
from gog_edge.indexing.calibration import calibrate_pack, fit_calibration
from gog_edge.indexing.compact import compact
from gog_edge.indexing.distribution.ray_embedding import ShardEmbedder, resume_build
from gog_edge.indexing.generation import PackOptions, PackWriter
from gog_edge.indexing.sources.base import ArticleRecord
from gog_edge.indexing.tombstones import remove
from gog_edge.indexing.vectors import embedding
from gog_edge.indexing.vectors.embedding import PARAGRAPHS, plan_shards
from gog_edge.retrieval.manifest import (
    DENSE_TEXT_FEATURES,
    Counts,
    IdRange,
    Manifest,
    Segment,
    read_manifest,
)
from gog_edge.retrieval.pack import Pack, verify_pack
from gog_edge.retrieval.text.encoder import TextEncoder, passage_text

TOPICS = {"France": ("capital", "money"), "Spain": ("people", "money of spain"), "Peru": ("capital of the people",)}


@pytest.fixture(scope="module")
def text_encoder_folder(tmp_path_factory):
    return write_tiny_text_encoder(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def text_encoder(text_encoder_folder):
    return TextEncoder.open(text_encoder_folder, threads=1)


@pytest.fixture(scope="module")
def other_encoder(tmp_path_factory):
    return TextEncoder.open(write_tiny_text_encoder(tmp_path_factory.mktemp("other"), seed=1), threads=1)


def groups(**changes):
    """One article for each topic; a keyword replaces the paragraphs of an article, or adds one."""
    return tuple((ArticleRecord(title, tuple(("Facts", text) for text in texts), "CC0"),)
                 for title, texts in {**TOPICS, **changes}.items())


def build(folder, text_encoder, source=None, **more):
    return build_pack(source or ListedSource(groups()), folder, name="texts", encoder=None, workers=1,
                      text_encoder=text_encoder, **more)


def stored(folder, manifest):
    """The vectors of all live paragraphs by (title, text)."""
    with_deleted = {}
    for shard in manifest.paragraphs.shards:
        with_deleted |= dict(zip(np.load(folder / shard.ids).tolist(), np.load(folder / shard.vectors), strict=True))
    pack = Pack.open(folder, None)
    try:
        deleted = set(pack.store.deleted_paragraphs().tolist())
        rows = pack.store.paragraphs(with_deleted)
        return {(rows[number].title, rows[number].text): vector for number, vector in with_deleted.items()
                if number not in deleted}
    finally:
        pack.close()


def expected(encoder, articles):
    return {(record.title, text): encoder.embed_passages([passage_text(record.title, section, text)])[0]
            for (record,) in articles for section, text in record.paragraphs}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for key, vector in wanted.items():
        np.testing.assert_allclose(found[key], vector, atol=2e-3)  # float16


def test_every_paragraph_has_a_vector(tmp_path, text_encoder):
    manifest = build(tmp_path / "pack", text_encoder)
    assert manifest.encoder is None and manifest.text_encoder == text_encoder.fingerprint
    assert manifest.paragraphs.rows == manifest.counts.paragraphs == 5
    assert_same(stored(tmp_path / "pack", manifest), expected(text_encoder, groups()))
    assert verify_pack(tmp_path / "pack") == manifest
    assert {"vectors/000001-paragraphs-000000.npy", "index/000001-paragraphs.faiss"} <= set(manifest.paths)
    assert manifest.paragraphs.index.held_out


def test_a_pack_without_a_text_encoder_has_the_same_manifest_as_before(tmp_path):
    manifest = build(tmp_path / "pack", None)
    raw = read_json(tmp_path / "pack" / "MANIFEST.json", what="test")
    assert not {"text_encoder", "paragraphs"} & raw.keys()
    assert read_manifest(tmp_path / "pack") == manifest == Manifest.from_json(raw)
    assert not list((tmp_path / "pack").glob("vectors/*"))


def test_images_and_paragraphs_may_have_vectors_of_different_lengths(tmp_path, tiny_encoder, text_encoder):
    with PackWriter(tmp_path / "pack", name="little", snapshot=SNAPSHOT, encoder=tiny_encoder,
                    text_encoder=text_encoder) as writer:
        writer.add(articles(), images())
        manifest = writer.commit()
    assert (manifest.dim_of("images"), manifest.dim_of("paragraphs")) == (tiny_encoder.dim, DIM)
    assert manifest.golden is not None and manifest.paragraphs.rows == manifest.counts.paragraphs == 44
    assert verify_pack(tmp_path / "pack") == manifest


def test_shards_cover_the_ids_of_their_kind():
    segment = Segment("s", IdRange(1, 2), IdRange(11, 15), IdRange(7, 6), Counts(2, 5, 0))
    plans = plan_shards(segment, 3, rows=2, kinds=["images", "captions", PARAGRAPHS])
    assert [(plan.kind, plan.number, plan.first, plan.last) for plan in plans] == [
        ("captions", 0, 7, 6), (PARAGRAPHS, 0, 11, 12), (PARAGRAPHS, 1, 13, 14), (PARAGRAPHS, 2, 15, 15),
    ]  # fmt: skip


def test_a_killed_build_continues_with_the_next_shard(tmp_path, text_encoder, monkeypatch):
    options = PackOptions(shard_rows=2)
    whole = build(tmp_path / "whole", text_encoder, options=options)
    plain, calls = embedding._embed_paragraphs, []

    def killed(plan, reader, encoder):
        calls.append(plan.number)
        if calls == [0, 1]:
            raise KeyboardInterrupt
        yield from plain(plan, reader, encoder)

    monkeypatch.setattr(embedding, "_embed_paragraphs", killed)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "pack", text_encoder, options=options)
    reports = []
    resumed = build(tmp_path / "pack", text_encoder, options=options, on_progress=lambda *each: reports.append(each))
    assert calls == [0, 1, 1, 2]  # the first shard is not embedded again
    assert [entry for entry in resumed.files if "vectors/" in entry.path] == \
        [entry for entry in whole.files if "vectors/" in entry.path]
    assert [report for report in reports if report[0] == PARAGRAPHS] == [(PARAGRAPHS, n, 5) for n in (2, 4, 5)]


def test_an_unfinished_build_is_not_continued_with_another_text_encoder(tmp_path, text_encoder, other_encoder):
    read_snapshot(ListedSource(groups()), tmp_path / "pack", name="texts", encoder=None, workers=1,
                  text_encoder=text_encoder)
    for other in (other_encoder, None):
        with pytest.raises(PackError, match="unfinished build with another text_encoder"):
            build(tmp_path / "pack", other)
    assert build(tmp_path / "pack", text_encoder).paragraphs.rows == 5


def test_an_update_embeds_only_new_paragraphs(tmp_path, text_encoder):
    folder = tmp_path / "pack"
    first = build(folder, text_encoder)
    changed = groups(Spain=("money", "people of spain"), Chad=("money",))[1:]  # France is gone
    about = replace(SNAPSHOT, date="2026-02-01")
    second = build(folder, text_encoder, ListedSource(changed, about=about), update=True)
    assert second.paragraphs.shards[:1] == first.paragraphs.shards and second.paragraphs.shards[1].rows == 3
    assert second.counts.paragraphs == 4 and second.paragraphs.rows == 8
    assert_same(stored(folder, second), expected(text_encoder, changed))
    assert verify_pack(folder) == second


def test_an_update_needs_the_same_text_encoder(tmp_path, text_encoder, other_encoder):
    build(tmp_path / "with", text_encoder)
    build(tmp_path / "without", None)
    for folder, other in (("with", other_encoder), ("with", None), ("without", text_encoder)):
        with pytest.raises(PackError, match="built with another text encoder"):
            build(tmp_path / folder, other, add=True)
    with pytest.raises(PackError, match="another text encoder .'tiny', now none"):
        compact(tmp_path / "with", None)


def test_removed_articles_lose_their_paragraphs(tmp_path, text_encoder):
    folder = tmp_path / "pack"
    build(folder, text_encoder)
    remove(folder, articles=["France"])
    pack = Pack.open(folder, None, text_encoder=text_encoder)
    try:
        assert len(pack.paragraphs) == pack.manifest.counts.paragraphs == 3 and pack.manifest.paragraphs.rows == 5
        hits = pack.paragraphs.search(text_encoder.embed_queries(["capital"]), 5)
        rows = pack.store.paragraphs(hits.ids[0][hits.ids[0] >= 0].tolist())
        assert {row.title for row in rows.values()} == {"Spain", "Peru"}
    finally:
        pack.close()


def test_compaction_keeps_the_vectors_of_live_paragraphs(tmp_path, text_encoder):
    folder = tmp_path / "pack"
    build(folder, text_encoder)
    build(folder, text_encoder, ListedSource(groups(Chad=("money",))[-1:]), add=True)
    remove(folder, articles=["Spain"])
    before = read_manifest(folder)
    after = compact(folder, None, text_encoder=text_encoder)
    assert (before.paragraphs.rows, after.paragraphs.rows, len(after.segments)) == (6, 4, 1)
    live = [group for group in groups(Chad=("money",)) if group[0].title != "Spain"]
    assert_same(stored(folder, after), expected(text_encoder, live))
    assert after.paragraphs.index.rows == 4 and verify_pack(folder) == after


def test_a_worker_of_a_cluster_embeds_the_same_paragraphs(tmp_path, tiny_encoder, tiny_encoder_folder, text_encoder,
                                                         text_encoder_folder):  # fmt: skip
    build = {"name": "texts", "encoder": tiny_encoder, "workers": 1, "text_encoder": text_encoder}
    alone = build_pack(ListedSource(groups()), tmp_path / "alone", **build)
    read_snapshot(ListedSource(groups()), tmp_path / "pack", **build)
    generation = resume_build(tmp_path / "pack", tiny_encoder, text_encoder)
    worker = ShardEmbedder(str(tmp_path / "pack"), generation.store, str(tiny_encoder_folder), str(text_encoder_folder),
                           generation.encoders.to_json(), 1)
    plans = [plan for plan in generation.shard_plans() if plan.kind == PARAGRAPHS]
    generation.close()
    assert [worker(asdict(plan))["error"] for plan in plans] == [""]
    path = alone.paragraphs.shards[0].vectors
    np.testing.assert_array_equal(np.load(tmp_path / "pack" / path), np.load(tmp_path / "alone" / path))
    with pytest.raises(PackError, match="differs from the one of the build"):
        ShardEmbedder(str(tmp_path / "pack"), generation.store, str(tiny_encoder_folder), None,
                      generation.encoders.to_json(), 1)


def test_damaged_vectors_are_reported(tmp_path, text_encoder):
    folder = tmp_path / "pack"
    manifest = build(folder, text_encoder)
    (folder / manifest.paragraphs.shards[0].vectors).write_bytes(b"")
    with pytest.raises(PackError, match="paragraphs-000000.npy"):
        Pack.open(folder, None, text_encoder=text_encoder)


@pytest.mark.parametrize("memory, fits", [(1_000_000, True), (64, False)])
def test_the_memory_limit_holds_for_paragraphs(tmp_path, text_encoder, memory, fits):
    options = PackOptions(memory=memory)
    if fits:
        assert build(tmp_path / "pack", text_encoder, options=options).paragraphs.index.rows == 5
    else:
        with pytest.raises(PackError, match="no index over 5 vectors of 16 fits 64 bytes"):
            build(tmp_path / "pack", text_encoder, options=options)


def test_the_calibration_uses_features_of_the_paragraphs(tmp_path, text_encoder):
    names = [f"{first}{second}" for first in ("Ba", "Do", "Ki", "Lu", "Me", "Po", "Ra", "Su", "Ti")
             for second in ("land", "mark", "via", "nor", "stan")]
    articles = tuple((ArticleRecord(name, (("Facts", f"The capital of {name}."),), "CC0"),) for name in names)
    manifest = build(tmp_path / "pack", text_encoder, ListedSource(articles))
    with pytest.raises(PackError, match="calibrate it with its text encoder 'tiny'"):
        calibrate_pack(tmp_path / "pack", None)
    manifest = calibrate_pack(tmp_path / "pack", None, text_encoder=text_encoder)
    calibration = manifest.text_calibration
    assert calibration.features == DENSE_TEXT_FEATURES == manifest.text_features
    assert calibration.weights[4:] == (0.0, 0.0)  # words alone tell the generated names apart
    assert read_manifest(tmp_path / "pack") == manifest
    raw = read_json(tmp_path / "pack" / "MANIFEST.json", what="test")
    raw["calibration"]["text"]["features"] = raw["calibration"]["text"]["features"][:4]
    raw["calibration"]["text"]["weights"] = raw["calibration"]["text"]["weights"][:4]
    with pytest.raises(PackError, match="must have the features"):
        Manifest.from_json(raw)


def test_every_optional_feature_must_raise_the_share_of_accepted_subjects():
    rng = np.random.default_rng(0)
    labels = np.repeat([1, 0], 100)
    useful = labels * 4.0 + rng.normal(size=200)
    noise = rng.normal(size=(200, 2))
    features = np.column_stack([useful, noise])
    fit = fit_calibration(features, labels, names=("useful", "first", "second"), optional=("first", "second"))
    assert fit.weights[0] > 0 and fit.weights[1:] == (0.0, 0.0)
    alone = fit_calibration(features[:, :1], labels, names=("useful",))
    assert (fit.weights[0], fit.bias) == pytest.approx((alone.weights[0], alone.bias))
