import json
import shutil
import sqlite3

import numpy as np
import pytest
from little_world import FACTS, FLAGS, flag
from tiny_encoder import write_tiny_encoder

from gog_edge.errors import PackError
from gog_edge.files import describe_files, write_array
from gog_edge.indexing.commit import write_tombstones
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.manifest import IMAGE_FEATURES, MANIFEST, Calibration, Manifest, read_manifest
from gog_edge.retrieval.pack import Pack, verify_pack
from gog_edge.retrieval.retriever import Retriever, image_probability, predict_probability, text_probability
from gog_edge.types import ImageQuery, TextQuery

STORE = "store/000001.sqlite"


@pytest.fixture
def copied(little_pack_folder, tmp_path):
    return shutil.copytree(little_pack_folder, tmp_path / "pack")


def rewrite(folder, **changes):
    """Change the manifest and update its hashes."""
    raw = json.loads((folder / MANIFEST).read_text()) | changes
    raw["files"] = [entry.to_json() for entry in describe_files(folder, [entry["path"] for entry in raw["files"]])]
    (folder / MANIFEST).write_text(json.dumps(raw))


def refused(folder, encoder, message):
    with pytest.raises(PackError, match=message):
        Pack.open(folder, encoder)


def test_an_open_pack_returns_the_stored_files(little_pack):
    stored = little_pack.image_file(1)
    assert stored.media_type == "image/png" and stored.data.startswith(b"\x89PNG")
    assert [little_pack.image_file(unknown) for unknown in (999, -1, 2**70)] == [None, None, None]
    assert little_pack.name == "little" and little_pack.manifest.counts.images == len(FLAGS)


def test_the_manifest_survives_json(little_pack_folder):
    manifest = read_manifest(little_pack_folder)
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    assert verify_pack(little_pack_folder) == manifest


@pytest.mark.parametrize("change", [
    {"name": ""}, {"name": 7}, {"generation": "1"}, {"generation": 0}, {"parent": -1}, {"snapshot": []},
    {"snapshot": {}},
    {"encoder": {"name": "tiny"}}, {"segments": [None]}, {"segments": {}},
    {"images": {"shards": [{"rows": 3}], "index": None}},
    {"images": {"shards": [{"vectors": "v", "ids": "i", "rows": "3"}], "index": None}},
    {"captions": {"shards": [], "index": 1}},
    {"counts": {"articles": -1, "paragraphs": 0, "images": 0}},
    {"counts": {"articles": 1.5, "paragraphs": 0, "images": 0}},
    {"target": {"memory": "2G", "recall": 0.9}}, {"duplicate_cosine": "high"}, {"golden": [1]}, {"report": 5},
    {"files": [[]]},
    {"calibration": None}, {"calibration": {"image": []}}, {"calibration": {"image": {"features": 1}}},
    {"tombstones": {}},
    {"paragraphs": {"shards": [{"vectors": "v", "ids": "i", "rows": 3}], "index": None}}, {"text_encoder": {"dim": 3}},
])  # fmt: skip
def test_invalid_fields_of_the_manifest_are_refused(little_pack_folder, change):
    raw = read_manifest(little_pack_folder).to_json()
    with pytest.raises(PackError, match="pack: invalid manifest"):
        Manifest.from_json(raw | change)


def test_a_manifest_is_strict_json(copied):
    text = (copied / MANIFEST).read_text()
    for old, new in (('"duplicate_cosine": ', '"duplicate_cosine": 1e999, "x": '),
                     ('"parent": ', '"parent": 1, "parent": '),
                     ('"name": ', '"name": "\\ud800", "x": '), ('"golden": ', '"golden": ' + "9" * 5000 + ', "x": '),
                     ('"golden": ', '"golden": ' + "[" * 100_000)):  # fmt: skip
        assert old in text
        (copied / MANIFEST).write_text(text.replace(old, new, 1))
        with pytest.raises(PackError, match="MANIFEST.json' is not JSON"):
            read_manifest(copied)


