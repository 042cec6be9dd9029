import json
import shutil
import sqlite3

import numpy as np
import pytest
from little_world import FACTS, FLAGS, flag
from tiny_encoder import write_tiny_encoder

from gog_edge.errors import PackError
from gog_edge.files import describe_files
from gog_edge.indexing.commit import write_tombstones
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.manifest import MANIFEST, Manifest, read_manifest
from gog_edge.retrieval.pack import Pack, verify_pack
from gog_edge.retrieval.retriever import Retriever
from gog_edge.types import ImageQuery, TextQuery

STORE = "store/000001.sqlite"


@pytest.fixture
def copied(little_pack_folder, tmp_path):
    return shutil.copytree(little_pack_folder, tmp_path / "pack")


def rewrite(folder, **changes):
    """Change the manifest and bring its hashes up to date."""
    raw = json.loads((folder / MANIFEST).read_text()) | changes
    raw["files"] = [entry.to_json() for entry in describe_files(folder, [entry["path"] for entry in raw["files"]])]
    (folder / MANIFEST).write_text(json.dumps(raw))


def refused(folder, encoder, words):
    with pytest.raises(PackError, match=words):
        Pack.open(folder, encoder)


def test_an_open_pack_gives_back_files_as_they_were_stored(little_pack):
    stored = little_pack.picture(1)
    assert stored.media_type == "image/png" and stored.data.startswith(b"\x89PNG")
    assert little_pack.picture(999) is None and little_pack.picture(-1) is None and little_pack.picture(2**70) is None
    assert little_pack.name == "little" and little_pack.manifest.counts.images == len(FLAGS)


def test_the_manifest_survives_json(little_pack_folder):
    manifest = read_manifest(little_pack_folder)
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    assert verify_pack(little_pack_folder) == manifest


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


def test_no_manifest_is_no_pack(copied, tiny_encoder):
    (copied / MANIFEST).unlink()
    refused(copied, tiny_encoder, "right folder")
    (copied / MANIFEST).write_text("{")
    refused(copied, tiny_encoder, "not JSON")


@pytest.mark.parametrize(
    "changes",
    [{"schema": 9}, {"kind": "encoder"}, {"snapshot": None}, {"counts": {}}, {"golden": "x"}, {"images": [1]},
     {"calibration": {"image": {"features": []}}}],
)  # fmt: skip
def test_other_manifests_are_refused(copied, tiny_encoder, changes):
    rewrite(copied, **changes)
    refused(copied, tiny_encoder, "again")


def test_another_encoder_is_refused_and_both_are_named(copied, tmp_path):
    other = Encoder.open(write_tiny_encoder(tmp_path / "other", seed=1, name="other"), threads=1)
    refused(copied, other, "'tiny'.*'other'")


def test_the_same_weights_with_other_preprocessing_are_refused(copied, tiny_encoder_folder, tmp_path):
    folder = shutil.copytree(tiny_encoder_folder, tmp_path / "other")
    raw = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(raw | {"preprocessing_sha256": "0" * 64}))
    refused(copied, Encoder.open(folder), "preprocessing_sha256")


def test_an_encoder_that_computes_other_vectors_fails_the_golden_query(copied, tmp_path, tiny_encoder):
    """Its manifest claims to be the same: only running it shows that it is not."""
    folder = write_tiny_encoder(tmp_path / "liar", seed=1)
    raw = json.loads((folder / "manifest.json").read_text())
    raw["weights_sha256"] = tiny_encoder.fingerprint.weights_sha256
    (folder / "manifest.json").write_text(json.dumps(raw))
    refused(copied, Encoder.open(folder), "golden image")


def test_another_store_schema_is_refused(copied, tiny_encoder):
    with sqlite3.connect(copied / STORE) as db:
        db.execute("PRAGMA user_version = 77")
    db.close()
    rewrite(copied)
    refused(copied, tiny_encoder, "schema 77")


def test_a_store_that_is_no_database_is_refused(copied, tiny_encoder):
    (copied / STORE).write_bytes(b"not a database" * 100)
    rewrite(copied)
    refused(copied, tiny_encoder, "no SQLite store")


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


def test_a_file_without_hash_is_refused(copied, tiny_encoder):
    raw = json.loads((copied / MANIFEST).read_text())
    raw["files"] = raw["files"][1:]
    (copied / MANIFEST).write_text(json.dumps(raw))
    refused(copied, tiny_encoder, "without its hash")


def test_a_path_outside_the_pack_is_refused(copied, tiny_encoder):
    raw = json.loads((copied / MANIFEST).read_text())
    raw["files"].append({"path": "../outside", "size": 1, "sha256": "0"})
    (copied / MANIFEST).write_text(json.dumps(raw))
    refused(copied, tiny_encoder, "outside")


def bury(folder, articles, images):
    """Write tombstones as a later generation would."""
    files = write_tombstones(folder, 2, np.array(articles, np.int64), np.array(images, np.int64))
    raw = json.loads((folder / MANIFEST).read_text())
    listed = [*raw["files"], {"path": files.articles}, {"path": files.images}]
    counts = raw["counts"] | {"articles": raw["counts"]["articles"] - len(articles),
                              "images": raw["counts"]["images"] - len(images)}  # fmt: skip
    rewrite(folder, tombstones={"articles": files.articles, "images": files.images}, files=listed, counts=counts)


def test_tombstones_take_images_and_articles_out_of_every_answer(copied, tiny_encoder):
    gone = list(FLAGS).index("Spain") + 1
    article = list(FACTS).index("Spain") + 1
    raw = json.loads((copied / MANIFEST).read_text())
    rewrite(copied, golden=raw["golden"] if raw["golden"] != gone else gone % len(FLAGS) + 1)
    bury(copied, [article], [gone])
    pack = Pack.open(copied, tiny_encoder)
    assert pack.picture(gone) is None
    seen, named, said = Retriever(tiny_encoder, [pack]).search(
        [ImageQuery(flag("Spain")), TextQuery("Spain"), TextQuery("Madrid")]
    )
    for result in (seen, named, said):
        assert "Spain" not in [title for evidence in result.evidence for title in evidence.titles]
    pack.close()
    assert verify_pack(copied).counts.images == len(FLAGS) - 1


def test_a_tombstone_of_nothing_is_found_by_verify(copied):
    bury(copied, [], [12345])
    with pytest.raises(PackError, match="tombstone 12345"):
        verify_pack(copied)


@pytest.mark.parametrize("ids", [np.array([1.5]), np.array([[1]])])
def test_tombstones_of_another_form_are_refused(copied, tiny_encoder, ids):
    bury(copied, [1], [])
    np.save(copied / "tombstones/000002-articles.npy", ids)
    rewrite(copied)
    refused(copied, tiny_encoder, "wanted int64")


def test_a_vector_that_is_not_of_unit_length_is_found_by_verify(copied):
    path = copied / "vectors/000001-images-000000.npy"
    np.save(path, np.load(path) * np.float16(2))
    rewrite(copied)
    with pytest.raises(PackError, match="unit length"):
        verify_pack(copied)


def test_a_damaged_page_of_the_store_is_found_by_verify(copied):
    path = copied / STORE
    data = bytearray(path.read_bytes())
    page = data.rindex(b"The capital of Spain") // 4096 * 4096
    data[page : page + 8] = b"\xff" * 8  # the header of a page of paragraphs
    path.write_bytes(data)
    rewrite(copied)
    with pytest.raises(PackError, match="damaged|build"):
        verify_pack(copied)