@pytest.mark.parametrize("name", [STORE, "index/000001-images.faiss", "vectors/000001-images-000000.npy"])
def test_missing_and_altered_files_are_named(copied, tiny_encoder, name):
    data = bytearray((copied / name).read_bytes())
    data[len(data) // 2] ^= 255
    (copied / name).write_bytes(data)
    refused(copied, tiny_encoder, f"{name}.*altered")
    (copied / name).write_bytes(data[:-10])
    refused(copied, tiny_encoder, f"{name}.*bytes")
    (copied / name).unlink()
    refused(copied, tiny_encoder, f"{name}.*missing")


def test_a_missing_or_invalid_manifest_is_refused(copied, tiny_encoder):
    (copied / MANIFEST).unlink()
    refused(copied, tiny_encoder, "right folder")
    (copied / MANIFEST).write_text("{")
    refused(copied, tiny_encoder, "not JSON")


@pytest.mark.parametrize(
    "changes",
    [{"schema": 9}, {"kind": "encoder"}, {"snapshot": None}, {"counts": {}}, {"golden": "x"}, {"images": [1]},
     {"calibration": {"image": {"features": []}}}],
)  # fmt: skip
def test_manifests_of_another_form_are_refused(copied, tiny_encoder, changes):
    rewrite(copied, **changes)
    refused(copied, tiny_encoder, "again")


def test_another_encoder_is_refused_with_both_names(copied, tmp_path):
    other = Encoder.open(write_tiny_encoder(tmp_path / "other", seed=1, name="other"), threads=1)
    refused(copied, other, "'tiny'.*'other'")


def test_the_same_weights_with_other_preprocessing_are_refused(copied, tiny_encoder_folder, tmp_path):
    folder = shutil.copytree(tiny_encoder_folder, tmp_path / "other")
    raw = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(raw | {"preprocessing_sha256": "0" * 64}))
    refused(copied, Encoder.open(folder), "preprocessing_sha256")


def test_an_encoder_that_computes_other_vectors_fails_the_golden_query(copied, tmp_path, tiny_encoder):
    """Its manifest has the same fingerprint: only running it shows the difference."""
    folder = write_tiny_encoder(tmp_path / "false", seed=1)
    raw = json.loads((folder / "manifest.json").read_text())
    raw["weights_sha256"] = tiny_encoder.fingerprint.weights_sha256
    (folder / "manifest.json").write_text(json.dumps(raw))
    refused(copied, Encoder.open(folder), "golden image")


def test_another_store_schema_is_refused(copied, tiny_encoder):
    with sqlite3.connect(copied / STORE) as db:
        db.execute("PRAGMA user_version = 77")
    db.close()
    rewrite(copied)
    refused(copied, tiny_encoder, "schema 3, got 77; update gog_edge")


def test_a_store_that_is_not_a_database_is_refused(copied, tiny_encoder):
    (copied / STORE).write_bytes(b"not a database" * 100)
    rewrite(copied)
    refused(copied, tiny_encoder, "is not an SQLite database")


def test_counts_that_disagree_are_refused(copied, tiny_encoder):
    raw = json.loads((copied / MANIFEST).read_text())
    counts = raw["segments"][0]["counts"] | {"articles": 1}
    rewrite(copied, segments=[raw["segments"][0] | {"counts": counts}])
    refused(copied, tiny_encoder, "store/000001.sqlite' has")


def test_rows_without_vectors_are_refused(copied, tiny_encoder):
    ids = copied / "vectors/000001-images-000000.ids.npy"
    np.save(ids, np.load(ids) + 1)
    rewrite(copied)
    refused(copied, tiny_encoder, "disagree")
    with pytest.raises(PackError, match="disagree, first at image 1"):
        verify_pack(copied)


def test_a_file_without_a_hash_is_refused(copied, tiny_encoder):
    raw = json.loads((copied / MANIFEST).read_text())
    raw["files"] = raw["files"][1:]
    (copied / MANIFEST).write_text(json.dumps(raw))
    refused(copied, tiny_encoder, "lists no hash for")


def test_a_path_outside_the_pack_is_refused(copied, tiny_encoder):
    raw = json.loads((copied / MANIFEST).read_text())
    raw["files"].append({"path": "../outside", "size": 1, "sha256": "0"})
    (copied / MANIFEST).write_text(json.dumps(raw))
    refused(copied, tiny_encoder, "outside")


def delete(folder, articles, images):
    """Write tombstones as a later generation would."""
    files = write_tombstones(folder, 2, np.array(articles, np.int64), np.array(images, np.int64))
    raw = json.loads((folder / MANIFEST).read_text())
    listed = [*raw["files"], {"path": files.articles}, {"path": files.images}]
    counts = raw["counts"] | {"articles": raw["counts"]["articles"] - len(articles),
                              "images": raw["counts"]["images"] - len(images)}  # fmt: skip
    rewrite(folder, tombstones={"articles": files.articles, "images": files.images}, files=listed, counts=counts)


def test_deleted_images_and_articles_are_in_no_result(copied, tiny_encoder):
    image = list(FLAGS).index("Spain") + 1
    article = list(FACTS).index("Spain") + 1
    raw = json.loads((copied / MANIFEST).read_text())
    rewrite(copied, golden=raw["golden"] if raw["golden"] != image else image % len(FLAGS) + 1)
    delete(copied, [article], [image])
    pack = Pack.open(copied, tiny_encoder)
    assert pack.image_file(image) is None
    by_picture, by_title, by_text = Retriever(tiny_encoder, [pack]).search(
        [ImageQuery(flag("Spain")), TextQuery("Spain"), TextQuery("Madrid")]
    )
    for result in (by_picture, by_title, by_text):
        assert "Spain" not in [title for evidence in result.evidence for title in evidence.titles]
    pack.close()
    assert verify_pack(copied).counts.images == len(FLAGS) - 1


def test_verify_detects_a_tombstone_of_an_unknown_id(copied):
    delete(copied, [], [12345])
    with pytest.raises(PackError, match="tombstone 12345"):
        verify_pack(copied)


@pytest.mark.parametrize("ids", [np.array([1.5]), np.array([[1]])])
def test_tombstones_of_another_dtype_or_shape_are_refused(copied, tiny_encoder, ids):
    delete(copied, [1], [])
    np.save(copied / "tombstones/000002-articles.npy", ids)
    rewrite(copied)
    refused(copied, tiny_encoder, "must contain int64")


def test_verify_detects_a_vector_that_does_not_have_unit_length(copied):
    path = copied / "vectors/000001-images-000000.npy"
    np.save(path, np.load(path) * np.float16(2))
    rewrite(copied)
    with pytest.raises(PackError, match="unit length"):
        verify_pack(copied)


def test_verify_detects_a_damaged_page_of_the_store(copied):
    path = copied / STORE
    data = bytearray(path.read_bytes())
    page = data.rindex(b"The capital of Spain") // 4096 * 4096
    data[page : page + 8] = b"\xff" * 8  # the header of the page
    path.write_bytes(data)
    rewrite(copied)
    with pytest.raises(PackError, match="damaged|build"):
        verify_pack(copied)


# --- the probability that the subject is in the pack ------------------------------------------------


@pytest.mark.parametrize(("features", "probability"), [
    ((1.0, 9.0, 0.5, 0.0), 0.8807970780),  # 1 / (1 + exp(-2))
    ((0.0, 0.0, 0.0, 0.0), 0.6224593312),  # 1 / (1 + exp(-0.5))
    ((0.0, 0.0, 2.5, 1.0), 0.2689414214),  # 1 / (1 + exp(1))
    ((1e6, 0.0, 0.0, 0.0), 1.0),
    ((-1e6, 0.0, 0.0, 0.0), 0.0),
])  # fmt: skip
def test_a_calibration_gives_the_logistic_function_of_its_features(features, probability):
    model = Calibration(IMAGE_FEATURES, (2.0, 0.0, -1.0, 1.0), 0.5, 0.05, 0.05, 0.9, 40, 40)
    assert predict_probability(model, features) == pytest.approx(probability, abs=1e-9)


def test_a_pack_without_calibration_uses_the_cosine_and_the_known_coverage(little_pack):
    assert little_pack.manifest.image_calibration is None and not little_pack.uses_captions
    assert [image_probability(little_pack, (cosine, 0, 0, 0)) for cosine in (-0.2, 0.7, 1.001)] == [0, 0.7, 1]
    assert text_probability(little_pack, (0.8, 0.25, 1, 1)) == pytest.approx(0.6)


@pytest.mark.parametrize("wrong", [-1, 2**40])
def test_a_vector_of_an_id_that_no_segment_has_is_refused(copied, tiny_encoder, wrong):
    path = copied / "vectors/000001-images-000000.ids.npy"
    ids = np.load(path)
    ids[-2] = wrong
    write_array(path, ids)
    rewrite(copied)
    refused(copied, tiny_encoder, f"a vector has the id {wrong}, which no segment has")
